"""`equiav pack`, `equiav index`, `equiav verify`: datasets, from clips to shards on object storage."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from equiav.config import ConfigError, DataConfig, ModelConfig, StreamConfig, require
from equiav.data.clips import PICTURES
from equiav.data.decoder import ClipDecoder
from equiav.data.labels import give_by_key, labels_of_entry
from equiav.data.sources import (
    PASSED_OVER,
    SOUNDS,
    VIDEOS,
    EncodeFrames,
    EncodeStill,
    EncodeSynthetic,
    EncodeVideo,
    Shape,
    absolute,
    cut,
    files_of,
    key_of,
    list_frames,
    list_stills,
    list_videos,
)
from equiav.data.stream import modalities
from equiav.data.synthetic import Rules, World
from equiav.progress import bar
from equiav.terminal import say
from streaming import Dataset, DatasetError, Store
from streaming.dataset import (
    INDEX,
    NoDataset,
    Shard,
    index_shard,
    keys_that_come_again,
    read_offsets,
    require_plain,
    unusable,
    verify_shard,
    write_index,
)
from streaming.labels import LABELS, write_labels
from streaming.order import permutation
from streaming.pack import REJECTED, Item, pack
from streaming.pack import Progress as Packed
from streaming.quarantine import FEW

CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class PackConfig:
    """Packs clips into shards. Killed and started again with the same settings, it goes on where it was."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = ""
    """A folder of videos, a video, a text file with a path a line, a CAV-MAE / EquiAV list (.json), or synthetic:COUNT."""
    to: str = ""
    """Folder for the dataset: s3://bucket/name, or any other that fsspec writes."""
    frames: int = 10
    """Frames of a clip, from the middles of as many equal parts."""
    short_side: int = 256
    """Of a frame, pixels. Frames of a list are packed as they are."""
    quality: int = 90
    """Of the JPEGs, 1 to 100."""
    modality: Literal["both", "audio", "image"] = "both"
    """What is packed of each clip. audio: sound files are taken, too; image: pictures are, and videos need no sound. Pretraining
    needs both."""
    stills: bool = False
    """The source has sounds, each with a picture of its name beside it (a.jpg beside a.wav), which stands."""
    audio: Literal["wav", "flac"] = "wav"
    """flac takes about half the space, and ten times as long to decode."""
    track: str = "default"
    """Of a file's sound: the one that a player plays, a language as the file names it (eng), or a number from 1 on."""
    clip_seconds: float = 0.0
    """Cut longer videos into clips of this length. 0: a video is a clip."""
    clip_overlap: float = 0.0
    """Seconds that neighbouring clips of a video share."""
    max_seconds: float = 30.0
    """Longer clips are rejected: training hears only the beginning, and frames from later would not belong to it."""
    keep_frozen: bool = False
    """Pack clips whose frames all show the same picture, too."""
    max_shard_bytes: int = 256 << 20
    """Size of a shard, at most."""
    shard_samples: int = 512
    """Clips of a shard, at most. What is finished survives a kill shard by shard."""
    processes: int = CORES
    """That decode and encode."""
    timeout: float = 600.0
    """Seconds after which a clip is given up."""
    in_order: bool = False
    """Keep the order of the source. By default clips are shuffled over the shards: neighbours in a list are often alike, and
    a batch is drawn from some shards at a time."""
    seed: int = 0
    """Of the shuffle, and of the synthetic world."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""
    data: DataConfig = field(default_factory=DataConfig)
    world: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        for name in ("frames", "short_side", "shard_samples", "processes", "max_seconds", "timeout"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(self.clip_seconds >= 0, "clip_seconds", self.clip_seconds, "0 or more")
        if self.clip_seconds:
            require(
                self.data.min_seconds <= self.clip_seconds <= self.max_seconds,
                "clip_seconds",
                self.clip_seconds,
                f"data.min_seconds={self.data.min_seconds} to max_seconds={self.max_seconds}",
            )
        most = 0.9 * self.clip_seconds
        require(0 <= self.clip_overlap <= most, "clip_overlap", self.clip_overlap, "0 to nine tenths of clip_seconds")
        good = self.track.isalnum() and self.track != "0"
        require(good, "track", self.track, "default, a language such as eng, or a number from 1 on")
        require(self.short_side >= 2, "short_side", self.short_side, "2 or more")
        require(not self.stills or self.modality == "both", "stills", True, "false, or modality both")
        require(self.frames <= 1000, "frames", self.frames, "at most 1000")
        require(self.patience >= 0, "patience", self.patience, "0 or more")
        w = self.world
        for name in ("silent", "unseen", "skew"):
            require(0 <= getattr(w, name) <= 10, f"world.{name}", getattr(w, name), "0 to 10")
        require(w.silent + w.unseen <= 1, "world.unseen", w.unseen, f"at most 1 less world.silent={w.silent}")
        require(1 <= self.quality <= 100, "quality", self.quality, "1 to 100")
        require(self.max_shard_bytes >= 1 << 16, "max_shard_bytes", self.max_shard_bytes, f"{1 << 16} or more")


@dataclass(frozen=True)
class IndexConfig:
    """Makes the index of shards (*.tar) that somebody else packed, and the offsets file of each."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the shards; it must be writable."""
    processes: int = CORES
    """Shards that are read at a time."""
    tried: int = 50
    """Samples of each shard that are decoded as training would, to say what it would refuse; 0: none."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        require(self.processes > 0, "processes", self.processes, "a positive number")
        require(self.patience >= 0, "patience", self.patience, "0 or more")
        require(self.tried >= 0, "tried", self.tried, "0 or more")


@dataclass(frozen=True)
class VerifyConfig:
    """Reads every byte of a dataset and compares it with its index."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the dataset."""
    processes: int = CORES
    """Shards that are read at a time."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        require(self.processes > 0, "processes", self.processes, "a positive number")
        require(self.patience >= 0, "patience", self.patience, "0 or more")


def run_pack(config: PackConfig, options: dict[str, Any] | None = None) -> None:
    require(bool(config.source), "source", "not given", "what to pack: a folder, a list, or synthetic:COUNT")
    require(bool(config.to), "to", "not set", "the folder to pack into (--to s3://bucket/name)")
    shape = Shape(
        config.frames,
        config.short_side,
        config.quality,
        config.audio,
        config.max_seconds,
        config.keep_frozen,
        config.data,
        config.modality != "image",
        config.modality != "audio",
        config.track,
    )
    items, encode, passed_over = open_source(config, shape)
    if not config.in_order:
        items = [items[k] for k in permutation(config.seed, len(items)).tolist()]
    store = Store(config.to, config.patience, options)
    if store.local:
        try:
            Path(store.root).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"to: {config.to} cannot be made ({error}); name a folder that can be written") from None
    finished = store.exists(INDEX)
    with bar() as progress:
        shown = progress.add_task("packing", total=len(items), note="")

        def report(packed: Packed) -> None:
            note = f"{packed.shards} shards, {packed.bytes / 2**20:,.0f} MiB, {packed.rejected.total()} rejected"
            progress.update(shown, completed=packed.items, note=note)

        done = pack(
            items,
            encode,
            store,
            processes=config.processes,
            max_shard_bytes=config.max_shard_bytes,
            part_items=config.shard_samples,
            settings=f"{shape!r} {config.world!r}" if config.source.startswith("synthetic:") else repr(shape),
            stamps=[stamp(content, config.frames) for _, content in items],
            timeout=config.timeout,
            report=report,
        )
        report(done)
    if passed_over and not finished:
        store.write(
            PASSED_OVER, "".join(json.dumps({"path": p, "why": w}) + "\n" for p, w in passed_over.items()).encode()
        )
    if not store.exists(LABELS) and (found := labels_of(config, items)):
        dataset = Dataset(store)
        write_labels(store, dataset.fingerprint, give_by_key(dataset, found))
    kept = len(items) - done.rejected.total()
    say(
        f"{kept} of {len(items)} clips in {done.shards} shards, {done.bytes / 2**20:,.1f} MiB, at {config.to}"
        + (": it was finished before, nothing was done" if finished else "")
    )
    for reason, count in done.rejected.most_common():
        say(f"  rejected: {count} {reason}")
    if done.rejected:
        say(f"  each with its reason in {config.to.rstrip('/')}/{REJECTED}")
    for why, count in Counter(passed_over.values()).most_common():
        say(f"  passed over: {count}, {why} ({PASSED_OVER} names them)")


def stamp(content: Any, frames: int) -> str:
    """Of an item's files: one that is another now is to be packed again."""
    if isinstance(content, int):
        return ""
    told = []
    for path in files_of(content, frames):
        try:
            about = os.stat(path)
            told.append(f"{about.st_size} {about.st_mtime_ns}")
        except OSError:  # it may come back
            told.append("absent")
    return ", ".join(told)


def open_source(
    config: PackConfig, shape: Shape
) -> tuple[list[Item], Callable[[Any], dict[str, bytes]], dict[str, str]]:
    """-> what to pack, what makes a sample of each, and path -> why, of files that are none of it."""
    kind, _, count = config.source.partition(":")
    if kind == "synthetic":
        require(
            count.isdecimal() and count.isascii() and int(count[:9]) > 0 and len(count) <= 8,
            "source",
            config.source,
            "synthetic:COUNT with a positive number below 10^8",
        )
        world = world_of(config)
        return [(f"synthetic-{config.seed}-{k}", k) for k in range(int(count))], EncodeSynthetic(world, shape), {}
    source = Path(config.source).expanduser()
    require(source.exists(), "source", config.source, "a folder, a file, or synthetic:COUNT; this path does not exist")
    if source.suffix == ".json":
        frames, other = list_frames(source)
        return frames, EncodeFrames(shape), other
    try:
        import av  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("av is not installed; `pip install 'equiav[prep]'` brings it") from None
    if config.stills:
        sounds, other = list_stills(source)
        if not sounds:
            raise ConfigError(
                f"source {source}: none of its sounds has a picture of its name beside it ({', '.join(PICTURES)})"
            )
        return (
            cut(sounds, config.clip_seconds, config.clip_overlap) if config.clip_seconds else sounds,
            EncodeStill(shape),
            other,
        )
    endings = (*VIDEOS, *{"audio": SOUNDS, "image": PICTURES}.get(config.modality, ()))
    if source.is_file() and source.suffix.lower() in (*VIDEOS, *SOUNDS, *endings):
        videos, other = [(key_of(source.stem), absolute(source))], {}
    else:
        videos, other = list_videos(source, endings)
    return (
        cut(videos, config.clip_seconds, config.clip_overlap) if config.clip_seconds else videos,
        EncodeVideo(shape),
        other,
    )


def world_of(config: PackConfig) -> World:
    return World(config.seed, config.short_side, config.frames, sample_rate=config.data.sample_rate, rules=config.world)


def labels_of(config: PackConfig, items: list[Item]) -> dict[str, list[str]]:
    """Those that a source says of its clips; `equiav label` gives others."""
    if config.source.startswith("synthetic:"):
        world = world_of(config)
        return {key: world.labels(k) for key, k in items}
    listed = {key: labels_of_entry(entry["labels"]) for key, entry in items if isinstance(entry, dict)}
    return {key: labels for key, labels in listed.items() if labels}


def run_index(config: IndexConfig, options: dict[str, Any] | None = None) -> None:
    require(bool(config.url), "url", "not given", "the folder of the shards")
    store = Store(config.url, config.patience, options)
    names = [name for name in store.list() if name.endswith(".tar") and not name.startswith(".")]  # a Mac leaves ._NAME
    for name in names:
        require_plain(store, name)
    if not names:
        raise NoDataset(f"{config.url} has no shards: no file there ends in .tar")
    indexed = _each("indexing", names, lambda name: index_shard(store, name), config.processes)
    shards = [shard for shard, _ in indexed]
    if again := keys_that_come_again([hashes for _, hashes in indexed]):
        shard, place = shards[again[0][0]], again[0][1]
        key = read_offsets(store, shard)[place].key
        say(
            f"{len(again)} key(s) stand in more than one shard, the first is {key}, again in {shard.name}: each counts as a "
            "sample of its own, and labels are given by key"
        )
    write_index(store, shards)
    say(f"{sum(s.samples for s in shards)} samples in {len(shards)} shards at {config.url}")
    if config.tried:
        say_what_is_unusable(store, shards, config.data, config.processes, config.tried)


def run_verify(config: VerifyConfig, options: dict[str, Any] | None = None) -> None:
    require(bool(config.url), "url", "not given", "the folder of a dataset")
    store = Store(config.url, config.patience, options)
    dataset = Dataset(store)
    found = _each("verifying", list(dataset), lambda shard: verify_shard(store, shard), config.processes)
    problems = [problem for of_shard in found for problem in of_shard]
    for p in problems:
        say(f"{p['shard']}{', sample ' + p['key'] if p['key'] else ''}: {p['reason']}")
    if problems:
        kinds = Counter("damaged samples" if p["key"] else "damaged shards" for p in problems)
        raise DatasetError(f"{config.url}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    say_what_is_unusable(store, list(dataset), config.data, config.processes)
    say(f"{dataset.samples} samples in {len(dataset)} shards, {dataset.bytes:,} bytes: every byte is as the index says")


def say_what_is_unusable(
    store: Store, shards: list[Shard], data: DataConfig, threads: int, most: int | None = None
) -> None:
    """By the decoder of training, so that it is what training will say."""
    hears, sees = modalities(Dataset(store))
    if not (hears and sees) and (hears or sees):
        say(
            f"its clips have {'sound' if hears else 'pictures'} alone: for `equiav finetune --tune.modality`, not for pretraining"
        )
    decoder = ClipDecoder(ModelConfig(), data, hears, sees) if hears or sees else ClipDecoder(ModelConfig(), data)
    found = _each("decoding", shards, lambda shard: unusable(store, shard, decoder, most), threads)
    tried, bad = sum(count for count, _ in found), [one for _, listed in found for one in listed]
    for reason, count in Counter(one.reason for one in bad).most_common():
        first = next(one for one in bad if one.reason == reason)
        say(f"  training cannot use {count} of {tried}: {reason}, such as {first.where}: {first.detail}")
    allowed = StreamConfig().max_bad
    if len(bad) > max(allowed * tried, FEW) or len(bad) == tried:
        raise DatasetError(
            f"{store.url}: training would end for {len(bad)} samples of {tried} that it cannot use (stream.max_bad={allowed:g}); "
            "`equiav pack` makes samples that it can, docs/streaming.md says what one has to be"
        )
    if not bad:
        say(f"training can use all of the {tried} samples that were decoded")


def _each(what: str, items: list[Any], call: Callable[[Any], Any], threads: int) -> list[Any]:
    with bar() as progress, ThreadPoolExecutor(threads) as pool:
        shown, results = progress.add_task(what, total=len(items), note="shards"), []
        for result in pool.map(call, items):
            results.append(result)
            progress.update(shown, advance=1)
    return results
