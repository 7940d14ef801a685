# pyright: reportAttributeAccessIssue=false, reportMissingImports=false
"""`.venv-rivals/bin/python benchmarks/rivals/run.py NAME SHARDS SCRATCH`: one rival loader measured, one line of JSON.

SHARDS is a folder of WebDataset tars as docs/streaming.md describes them. Their content is converted once into the rival's
own format in a folder of SCRATCH, then batches of 32 are taken for S seconds from one loader process. Every rival decodes
the same: one of the ten frames, drawn anew each time, and the audio; collated by torch's default_collate in the worker,
straight into shared memory. The consumer only counts.

The worker keeps freed memory (mallopt): by default glibc gives the decoded samples of each batch back to the kernel and
faults fresh pages in for the next. MosaicML and litdata gain from that, webdataset neither gains nor loses clearly.
`--trim` leaves the allocator as most users have it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import sys
import time
import wave
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

# `import streaming` must be MosaicML's: neither this folder nor the root of the repository may be searched.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (HERE, HERE.parents[1])]
os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it would ask the network

import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402
import soundfile  # noqa: E402
import webdataset as wds  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

BATCH, SIDE, AUDIO, FRAMES = 32, 256, 164_080, 10
EPOCH = 50_000  # samples at least: small data is repeated within an epoch, so that no rival pays for ends of epochs
WARM_UP = 2.0  # seconds from the first batch on
WORKER = {"num_workers": 1, "prefetch_factor": 4, "multiprocessing_context": "fork"}  # fork: torch's default till 3.13

Sample = dict[str, bytes]
Batch = list  # of two tensors: frames (b, 256, 256, 3) uint8, audio (b, 164080) int16


def keep_freed_memory(worker: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt, mmap_threshold, trim_threshold = ctypes.CDLL(None).mallopt, -3, -1
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def decode(sample: Sample, audio: str) -> tuple[np.ndarray, np.ndarray]:
    picture = simplejpeg.decode_jpeg(sample[f"{random.randrange(FRAMES)}.jpg"])
    top, left = (picture.shape[0] - SIDE) // 2, (picture.shape[1] - SIDE) // 2
    if audio == "wav":
        with wave.open(io.BytesIO(sample["wav"])) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    else:
        sound, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")
    waveform = np.zeros(AUDIO, np.int16)
    waveform[: len(sound)] = sound[:AUDIO]
    return picture[top : top + SIDE, left : left + SIDE], waveform


def members(audio: str) -> list[str]:
    return [*(f"{k}.jpg" for k in range(FRAMES)), audio, "json"]


def samples_of(tar: str, audio: str) -> Iterator[Sample]:
    for sample in wds.WebDataset([tar], shardshuffle=False):
        yield {name: sample[name] for name in members(audio)}


def copies(samples: int) -> int:
    return -(-EPOCH // samples)


# ---- the rivals: shards, folder of one's own, audio -> batches without end


def webdataset(tars: list[str], folder: Path, audio: str) -> Iterator[Batch]:
    """As its documentation advises for training: shards with replacement (no epochs, so no ends of epochs), a shuffle
    buffer of undecoded samples, decoding behind it, batches made in the worker. A buffer of 100 mixes about as far as
    litdata, which shuffles within a chunk; the 1000 of its examples would be 0.5 GB and slower, out of the CPU's caches.
    `initial` fills it before the first batch, outside the measurement. All members of a sample have to be read; the tars
    are read in place."""
    dataset = wds.WebDataset(tars, resampled=True, shardshuffle=False, empty_check=False)
    dataset = dataset.shuffle(100, initial=100).map(partial(decode, audio=audio))
    dataset = dataset.batched(BATCH, collation_fn=default_collate)
    return iter(wds.WebLoader(dataset, batch_size=None, **WORKER))


def mosaicml(tars: list[str], folder: Path, audio: str) -> Iterator[Batch]:
    """One column of bytes a member, uncompressed (JPEG and FLAC are compressed already), shards of the default 64 MiB.
    Read in place (local, no remote), so nothing is downloaded or hashed; its default shuffle, py1e."""
    import streaming

    if not (folder / "index.json").exists():
        with streaming.MDSWriter(out=str(folder), columns=dict.fromkeys(members(audio), "bytes")) as writer:
            for tar in tars:
                for sample in samples_of(tar, audio):
                    writer.write(sample)

    class Decoded(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> tuple[np.ndarray, np.ndarray]:
            return decode(super().__getitem__(at), audio)

    size = sum(shard["samples"] for shard in json.loads((folder / "index.json").read_text())["shards"])
    dataset = Decoded(local=str(folder), shuffle=True, batch_size=BATCH, epoch_size=size * copies(size))
    loader = streaming.StreamingDataLoader(dataset, batch_size=BATCH, persistent_workers=True, **WORKER)
    while True:
        yield from loader


def litdata(tars: list[str], folder: Path, audio: str) -> Iterator[Batch]:
    """A dict of bytes, uncompressed, chunks of the default 64 MB. A local folder is read in place, mapped into memory, by
    itself. Its default collate is torch's with more cases; torch's is as fast and the same for all."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    if not (folder / "index.json").exists():
        convert = partial(samples_of, audio=audio)
        optimize(convert, tars, str(folder), chunk_bytes="64MB", num_workers=1, reorder_files=False, verbose=False)
    size = len(StreamingDataset(str(folder)))
    dataset = StreamingDataset(
        str(folder), shuffle=True, subsample=float(copies(size)), transform=partial(decode, audio=audio)
    )
    loader = StreamingDataLoader(
        dataset, batch_size=BATCH, collate_fn=default_collate, persistent_workers=True, **WORKER
    )
    while True:
        yield from loader


RIVALS: dict[str, tuple[str, Callable[[list[str], Path, str], Iterator[Batch]]]] = {
    "webdataset": ("webdataset", webdataset),
    "mosaicml": ("mosaicml-streaming", mosaicml),
    "litdata": ("litdata", litdata),
}


# ---- measuring


def cpu_seconds(pid: int | str = "self") -> float:
    """Of a process, the children it waited for, and all below that live."""
    folder = Path("/proc", str(pid))
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    children = [child for file in folder.glob("task/*/children") for child in file.read_text().split()]
    return own + sum(map(cpu_seconds, children))


def measure(batches: Iterator[Batch], seconds: float) -> tuple[float, float]:
    """Samples a second, CPU seconds a sample."""
    frames, waveforms = next(batches)
    shapes = tuple(frames.shape), tuple(waveforms.shape)
    assert shapes == ((BATCH, SIDE, SIDE, 3), (BATCH, AUDIO)), f"not what was asked for: {shapes}"
    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_UP:
        next(batches)
    begun, cpu, samples = time.perf_counter(), cpu_seconds(), 0
    while (spent := time.perf_counter() - begun) < seconds:
        samples += len(next(batches)[0])
    return samples / spent, (cpu_seconds() - cpu) / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RIVALS)
    parser.add_argument("shards", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--audio", choices=("wav", "flac"), default="wav")
    parser.add_argument("--trim", action="store_true", help="let glibc return freed memory, its default")
    args = parser.parse_args()
    if not args.trim:
        WORKER["worker_init_fn"] = keep_freed_memory
    tars = sorted(args.shards.resolve().glob("*.tar"))
    if not tars:
        sys.exit(f"no *.tar in {args.shards}")
    what = zlib.crc32(repr([(str(tar), tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars]).encode())
    distribution, rival = RIVALS[args.name]
    folder = args.scratch.resolve() / f"{args.name}-{args.audio}-{what:08x}"  # other shards, other folder
    batches = rival([str(tar) for tar in tars], folder, args.audio)
    rate, cpu = measure(batches, args.seconds)
    figures = {"samples_per_s": round(rate, 1), "cpu_s_per_sample": round(cpu, 6)}
    print(json.dumps({"name": args.name, "version": version(distribution), **figures}), flush=True)


if __name__ == "__main__":
    main()
