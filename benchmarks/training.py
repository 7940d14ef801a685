"""The training step as the loop runs it, and what a checkpoint costs it. ViT-B in bfloat16 on a GPU, tiny on a CPU."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from equiav.augment import Batch, make_views
from equiav.commands.plan import PlanConfig, make_plan
from equiav.config import Config, from_dict, load
from equiav.parallel import Ranks
from equiav.train import TrainState, begin, train
from equiav.train.checkpoint import Checkpoints

Row = tuple[str, str, str]  # what, figure, beside what it is measured
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = "vit_b16" if DEVICE == "cuda" else "tiny"
BATCHES = (32, 64, 128, 256) if DEVICE == "cuda" else (32,)
STEPS = 20


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], repeat: int = 7) -> float:
    """Median time of a call, after two to warm up."""
    times = []
    for k in range(repeat + 2):
        started = time.perf_counter()
        call()
        synchronize()
        if k >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


class Steps:
    """A run over one batch that stays the same."""

    def __init__(self, batch: int, **settings: object):
        config, _ = load(Config, "benchmark", ["--model.size", SIZE], recipe="smoke")
        values = {"batch_size": batch, "micro_batch": batch, "steps": 10**6, "warmup_steps": 0, **settings}
        self.config: Config = replace(config, device=DEVICE, train=replace(config.train, **values))
        m, side = config.model, config.data.frame_size
        frames = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        waveform = torch.randint(-3000, 3000, (batch, 160 * m.spectrogram_frames)).short()
        lengths = torch.full((batch,), waveform.shape[1])
        self.batch = Batch(0, torch.arange(batch), frames, waveform, lengths, torch.ones(batch, dtype=torch.bool))
        self.ranks = Ranks(DEVICE)
        self.state: TrainState = begin(self.config, self.ranks)
        self.run(5)

    def run(self, count: int, act: Callable[[int], object] = lambda step: None) -> float:
        """Seconds that `count` steps take."""
        config = replace(self.config, train=replace(self.config.train, steps=self.state.step + count))

        def after(step: int, signals: list[float]) -> bool:
            act(step)
            return False

        synchronize()
        begun = time.perf_counter()
        train(config, self.ranks, self.state, itertools.repeat(self.batch), act=after)
        synchronize()
        return time.perf_counter() - begun


def peak_rate() -> float:
    """Multiply-adds a second of a large product, in the precision of the step."""
    n = 8192 if DEVICE == "cuda" else 1024
    a, b = (
        torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32) for _ in (0, 1)
    )
    return n**3 / seconds(lambda: a @ b)


def step() -> Iterator[Row]:
    """Views, forward, loss, backward, update, numbers for the log."""
    peak, counted = (
        peak_rate(),
        make_plan(from_dict(PlanConfig, {"model": {"size": SIZE}}, "benchmark")).forward_backward,
    )
    best, rate = BATCHES[0], 0.0
    for batch, settings in itertools.product(BATCHES, ({}, {"compile": True}) if DEVICE == "cuda" else ({},)):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            steps = Steps(batch, **settings)
            spent = steps.run(STEPS) / STEPS
        except torch.cuda.OutOfMemoryError:
            yield f"training step, {SIZE}, batch {batch}", "does not fit", ", ".join(settings)
            continue
        views = seconds(lambda s=steps: make_views(s.config, s.batch.to(s.ranks.device)))
        beside = f"{batch * counted / spent / peak:.0%} of a large product's rate; views {views / spent:.1%}"
        if DEVICE == "cuda":
            beside += f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
        yield (
            f"training step, {SIZE}, batch {batch}{', compiled' if settings else ''}",
            f"{batch / spent:,.0f} samples/s",
            beside,
        )
        if batch / spent > rate and not settings:
            best, rate = batch, batch / spent
        del steps
    yield from _where(best)
    for micro_batch, settings in ((best // 4, {}), (best // 4, {"recompute": True})):
        steps = Steps(best, micro_batch=micro_batch, **settings)
        spent = steps.run(STEPS) / STEPS
        how = f"micro-batches of {micro_batch}{', recomputed' if settings else ''}"
        yield f"training step, {SIZE}, batch {best}, {how}", f"{best / spent / rate:.2f}x", "of that at once"
        del steps


def _where(batch: int) -> Iterator[Row]:
    """What the time of a step goes to."""
    steps = Steps(batch)
    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        steps.run(3)
    name = f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    for event in events[:10]:
        yield f"of which {event.key[:60]}", f"{getattr(event, name) / total:.1%}", f"{event.count // 3} times a step"


def checkpoint() -> Iterator[Row]:
    steps, count = Steps(BATCHES[0]), 100
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, held = Checkpoints(folder, steps.ranks), []

        def act(at: int) -> None:
            if at == middle:
                checkpoints.save(steps.state, {})
                held.append(checkpoints.seconds)

        without, beside = [], []
        for _ in range(3):
            without.append(steps.run(count))
            middle = steps.state.step + count // 2
            beside.append(steps.run(count, act))
            checkpoints.wait()
        checkpoints.close()
    yield (
        f"a save every {count} steps, {SIZE}, batch {BATCHES[0]}",
        f"{min(without) / min(beside):.3f}x the samples/s without",
        f"holds the run up for {1000 * min(held):.0f} ms, {min(held) / min(without):.2%} of the interval; writes beside it",
    )


BENCHMARKS = (step, checkpoint)
