"""`equiav stats`: what a dataset is like, from some of its samples: the numbers that a recipe for it needs."""

from __future__ import annotations

import numpy as np
import yaml

from equiav.commands.settings import StatsConfig
from equiav.config import ConfigError
from equiav.data.stream import modalities
from equiav.data.survey import survey
from equiav.terminal import say
from streaming import Dataset, Store
from streaming.labels import LABELS, read_labels


def run_stats(config: StatsConfig) -> None:
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
