"""`equiav pretrain`: starts a run, goes on with it, or says that it is finished; alone, or as one of torchrun's processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equiav.config import NotHere, RunConfig
from equiav.parallel import Ranks
from equiav.tasks import Pretraining
from equiav.train import launched, run
from equiav.train.run import Show
from equiav.weights import save_model
from monitoring.metrics import brief
from streaming import Store
from streaming.processes import keep_freed_memory


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrains on a packed dataset. The same command starts the run, goes on where it was, or says that it is finished."""


def run_pretrain(config: PretrainConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("device is cuda, expected cpu: this torch sees no GPU")
    if config.device == "cpu":
        keep_freed_memory()
    console = Console(stderr=True)

    def tell(message: str) -> None:
        console.print(f"equiav pretrain: {message}", highlight=False, markup=False, soft_wrap=True)

    ranks = Ranks(config.device, config.train.micro_batches, config.train.shard)
    with launched(ranks, tell) as takes_part:
        if not takes_part:
            return
        with showing(config.train.steps) as show:
            state, began, _, _, problem = run(config, Pretraining(config), ranks, tell, show)
        weights = ranks.whole(state.model)

        def leave() -> None:
            if began == state.step and left(config):
                return
            save_model(config.out / "model", weights, config)
            where = bring(config) if config.checkpoint.url else str(config.out / "model")
            tell(f"finished: {state.step} steps, {where}")

        ranks.first(leave)  # all end together: one that waits for the others to end would count as lost
        if problem:
            raise problem


def left(config: RunConfig) -> bool:
    """Whether an earlier start has left the model where it is to be."""
    url = config.checkpoint.url
    there = not url or Store(url, config.checkpoint.patience).exists("model/config.json")
    return there and (bool(url) or (config.out / "model" / "config.json").exists())


def bring(config: RunConfig) -> str:
    """What a run leaves, beside its checkpoints: the disk that it ran on may be gone with its pod. -> where the model is"""
    store = Store(config.checkpoint.url, config.checkpoint.patience)
    for name in (
        "metrics.jsonl",
        "summary.json",
        "config.yaml",
        "model/model.safetensors",
        "model/config.json",
    ):  # the last: all is there
        if (config.out / name).exists():  # a start that finds the run finished has written no config.yaml
            store.upload(name, config.out / name)
    return f"{store.url}/model"


@contextmanager
def showing(steps: int) -> Iterator[Show]:
    """A bar on a terminal, a JSON line a step elsewhere."""
    console = Console()
    columns = [
        TextColumn("pretraining"),
        BarColumn(16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=steps, note="")

        def show(step: int, metrics: dict[str, float], timing: dict[str, Any]) -> None:
            if console.is_terminal:
                progress.update(bar, completed=step + 1, note=brief({**metrics, **timing}))
            else:
                print(json.dumps({"step": step, **metrics, **timing}), flush=True)

        yield show
