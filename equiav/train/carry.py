"""From a command to the end of a run: processes joined, progress shown, the model left where it is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equiav.config import NotHere, RunConfig
from equiav.parallel import Ranks
from equiav.tasks import Task
from equiav.train.log import writing
from equiav.train.run import Done, Show, launched, run
from equiav.weights import save_model
from monitoring.metrics import brief
from streaming import Store
from streaming.processes import keep_freed_memory

SAY = 10.0  # seconds between two lines of progress, where there is no terminal
Then = Callable[[Ranks, Done, Callable[[str], None]], dict[str, str]]
"""What all processes do when the steps are done -> files to leave beside the model, on rank 0."""


def carry_out(
    command: str,
    config: RunConfig,
    task: Task,
    then: Then = lambda *_: {},
    notes: Sequence[str] = (),
    again: Callable[[], str] = lambda: "",
    ready: Callable[[Ranks], None] = lambda ranks: None,
) -> None:
    """Starts a run, goes on with it, or says that it is finished; alone, or as one of torchrun's processes.

    notes: what there is to say before it. again: to who asks once more for a run that is finished. ready: raises where `then`
    could not be done.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("device is cuda, expected cpu: this torch sees no GPU")
    if config.device == "cpu":
        keep_freed_memory()
    console = Console(stderr=True)

    def tell(message: str) -> None:
        console.print(f"equiav {command}: {message}", highlight=False, markup=False, soft_wrap=True)

    ranks = Ranks(config.device, config.train.micro_batches, config.train.shard)
    with launched(ranks, tell) as takes_part:
        if not takes_part:
            return
        for note in notes if ranks.rank == 0 else ():
            tell(note)
        ready(ranks)
        with showing(config.train.steps) as show:
            done = run(config, task, ranks, tell, show)
        state = done.state
        weights = ranks.whole(state.model)
        finished_before = ranks.first(lambda: done.began == state.step and left(config))
        if finished_before and ranks.rank == 0 and (said := again()):
            tell(said)
        beside = {} if finished_before else then(ranks, done, tell)

        def leave() -> None:
            if finished_before:
                return
            with writing(config.out / "model") as folder:
                for name, content in beside.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_text(content)
                save_model(folder, weights, config)
            where = upload_leavings(config, list(beside)) if config.checkpoint.url else str(config.out / "model")
            tell(f"finished: {state.step} steps, {where}")

        ranks.first(leave)  # all end together: one that waits for the others to end would count as lost
        if done.problem:
            raise done.problem


def left(config: RunConfig) -> bool:
    """Whether an earlier start has left the model where it is to be."""
    url = config.checkpoint.url
    there = not url or Store(url, config.checkpoint.patience).exists("model/config.json")
    return there and (bool(url) or (config.out / "model" / "config.json").exists())


def upload_leavings(config: RunConfig, beside: list[str]) -> str:
    """What a run leaves, beside its checkpoints: the disk that it ran on may be gone with its pod. -> where the model is"""
    store = Store(config.checkpoint.url, config.checkpoint.patience)
    for name in (
        "metrics.jsonl",
        "summary.json",
        "config.yaml",
        *(f"model/{name}" for name in beside),
        "model/model.safetensors",
        "model/config.json",
    ):  # the last: all is there
        if (config.out / name).exists():  # a start that finds the run finished has written no config.yaml
            store.upload(name, config.out / name)
    return f"{store.url}/model"


@contextmanager
def showing(steps: int) -> Iterator[Show]:
    """A bar on a terminal; elsewhere a line at the first and the last step, and now and then between. What each step says is in
    metrics.jsonl and timing.jsonl."""
    begun, first, said = (
        0.0,
        0,
        -math.inf,
    )  # when this start showed its first step, which that was, when a line was last said
    console = Console()
    columns = [
        TextColumn("training"),
        BarColumn(16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=steps, note="")

        def show(step: int, metrics: dict[str, float], timing: dict[str, Any]) -> None:
            nonlocal begun, first, said
            now, note = time.monotonic(), brief({**metrics, **timing})
            if console.is_terminal:
                progress.update(bar, completed=step + 1, note=note)
                return
            if said == -math.inf:
                begun, first = now, step
            elif now < said + SAY and step + 1 < steps:
                return
            said = now
            rate = (step - first) / (now - begun) if step > first else 0.0
            left = f", {timedelta(seconds=round((steps - step - 1) / rate))} left" if rate else ""
            print(f"{step + 1:,} of {steps:,} steps ({(step + 1) / steps:.0%}){left}: {note}", flush=True)

        yield show
