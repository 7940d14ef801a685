"""What a dataset is like, from some of its samples."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from equiav.augment.logmel import moments
from equiav.config import DataConfig, ModelConfig
from equiav.data.clips import DECODE_AUDIO, BadClipError
from equiav.data.decoder import IMAGES
from streaming import Dataset
from streaming.order import permutation
from streaming.shards import Offsets


@dataclass
class Survey:
    """Of some clips of a dataset."""

    clips: int = 0
    seconds: list[float] = field(default_factory=list)
    pictures: Counter[int] = field(default_factory=Counter)  # how many a clip has -> clips
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


def survey(dataset: Dataset, model: ModelConfig, data: DataConfig, samples: int, seed: int = 0) -> Survey:
    """samples: that are heard, of as many shards as there are; 0: all."""
    stats, shards = Survey(), list(dataset)
    order = permutation(seed, len(shards)).tolist()
    of_each = -(-(samples or dataset.samples) // len(shards))
    for number in order:
        if samples and stats.clips >= samples:
            break
        shard = shards[number]
        offsets = Offsets(dataset.store.read(shard.offsets_name))
        most = min(of_each, len(offsets)) if samples else len(offsets)
        for k in np.linspace(0, len(offsets) - 1, most).round().astype(int).tolist():
            members = offsets[k].members
            stats.clips += 1
            stats.pictures[sum(name.rpartition(".")[2] in IMAGES for name in members)] += 1
            sound = next((name for name in members if name in DECODE_AUDIO), "")
            if not sound:
                stats.refused["no sound"] += 1
                continue
            place = members[sound]
            content = dataset.store.read(shard.name, place.offset, place.offset + place.length)
            try:
                audio = DECODE_AUDIO[sound](content, offsets[k].key, data)
            except BadClipError as error:
                stats.refused[error.reason] += 1
                continue
            stats.seconds.append(len(audio) / data.sample_rate)
            bins, total, squares = moments(torch.from_numpy(audio.copy()), model, data)
            stats.bins, stats.total, stats.squares = stats.bins + bins, stats.total + total, stats.squares + squares
    return stats
