"""What frozen features tell of labels: by a linear classifier, and by the nearest clips."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.evaluate.classification import accuracy, mean_average_precision
from streaming.order import permutation

STRENGTHS = tuple(10.0**k for k in range(-6, 3))  # of the regularisation, tried on what is held out
MIDDLE = 1e-2  # where nothing can be chosen
ITERATIONS = 200  # of L-BFGS, at most
WARMTH = 0.07  # of the neighbours' votes
BLOCK = 1 << 24  # similarities at a time


class Linear(NamedTuple):
    weight: Tensor  # (D, classes) float64
    bias: Tensor  # (classes,)
    mean: Tensor  # (D,), of the features that it learned from
    deviation: Tensor  # (D,)

    def scores(self, x: np.ndarray, one: bool) -> np.ndarray:
        z = (torch.from_numpy(x).double() - self.mean) / self.deviation @ self.weight + self.bias
        return (z.softmax(dim=1) if one else z.sigmoid()).numpy()


def fit_linear(x: np.ndarray, right: np.ndarray, strength: float, one: bool) -> Linear:
    """x (n, D), right (n, classes) bool -> the classifier of least loss plus strength / 2 x its squared weights. one:
    cross-entropy; else binary cross-entropy of each class by itself."""
    features, wanted = torch.from_numpy(x).double(), torch.from_numpy(right).double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-12)
    features = (features - mean) / deviation
    weight = torch.zeros(x.shape[1], right.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(right.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-8, tolerance_change=1e-12,
                               history_size=20, line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> Tensor:
        search.zero_grad()
        z = features @ weight + bias
        if one:
            data = F.cross_entropy(z, wanted)
        else:
            data = F.binary_cross_entropy_with_logits(z, wanted, reduction="none").sum(dim=1).mean()
        value = data + strength / 2 * weight.square().sum()
        value.backward()
        return value

    search.step(loss)  # type: ignore[arg-type]
    return Linear(weight.detach(), bias.detach(), mean, deviation)


def choose_strength(
    x: np.ndarray, right: np.ndarray, held_out: float, one: bool, seed: int
) -> tuple[float, dict[str, float | None]]:
    """-> the strength that is best on a part of the clips, learned from the others; and what each was worth there. Of equals, the
    strongest."""
    order = permutation(seed, len(x))
    count = min(len(x) - 1, max(1, round(held_out * len(x))))
    apart, rest = order[:count], order[count:]
    worth: dict[float, float] = {}
    for strength in STRENGTHS:
        scores = fit_linear(x[rest], right[rest], strength, one).scores(x[apart], one)
        worth[strength] = (accuracy if one else mean_average_precision)(right[apart], scores)
    told = {f"{strength:g}": value if math.isfinite(value) else None for strength, value in worth.items()}
    known = {strength: value for strength, value in worth.items() if math.isfinite(value)}
    if not known:  # none of what is held out has a label
        return MIDDLE, told
    return max(known, key=lambda strength: (known[strength], strength)), told


def nearest(x: np.ndarray, right: np.ndarray, asked: np.ndarray, neighbours: int) -> np.ndarray:
    """x (n, D) of known clips, asked (m, D) -> (m, classes), shares of the votes: the classes of the nearest by cosine, each
    weighing exp(cosine / WARMTH)."""
    known, others = (F.normalize(torch.from_numpy(a).double(), dim=1) for a in (x, asked))
    classes, k = torch.from_numpy(right).double(), min(neighbours, len(x))
    parts = []
    for some in others.split(max(1, BLOCK // max(len(x), k * classes.shape[1]))):
        near = (some @ known.T).topk(k, dim=1)
        votes = ((near.values - near.values[:, :1]) / WARMTH).exp()  # (b, k)
        parts.append((votes[:, :, None] * classes[near.indices]).sum(dim=1) / votes.sum(dim=1, keepdim=True))
    return torch.cat(parts).numpy()
