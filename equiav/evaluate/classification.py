"""What a classifier is worth on a dataset: every clip once, shared by all processes, the numbers those of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiav.augment import Clips
from equiav.config import Config
from equiav.evaluate.look import Features, look
from equiav.parallel import Ranks
from equiav.tasks import Classification
from streaming import Dataset

DRAWS, SURE = 200, 0.95  # of the bootstrap


def score(
    config: Config, task: Classification, model: Any, dataset: Dataset, ranks: Ranks, chosen: np.ndarray
) -> Features:
    """Collective. Of the `chosen` (samples,) bool: probabilities, their mean over `tune.test_frames` frames."""

    def probabilities(clips: Clips, computes: torch.autocast) -> Tensor:
        audio, image = task.inputs(clips)
        with computes:
            z = model(audio, image).double()
        return z.softmax(dim=1) if task.tune.loss == "one" else z.sigmoid()

    was_training = model.training
    model.eval()
    found = look(config, task.tune, dataset, ranks, chosen, probabilities)
    model.train(was_training)
    return found


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
