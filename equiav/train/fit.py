"""`equiav plan --stream.url URL`: settings that fit a dataset and this machine, and how long a run with them would take here."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch

from equiav.config import Config, ConfigError, TrainConfig, from_dict, to_dict
from equiav.data.stream import batches, open_stream
from equiav.data.survey import survey
from equiav.parallel import Ranks
from equiav.tasks import Pretraining
from equiav.train.loop import initial_state, steps
from streaming import Dataset

C = TypeVar("C", bound=Config)
EPOCHS, WARM_UP = 20, 2  # the paper's, on AudioSet-2M
HEARD = 200  # clips
FIRST, MEASURED = 3, 20  # steps: those that start things, those that are timed
ENOUGH = 20.0  # seconds of timed steps
RATES = {"tiny": (2e-3, 1e-5)}  # of learning, at the peak and at the start; the defaults are the paper's, of ViT-B
BUSY = 0.3  # share of the cores that others may use without being told of
ROOM = 0.7  # share of the memory that activations may take


def fit(config: C, dataset: Dataset, activation_bytes: int) -> C:
    """activation_bytes: of a sample, in bfloat16."""
    n, t, device = dataset.samples, config.train, config.device
    if n < 2:
        raise ConfigError(f"stream.url: {config.stream.url} has {n} clip(s), expected 2 or more")
    # Quarter of the dataset at most: an epoch of some steps, each with other clips to compare with.
    G = min(t.batch_size, 2 ** max(1, int(math.log2(max(2, n / 4)))))
    per_epoch = -(-n // G)
    of_a_clip = activation_bytes * (1 if device == "cuda" else 2)
    p = min(t.micro_batch, G, 2 ** int(math.log2(max(1, ROOM * free_memory(device) / of_a_clip))))
    heard = survey(dataset, config.model, config.data, HEARD)
    if not heard.bins:
        raise ConfigError(f"stream.url: none of {heard.clips} clips of {config.stream.url} can be heard")
    cores = len(os.sched_getaffinity(0)) // (max(1, torch.cuda.device_count()) if device == "cuda" else 1)
    given = t.lr, t.lr_start
    lr, lr_start = RATES.get(config.model.size, given) if given == (TrainConfig.lr, TrainConfig.lr_start) else given
    return replace(
        config,
        data=replace(config.data, audio_mean=round(heard.mean, 3), audio_std=round(heard.deviation, 3)),
        stream=replace(config.stream, workers=min(8, max(1, cores - 1))),
        train=replace(
            t,
            batch_size=G,
            micro_batch=p,
            steps=EPOCHS * per_epoch,
            warmup_steps=WARM_UP * per_epoch,
            lr=lr,
            lr_start=lr_start,
        ),
    )


def free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


class Pace(NamedTuple):
    """Of a run in one process on this machine."""

    start: float  # seconds until it goes at its pace
    step: float  # seconds
    others: float = 0.0  # cores that other programs used when it was measured

    def seconds(self, steps: int) -> float:
        return self.start + steps * self.step


def measure(config: Config) -> Pace:
    """Some steps, with the dataset's own clips."""
    begun, others = time.perf_counter(), os.getloadavg()[0]
    few = replace(config, train=replace(config.train, steps=max(config.train.steps, FIRST + MEASURED)))
    ranks = Ranks(config.device)
    task = Pretraining(few)
    state = initial_state(task, ranks)
    with open_stream(few) as loader:
        running = steps(task, ranks, state, batches(loader))
        for _ in range(FIRST):
            next(running).read()
        first = time.perf_counter()
        done = 0
        while done < MEASURED and time.perf_counter() - first < ENOUGH:
            next(running).read()
            done += 1
        step = (time.perf_counter() - first) / done
    return Pace(max(0.0, first - begun - FIRST * step), step, others)


def settings(config: Config) -> dict[str, Any]:
    """What a recipe says, for --config: whatever is not as it is by default, and what was chosen for the dataset."""
    values = to_dict(Config(**{f.name: getattr(config, f.name) for f in fields(Config)}))
    defaults = to_dict(from_dict(Config, {"model": {"size": config.model.size}}, "defaults"))
    chosen = {"model.size", "device", "data.audio_mean", "data.audio_std", "stream.url", "stream.workers", "train.batch_size",
              "train.micro_batch", "train.steps", "train.warmup_steps", "train.lr", "train.lr_start"}  # fmt: skip
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(value, dict):
            if name in chosen or value != defaults[name]:
                kept[name] = value
        elif of_section := {k: v for k, v in value.items() if f"{name}.{k}" in chosen or v != defaults[name][k]}:
            kept[name] = of_section
    return kept


def words(config: Config, dataset: Dataset, pace: Pace, price: float) -> Iterator[str]:
    t = config.train
    hours = pace.seconds(t.steps) / 3600
    took = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
    epochs = t.steps / -(-dataset.samples // t.batch_size)
    yield (
        f"{dataset.samples:,} clips: batches of {t.batch_size}, {t.steps:,} steps ({epochs:.3g} epochs), of which "
        f"{t.warmup_steps:,} to warm up; learning rate {t.lr:g}; micro-batches of {t.micro_batch}; "
        f"{config.stream.workers} decoding process(es)"
    )
    yield f"a step takes {pace.step:.2f} s here, in one process: the run would take {took}" + (
        f", and cost {hours * price:,.2f} at {price:g} an hour" if price else ""
    )
    cores = len(os.sched_getaffinity(0))
    if pace.others > BUSY * cores:
        yield (
            f"other programs used {pace.others:.1f} of {cores} cores in the minute before: a step takes less where it is alone"
        )
    if t.batch_size < 64:
        yield "a batch this small has little to compare with: expect a weaker model, or gather more clips"
