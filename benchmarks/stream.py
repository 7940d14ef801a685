"""The stream's speed: from the local cache, from S3, with faults, beside other loaders; and how well it mixes."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from equiav.config import Config, from_dict
from equiav.data.clips import ENCODE_AUDIO, encode_frame
from equiav.data.decoder import ClipDecoder
from equiav.data.local_s3 import LocalS3
from equiav.data.synthetic import World
from streaming import Dataset, Epoch, Loader, Order, Store
from streaming.fetch import REQUEST
from streaming.pack import pack
from streaming.processes import Child
from tests.streaming.fault_proxy import FaultProxy

Row = tuple[str, str, str]
CLIPS, DIFFERENT, SHARD, BATCH = 1536, 48, 48, 32
SIDE = 256
CORES = len(os.sched_getaffinity(0))
RIVALS = ("webdataset", "mosaicml", "litdata")


class Encode:
    """Clips of ten seconds, ten frames of 340 x 256."""

    def __init__(self, audio: str):
        self.audio, self.world = audio, World(0, SIDE, 10, seconds=10.0)

    def __call__(self, index: int) -> dict[str, bytes]:
        return encode(self.world, self.audio, index % DIFFERENT)


@cache
def encode(world: World, audio: str, index: int) -> dict[str, bytes]:
    clip = world.clip(index)
    frames = [np.asarray(Image.fromarray(frame).resize((340, SIDE))) for frame in clip.frames]
    members = {f"{k}.jpg": encode_frame(frame) for k, frame in enumerate(frames)}
    return {**members, audio: ENCODE_AUDIO[audio](clip.audio, 16000), "json": b"{}"}


@cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="equiav-bench-")


@cache
def shards(audio: str) -> Path:
    """Packed once for all benchmarks."""
    folder = Path(scratch().name, "store", "clips", audio)
    items = [(f"clip{k:04d}", k) for k in range(CLIPS)]
    pack(items, Encode(audio), Store(str(folder)), processes=2, part_items=SHARD)
    return folder


def open_loader(
    url: str,
    workers: int = 1,
    cache: Path | None = None,
    options: dict[str, Any] | None = None,
    window: int = 16,
    **arguments: Any,
) -> Loader:
    config = from_dict(Config, {}, "benchmark")
    dataset = Dataset(Store(url, options=options), cache)
    order = Order(dataset.fingerprint, 0, BATCH, lanes=2, window=window)
    draw = lambda epoch, samples: np.random.default_rng(epoch).random(len(samples))  # noqa: E731
    return Loader(
        dataset, order, ClipDecoder(config.model, config.data), workers=workers, cache=cache, draw=draw, **arguments
    )


def rate(loader: Loader, seconds: float = 6.0) -> float:
    """Samples a second, after an epoch to warm up."""
    batches = loader.batches()
    for _ in range(loader.steps_per_epoch):
        next(batches)
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        count += int(next(batches).valid.sum())
    spent = time.perf_counter() - begun
    batches.close()
    return count / spent


def processor_seconds(loader: Loader) -> float:
    """Of this process and the loader's."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for child in (*loader._workers, loader._fetcher):
        assert child.process
        total += seconds_of(child.process.pid)
    return total


def seconds_of(pid: int | None) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@cache
def local_rate(audio: str) -> tuple[float, float]:
    """Of the shards on local disk through one decoding process: samples a second, processor seconds a sample."""
    with open_loader(str(shards(audio))) as loader:
        rate(loader, 0.1)
        before, decoded = processor_seconds(loader), sum(loader.stats().decoded)
        figure = rate(loader)
        return figure, (processor_seconds(loader) - before) / (sum(loader.stats().decoded) - decoded)


@cache
def bare_rate(audio: str) -> float:
    """Of decoding alone, on one core: the same decoder over members in memory."""
    config = from_dict(Config, {}, "benchmark")
    decoder = ClipDecoder(config.model, config.data)
    out = {name: np.empty(shape, dtype) for name, (shape, dtype) in decoder.fields.items()}
    samples = [encode(World(0, SIDE, 10, seconds=10.0), audio, k) for k in range(16)]
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        for sample in samples:
            names = decoder.members(list(sample), 0.5)
            decoder.decode("", {name: sample[name] for name in names}, out)
        times.append(time.perf_counter() - begun)
    return len(samples) / statistics.median(times)


def local() -> Iterator[Row]:
    for audio in ("wav", "flac"):
        figure, spent = local_rate(audio)
        yield (
            f"stream, local shards, {audio.upper()}, one decoding process",
            f"{figure:,.0f} samples/s",
            f"{figure / bare_rate(audio):.2f} of the bare decoder's rate; {1000 * spent:.2f} ms of CPU a sample",
        )


def read_all(connection: Any, url: str, options: dict[str, Any]) -> None:
    """Every byte of every shard, with the loader's client, requests and threads, to nowhere."""
    store = Store(url, options=options)
    ranges = [
        (s.name, begin, min(begin + REQUEST, s.bytes)) for s in Dataset(store) for begin in range(0, s.bytes, REQUEST)
    ]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda r: store.read(*r), ranges[:16]))
        begun = time.perf_counter()
        read = sum(pool.map(lambda r: len(store.read(*r)), ranges))
        connection.send(read / (time.perf_counter() - begun))


def raw_rate(url: str, options: dict[str, Any]) -> float:
    child = Child("reading process", read_all, (url, options))
    try:
        return child.receive()
    finally:
        child.stop()


def first_epoch(url: str, options: dict[str, Any], cache: Path) -> tuple[float, float]:
    """Samples a second of a stream that fetches everything: from the beginning of the second window to that of the last, so that
    as many windows are fetched as are delivered. And its processor seconds a sample."""
    window = 4  # shards
    with open_loader(url, 1, cache, options, window=window) as loader:
        batches = loader.batches()
        steps = window * SHARD // BATCH
        last = (CLIPS // (window * SHARD) - 1) * steps
        for _ in range(steps + 1):
            next(batches)
        begun, before, count = time.perf_counter(), processor_seconds(loader), (last - steps) * BATCH
        for _ in range(steps, last):
            next(batches)
        spent, used = time.perf_counter() - begun, processor_seconds(loader) - before
        batches.close()
        return count / spent, used / count


def s3() -> Iterator[Row]:
    """The server runs on the same cores. `throttled`: it gives what a network of 1 Gbit/s would."""
    for audio in ("wav", "flac"):
        url = f"s3://clips/{audio}"
        sample = sum(path.stat().st_size for path in shards(audio).glob("*.tar")) / CLIPS
        for name, limit in (("as fast as it can", None), ("throttled to 1 Gbit/s", "125M")):
            with LocalS3(Path(scratch().name, "store"), limit) as server:
                raw = raw_rate(url, server.options) / sample
                with tempfile.TemporaryDirectory(dir=scratch().name) as folder:
                    before = seconds_of(server.process.pid)
                    figure, ours = first_epoch(url, server.options, Path(folder))
                    served = (seconds_of(server.process.pid) - before) / CLIPS  # a little more: the last window, too
            decode = local_rate(audio)[0]
            ratio = f"{figure / min(raw, decode):.2f} of the lower of raw GET {raw:,.0f} and decoding {decode:,.0f}"
            used = (
                f"ours {1000 * ours:.1f}, the server's {1000 * served:.1f} of {1000 * CORES / figure:.1f} ms a sample"
            )
            yield f"stream from S3, {audio.upper()}, server {name}", f"{figure:,.0f} samples/s", f"{ratio}; CPU: {used}"


def run_proxy(connection: Any, upstream: int, share: float) -> None:
    proxy = FaultProxy(upstream)
    proxy.shares = {"503": share}
    connection.send(proxy.port)
    connection.recv()


def faults() -> Iterator[Row]:
    """Both through the same proxy; it answers 503 to one request in twenty."""
    rates = []
    with LocalS3(Path(scratch().name, "store")) as server:
        shards("wav")
        for part in (0.0, 0.05):
            proxy = Child("proxy", run_proxy, (server.port, part))
            options = {**server.options, "endpoint_url": f"http://127.0.0.1:{proxy.receive()}"}
            with tempfile.TemporaryDirectory(dir=scratch().name) as folder:
                rates.append(first_epoch("s3://clips/wav", options, Path(folder))[0])
            proxy.stop()
    yield (
        "stream from S3, 5% of requests answered 503",
        f"{rates[1]:,.0f} samples/s",
        f"{rates[1] / rates[0]:.2f} of that without",
    )


def rivals() -> Iterator[Row]:
    """On the same shards' content, one loader process each; `benchmarks/rivals` says how each is set up."""
    here = Path(__file__).parent
    python = here.parent / ".venv-rivals" / "bin" / "python"
    if not (here.parent / ".venv-rivals" / "installed").exists():
        subprocess.run(["bash", str(here / "rivals" / "install.sh")], check=True, stdout=subprocess.DEVNULL)
    for audio in ("wav", "flac"):
        some = Path(scratch().name, f"some-{audio}")
        some.mkdir()
        for path in sorted(shards(audio).glob("*.tar"))[:4]:
            (some / path.name).symlink_to(path)
        for name in RIVALS:
            command = [
                str(python),
                str(here / "rivals" / "run.py"),
                name,
                str(some),
                str(Path(scratch().name, "rivals")),
                "--seconds",
                "6",
                "--audio",
                audio,
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            theirs = json.loads(result.stdout.strip().splitlines()[-1])
            local_rate.cache_clear()  # measured again, beside each
            ours, spent = local_rate(audio)
            yield (
                f"stream beside {name} {theirs['version']}, {audio.upper()}",
                f"{ours / theirs['samples_per_s']:.2f}x",
                f"{ours:,.0f} against {theirs['samples_per_s']:,.0f} samples/s; "
                f"{1000 * spent:.2f} against {1000 * theirs['cpu_s_per_sample']:.2f} ms of CPU a sample",
            )


def mixing() -> Iterator[Row]:
    """200,000 samples in 400 shards, batches of 256, the default lanes and window, beside a full shuffle."""
    shards, size, G = 400, 500, 256
    N = shards * size
    epoch = Epoch(Order("5f" * 32, 0, G), np.full(shards, size, np.int32), 0)
    full = np.random.default_rng(0).permutation(N) // size
    ours = np.concatenate([epoch.slots(k, 0, G).shards for k in range(epoch.steps)])
    figures = []
    for of_shard in (ours, full):
        batches = of_shard[: N // G * G].reshape(-1, G)
        distinct = np.mean([len(np.unique(batch)) for batch in batches])
        # A value that all samples of a shard share (a class, a film): how much its mean over a batch strays.
        values = np.random.default_rng(1).standard_normal(shards)
        figures.append((distinct, values[batches].mean(axis=1).std()))
    (a, b), (x, y) = figures
    yield "mixing: different shards in a batch of 256", f"{a:.1f}", f"{x:.1f} in a full shuffle (400 shards)"
    yield (
        "mixing: batch mean of what a shard's samples share",
        f"{b:.3f} standard deviations",
        f"{y:.3f} in a full shuffle",
    )


def order() -> Iterator[Row]:
    """A billion samples in two million shards."""
    sizes = np.full(2_000_000, 500, np.int32)
    begun = time.perf_counter()
    epoch = Epoch(Order("5f" * 32, 0, 65536, lanes=64, window=512), sizes, 1)
    epoch.slots(epoch.steps // 2, 0, 256)
    planned = time.perf_counter() - begun
    times = []
    for k in range(50):
        begun = time.perf_counter()
        epoch.slots(1000 + k, 0, 256)
        times.append(time.perf_counter() - begun)
    beside = f"then {1000 * statistics.median(times):.2f} ms for a rank's 256 of a step"
    yield "order of a billion samples, planned", f"{planned:.2f} s", beside


BENCHMARKS = (local, s3, faults, rivals, mixing, order)
