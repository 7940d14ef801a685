"""The training step as the loop runs it, and what a checkpoint costs it. ViT-B in bfloat16 on a GPU, tiny on a CPU."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from equiav.augment import Clips, make_views
from equiav.config import Config, from_dict, load
from equiav.model.arithmetic import forward_backward
from equiav.parallel import Ranks, norm
from equiav.tasks import Pretraining
from equiav.train import TrainState, initial_state, steps
from equiav.train.checkpoint import Checkpoints
from equiav.train.numbers import Numbers
from monitoring.exporter import FOLDER
from monitoring.metrics import by_key
from streaming import Quarantine, Stats

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
        self.batch = Clips(0, torch.arange(batch), frames, waveform, lengths, torch.ones(batch, dtype=torch.bool))
        self.ranks = Ranks(DEVICE)
        self.state: TrainState = initial_state(Pretraining(self.config), self.ranks)
        self.run(5)

    def run(self, count: int, act: Callable[[int], object] = lambda step: None) -> float:
        """Seconds that `count` steps take. `act(steps done)`: after each."""
        config = replace(self.config, train=replace(self.config.train, steps=self.state.step + count))
        synchronize()
        begun, late = time.perf_counter(), None
        for step in steps(Pretraining(config), self.ranks, self.state, itertools.repeat(self.batch)):
            if late:
                late.read()
            late = step
            act(self.state.step)
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
    config = from_dict(Config, {"model": {"size": SIZE}}, "benchmark")
    peak, counted = peak_rate(), forward_backward(config.model, config.objective)
    best, rate = BATCHES[0], 0.0
    for batch, settings in itertools.product(BATCHES, ({}, {"compile": True}) if DEVICE == "cuda" else ({},)):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            run = Steps(batch, **settings)
            spent = run.run(STEPS) / STEPS
        except torch.cuda.OutOfMemoryError:
            yield f"training step, {SIZE}, batch {batch}", "does not fit", ", ".join(settings)
            continue
        views = seconds(lambda s=run: make_views(s.config, s.batch.to(s.ranks.device)))
        gradients = [p for p in run.state.model.parameters() if p.requires_grad]  # as many numbers
        norms = seconds(lambda r=run, g=gradients: norm(r.ranks, g))
        beside = f"{batch * counted / spent / peak:.0%} of a large product's rate; views {views / spent:.1%}, "
        beside += f"norm of the gradient {norms / spent:.1%}"
        if DEVICE == "cuda":
            beside += f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
        yield (
            f"training step, {SIZE}, batch {batch}{', compiled' if settings else ''}",
            f"{batch / spent:,.0f} samples/s",
            beside,
        )
        if batch / spent > rate and not settings:
            best, rate = batch, batch / spent
        del run
    yield from _where(best)
    for micro_batch, settings in ((best // 4, {}), (best // 4, {"recompute": True})):
        run = Steps(best, micro_batch=micro_batch, **settings)
        spent = run.run(STEPS) / STEPS
        how = f"micro-batches of {micro_batch}{', recomputed' if settings else ''}"
        yield f"training step, {SIZE}, batch {best}, {how}", f"{best / spent / rate:.2f}x", "of that at once"
        del run


def _where(batch: int) -> Iterator[Row]:
    """What the time of a step goes to."""
    run = Steps(batch)
    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        run.run(3)
    name = f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    for event in events[:10]:
        yield f"of which {event.key[:60]}", f"{getattr(event, name) / total:.1%}", f"{event.count // 3} times a step"


def checkpoint() -> Iterator[Row]:
    run, count = Steps(BATCHES[0]), 100
    about: dict[str, Any] = {"stream": {}, "quarantine": {}, "config": {}}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, run.ranks) as checkpoints:
        checkpoints.take_over(run.state)
        held = []

        def act(at: int) -> None:
            if at == middle:
                checkpoints.save(run.state, about)
                held.append(checkpoints.seconds)

        without, beside = [], []
        for _ in range(3):
            without.append(run.run(count))
            middle = run.state.step + count // 2
            beside.append(run.run(count, act))
            checkpoints.finish()
    yield (
        f"a save every {count} steps, {SIZE}, batch {BATCHES[0]}",
        f"{min(without) / min(beside):.3f}x the samples/s without",
        f"holds the run up for {1000 * min(held):.0f} ms, {min(held) / min(without):.2%} of the interval; writes beside it",
    )


def metrics() -> Iterator[Row]:
    """A step that is told to Prometheus, beside one that is not; and the telling by itself."""
    run, count = Steps(BATCHES[0]), 30
    terms = [key for key in by_key() if key.startswith(("loss", "accuracy", "similarity", "gain", "spread"))]
    values: dict[str, Any] = {
        **dict.fromkeys(terms, 1.0),
        "clips": BATCHES[0],
        "bad": 0,
        "gradient_norm": 1.0,
        "lr": 1.0,
    }
    timing = {"clips_per_second": 1.0, "saved_step": 0, "save_seconds": 0.0, "failed_saves": 0, "unsaved_seconds": 0.0}
    stats = Stats(Counter(), [0.0], [0], 0.0, 1)
    loader: Any = SimpleNamespace(stats=lambda: stats, steps_per_epoch=100)
    checkpoints: Any = SimpleNamespace(saved_step=0, failures=0)
    spent = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        config: Any = run.config
        numbers = Numbers(config, Pretraining(config), run.ranks, loader, checkpoints, Quarantine(100), print)
        del os.environ[FOLDER]

        def act(at: int) -> None:
            begun = time.perf_counter()
            numbers.spent({"views": 0.1, "model": 0.1, "update": 0.1, "data": 0.1, "save": 0.0})
            numbers.step(at, values, True, timing, 0.1)
            spent.append(time.perf_counter() - begun)

        without, told = [], []
        for _ in range(3):
            without.append(run.run(count))
            told.append(run.run(count, act))
        numbers.board.close()
    yield (
        f"a step told to Prometheus, {SIZE}, batch {BATCHES[0]}",
        f"{min(without) / min(told):.3f}x the samples/s without",
        f"{1e6 * sum(spent) / len(spent):.0f} us of a step's {1000 * min(without) / count:.0f} ms: "
        f"{sum(spent) / len(spent) / (min(without) / count):.3%}",
    )


BENCHMARKS = (step, checkpoint, metrics)
