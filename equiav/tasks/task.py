"""What the loop asks of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from equiav.augment import Clips
from equiav.config import Config
from equiav.objective import Rows, aligned

Metrics = dict[str, float]
Outputs = tuple[Any, ...]
"""What the model makes of a micro-batch, a NamedTuple of tensors (b, ...) or None, a row a clip."""
O = TypeVar("O", bound=Outputs)  # noqa: E741


class Task(Protocol):
    @property
    def config(self) -> Config: ...

    fewest: int
    """Clips; a step with fewer changes nothing."""
    hears: bool
    sees: bool
    """What it uses of a clip."""
    often: np.ndarray | None
    """(clips,) how often each comes in an epoch, in the mean; None: once."""
    learns_from: Mapping[str, str]
    """Digests of what the run is a function of, beside its settings and its clips."""

    def build(self) -> nn.Module:
        """The model, on whatever device is the default; `init_weights(seed)` fills it."""
        ...

    def blocks(self, model: nn.Module) -> Iterator[nn.Module]:
        """Parts of the model that are sharded, and compiled, each by itself."""
        ...

    def prepared(self, clips: Clips) -> Clips:
        """On the host, before they go to the device: with what the loss needs beside them."""
        ...

    def forward(self, model: nn.Module, clips: Clips, computes: Callable[[], Any]) -> Outputs:
        """A micro-batch. `computes` is called when its inputs are ready: a context for the model."""
        ...

    def loss(self, whole: Any, clips: Clips, rows: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of this process's rows, joined: its share of the global loss, and of each row what it contributes to what the run
        reports: name -> (b,) float64, sums over the global batch."""
        ...

    def updated(self, model: nn.Module) -> None:
        """After an update."""
        ...

    def reported(self, sums: Metrics) -> Metrics:
        """What the log says, from the sums over the global batch."""
        ...

    def chance(self, step: int, clips: float) -> Metrics:
        """The loss of guessing among so many clips, by term, of the terms that this step trains; `total`: all, weighted."""
        ...

    def untrained(self, step: int) -> set[str]:
        """Metrics that are undefined at this step."""
        ...

    def flops(self) -> int:
        """Multiply-adds of a clip, forward and backward."""
        ...


def joined(parts: Sequence[O]) -> O:
    """The rows of all parts, as one. It is a leaf: backward leaves gradients in it, which `backward` hands on."""
    fields: list[Any] = [
        None if z[0] is None else torch.cat(z).detach().requires_grad_() for z in zip(*parts, strict=True)
    ]
    return type(parts[0])(*fields)


def backward(own: Outputs, whole: Outputs, part: slice) -> None:
    """Goes on backward from the gradients of those rows of `whole` that `own` is."""
    outputs, gradients = [], []
    for z, of_whole in zip(own, whole, strict=True):
        if z is not None and of_whole is not None and z.requires_grad:
            outputs.append(z)
            gradients.append(torch.zeros_like(z) if of_whole.grad is None else aligned(of_whole.grad[part]).to(z.dtype))
    torch.autograd.backward(outputs, gradients)
