"""The optimizers: what each computes, and what it keeps of each weight between two steps. To add one, write a class with the
methods of `AdamW`, add it to OPTIMIZERS, and its name to `train.optimizer`.

An update must not depend on which rank holds which rows of a weight. AdamW treats each number alone; Muon orthogonalizes whole
matrices, so every rank computes all of a matrix and takes its own rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from equiav.config import TrainConfig
from equiav.parallel import first_row


class Keeps(NamedTuple):
    """A tensor that an optimizer keeps of a weight."""

    scalar: bool = False  # float32; else of the weight's shape
    device: torch.device | None = None  # of a scalar
    positive: bool = False  # never below zero
    counts: bool = False  # the steps that changed the weight


class AdamW(torch.optim.AdamW):
    """The paper's."""

    def __init__(self, weights: Iterable[Tensor], settings: TrainConfig, device: torch.device):
        # On a CPU the fused one rounds the last few numbers of a tensor differently, so the bits would depend on the sharding.
        self.fused = device.type == "cuda"
        options = {"lr": settings.lr_start, "betas": settings.betas, "weight_decay": settings.weight_decay}
        super().__init__([{"params": list(weights)}], fused=self.fused, **options)

    def keeps(self, p: Tensor) -> dict[str, Keeps]:
        step = Keeps(scalar=True, device=p.device if self.fused else torch.device("cpu"), counts=True)
        return {"exp_avg": Keeps(), "exp_avg_sq": Keeps(positive=True), "step": step}


MOMENTUM = 0.95
ROUNDS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, as Muon's authors chose them
RMS = 0.2  # of an update, as AdamW's has it, so that both take the same learning rates (arXiv:2502.16982)


def orthogonal(matrix: Tensor) -> Tensor:
    """(m, n) -> the same, its singular values about 1."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float().T if tall else matrix.float()
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon:
    """Matrices move along their orthogonalized momentum; everything else is AdamW's."""

    def __init__(self, weights: Iterable[Tensor], settings: TrainConfig, device: torch.device):
        listed = list(weights)
        self.matrices = [p for p in listed if p.dim() == 2]
        self.rest = AdamW([p for p in listed if p.dim() != 2], settings, device)
        self.state = self.rest.state
        self.decay = settings.weight_decay
        self.param_groups: list[dict[str, Any]] = [
            {"params": self.matrices, "lr": settings.lr_start},
            *self.rest.param_groups,
        ]
        self.found_inf: Tensor | None = None  # on a GPU, not zero: nothing is to change

    def keeps(self, p: Tensor) -> dict[str, Keeps]:
        return {"momentum": Keeps()} if p.dim() == 2 else self.rest.keeps(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.rest.zero_grad(set_to_none)
        for p in self.matrices:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        if self.rest.fused:
            self.rest.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.rest.step()
        rate = self.param_groups[0]["lr"]
        for p in self.matrices:
            if p.grad is None:
                continue
            kept = self.state[p]
            if "momentum" not in kept:
                kept["momentum"] = torch.zeros_like(p)
            momentum = kept["momentum"].lerp(p.grad, 1 - MOMENTUM)
            update = p.grad.lerp(momentum, MOMENTUM)  # Nesterov's
            whole = update.full_tensor() if isinstance(update, DTensor) else update
            size = RMS * max(whole.shape) ** 0.5
            moved = _rows_of(orthogonal(whole) * size, update).to(p.dtype)
            changed = local(p) * (1 - rate * self.decay) - rate * moved
            self._replace(local(kept["momentum"]), local(momentum))
            self._replace(local(p), changed)

    def _replace(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _rows_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a matrix, which is cut as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    return whole[first_row(like) :][: len(like.to_local())]


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}
