"""`equiav pretrain`: starts a run, goes on with it, or says that it is finished; alone, or as one of torchrun's processes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equiav.augment import Batch
from equiav.config import CheckpointConfig, Config, ConfigError, require, to_dict, to_yaml
from equiav.data.stream import batches, open_stream
from equiav.ending import Superseded, Terminated
from equiav.parallel import Ranks
from equiav.train import NotFinite, TrainState, begin, train
from equiav.train.checkpoint import Checkpoints
from equiav.train.watch import Watch
from equiav.weights import save_model
from streaming import Loader
from streaming.processes import end_with_parent, keep_freed_memory

ROUNDING = ("device", "train.micro_batch", "train.compile")  # the same run, but for the last bits from there on
WITHOUT_EFFECT = (
    "out",
    "resume",
    "log_samples",
    "stall_seconds",
    "checkpoint",
    "stream.url",
    "stream.workers",
    "stream.ahead",
    "stream.cache",
    "stream.cache_bytes",
    "stream.patience",
    "train.recompute",
    "train.shard",
)


@dataclass(frozen=True)
class PretrainConfig(Config):
    """Pretrains on a packed dataset. The same command starts the run, goes on where it was, or says that it is finished."""

    out: Path = Path("runs/pretrain")
    """Folder of metrics.jsonl, quarantine.jsonl, config.yaml, starts.jsonl and the trained model."""
    resume: Literal["auto", "never"] = "auto"
    """never: an error where `checkpoint.url` holds checkpoints."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stall_seconds: float = 60.0
    """Without a step, after which the run has stalled: the rank that holds it up is named, every rank writes where it stands to
    `out`/stalls, and the processes end, to be started again. Waiting for a store is no stall within its patience. 0: never."""
    log_samples: bool = False
    """Write the ids of every step's samples to samples-RANK.jsonl, each line with the token of the start (starts.jsonl)."""


def run_pretrain(config: PretrainConfig) -> None:
    require(config.device == "cpu" or torch.cuda.is_available(), "device", config.device, "cpu: this torch sees no GPU")
    if config.device == "cpu":
        keep_freed_memory()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # an agent that is killed would leave it behind, training beside those that take its place
    ranks = Ranks(config.device)
    with _Asked() as asked:
        try:
            _run(config, ranks, asked)
        except Superseded:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                # The agent would start it again, and that would take over in its turn.
                os.kill(os.getppid(), signal.SIGTERM)
            raise
    ranks.close()


def _run(config: PretrainConfig, ranks: Ranks, asked: _Asked) -> None:
    console = Console(stderr=True)
    first = ranks.rank == 0

    def tell(message: str) -> None:
        console.print(f"equiav pretrain: {message}", highlight=False, markup=False)

    config.out.mkdir(parents=True, exist_ok=True)
    c = config.checkpoint
    checkpoints = Checkpoints(
        c.url or str(config.out / "checkpoints"), ranks, c.keep, c.keep_every, c.patience, warn=tell
    )
    state = begin(config, ranks)
    checkpoints.require_room(state)
    with open_stream(
        config, rank=ranks.rank, ranks=ranks.size, sharers=ranks.local_size, quarantine=config.out / "quarantine.jsonl"
    ) as loader:
        found = checkpoints.load(state)
        if found is not None:
            if config.resume == "never":
                raise ConfigError(
                    f"resume is never, and {checkpoints.store.url} holds a checkpoint of step {state.step}; choose "
                    "another folder"
                )
            otherwise = _same_run(config, found["config"], checkpoints.store.url)
            if first and otherwise:
                tell(f"rounded otherwise from step {state.step} on: {otherwise}")
            loader.restore(found["stream"])
        finished = state.step == config.train.steps
        if first and not finished:
            (config.out / "config.yaml").write_text(to_yaml(config))
            start = {"time": time.time(), "step": state.step, "token": checkpoints.token, "ranks": ranks.size}
            _append(config.out / "starts.jsonl", {**start, **environment()})
            how = "goes on at" if found else "begins at"
            tell(f"{how} step {state.step} of {config.train.steps}, {ranks.size} process(es)")
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and ranks.size > ranks.local_size:
                tell(
                    "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node: without it, this one's agent keeps "
                    "the addresses of a round that is over, and ends when nodes come or go (docs/training.md)"
                )
        patience = max(config.stream.patience, config.checkpoint.patience)
        watch = Watch(ranks, config.out / "stalls", config.stall_seconds, patience, asked, tell)
        run = _Run(config, ranks, state, loader, checkpoints, watch, asked)
        try:
            with run.logging() as report:
                train(config, ranks, state, run.batches(), report, run.signals, run.act)
            run.save()
            checkpoints.wait()
        except NotFinite as error:
            (config.out / "not_finite.json").write_text(json.dumps(error.steps))
            raise
        finally:
            watch.end()
            checkpoints.close()
        if run.ended:
            raise Terminated(f"asked to end by SIGTERM; step {state.step} is saved at {checkpoints.store.url}")
    weights = ranks.whole(state.model)
    if first and not (finished and (config.out / "model" / "config.json").exists()):
        save_model(config.out / "model", weights, config)
    if first:
        tell(f"{'the run is finished' if finished else 'finished'}: {state.step} steps, {config.out / 'model'}")


class _Asked:
    """Whether SIGTERM has come. Python's own handlers wait for the main thread, which may be in a collective that never ends."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()  # never closed: the watch may still ask
        self._come = False

    def __call__(self) -> bool:
        with suppress(BlockingIOError):
            if signal.SIGTERM in os.read(self._read, 4096):
                self._come = True
        return self._come

    def __enter__(self) -> _Asked:
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        signal.signal(signal.SIGTERM, self._before)


class _Run:
    """What happens beside the steps."""

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        state: TrainState,
        loader: Loader,
        checkpoints: Checkpoints,
        watch: Watch,
        asked: _Asked,
    ):
        self.config, self.ranks, self.state, self.loader, self.checkpoints = config, ranks, state, loader, checkpoints
        self.watch = watch
        self.asked, self.saved, self.last_save, self.ended, self.due = asked, state.step, time.monotonic(), False, False

    def batches(self) -> Iterator[Batch]:
        self.watch.at(self.state.step, "waits for data")
        for step, batch in enumerate(batches(self.loader, self.state.step), self.state.step):
            self.watch.at(step, "computes")
            if self.config.log_samples:
                ids = batch.samples[batch.valid].tolist()
                _append(self.config.out / f"samples-{self.ranks.rank}.jsonl", [self.checkpoints.token, step, ids])
            yield batch
            self.watch.at(step + 1, "waits for data")

    def signals(self) -> list[float]:
        """Of this rank, summed over all: asked to end; a save is due; another start has taken over; a save is under way."""
        seconds = self.config.checkpoint.every_seconds
        due = self.ranks.rank == 0 and bool(seconds) and time.monotonic() - self.last_save > seconds
        return [float(self.asked()), float(due), float(self.checkpoints.superseded), float(self.checkpoints.saving)]

    def act(self, step: int, signals: list[float]) -> bool:
        if signals[2]:
            raise Superseded(f"{self.checkpoints.store.url}: another start of this run has taken over; this one ends")
        self.ended = signals[0] > 0
        every = self.config.checkpoint.every_steps
        self.due = self.due or signals[1] > 0 or bool(every and step % every == 0)
        if self.due and not signals[3] and not self.ended:  # a store that is slow or down holds up nobody
            self.save()
        return self.ended

    def save(self) -> None:
        self.due = False
        if self.saved == self.state.step:
            return
        self.watch.at(self.state.step, "saves")
        # What any rank has set aside, every rank has from here on.
        for part in self.ranks.objects(self.loader.quarantine.state()):
            self.loader.quarantine.load(part)
        about = {"stream": self.loader.state(self.state.step), "config": to_dict(self.config), **environment()}
        self.checkpoints.save(self.state, about)
        self.saved, self.last_save = self.state.step, time.monotonic()

    @contextmanager
    def logging(self) -> Iterator[Any]:
        """Gives `report(step, metrics)`: metrics.jsonl, and a bar on a terminal or a JSON line elsewhere."""
        if self.ranks.rank:
            yield lambda step, metrics: None
            return
        console, steps = Console(), self.config.train.steps
        path = self.config.out / "metrics.jsonl"
        _keep_before(path, self.state.step)
        columns = [
            TextColumn("pretraining"),
            BarColumn(16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
        ]
        with (
            path.open("a", buffering=1) as log,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            bar, last = progress.add_task("", total=steps, completed=self.state.step, note=""), time.monotonic()

            def report(step: int, metrics: dict[str, float]) -> None:
                nonlocal last
                now = time.monotonic()
                rate, last = metrics["clips"] / (now - last), now
                beside = {
                    "clips_per_second": round(rate, 2),
                    "save_seconds": self.checkpoints.seconds,
                    "saved_step": self.checkpoints.saved_step,
                    "failed_saves": self.checkpoints.failures,
                    "quarantined": len(self.loader.quarantine),
                }
                line = json.dumps({"step": step, **metrics, **beside})
                log.write(line + "\n")
                if console.is_terminal:
                    progress.update(bar, completed=step + 1, note=f"loss {metrics['loss']:.2f}, {rate:.0f} clips/s")
                else:
                    print(line, flush=True)

            yield report


def _same_run(config: Config, began_with: dict[str, Any], url: str) -> str:
    """A run is a function of its config: another config is another run. -> what changed of the settings that only round."""
    now, then = _flat(json.loads(json.dumps(to_dict(config)))), _flat(began_with)
    changed = {
        name: f"{name} is {now.get(name)}, was {then.get(name)}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name) and not name.startswith(WITHOUT_EFFECT)
    }
    refused = [told for name, told in changed.items() if name not in ROUNDING]
    if refused:
        raise ConfigError(
            f"the checkpoints at {url} are of a run with other settings: {'; '.join(refused)}. Set them back, or "
            "begin a new run in another folder"
        )
    return "; ".join(changed.values())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def environment() -> dict[str, Any]:
    """What a run's result depends on beside its config, as far as it can be known."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    code = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {
        "equiav": version("equiav"),
        "code": code,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def _append(path: Path, value: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def _keep_before(path: Path, step: int) -> None:
    """Of metrics.jsonl, the steps that the checkpoint has: those after it come again."""
    if path.exists():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] < step
        ]
        path.write_text("".join(line + "\n" for line in lines))
