"""What a classifier is worth on a dataset: every clip once, shared by all processes, the numbers those of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from equiav.config import Config
from equiav.data.decoder import ClipDecoder
from equiav.data.stream import as_tensors
from equiav.parallel import Ranks
from equiav.tasks import Classification
from streaming import Dataset, Loader, Order

DRAWS, SURE = 1000, 0.95  # of the bootstrap


class Tested(NamedTuple):
    samples: np.ndarray  # (n,) ascending; a clip that cannot be used is not there
    scores: np.ndarray  # (n, classes) float64, mean probabilities


@torch.no_grad()
def score(config: Config, task: Classification, model: Any, dataset: Dataset, ranks: Ranks) -> Tested:
    """Collective. The mean of a clip's probabilities over `tune.test_frames` frames from the middles of equal parts."""
    s, t = config.stream, config.train
    order = Order(dataset.fingerprint, 0, t.batch_size, s.lanes, s.window)
    sums: dict[int, np.ndarray] = {}
    was_training, frames = model.training, task.tune.test_frames if task.sees else 1
    model.eval()
    for k in range(frames):
        at = (k + 0.5) / frames
        with Loader(
            dataset,
            order,
            ClipDecoder(config.model, config.data, task.hears, task.sees),
            rank=ranks.rank,
            ranks=ranks.size,
            unit=t.micro_batch,
            workers=s.workers,
            ahead=s.ahead,
            cache=s.cache.expanduser(),
            cache_bytes=s.cache_bytes,
            sharers=ranks.local_size,
            draw=lambda epoch, samples, at=at: np.full(len(samples), at),
        ) as loader:
            for _, batch in zip(range(loader.steps_per_epoch), loader.batches(0), strict=False):
                own = _of_batch(config, task, model, as_tensors(batch), ranks)
                for samples, scores in ranks.objects(own):
                    for sample, row in zip(samples, scores, strict=True):
                        sums[sample] = sums[sample] + row if sample in sums else row
    model.train(was_training)
    samples = np.array(sorted(sums), np.int64)
    return Tested(
        samples, np.stack([sums[k] for k in samples.tolist()]) / frames if len(samples) else np.zeros((0, task.classes))
    )


def _of_batch(
    config: Config, task: Classification, model: Any, clips: Any, ranks: Ranks
) -> tuple[list[int], np.ndarray]:
    """Own rows, a whole micro-batch at a time, as many on every rank."""
    p, most = min(config.train.micro_batch, config.train.batch_size), -(-config.train.micro_batches // ranks.size)
    clips = clips.to(ranks.device).padded(p * most)
    low = config.train.precision == "bfloat16" or (config.train.precision == "auto" and ranks.device.type == "cuda")
    parts = []
    for k in range(0, p * most, p):
        audio, image = task.inputs(clips.rows(slice(k, k + p)))
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=low):
            z = model(audio, image).double()
        parts.append(z.softmax(dim=1) if task.tune.loss == "one" else z.sigmoid())
    scores, valid = torch.cat(parts).cpu().numpy(), clips.valid.numpy()
    return clips.samples.cpu().numpy()[valid].tolist(), scores[valid]


# ---- numbers


def average_precision(right: np.ndarray, scores: np.ndarray) -> float:
    """right (n,) bool. The mean of the precision at each right clip; clips of one score count together. nan: none is right."""
    if not right.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    right, scores = right[order], scores[order]
    ends = np.flatnonzero(np.diff(scores, append=-np.inf))  # the last of each score
    hits = np.cumsum(right)[ends]
    gained = np.diff(hits, prepend=0)
    return float((gained * hits / (ends + 1)).sum() / right.sum())


def area_under_curve(right: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a right clip has a higher score than a wrong one, ties a half. nan: all are right, or none is."""
    wrong = np.sort(scores[~right])
    if not right.any() or not len(wrong):
        return float("nan")
    below, upto = (np.searchsorted(wrong, scores[right], side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(wrong)))


def mean_average_precision(right: np.ndarray, scores: np.ndarray) -> float:
    """right (n, classes) bool. Over the classes that have a clip, each as much."""
    found = [average_precision(right[:, k], scores[:, k]) for k in range(right.shape[1])]
    return float(np.mean([x for x in found if np.isfinite(x)] or [np.nan]))


def accuracy(right: np.ndarray, scores: np.ndarray) -> float:
    return float(right[np.arange(len(right)), scores.argmax(axis=1)].mean())


def interval(of: Callable[[np.ndarray, np.ndarray], float], right: np.ndarray, scores: np.ndarray) -> list[float]:
    """Of a number, by drawing clips with replacement: what lies between the 2.5th and the 97.5th percentile."""
    rng = np.random.default_rng(0)
    drawn = [of(right[rows], scores[rows]) for rows in (rng.integers(0, len(right), len(right)) for _ in range(DRAWS))]
    return [float(x) for x in np.nanpercentile(drawn, (100 * (1 - SURE) / 2, 100 * (1 + SURE) / 2))]


def results(right: np.ndarray, scores: np.ndarray, classes: list[str], one: bool) -> dict[str, Any]:
    """right (n, classes) bool -> what is said of it, by class, too."""
    name, of = ("accuracy", accuracy) if one else ("mAP", mean_average_precision)
    by_class = {
        label: {
            "clips": int(right[:, k].sum()),
            "AP": average_precision(right[:, k], scores[:, k]),
            "AUC": area_under_curve(right[:, k], scores[:, k]),
        }
        for k, label in enumerate(classes)
    }
    return {
        "clips": len(right),
        name: of(right, scores),
        f"{name} 95%": interval(of, right, scores),
        "mAP": mean_average_precision(right, scores),
        "AUC": float(np.mean([c["AUC"] for c in by_class.values() if np.isfinite(c["AUC"])] or [np.nan])),
        "classes without a clip": [label for label, c in by_class.items() if not c["clips"]],
        "by class": by_class,
    }
