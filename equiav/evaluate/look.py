"""What a model makes of the clips of a dataset: every clip once, shared by all processes, the numbers those of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from equiav.augment import Clips
from equiav.config import Config, LabelsConfig
from equiav.data.decoder import ClipDecoder
from equiav.data.stream import as_tensors
from equiav.parallel import Ranks
from streaming import Dataset, DatasetError, Loader, Order, Selection

Compute = Callable[[Clips, torch.autocast], Tensor]
"""A micro-batch, and the context of the model -> (b, k) float64."""


class Features(NamedTuple):
    samples: np.ndarray  # (n,) ascending; a clip of which nothing can be used is not there
    values: np.ndarray  # (n, k) float64, the mean over a clip's frames
    bad: Counter[str]  # why clips, or frames of clips, could not be used -> how many


@torch.no_grad()
def look(
    config: Config, of: LabelsConfig, dataset: Dataset, ranks: Ranks, chosen: np.ndarray, compute: Compute
) -> Features:
    """Collective. Of the `chosen` (samples,) bool: its mean over `test_frames` frames
    from the middles of equal parts."""
    sums: dict[int, np.ndarray] = {}
    terms: Counter[int] = Counter()
    bad: Counter[str] = Counter()
    frames = of.test_frames if of.sees else 1
    for k in range(frames):
        with reader(config, of, dataset, ranks, chosen, (k + 0.5) / frames, config.stream.workers) as loader:
            for _, batch in zip(range(loader.steps_per_epoch), loader.batches(0), strict=False):
                own = (*_of_batch(config, as_tensors(batch), ranks, compute), [one.reason for one in batch.bad])
                for samples, values, reasons in ranks.objects(own):
                    bad.update(reasons)
                    for sample, row in zip(samples, values, strict=True):
                        sums[sample] = sums[sample] + row if sample in sums else row
                        terms[sample] += 1
    if not sums:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.most_common(3))
        raise DatasetError(f"no clip of {dataset.store.url} can be used ({reasons})")
    samples = sorted(sums)
    return Features(np.array(samples, np.int64), np.stack([sums[k] / terms[k] for k in samples]), bad)


def reader(
    config: Config, of: LabelsConfig, dataset: Dataset, ranks: Ranks, chosen: np.ndarray, at: float, workers: int
) -> Loader:
    """at: of a clip's frames, which is shown, 0 to 1."""
    s, t = config.stream, config.train
    return Loader(
        dataset,
        Order(dataset.fingerprint, 0, t.batch_size, s.lanes, s.window),
        ClipDecoder(config.model, config.data, of.hears, of.sees),
        rank=ranks.rank,
        ranks=ranks.size,
        unit=t.micro_batch,
        workers=workers,
        ahead=s.ahead,
        selection=None if chosen.all() else Selection(chosen),
        cache=s.cache.expanduser(),
        cache_bytes=s.cache_bytes,
        sharers=ranks.local_size,
        draw=lambda epoch, samples: np.full(len(samples), at),
    )


def _of_batch(config: Config, clips: Clips, ranks: Ranks, compute: Compute) -> tuple[list[int], np.ndarray]:
    """Own rows, a whole micro-batch at a time, as many on every rank."""
    p, most = min(config.train.micro_batch, config.train.batch_size), -(-config.train.micro_batches // ranks.size)
    clips = clips.to(ranks.device).padded(p * most)
    low = config.train.precision == "bfloat16" or (config.train.precision == "auto" and ranks.device.type == "cuda")
    parts = []
    for k in range(0, p * most, p):
        parts.append(
            compute(clips.rows(slice(k, k + p)), torch.autocast(ranks.device.type, torch.bfloat16, enabled=low))
        )
    values, valid = torch.cat(parts).cpu().numpy(), clips.valid.numpy()
    return clips.samples.cpu().numpy()[valid].tolist(), values[valid]
