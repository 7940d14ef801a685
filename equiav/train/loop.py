"""Batch -> views -> embeddings -> loss -> update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from equiav.augment import Batch, make_views
from equiav.config import Config, require
from equiav.model import EquiAV
from equiav.objective import Embeddings, Rows, Weights, equiav_loss, weights_at
from equiav.parallel import Ranks, add_gradients, fully_sharded, squared_norm
from equiav.train.schedule import learning_rate
from streaming.order import share

Metrics = dict[str, float]


class NotFinite(FloatingPointError):  # noqa: N818
    """The loss or the gradient was not finite, step after step. `steps` have the ids of their samples."""

    def __init__(self, message: str, steps: dict[int, list[int]]):
        super().__init__(message)
        self.steps = steps


@dataclass
class TrainState:
    """What an update changes. `step` updates are done."""

    model: EquiAV
    optimizer: torch.optim.Optimizer
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite


def begin(config: Config, ranks: Ranks) -> TrainState:
    """The state before the first step, on all ranks together: a function of the config alone."""
    settings = config.train
    require(
        ranks.size <= settings.micro_batches,
        "train.micro_batch",
        settings.micro_batch,
        f"{settings.batch_size // ranks.size} or less: {ranks.size} processes share train.batch_size="
        f"{settings.batch_size} in whole micro-batches, of which there are {settings.micro_batches}",
    )
    shard = settings.shard or ranks.size
    require(ranks.size % shard == 0, "train.shard", shard, f"a divisor of the {ranks.size} processes")
    with torch.device("meta"):
        model = EquiAV(config.model, config.objective)
    model.to_empty(device=ranks.device).init_weights(config.seed)
    model.train()
    blocks = [block for branch in (model.audio, model.image) for block in branch.encoder.blocks]
    if settings.compile:
        for block in blocks:
            block.compile()
    if ranks.size > 1:
        fully_sharded(model, blocks, ranks.mesh(shard))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.lr_start,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        # On a CPU, the fused one rounds the last few numbers of a tensor otherwise: where ranks cut it would show.
        fused=ranks.device.type == "cuda",
    )
    return TrainState(model, optimizer)


def train(
    config: Config,
    ranks: Ranks,
    state: TrainState,
    batches: Iterable[Batch],
    report: Callable[[int, Metrics], object] = lambda step, metrics: None,
    signals: Callable[[], list[float]] = list,
    act: Callable[[int, list[float]], bool] = lambda step, signals: False,
) -> None:
    """From `state.step` to `config.train.steps`.

    `report(step, metrics)`, on every rank with the same numbers, one step late: nobody waits for the device. `signals` are
    numbers of this rank that are summed over all; `act(steps done, their sums)`, at the same step on every rank, may save, and
    ends the run where it returns true.
    """
    settings, model, optimizer = config.train, state.model, state.optimizer
    late: _Late | None = None
    ended = False
    bad: dict[int, list[int]] = {}  # in a row
    for step, batch in zip(range(state.step, settings.steps), batches, strict=False):
        weights, rate = weights_at(step, settings.steps, config.objective), learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        terms, rows = forward_backward(config, ranks, model, batch, weights)

        square = squared_norm(p.grad for p in model.parameters() if p.grad is not None)
        own = torch.stack([*terms.values(), square, *_to_device(signals(), square.device)])
        sums = ranks.total(own)  # (terms, square, signals), float64
        norm = sums[len(terms)].sqrt()
        clip_grads_with_norm_(model.parameters(), settings.clip, norm.float())
        finite = sums.isfinite().all()
        nothing = ~finite | (rows.everyone.sum() < 2)
        if ranks.device.type == "cuda":
            # Read on the device: where it is not zero, nothing changes, the count of steps included.
            optimizer.found_inf = nothing.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not nothing:
            optimizer.step()
        model.clamp_temperature()
        state.step = step + 1

        values = torch.cat([sums, torch.stack([norm, finite, rows.N]).double()])
        now = _Late(step, batch, rate, tuple(terms), _to_host(values))
        ended = late is not None and _settle(late, config, ranks, state, bad, report, act)
        late = now
        if ended:
            break
    if late is not None:
        ended = _settle(late, config, ranks, state, bad, report, act) or ended
    if state.step != settings.steps and not ended:
        raise RuntimeError(f"the data ended after {state.step} batches, expected train.steps={settings.steps}")


def forward_backward(
    config: Config, ranks: Ranks, model: EquiAV, batch: Batch, weights: Weights
) -> tuple[dict[str, Tensor], Rows]:
    """Gradients of the global loss into the model -> this rank's share of the terms, and the rows they are of."""
    settings, device = config.train, ranks.device
    low_precision = settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")
    p = min(settings.micro_batch, settings.batch_size)
    shares = [share(settings.micro_batches, rank, ranks.size) for rank in range(ranks.size)]  # in micro-batches
    # As many micro-batches on every rank, so that the collectives of sharded parameters meet; and every one full.
    b = p * max(stop - first for first, stop in shares)
    batch = batch.to(device).padded(b)
    parts = [slice(k, k + p) for k in range(0, b, p)]

    def gather(x: Tensor) -> Tensor:
        """Own rows (b, ...) -> those of the global batch, in its order: (M, ...), the same at every number of ranks."""
        everyone = ranks.gather(x).split(b)
        return torch.cat([own[: p * (stop - first)] for own, (first, stop) in zip(everyone, shares, strict=True)])

    def embed(part: slice) -> Embeddings:
        views = make_views(config, batch.rows(part))
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            return Embeddings(*model(*views))

    rows = Rows.of(batch.valid.to(device, non_blocking=True), gather, p * shares[ranks.rank][0], p)
    with torch.set_grad_enabled(not settings.recompute):
        embedded = [embed(part) for part in parts]
    whole = Embeddings.cat(embedded)
    loss, terms = equiav_loss(whole, weights, config.objective, rows)
    loss.backward()

    def backward(k: int) -> None:
        e = embed(parts[k]) if settings.recompute else embedded[k]
        e.backward_from(whole, parts[k])

    add_gradients(model, [partial(backward, k) for k in range(len(parts))])
    return terms, rows


class _Late(NamedTuple):
    """A step whose numbers are on their way to the host."""

    step: int
    batch: Batch
    rate: float
    names: tuple[str, ...]
    values: tuple[Tensor, Any]  # on the host, when the event has come


def _to_device(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    if values.device.type != "cuda":
        return values, None
    there = torch.empty_like(values, device="cpu", pin_memory=True)
    there.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return there, event


def _settle(
    late: _Late,
    config: Config,
    ranks: Ranks,
    state: TrainState,
    bad: dict[int, list[int]],
    report: Callable[[int, Metrics], object],
    act: Callable[[int, list[float]], bool],
) -> bool:
    """What follows from a step's numbers; true where the run ends."""
    host, event = late.values
    if event is not None:
        event.synchronize()
    values = host.tolist()
    norm, finite, N = values[-3:]
    signals = values[len(late.names) + 1 : -3]
    metrics = dict(zip(late.names, values, strict=False))
    if finite:
        bad.clear()
    else:
        state.skipped += 1
        bad[late.step] = [sample for part in ranks.objects(late.batch.samples.tolist()) for sample in part]
    report(late.step, {**metrics, "gradient_norm": norm, "lr": late.rate, "clips": N, "skipped": state.skipped})
    if len(bad) >= config.train.max_skipped:
        names = [name for name, value in {**metrics, "gradient_norm": norm}.items() if not abs(value) < float("inf")]
        raise NotFinite(
            f"step {late.step}: {', '.join(names)} not finite, as in {len(bad)} steps in a row "
            f"(train.max_skipped={config.train.max_skipped}). Lower train.lr or train.clip, or set "
            "train.precision=float32",
            dict(bad),
        )
    return act(state.step, signals)
