"""What a dataset is like, from some of its samples."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch

from equiav.augment.logmel import moments
from equiav.config import DataConfig, ModelConfig
from equiav.data.clips import DECODE_AUDIO, BadClipError
from equiav.data.decoder import IMAGES
from streaming import Dataset, Store
from streaming.dataset import Shard, read_offsets
from streaming.order import permutation
from streaming.shards import Sample

THREADS = 16  # shards that are looked at together: a store takes its time to answer


@dataclass
class Survey:
    """Of some clips of a dataset."""

    clips: int = 0
    seconds: list[float] = field(default_factory=list)
    pictures: Counter[int] = field(default_factory=Counter)  # how many a clip has -> clips
    labels: Counter[str] = field(default_factory=Counter)  # label -> clips; a clip may have several
    refused: Counter[str] = field(default_factory=Counter)  # why -> clips
    bins: int = 0  # of spectrograms
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.bins

    @property
    def deviation(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.bins - self.mean**2))

    def __add__(self, other: Survey) -> Survey:
        return Survey(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def survey(dataset: Dataset, model: ModelConfig, data: DataConfig, samples: int, seed: int = 0) -> Survey:
    """samples: that are heard, of as many shards as there are; 0: all."""

    def of_a_shard(chosen: tuple[int, int]) -> Survey:
        of_it = Survey()
        for sample in spread(dataset, *chosen):
            _hear(of_it, dataset.store, sample, model, data)
        return of_it

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(of_a_shard, shares(dataset, samples, seed)), Survey())


class SampleAt(NamedTuple):
    """A sample, and where it is."""

    number: int  # of the sample in the dataset: what draws depend on
    shard: Shard
    place: int  # in the shard
    sample: Sample


def shares(dataset: Dataset, samples: int, seed: int) -> list[tuple[int, int]]:
    """-> numbers of shards, and how many samples to look at in each, so that they are `samples` in all; 0: all there are."""
    order = permutation(seed, len(dataset)).tolist()
    if not samples:
        return [(number, int(dataset.sizes[number])) for number in order]
    of_each, left, found = -(-samples // len(order)), samples, []
    for number in order:
        most = min(of_each, left, int(dataset.sizes[number]))
        if most:
            found.append((number, most))
        left -= most
    return found


def spread(dataset: Dataset, number: int, most: int) -> Iterator[SampleAt]:
    """So many samples of a shard, from its beginning to its end."""
    shard, first = dataset[number], int(dataset.starts[number])
    offsets = read_offsets(dataset.store, shard)
    for place in np.linspace(0, len(offsets) - 1, most).round().astype(int).tolist():
        yield SampleAt(first + place, shard, place, offsets[place])


def member(store: Store, looked: SampleAt, name: str) -> bytes:
    place = looked.sample.members[name]
    return store.read(looked.shard.name, place.offset, place.offset + place.length)


def pictures_of(sample: Sample) -> list[str]:
    """Names of its members, in order."""
    return sorted((n for n in sample.members if n.rpartition(".")[2] in IMAGES), key=lambda name: (len(name), name))


def labels_of(about: bytes) -> list[str]:
    """Of a sample's `json`, as packing writes it: `label`, or `labels` (a list, or text with commas)."""
    try:
        said = json.loads(about)
    except (ValueError, RecursionError):
        return []
    if not isinstance(said, dict):
        return []
    found = said.get("labels", said.get("label"))
    if found is None:
        return []
    listed = found.split(",") if isinstance(found, str) else found if isinstance(found, list) else [found]
    return [text for one in listed if (text := str(one).strip())]


def _hear(of_it: Survey, store: Store, looked: SampleAt, model: ModelConfig, data: DataConfig) -> None:
    members = looked.sample.members
    of_it.clips += 1
    of_it.pictures[len(pictures_of(looked.sample))] += 1
    if "json" in members:
        of_it.labels.update(set(labels_of(member(store, looked, "json"))))
    sound = next((name for name in members if name in DECODE_AUDIO), "")
    if not sound:
        of_it.refused["no sound"] += 1
        return
    try:
        audio = DECODE_AUDIO[sound](member(store, looked, sound), looked.sample.key, data)
    except BadClipError as error:
        of_it.refused[error.reason] += 1
        return
    of_it.seconds.append(len(audio) / data.sample_rate)
    bins, total, squares = moments(torch.from_numpy(audio.copy()), model, data)
    of_it.bins, of_it.total, of_it.squares = of_it.bins + bins, of_it.total + total, of_it.squares + squares
