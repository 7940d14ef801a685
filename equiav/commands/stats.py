"""`equiav stats`: what a dataset is like, from some of its samples: the numbers that a recipe for it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
import yaml

from equiav.config import ConfigError, DataConfig, ModelConfig, require
from equiav.data.stream import modalities
from equiav.data.survey import survey
from equiav.terminal import say
from streaming import Dataset, Store
from streaming.labels import LABELS, read_labels


@dataclass(frozen=True)
class StatsConfig:
    """Says how long clips are, how many frames they have, and the mean and deviation of their spectrograms."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the dataset."""
    samples: int = 1000
    """Clips that are heard, of as many shards as there are; 0: all."""
    write: Path | None = None
    """File to write the settings into that the dataset wants (data.audio_mean, data.audio_std), for --config."""
    seed: int = 0
    """Of the choice."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        require(self.patience >= 0, "patience", self.patience, "0 or more")
        require(self.samples >= 0, "samples", self.samples, "0 or more")


def run_stats(config: StatsConfig) -> None:
    require(bool(config.url), "url", "not given", "the folder of a dataset")
    if config.write and config.write.exists():
        raise ConfigError(f"write: {config.write} exists already; name a file that does not")
    if config.write:
        require(config.write.parent.is_dir(), "write", config.write, "a file in a folder that is there")
    dataset = Dataset(Store(config.url, config.patience))
    stats = survey(dataset, config.model, config.data, config.samples, config.seed)
    say(
        f"{dataset.samples:,} clips in {len(dataset):,} shards, {dataset.bytes / 2**30:,.2f} GiB; {stats.clips:,} were heard"
    )
    if dataset.store.exists(LABELS):
        labels = read_labels(dataset)
        counts, of_each = labels.classes.counts(), labels.classes.each
        say(
            f"labels: {len(counts):,} classes of {counts.min():,} to {counts.max():,} clips; {of_each.mean():.2f} of a clip, "
            f"{int((of_each == 0).sum()):,} clips have none"
        )
        for name, count in zip(labels.parts.names, labels.parts.counts().tolist(), strict=True):
            say(f"  part {name}: {count:,} clips")
    if not stats.bins and modalities(dataset) == (False, True):
        say("its clips have pictures alone: for `equiav finetune --tune.modality image`")
        return
    for reason, count in stats.refused.most_common(5):
        say(f"  training cannot use {count}: {reason}")
    if not stats.bins:
        raise ConfigError(f"url: none of {stats.clips} clips of {config.url} can be heard")
    seconds = np.array(stats.seconds)
    hours = seconds.mean() * dataset.samples / 3600
    low, middle, high = np.percentile(seconds, (5, 50, 95))
    say(
        f"sound: {low:.1f} to {high:.1f} s (5th to 95th percentile), {middle:.1f} in the middle; about {hours:,.1f} hours in all"
    )
    pictures = ", ".join(f"{number} of {count:,} clips" for number, count in sorted(stats.pictures.items()))
    say(f"pictures: {pictures}")
    found = {"audio_mean": round(stats.mean, 3), "audio_std": round(stats.deviation, 3)}
    say(
        f"spectrograms: mean {stats.mean:.3f}, deviation {stats.deviation:.3f}: "
        + " ".join(f"--data.{k} {v}" for k, v in found.items())
    )
    if config.write:
        config.write.write_text(yaml.safe_dump({"data": found}))
        say(f"wrote {config.write}, for --config")
