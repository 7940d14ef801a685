"""Batch -> what the task makes of it -> loss -> update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from equiav.augment import Clips
from equiav.objective import Rows
from equiav.parallel import Ranks, add_gradients, fully_sharded, norm
from equiav.tasks import Outputs, Task, joined
from equiav.tasks.task import Metrics, backward
from equiav.train.optimizers import OPTIMIZERS, AdamW, Muon
from equiav.train.schedule import learning_rate
from streaming.order import share


class Signals(NamedTuple):
    """Numbers that ranks tell each other with every step; each has the largest of all."""

    asked: float = 0.0  # the status with which to end, 0: go on
    due: float = 0.0  # a save is, by time
    busy: float = 0.0  # with a save
    superseded: float = 0.0
    overdue: float = 0.0  # a save is, and the run shall end for it


@dataclass
class TrainState:
    """What an update changes. `step` updates are done."""

    model: nn.Module
    optimizer: AdamW | Muon
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite


def initial_state(task: Task, ranks: Ranks) -> TrainState:
    """The state before the first step, on all ranks together: a function of the config alone."""
    settings = task.config.train
    with torch.device("meta"):
        model: Any = task.build()
    model.to_empty(device=ranks.device).init_weights(task.config.seed)
    model.train()
    blocks = list(task.blocks(model))
    if settings.compile:
        for block in blocks:
            block.compile()
    if ranks.size > 1:
        fully_sharded(model, blocks, ranks.mesh())
    learned = [p for p in model.parameters() if p.requires_grad]
    return TrainState(model, OPTIMIZERS[settings.optimizer](learned, settings, ranks.device))


class PhaseTimer:
    """Seconds of a step by what is computed. On a GPU they are its own: marks among what is queued there, which nobody waits
    for; they are read when the step's numbers have come."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self, phase: str) -> None:
        """Of views, model, update; none: the step has ended."""
        mark: Any = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
        if self._cuda:
            mark.record()
        self._marks.append((phase, mark))

    def seconds(self) -> dict[str, float]:
        spent: dict[str, float] = {}
        for (phase, begun), (_, ended) in pairwise(self._marks):
            seconds = begun.elapsed_time(ended) / 1000 if self._cuda else ended - begun
            spent[phase] = spent.get(phase, 0.0) + seconds
        return spent


class Step(NamedTuple):
    """A step that was begun; its numbers may still be on their way to the host."""

    number: int
    batch: Clips
    rate: float
    task: Task
    names: tuple[str, ...]  # of the terms
    values: Tensor  # (terms, norm, finite, N, signals), on the host when the event has come
    event: Any
    timer: PhaseTimer

    def read(self) -> tuple[Metrics, bool, Signals]:
        """Waits for the device. -> what the run reports, the same on every rank; whether all of it was finite; signals."""
        if self.event is not None:
            self.event.synchronize()
        values = self.values.tolist()
        count = len(self.names)
        metrics = self.task.reported(dict(zip(self.names, values[:count], strict=True)))
        gradient_norm, finite, N = values[count : count + 3]
        metrics |= {"gradient_norm": gradient_norm, "lr": self.rate, "clips": int(N), "bad": int(metrics["bad"])}
        return metrics, bool(finite), Signals(*values[count + 3 :])


def steps(
    task: Task, ranks: Ranks, state: TrainState, batches: Iterable[Clips], signals: Callable[[], Signals] = Signals
) -> Iterator[Step]:
    """From `state.step` to `train.steps`, a step at a time; nobody waits for the device.

    Where a step's loss or gradient is not finite, or it has too few clips, nothing changes: the same on all ranks.
    """
    settings, model, optimizer = task.config.train, state.model, state.optimizer
    for number, batch in zip(range(state.step, settings.steps), batches, strict=False):
        rate = learning_rate(number, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        timer = PhaseTimer(ranks.device)
        names, terms, N = forward_backward(task, ranks, model, batch, number, timer)
        timer.start("update")
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        gradient_norm, told = norm(ranks, gradients, signals())
        clip_grads_with_norm_(model.parameters(), settings.clip, gradient_norm.float())
        finite = terms.isfinite().all() & gradient_norm.isfinite()
        nothing = ~finite | (task.fewest > N)
        if ranks.device.type == "cuda":
            # Read on the device: where it is not zero, nothing changes, the count of steps included.
            optimizer.found_inf = nothing.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not nothing:
            optimizer.step()
        task.updated(model)
        state.step = number + 1
        timer.start("")
        values = torch.cat([terms, torch.stack([gradient_norm, finite.double(), N.double()]), told])
        yield Step(number, batch, rate, task, names, *_to_host(values), timer)
    if state.step != settings.steps:
        raise RuntimeError(f"the data ended after {state.step} batches, expected train.steps={settings.steps}")


def forward_backward(
    task: Task, ranks: Ranks, model: nn.Module, batch: Clips, step: int, timer: PhaseTimer
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Gradients of the global loss into the model -> names and values (float64) of its terms, and the number of clips."""
    settings, device = task.config.train, ranks.device
    low_precision = settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")
    p = min(settings.micro_batch, settings.batch_size)
    shares = [share(settings.micro_batches, rank, ranks.size) for rank in range(ranks.size)]  # in micro-batches
    # As many micro-batches on every rank, so that the collectives of sharded parameters meet; and every one full.
    b = p * max(stop - first for first, stop in shares)
    batch = task.prepared(batch).to(device).padded(b)
    parts = [slice(k, k + p) for k in range(0, b, p)]

    def gather(x: Tensor) -> Tensor:
        """Own rows (b, ...) -> those of the global batch, in its order: (M, ...), the same at every number of ranks."""
        everyone = ranks.gather(x).split(b)
        return torch.cat([own[: p * (stop - first)] for own, (first, stop) in zip(everyone, shares, strict=True)])

    def computes() -> torch.autocast:
        timer.start("model")
        return torch.autocast(device.type, torch.bfloat16, enabled=low_precision)

    def forward(part: slice) -> Outputs:
        timer.start("views")
        return task.forward(model, batch.rows(part), computes)

    valid = batch.valid.to(device, non_blocking=True)
    rows = Rows.of(valid, gather, p * shares[ranks.rank][0], p)
    with torch.set_grad_enabled(not settings.recompute):
        made = [forward(part) for part in parts]
    whole = joined(made)
    loss, terms = task.loss(whole, batch, rows, step)
    loss.backward()
    terms["bad"] = ((batch.samples >= 0) & ~valid).double()

    def through(k: int) -> None:
        backward(forward(parts[k]) if settings.recompute else made[k], whole, parts[k])

    add_gradients(model, [partial(through, k) for k in range(len(parts))])
    # Row by row, in the order of the batch: a sum of the same shape in the same order at every number of ranks.
    sums = gather(torch.stack(list(terms.values()), dim=1)).sum(dim=0)  # (M, terms) -> (terms,)
    return tuple(terms), sums, rows.everyone.sum()


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    if values.device.type != "cuda":
        return values, None
    there = torch.empty_like(values, device="cpu", pin_memory=True)
    there.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return there, event
