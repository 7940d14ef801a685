"""`equiav show`: a dataset, or one of its clips, for one's eyes."""

from __future__ import annotations

import difflib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from rich.console import Console

from equiav.augment import Clips, make_views, normalised_spectrogram
from equiav.commands.settings import ShowConfig
from equiav.config import ConfigError
from equiav.data.clips import DECODE_AUDIO, BadClipError, decode_frame
from equiav.data.decoder import ClipDecoder
from equiav.data.sources import PASSED_OVER
from equiav.data.stream import frame_draw
from equiav.data.survey import THREADS, SampleAt, labels_of, member, pictures_of, shares, spread, survey
from equiav.evaluate.pictures import Titled, blocks, coloured, scaled, seen, sheet
from equiav.terminal import say
from streaming import BadSample, Dataset, Store
from streaming.dataset import read_offsets
from streaming.labels import LABELS, read_labels
from streaming.pack import REJECTED
from streaming.shards import Sample

HEARD, SHOWN, ACROSS, HEIGHT, EPOCHS = 200, 24, 6, 128, 4
NAMED = 20  # labels, reasons


def run_show(config: ShowConfig) -> None:
    dataset = Dataset(Store(config.url, config.stream.patience))
    rows = one_clip(config, dataset) if config.key else some_clips(config, dataset)
    if not rows:
        return
    picture = sheet(rows, HEIGHT)
    if config.png:
        picture.save(config.png)
        say(f"wrote {config.png}")
    elif sys.stdout.isatty():
        console = Console()
        console.print(blocks(picture, console.width))
    else:
        say("--png FILE draws it")


# ---- a dataset


def some_clips(config: ShowConfig, dataset: Dataset) -> list[list[Titled]]:
    found = survey(dataset, config.model, config.data, HEARD, config.seed)
    of = "" if found.clips == dataset.samples else f" of {found.clips:,} that were looked at"
    hours = ""
    if found.seconds:
        low, middle, high = np.percentile(found.seconds, (5, 50, 95))
        total = np.mean(found.seconds) * dataset.samples / 3600
        hours = f"; {total:,.2f} hours: {low:.1f} to {high:.1f} s, {middle:.1f} s in the middle"
    say(f"{dataset.samples:,} clips in {len(dataset):,} shards, {dataset.bytes / 2**20:,.1f} MiB{hours}")
    counts = ", ".join(f"{count:,} with {number}" for number, count in sorted(found.pictures.items()))
    say(f"pictures: {counts}{of}")
    if dataset.store.exists(LABELS):
        labels = read_labels(dataset).classes
        say(f"labels: {_most(Counter(dict(zip(labels.names, labels.counts().tolist(), strict=True))))}")
    else:
        say(f"labels{of}: {_most(found.labels) or 'none'}")
    for reason, count in found.refused.most_common(NAMED):
        say(f"training cannot use {count}{of}: {reason}")
    for file, what, field in ((REJECTED, "rejected", "reason"), (PASSED_OVER, "passed over", "why")):
        if listed := _listed(dataset.store, file, field):
            say(f"{what} when it was packed ({file} names each): {_most(listed)}")
    looked = [one for chosen in shares(dataset, SHOWN, config.seed) for one in spread(dataset, *chosen)]
    with ThreadPoolExecutor(4) as pool:  # whose pictures may be large
        pictures = [one for one in pool.map(lambda one: _middle(dataset.store, one), looked) if one]
    if looked:
        say(
            f"a clip's frames, sound and views: equiav show {shlex.quote(config.url)} {shlex.quote(looked[0].sample.key)}"
        )
    return [pictures[k : k + ACROSS] for k in range(0, len(pictures), ACROSS)]


def _most(counts: Counter[str]) -> str:
    rest = len(counts) - NAMED
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common(NAMED)) + (
        f", and {rest:,} more" if rest > 0 else ""
    )


def _listed(store: Store, name: str, field: str) -> Counter[str]:
    """What packing said of clips that are not in the dataset; nothing, where somebody else made it."""
    if not store.exists(name):
        return Counter()
    try:
        return Counter(str(json.loads(line)[field]) for line in store.read(name).splitlines())
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.url}/{name}: not the list that packing writes ({error}); remove it") from None


def _middle(store: Store, looked: SampleAt) -> Titled | None:
    names = pictures_of(looked.sample)
    if not names:
        return None
    try:
        frame = decode_frame(member(store, looked, names[len(names) // 2]), looked.sample.key)
        return looked.sample.key, scaled(frame, HEIGHT)
    except BadClipError as error:
        say(f"training cannot use {looked.sample.key}: {error.reason}")
        return None


# ---- a clip


def one_clip(config: ShowConfig, dataset: Dataset) -> list[list[Titled]]:
    looked = find(dataset, config.key)
    sample, store = looked.sample, dataset.store
    say(f"{sample.key}: sample {looked.number:,} of the dataset, {looked.place} of {looked.shard.name}")
    contents = {name: member(store, looked, name) for name in sample.members}
    rows: list[list[Titled]] = []
    pictures: list[Titled] = []
    for name in pictures_of(sample):
        try:
            frame = decode_frame(contents[name], sample.key)
        except BadClipError as error:
            say(f"  {name}: {len(contents[name]):,} bytes, {error.reason}")
            continue
        say(f"  {name}: {frame.shape[1]} x {frame.shape[0]} pixels, {len(contents[name]):,} bytes")
        pictures.append((name, frame))
    for name in sample.members:
        if name not in dict(pictures) and name != "json" and name not in pictures_of(sample):
            say(f"  {name}: {len(contents[name]):,} bytes")
    if "json" in contents:
        say(f"  json: {contents['json'].decode(errors='replace')}")
        if labels := labels_of(contents["json"]):
            say(f"  labels: {', '.join(labels)}")
    if pictures:
        rows.append(pictures)
    try:
        rows += list(_views(config, looked, contents))
    except BadSample as error:
        say(f"  training cannot use it: {error.detail or error.reason}")
    return rows


def _views(config: ShowConfig, looked: SampleAt, contents: dict[str, bytes]) -> Iterator[list[Titled]]:
    """What the model is given of it, in the first epochs of a run with these settings and this seed."""
    hears, sees = any(name in DECODE_AUDIO for name in contents), bool(pictures_of(looked.sample))
    if hears != sees:  # for fine-tuning, which draws no views
        say(
            f"  it has {'sound' if hears else 'pictures'} alone: for `equiav finetune --tune.modality`, not for pretraining"
        )
    if hears and not sees:
        clips = _decoded(config, looked, contents, 0, sees=False)
        yield [
            ("the sound", coloured(normalised_spectrogram(clips.waveform, clips.lengths, config.model, config.data)[0]))
        ]
    if hears != sees:
        return
    images: list[Titled] = []
    sounds: list[Titled] = []
    for epoch in range(EPOCHS):
        views = make_views(config, _decoded(config, looked, contents, epoch))
        if not epoch:
            images.append(("the image", seen(views.image[0])))
            sounds.append(("the sound", coloured(views.audio[0])))
        if views.image_aug is not None and views.audio_aug is not None:
            images.append((f"augmented, epoch {epoch}", seen(views.image_aug[0])))
            sounds.append((f"augmented, epoch {epoch}", coloured(views.audio_aug[0])))
    yield images
    yield sounds


def _decoded(config: ShowConfig, looked: SampleAt, contents: dict[str, bytes], epoch: int, sees: bool = True) -> Clips:
    """As the stream would: its decoder, its draw of a frame."""
    decoder, number = ClipDecoder(config.model, config.data, True, sees), np.array([looked.number])
    names = decoder.members(list(contents), float(frame_draw(config.seed, epoch, number)[0]))
    out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in decoder.fields.items()}
    decoder.decode(looked.sample.key, {name: contents[name] for name in names}, out)
    waveform, lengths = (torch.from_numpy(out[name])[None] for name in ("waveform", "lengths"))
    frames = torch.from_numpy(out["frames"])[None].permute(0, 3, 1, 2) if sees else None
    return Clips(epoch, torch.from_numpy(number), frames, waveform, lengths, torch.ones(1, dtype=torch.bool))


def find(dataset: Dataset, key: str) -> SampleAt:
    """Shards are asked side by side, in their order: a key may be in any."""

    def within(number: int) -> tuple[list[str], SampleAt | None]:
        shard, keys = dataset[number], []
        offsets = read_offsets(dataset.store, shard)
        for place in range(len(offsets)):
            sample: Sample = offsets[place]
            if sample.key == key:
                return [], SampleAt(int(dataset.starts[number]) + place, shard, place, sample)
            keys.append(sample.key)
        return difflib.get_close_matches(key, keys, n=1), None

    near: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(dataset), 4 * THREADS):  # not more than is needed
            for close, looked in pool.map(within, range(first, min(first + 4 * THREADS, len(dataset)))):
                if looked:
                    return looked
                near += close
    best = difflib.get_close_matches(key, near, n=1)
    hint = f"did you mean {best[0]!r}?" if best else f"`equiav show {dataset.store.url}` names one"
    raise ConfigError(f"key: {dataset.store.url} has no clip {key!r}; {hint}")
