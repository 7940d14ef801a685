"""`equiav pack`, `equiav index`, `equiav verify`: datasets, from clips to shards on object storage."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from equiav.commands.settings import IndexConfig, PackConfig, VerifyConfig
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
from equiav.data.synthetic import World
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


def run_pack(config: PackConfig, options: dict[str, Any] | None = None) -> None:
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
