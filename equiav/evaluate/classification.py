"""What a classifier is worth on a dataset: every clip once, shared by all processes, the numbers those of one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch

from equiav.config import Config
from equiav.data.decoder import ClipDecoder
from equiav.data.stream import as_tensors
from equiav.parallel import Ranks
from equiav.tasks import Classification
from streaming import Dataset, DatasetError, Loader, Order, Selection

DRAWS, SURE = 200, 0.95  # of the bootstrap


class Tested(NamedTuple):
    samples: np.ndarray  # (n,) ascending; a clip of which nothing can be used is not there
    scores: np.ndarray  # (n, classes) float64, mean probabilities
    bad: Counter[str]  # why clips, or frames of clips, could not be used -> how many


@torch.no_grad()
def score(
    config: Config, task: Classification, model: Any, dataset: Dataset, ranks: Ranks, chosen: np.ndarray
) -> Tested:
    """Collective. Of the `chosen` (samples,) bool: the mean of a clip's probabilities over `tune.test_frames` frames from the middles of equal parts."""
    s, t = config.stream, config.train
    order = Order(dataset.fingerprint, 0, t.batch_size, s.lanes, s.window)
    sums: dict[int, np.ndarray] = {}
    terms: Counter[int] = Counter()
    bad: Counter[str] = Counter()
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
            selection=None if chosen.all() else Selection(chosen),
            cache=s.cache.expanduser(),
            cache_bytes=s.cache_bytes,
            sharers=ranks.local_size,
            draw=lambda epoch, samples, at=at: np.full(len(samples), at),
        ) as loader:
            for _, batch in zip(range(loader.steps_per_epoch), loader.batches(0), strict=False):
                own = (*_of_batch(config, task, model, as_tensors(batch), ranks), [one.reason for one in batch.bad])
                for samples, scores, reasons in ranks.objects(own):
                    bad.update(reasons)
                    for sample, row in zip(samples, scores, strict=True):
                        sums[sample] = sums[sample] + row if sample in sums else row
                        terms[sample] += 1
    model.train(was_training)
    if not sums:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.most_common(3))
        raise DatasetError(f"tune.test_url: no clip of {dataset.store.url} can be used ({reasons})")
    samples = sorted(sums)
    return Tested(np.array(samples, np.int64), np.stack([sums[k] / terms[k] for k in samples]), bad)


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


def average_precisions(right: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """right, scores (n,), weights (d, n), how often each clip counts -> (d,). The mean of the precision at each right clip; clips
    of one score count together. nan: there is no right one."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last of each score
    ranked = np.cumsum(weights[:, order], axis=1)[:, ends]
    hits = np.cumsum(weights[:, order] * right[order], axis=1)[:, ends]
    gained = np.diff(hits, prepend=0, axis=1)
    with np.errstate(invalid="ignore"):
        precision = np.where(ranked > 0, hits / np.maximum(ranked, 1e-300), 0.0)
        return (gained * precision).sum(axis=1) / hits[:, -1]


def average_precision(right: np.ndarray, scores: np.ndarray) -> float:
    return float(average_precisions(right, scores, np.ones((1, len(right))))[0])


def area_under_curve(right: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a right clip has a higher score than a wrong one, ties a half. nan: all are right, or none is."""
    wrong = np.sort(scores[~right])
    if not right.any() or not len(wrong):
        return float("nan")
    below, upto = (np.searchsorted(wrong, scores[right], side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(wrong)))


def mean_average_precisions(right: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """right (n, classes) bool, weights (d, n) -> (d,). Over the classes that have a clip, each as much."""
    total, count = np.zeros(len(weights)), np.zeros(len(weights))
    for k in np.flatnonzero(right.any(axis=0)):
        found = average_precisions(right[:, k], scores[:, k], weights)
        there = np.isfinite(found)
        total, count = total + np.where(there, found, 0.0), count + there
    with np.errstate(invalid="ignore"):
        return total / count


def mean_average_precision(right: np.ndarray, scores: np.ndarray) -> float:
    return float(mean_average_precisions(right, scores, np.ones((1, len(right))))[0])


def accuracies(right: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hit = right[np.arange(len(right)), scores.argmax(axis=1)]
    return weights @ hit / weights.sum(axis=1)


def accuracy(right: np.ndarray, scores: np.ndarray) -> float:
    return float(accuracies(right, scores, np.ones((1, len(right))))[0])


def interval(
    of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray], right: np.ndarray, scores: np.ndarray
) -> list[float]:
    """Of a number, by drawing clips with replacement: what lies between the 2.5th and the 97.5th percentile."""
    n = len(right)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float64)
    drawn = of(right, scores, weights)
    return [float(x) for x in np.percentile(drawn[np.isfinite(drawn)], (50 * (1 - SURE), 50 * (1 + SURE)))]


def results(right: np.ndarray, scores: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """right (n, classes) bool -> what is said of it, by class, too. What cannot be said is null. There is an accuracy where each
    clip has one class."""
    one = bool((right.sum(axis=1) == 1).all())
    by_class = {
        label: {
            "clips": int(right[:, k].sum()),
            "AP": _said(average_precision(right[:, k], scores[:, k])),
            "AUC": _said(area_under_curve(right[:, k], scores[:, k])),
        }
        for k, label in enumerate(classes)
    }
    areas = [c["AUC"] for c in by_class.values() if c["AUC"] is not None]
    area = float(np.mean(areas)) if areas else None
    said: dict[str, Any] = {"clips": len(right)}
    for name, of in ((("accuracy", accuracies),) if one else ()) + (("mAP", mean_average_precisions),):
        said[name] = _said(float(of(right, scores, np.ones((1, len(right))))[0]))
        said[f"{name} 95%"] = interval(of, right, scores) if right.any() else None
    return {
        **said,
        "AUC": area,
        "d'": None if area is None or not 0 < area < 1 else math.sqrt(2) * NormalDist().inv_cdf(area),
        "classes without a clip": [label for label, c in by_class.items() if not c["clips"]],
        "by class": by_class,
    }


def _said(number: float) -> float | None:
    return number if np.isfinite(number) else None
