"""A run, told once: what it begins with, its steps, what happens beside them, how it ends."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from xxhash import xxh3_128

from equiav.augment import Clips
from equiav.augment.logmel import moments
from equiav.config import ConfigError, NotHere, RunConfig, differences, to_dict, to_yaml
from equiav.data.stream import as_tensors, open_stream, require_modalities
from equiav.ending import Ending, Interrupted, Stalled, Superseded, Terminated, Unsaved
from equiav.parallel import Ranks, slab
from equiav.tasks import Task
from equiav.tasks.task import Metrics
from equiav.train.checkpoint import Checkpoints
from equiav.train.log import Log, append, writing
from equiav.train.loop import Signals, Step, TrainState, initial_state, steps
from equiav.train.manifest import NotWhole
from equiav.train.numbers import SUMMARY, Numbers
from equiav.train.watch import Watch
from equiav.weights import download, initial_weights
from streaming import (
    Bad,
    CacheError,
    CacheGone,
    CacheMisfit,
    DatasetError,
    Loader,
    Quarantine,
    Stats,
    Store,
    StoreError,
    TooManyBadSamples,
)
from streaming.order import sample_of
from streaming.store import Denied, NoStore

Tell = Callable[[str], None]
Show = Callable[[int, Metrics, dict[str, Any]], None]
TELLS = {"saves": "save", "waits for data": "data"}  # of the watch's phases, those that are told as such
FINAL = (ConfigError, DatasetError, NoStore, CacheMisfit, TooManyBadSamples, FloatingPointError, Superseded)
ENDINGS = {of.status: of for of in (Terminated, Interrupted, Superseded, Stalled, Unsaved)}
HEARD = 8  # clips of the first step, to compare with the settings
MANY = 200  # epochs, beyond which a run's length is rather a mistake
OVERDUE_AGAIN = 60.0  # seconds between two words on a save that is overdue


def remedy(error: BaseException) -> str:
    """What a launcher is to do about it: start the workers `again`; start this node `elsewhere`, the others go on; `never` start
    it again, since no restart mends it; `doubt`: once again, then never."""
    if isinstance(error, CacheGone):
        return "again"
    if isinstance(error, NotHere | CacheError) and not isinstance(error, CacheMisfit):
        return "elsewhere"
    if isinstance(error, Denied):  # a store may refuse for a moment what it has always allowed
        return "doubt"
    return "never" if isinstance(error, FINAL) else "again"


class NotFinite(FloatingPointError):  # noqa: N818
    """The loss or the gradient was not finite, step after step."""


class Done(NamedTuple):
    """What a run leaves in memory."""

    state: TrainState
    began: int  # step
    stats: Stats
    quarantined: Counter[str]  # samples that could not be used, by reason
    problem: Ending | None  # its last checkpoint could not be saved


def run(
    config: RunConfig, task: Task, ranks: Ranks, tell: Tell, show: Show, options: dict[str, Any] | None = None
) -> Done:
    """From the newest checkpoint, or from the beginning, to the last step. `options`: for the file system of the clips."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotHere(f"out: {config.out} cannot be made ({error}); set a folder that can be written") from None
    patience = max(config.stream.patience, config.checkpoint.patience)
    with Watch(ranks, config.out / "stalls", config.stall_seconds, patience, tell, config.train.compile) as watch:
        return run_watched(config, task, ranks, tell, show, options, watch)


def run_watched(
    config: RunConfig, task: Task, ranks: Ranks, tell: Tell, show: Show, options: dict[str, Any] | None, watch: Watch
) -> Done:
    first = ranks.rank == 0
    c, url = config.checkpoint, config.checkpoint.url or str(config.out / "checkpoints")
    checkpoints = Checkpoints(url, ranks, c.keep, c.keep_every, c.patience, warn=tell, moved=watch.moved)
    state = initial_state(task, ranks)
    if any(other != dict(task.learns_from) for other in ranks.objects(dict(task.learns_from))):
        raise StoreError(
            f"the processes read different {', '.join(task.learns_from)} of the dataset: they were changed meanwhile"
        )
    loader = open_stream(
        config,
        hears=task.hears,
        sees=task.sees,
        often=task.often,
        rank=ranks.rank,
        ranks=ranks.size,
        sharers=ranks.local_size,
        options=options,
    )
    listed = config.out / "quarantine.jsonl" if first else None
    quarantine = Quarantine(loader.samples, config.stream.max_bad, listed)
    with loader, checkpoints:
        if loader.samples < task.fewest:
            raise ConfigError(
                f"stream.url: {loader.dataset.store.url} has {loader.samples} clip(s) to learn from, expected {task.fewest} or "
                "more"
            )
        with suppress(StoreError):  # the steps will have more to say of a store
            require_modalities("stream.url", loader.dataset, task.hears, task.sees)
        found = find(config, task, checkpoints, state, loader, quarantine)
        began_with = (
            found.get("init", {}) if found else begin_with(config, ranks, state, tell, watch) if config.weights else {}
        )
        if first:
            how = "is finished" if state.step == config.train.steps else "goes on" if found else "begins"
            spares = f" and {ranks.spares} spare(s)" if ranks.spares else ""
            tell(f"{how} at step {state.step} of {config.train.steps}, {ranks.size} process(es){spares}")
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and ranks.size > ranks.local_size:
                tell(
                    "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node: without it, this one's agent keeps "
                    "the addresses of a round that is over, and ends when nodes come or go (docs/training.md)"
                )
            if state.step < config.train.steps:
                for line in expected(config, task, loader):
                    tell(line)
                write_start(config, ranks, checkpoints, loader, state.step)
        digest = found.get("log", "") if found else ""
        log = Log(config.out, state.step, checkpoints.token, checkpoints.lines, digest) if first else None
        if log and log.missing:
            tell(f"{log.missing} of the {state.step} lines before this step are neither in {config.out} nor at {url}")
        if log and log.others:
            tell(
                f"the lines of metrics.jsonl before step {state.step} are not those that were saved, neither in {config.out} nor "
                f"at {url}: somebody changed them"
            )
        with StopRequest(tell if first else None) as asked:
            watch.asked = asked
            numbers = Numbers(config, task, ranks, loader, checkpoints, quarantine, tell)
            if first:
                numbers.begin(environment())
            how = ""  # it goes on elsewhere, or again
            try:
                ended = train(
                    config,
                    task,
                    ranks,
                    state,
                    loader,
                    quarantine,
                    checkpoints,
                    watch,
                    asked,
                    log,
                    numbers,
                    show,
                    began_with,
                )
                how = "finished" if state.step == config.train.steps else "asked"
            except BaseException as error:
                lost = remedy(error) == "never" and not isinstance(error, Superseded)  # the one after it goes on
                how = "failed" if lost else ""
                raise
            finally:
                watch.end()
                numbers.end(how)
                if log:
                    log.close()
        if ended and state.step < config.train.steps:
            raise ended
        return Done(state, found["step"] if found else 0, loader.stats(), quarantine.counts(), ended)


def require_unused(config: RunConfig, url: str) -> None:
    """A run that begins writes its log anew: not over that of a run whose checkpoints are elsewhere."""
    before = config.out / "config.yaml"
    if not before.exists():
        return
    try:
        there = yaml.safe_load(before.read_text("utf-8"))
        was = str(there["checkpoint"]["url"] or config.out / "checkpoints")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        was = "a place that its config.yaml does not say"
    finished = (config.out / "model" / "config.json").exists()
    if finished or (was != url and was != named(url)):
        raise ConfigError(
            f"out: {config.out} holds a {'finished ' * finished}run with checkpoints at {was}, and there is none at {url}; "
            "choose another folder, or set checkpoint.url as it was (--resume anyway: begin at step 0, over its log)"
        )


def find(
    config: RunConfig, task: Task, checkpoints: Checkpoints, state: TrainState, loader: Loader, quarantine: Quarantine
) -> dict[str, Any] | None:
    """The newest checkpoint of this run, into `state` -> its manifest. Takes the folder over, when all is known to be good."""
    url = checkpoints.store.url

    def accept(manifest: dict[str, Any]) -> None:
        if config.resume == "never" and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            raise ConfigError(
                f"resume is never, and {url} holds a checkpoint of step {manifest['step']}; choose another folder"
            )
        if manifest["step"] > config.train.steps:
            raise NotWhole(f"it is of step {manifest['step']}, of a run of {config.train.steps}")
        if beyond := [sample for sample in manifest["quarantine"] if int(sample) >= loader.dataset.samples]:
            raise NotWhole(f"sample {beyond[0]} is quarantined, of {loader.dataset.samples}")
        refused, otherwise = differences(config, manifest["config"])
        before = manifest.get("init", {}).get("from", "")
        if config.weights and named(config.weights) != before:  # `--weights` may be omitted on resume
            refused.append(f"weights is {named(config.weights)}, was {before or 'empty'}")
        before_it = manifest.get("learns_from", {})
        refused += [
            f"the {what} are others" for what, digest in task.learns_from.items() if before_it.get(what) != digest
        ]
        if refused:
            raise ConfigError(
                f"the checkpoints at {url} are of a run with other settings: {'; '.join(refused)}. Set them back, or begin a "
                "new run in another folder"
            )
        loader.restore(manifest["stream"])
        if otherwise and checkpoints.ranks.rank == 0:
            checkpoints.warn(
                f"numerics may differ in the last bits from step {manifest['step']} on: {'; '.join(otherwise)}"
            )

    def load() -> dict[str, Any] | None:
        found = checkpoints.load(state, accept)
        while (
            found is None and checkpoints.newest() >= 0
        ):  # a live start has saved, and retired what was read, meanwhile
            found = checkpoints.load(state, accept)
        if found is None and config.resume != "anyway" and (unusable := checkpoints.unusable()):
            raise ConfigError(
                f"{url} holds checkpoints of which none can be used: {'; '.join(unusable)}. Mend them (damaged-step-... is "
                "renamed to step-...), or begin at step 0 with --resume anyway, or in another folder"
            )
        return found

    found = load()
    if not found and config.resume != "anyway":
        checkpoints.ranks.first(lambda: require_unused(config, url))
    checkpoints.take_over(state)
    while checkpoints.newest() > state.step:  # the start that this one takes over from has saved meanwhile
        found = load()
    if found:
        with writing(config.out / "quarantine.jsonl"):
            quarantine.load(found["quarantine"], loader.dataset.place_of)
    return found


def expected(config: RunConfig, task: Task, loader: Loader) -> Iterator[str]:
    """What there is to know before the first step."""
    t, samples, per_epoch = config.train, loader.samples_per_epoch, loader.steps_per_epoch
    chance = task.chance(0, min(t.batch_size, samples))["total"]
    saves = f"every {config.checkpoint.every_steps} steps" if config.checkpoint.every_steps else "by time"
    yield (
        f"{samples:,} clips, {per_epoch:,} step(s) an epoch, {t.steps / per_epoch:,.1f} epochs; guessing has a loss of "
        f"{chance:.2f}; it is saved {saves}; look with `equiav top {config.out}`"
    )
    if t.batch_size > samples and task.fewest > 1:
        yield (
            f"train.batch_size is {t.batch_size}, the dataset has {samples} clips: the rest of each step is empty, and "
            f"nothing is compared with more than {samples}; set it to {samples} or less"
        )
    if t.steps / per_epoch > MANY and task.fewest > 1:
        yield (
            f"train.steps is {t.steps:,}: each clip will be seen {t.steps / per_epoch:,.0f} times. The paper's 20 epochs "
            f"would be {20 * per_epoch:,} steps, with train.warmup_steps={2 * per_epoch:,}"
        )


def unlike(config: RunConfig, clips: Clips) -> str:
    """What there is to say, where the spectrograms of some clips are far from what the settings say of them."""
    data, bins, total, squares = config.data, 0, 0.0, 0.0
    for k in clips.valid.nonzero().flatten().tolist()[:HEARD]:
        of_clip = moments(clips.waveform[k, : clips.lengths[k]], config.model, data)
        bins, total, squares = bins + of_clip[0], total + of_clip[1], squares + of_clip[2]
    if not bins:
        return ""
    mean = total / bins
    deviation = math.sqrt(max(0.0, squares / bins - mean**2))
    if abs(mean - data.audio_mean) <= data.audio_std and 0.5 <= deviation / data.audio_std <= 2:
        return ""
    return (
        f"the first clips' spectrograms have mean {mean:.2f} and deviation {deviation:.2f}, data.audio_mean is "
        f"{data.audio_mean:g} and data.audio_std {data.audio_std:g}: `equiav stats` says what fits the dataset"
    )


def begin_with(config: RunConfig, ranks: Ranks, state: TrainState, tell: Tell, watch: Watch) -> dict[str, str]:
    """Weights from elsewhere, into the state -> what is to be remembered of them."""
    imported, problem = None, ""
    try:
        names = list(state.model.state_dict())
        predicts = any(".predictor." in name for name in names)
        with once_a_node(config.weights, ranks, config.checkpoint.patience, watch.moved) as path:
            imported = initial_weights(config.weights, config, config.seed, path, predicts)
        imported.restrict_to(names)
        if lacks := sorted(
            {name.partition(".")[0] for name in imported.fresh if name.endswith(".encoder.blocks.0.attn.qkv.weight")}
        ):
            raise ConfigError(
                f"weights: {named(config.weights)} has no encoder for {' and '.join(lacks)}, which this run needs"
            )
    except (ConfigError, StoreError) as error:
        problem = str(error)
    digest = digest_of(imported.state) if imported else ""
    for rank, (wrong, other) in enumerate(ranks.objects((problem, digest))):
        if wrong:
            raise ConfigError(wrong if rank == ranks.rank or not digest else f"rank {rank}: {wrong}")
        if other != digest:
            raise ConfigError(f"weights: rank {rank} finds other weights at {config.weights} than rank {ranks.rank}")
    assert imported
    with torch.no_grad():
        for name, x in state.model.state_dict().items():
            if name not in imported.state:
                continue  # it has its initial value
            own = slab(x, ranks)
            rows = (
                imported.state[name] if x.dim() == 0 else imported.state[name][own.first : own.first + len(own.local)]
            )
            own.local.copy_(rows)
    if ranks.rank == 0:
        tell("\n  ".join([f"begins with the weights of {named(config.weights)}", *imported.account()]))
    return {"from": named(config.weights), "digest": digest}


@contextmanager
def once_a_node(source: str, ranks: Ranks, patience: float, moved: Callable[[], None]) -> Iterator[Path]:
    """Where the files of a model are on this machine. From a store, one process of each node downloads them."""
    if "://" not in source:
        yield Path(source).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="equiav-") as folder:
        path: Path | None = None
        problem: Exception | None = None
        if ranks.local_rank == 0:
            try:
                path = download(source, Path(folder), patience, moved)
            except (ConfigError, StoreError) as error:
                problem = error
        paths, problems = zip(*ranks.objects((path, problem)), strict=True)
        if first := next(filter(None, problems), None):
            raise first
        try:
            yield paths[ranks.rank - ranks.local_rank]
        finally:
            ranks.objects(None)  # all have read it


def named(source: str) -> str:
    """Without a password; a path however it was written."""
    return Store(source).url if "://" in source else str(Path(source).expanduser().absolute()) if source else ""


def digest_of(weights: Mapping[str, torch.Tensor]) -> str:
    digest = xxh3_128()
    for name, x in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def train(
    config: RunConfig,
    task: Task,
    ranks: Ranks,
    state: TrainState,
    loader: Loader,
    quarantine: Quarantine,
    checkpoints: Checkpoints,
    watch: Watch,
    asked: StopRequest,
    log: Log | None,
    numbers: Numbers,
    show: Show,
    began_with: dict[str, str],
) -> Ending | None:
    """The steps, and what happens beside them. -> what it ends with before its last step."""
    saves = Saves(config.checkpoint, checkpoints, state.step)
    bad: dict[int, list[Bad]] = {}  # step -> what of its own samples cannot be used
    not_finite: dict[int, list[int]] = {}  # steps in a row -> the ids of their samples
    under_way: deque[Step] = deque()
    told = Signals()
    clock = [time.monotonic()]  # when the steps came

    def data() -> Iterator[Clips]:
        watch.at(state.step, "waits for data")
        for number, batch in enumerate(loader.batches(state.step), state.step):
            watch.at(number, "computes")
            if config.log_samples:
                ids = batch.samples[batch.valid].tolist()
                append(config.out / f"samples-{ranks.rank}.jsonl", [checkpoints.token, number, ids])
            bad[number] = batch.bad
            clips = as_tensors(batch)
            if log and number == 0 and task.hears and (said := unlike(config, clips)):
                numbers.tell(said)
            yield clips

    def settle() -> None:
        """The numbers of the oldest step under way have come."""
        nonlocal told
        step = under_way.popleft()
        metrics, finite, told = step.read()
        if finite:
            not_finite.clear()
        else:
            state.skipped += 1
            samples = ranks.objects(sample_of(step.batch.samples.cpu().numpy()).tolist())
            not_finite[step.number] = [sample for of_rank in samples for sample in of_rank if sample >= 0]
        metrics["skipped"] = state.skipped
        seconds = clock[1] - clock.pop(0)
        rate = metrics["clips"] / seconds
        timing = {"clips_per_second": round(rate, 2), **saves.timing()}
        if log:
            log.write(step.number, metrics, timing)
            show(step.number, metrics, timing)
        numbers.step(step.number, metrics, finite, timing, seconds)
        numbers.spent(step.timer.seconds())
        numbers.spent({TELLS[phase]: seconds for phase, seconds in watch.spent().items() if phase in TELLS})
        found = bad.pop(step.number)
        if metrics["bad"]:
            everyones = [one for of_rank in ranks.objects(found) for one in of_rank]
            with writing(config.out / "quarantine.jsonl"):
                quarantine.add(everyones)
        if len(not_finite) >= config.train.max_skipped:
            raise_not_finite(config, ranks, metrics, not_finite)
        if told.superseded:
            raise Superseded(checkpoints.superseded_for_all())
        if told.overdue and (problem := ranks.first(lambda: saves.overdue())):  # a save may have come since
            raise Unsaved(problem)
        if not told.busy:
            checkpoints.advance()
        saves.due = saves.due or bool(told.due)

    def signals() -> Signals:
        overdue = bool(saves.overdue()) and config.checkpoint.overdue == "end"
        return Signals(asked(), saves.due_by_time(), checkpoints.busy, bool(checkpoints.superseded), overdue)

    def save() -> None:
        watch.at(state.step, "saves")
        if log:
            log.sync()
        about = {
            "stream": loader.state(state.step),
            "quarantine": quarantine.state(),
            "config": shown(config, loader, checkpoints),
            "init": began_with,
            "learns_from": dict(task.learns_from),
            "log": log.digest() if log else "",
            **environment(),
        }
        checkpoints.save(state, about, log.since(checkpoints.saved_step) if log else (0, b""))
        saves.begun(state.step)

    running = steps(task, ranks, state, data(), signals)  # keep a reference: closing it waits for decoding
    for step in running:
        under_way.append(step)
        watch.begun()
        clock.append(time.monotonic())
        saves.after(state.step)
        # A step's numbers are read while the next one computes. What is saved has been read: no line of it may be lost.
        while len(under_way) > (0 if saves.due and not told.busy else 1):
            settle()
        if told.asked:
            break
        if saves.due and not under_way and not told.busy:  # a store that is slow or down holds up nobody
            save()
        watch.at(state.step, "waits for data")
    while under_way:
        settle()
    watch.at(state.step, "saves")
    problem = checkpoints.finish()  # of a save that is under way
    if not checkpoints.superseded_for_all() and (saves.saved != state.step or problem):
        save()
        problem = checkpoints.finish()
    if by := checkpoints.superseded_for_all():
        raise Superseded(by)
    if told.asked and state.step < config.train.steps:
        return ending(told.asked, state.step, checkpoints.store.url, problem)
    return Unsaved(f"step {state.step}, the last, could not be saved: {problem}") if problem else None


def ending(status: float, step: int, url: str, problem: str) -> Ending:
    """Of who was asked to end."""
    how, by = (Interrupted, "Ctrl-C") if status == Interrupted.status else (Terminated, "SIGTERM")
    saved = f"step {step} is saved at {url}"
    if problem:
        saved = f"step {step} could not be saved ({problem}); the next start goes on from an earlier one"
    return how(f"asked to end by {by}; {saved}")


def raise_not_finite(config: RunConfig, ranks: Ranks, metrics: Metrics, steps: dict[int, list[int]]) -> None:
    if ranks.rank == 0:
        with writing(config.out / "not_finite.json") as path:
            path.write_text(json.dumps(steps))
    names = [name for name, value in metrics.items() if not abs(value) < float("inf")]
    raise NotFinite(
        f"step {max(steps)}: {', '.join(names)} not finite, as in {len(steps)} steps in a row (train.max_skipped="
        f"{config.train.max_skipped}). Lower train.lr or train.clip, or set train.precision=float32"
    )


class Saves:
    """When one is due, and for how long it has been."""

    def __init__(self, config: Any, checkpoints: Checkpoints, step: int):
        self.config, self.checkpoints = config, checkpoints
        self.due = False
        self.saved = step  # of the last that was begun
        self._begun = time.monotonic()
        self._open: tuple[int, float] | None = None  # the step from which on one is due, and since when
        self._said = 0.0

    def after(self, step: int) -> None:
        self.due = self.due or bool(self.config.every_steps and step % self.config.every_steps == 0)
        if self.due and self._open is None:
            self._open = (step, time.monotonic())
        if self._open and self.checkpoints.saved_step >= self._open[0]:
            self._open = None

    def due_by_time(self) -> bool:
        seconds = self.config.every_seconds
        return self.checkpoints.ranks.rank == 0 and bool(seconds) and time.monotonic() - self._begun > seconds

    def begun(self, step: int) -> None:
        self.due, self.saved, self._begun = False, step, time.monotonic()
        self._open = self._open or (step, self._begun)

    def unsaved_seconds(self) -> float:
        return time.monotonic() - self._open[1] if self._open else 0.0

    def overdue(self) -> str:
        """What there is to say of it, on rank 0, which also says it."""
        if self.checkpoints.ranks.rank or self.unsaved_seconds() <= self.config.overdue_seconds:
            return ""
        saved = f"the last that succeeded is of step {self.checkpoints.saved_step}"
        text = (
            f"NO SAVE HAS SUCCEEDED for {self.unsaved_seconds():.0f} s since one was due (checkpoint.overdue_seconds="
            f"{self.config.overdue_seconds:g}); {saved}; {self.checkpoints.failures} have failed. Look at "
            f"{self.checkpoints.store.url}"
        )
        if time.monotonic() - self._said > OVERDUE_AGAIN:
            self._said = time.monotonic()
            self.checkpoints.warn(text)
        return text

    def timing(self) -> dict[str, Any]:
        return {
            "saved_step": self.checkpoints.saved_step,
            "save_seconds": self.checkpoints.seconds,
            "failed_saves": self.checkpoints.failures,
            "unsaved_seconds": round(self.unsaved_seconds(), 1),
        }


class StopRequest:
    """Whether this process shall end: the status for it, by SIGTERM or Ctrl-C. Python's own handlers wait for the main thread,
    which may be in a collective that never ends. A second Ctrl-C ends at once."""

    def __init__(self, tell: Tell | None):
        self.tell, self._status, self._interrupts, self._interrupted = tell, 0, 0, float("-inf")
        self._read, self._write = os.pipe()  # never closed: the watch may still ask

    def __call__(self) -> int:
        with suppress(BlockingIOError):
            for number in os.read(self._read, 4096):
                if number == signal.SIGTERM:
                    self._status = Terminated.status
                elif number == signal.SIGINT:
                    self._status = self._status or Interrupted.status
                    if time.monotonic() - self._interrupted > 1:  # a terminal and a launcher may both pass it on
                        self._interrupts, self._interrupted = self._interrupts + 1, time.monotonic()
        if self._interrupts > 1:
            os._exit(Interrupted.status)
        return self._status

    def _handle(self, number: int, _: Any) -> None:
        again = "; Ctrl-C again ends without it" if number == signal.SIGINT else ""
        if self.tell:
            self.tell(f"{signal.Signals(number).name}: finishes the step, saves, and ends{again}")
        self()

    def __enter__(self) -> StopRequest:
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def launched(ranks: Ranks, tell: Tell) -> Iterator[bool]:
    """Around a run that may be one of torchrun's processes. -> whether this one takes part; a spare waits until it ends."""
    try:
        if ranks.spare:
            tell(f"process {ranks.rank} is a spare: {ranks.size} can share train.batch_size in whole micro-batches")
            try:
                how = ranks.wait_as_spare()
            except RuntimeError as error:
                raise Stalled(f"rank 0, which this spare waits beside, is gone ({error})") from None
            status, text = how
            if status in ENDINGS:
                raise ENDINGS[status](text)
            if text:
                raise ConfigError(f"the run has ended: {text}")
        yield not ranks.spare
    except Exception as error:
        if isinstance(error, Ending) or remedy(error) == "never":
            ranks.close(str(error), error.status if isinstance(error, Ending) else 0)
        raise
    ranks.close()


def write_start(config: RunConfig, ranks: Ranks, checkpoints: Checkpoints, loader: Loader, step: int) -> None:
    with writing(config.out / "config.yaml") as path:
        part = path.with_suffix(f".{checkpoints.token}")
        part.write_text(to_yaml(shown(config, loader, checkpoints)))
        part.replace(path)
        (config.out / SUMMARY).unlink(missing_ok=True)  # of an earlier end
    start = {"time": time.time(), "step": step, "token": checkpoints.token, "ranks": ranks.size, "shard": ranks.shard}
    append(config.out / "starts.jsonl", {**start, **environment()})


def shown(config: RunConfig, loader: Loader, checkpoints: Checkpoints) -> dict[str, Any]:
    """The settings, less any password in a URL."""
    values = to_dict(config)
    values["weights"] = named(config.weights)
    values["stream"]["url"] = loader.dataset.store.url
    if config.checkpoint.url:
        values["checkpoint"]["url"] = checkpoints.store.url
    if "tune" in values:
        values["tune"]["test_url"] = named(values["tune"]["test_url"])
    return values


@cache
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
