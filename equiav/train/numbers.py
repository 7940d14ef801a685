"""What a run tells of itself while it runs: its numbers, as monitoring/metrics.py defines them, onto a board."""

from __future__ import annotations

import hashlib
import os
import resource
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from equiav.config import RunConfig
from equiav.parallel import Ranks
from equiav.tasks.task import Metrics, Task
from equiav.train.checkpoint import Checkpoints
from monitoring import metrics as m
from monitoring.board import Board, started, write
from monitoring.exporter import FOLDER, start_companion
from streaming import Loader, Quarantine

# Operations a second, dense, in bfloat16, by NVIDIA's data sheets; the name of a GPU begins so.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
KEYS, SUMMARY = m.by_key(), "summary.json"


class Numbers:
    """Of this rank; those that all ranks have alike are told by rank 0."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        ranks: Ranks,
        loader: Loader,
        checkpoints: Checkpoints,
        quarantine: Quarantine,
        tell: Callable[[str], None],
    ):
        self.config, self.task, self.ranks, self.loader = config, task, ranks, loader
        self.checkpoints, self.quarantine, self.tell = checkpoints, quarantine, tell
        self.board = Board(folder_of(config, ranks, tell), f"rank-{ranks.rank}", ranks.rank, tell)
        self._first = ranks.rank == 0
        self._begun = started(os.getpid()) / os.sysconf("SC_CLK_TCK")  # on the clock of CLOCK_BOOTTIME
        self._sums: dict[tuple[m.Metric, tuple[str, ...]], float] = {}
        self._steps = 0
        self._saved, self._failures = checkpoints.saved_step, 0

    def begin(self, environment: Mapping[str, Any]) -> None:
        """On rank 0."""
        board = self.board
        about = (environment["equiav"], environment["code"], environment["torch"], environment["gpu"] or "cpu")
        board.set(m.BUILD, 1, *about)
        board.set(m.BEGAN, time.time())
        board.set(m.STEPS_PLANNED, self.config.train.steps)
        board.set(m.FLOPS, 2 * self.task.flops())
        if peak := next((peak for name, peak in PEAKS.items() if environment["gpu"].startswith(name)), 0):
            board.set(m.PEAK, peak * self.ranks.size)
        board.set(m.WORLD, self.ranks.size)
        board.set(m.SPARES, self.ranks.spares)
        board.set(m.SAMPLES, self.loader.samples_per_epoch)
        board.set(m.LIMIT, self.quarantine.limit)
        board.set(m.SAVED_STEP, self.checkpoints.saved_step)
        board.set(m.SAVED_TIME, time.time())

    def spent(self, phases: Mapping[str, float]) -> None:
        for phase, seconds in phases.items():
            self.board.add(m.PHASE, seconds, phase)

    def step(self, step: int, metrics: Metrics, finite: bool, timing: Mapping[str, Any], seconds: float) -> None:
        """The numbers of a step have come."""
        board = self.board
        if not self._steps:
            board.add(m.STARTING, time.clock_gettime(time.CLOCK_BOOTTIME) - self._begun)
        self._steps += 1
        if self._first:
            for key, value in {**metrics, **timing, "step": step + 1}.items():
                if key not in self.task.untrained(step):
                    metric, labels = KEYS[key]
                    board.set(metric, value, *labels)
            for term, chance in self.task.chance(step, metrics["clips"]).items():
                if f"loss_{term}" in metrics:
                    board.set(m.CHANCE, metrics[f"loss_{term}"] / chance, term)
            board.set(m.LAST_STEP, time.time())
            board.add(m.STEPS, 1)
            board.add(m.CLIPS, metrics["clips"])
            board.add(m.NOT_FINITE, not finite)
            board.observe(m.STEP_TIME, seconds)
        if board.due():
            self._look(step)

    def _look(self, step: int) -> None:
        """What takes some effort to find out."""
        board, stats = self.board, self.loader.stats()
        sums = {m.READS: "requests", m.RETRIES: "retries", m.HEDGED: "hedged", m.READ_BYTES: "bytes", m.HITS: "hits"}
        for metric, name in {**sums, m.MISSES: "misses"}.items():
            self._raise(metric, stats.fetch[name])
        self._raise(m.DECODED, sum(stats.decoded))
        self._raise(m.DECODE, sum(stats.decode_seconds))
        board.set(m.READY, stats.queue_depth)
        board.set(m.MEMORY, resident())
        if self.ranks.device.type == "cuda":
            board.set(m.GPU_PEAK, torch.cuda.max_memory_reserved())
            board.set(m.GPU_TOTAL, torch.cuda.get_device_properties(self.ranks.device).total_memory)
        if self._first:
            board.set(m.EPOCH, (step + 1) / self.loader.steps_per_epoch)
            for reason, count in self.quarantine.counts().items():
                board.set(m.QUARANTINED, count, reason)
            self._raise(m.FAILED_SAVES, self.checkpoints.failures)
            if self.checkpoints.saved_step > self._saved:
                self._saved = self.checkpoints.saved_step
                board.add(m.SAVES, 1)
                board.set(m.SAVED_STEP, self._saved)
                board.set(m.SAVED_TIME, time.time())
                board.set(m.SAVED_BYTES, self.checkpoints.saved_bytes)

    def _raise(self, metric: m.Metric, value: float) -> None:
        """A counter, to what somebody else has counted since this process began."""
        self.board.add(metric, value - self.board.value(metric))

    def end(self, how: str) -> None:
        """how: finished, asked, failed; empty: it goes on elsewhere, or again."""
        if how == "asked" and "EQUIAV_NODE" in os.environ:
            how = ""  # for a node that has come, it may be: the node's program knows who was asked
        if self._first:
            self._look(max(0, int(self.board.value(m.STEP)) - 1))
            if how:
                self.board.set(m.ENDED, time.time(), how)
            if how and (self._steps or not (self.config.out / SUMMARY).exists()):
                self._sum_up()
        self.board.close()

    def _sum_up(self) -> None:
        """The last numbers, for who has no Prometheus: summary.json in the run's folder."""
        numbers: dict[str, Any] = {}
        for metric in m.METRICS:
            found = {labels: value for (name, labels), value in self.board.values.items() if name == metric.name}
            if found and not metric.per_rank and metric.kind != m.HISTOGRAM:
                by_label = {" ".join(labels): value for labels, value in found.items()}
                numbers[metric.full_name] = by_label if metric.labels else found[()]
        try:
            write(self.config.out / SUMMARY, numbers, indent=1)
        except OSError as error:
            self.tell(f"{SUMMARY} cannot be written: {error}")


def folder_of(config: RunConfig, ranks: Ranks, tell: Callable[[str], None]) -> Path | None:
    """Where the processes of this node write. Their launcher serves it; where it does not, the first of them sees to it. What
    goes wrong here costs the numbers, not the run."""
    if folder := os.environ.get(FOLDER):
        return Path(folder)
    if not config.metrics.port:
        return None
    name = hashlib.sha256(str(config.out.absolute()).encode()).hexdigest()[:12]
    ours = Path(tempfile.gettempdir()) / f"equiav-{os.getuid()}"
    folder = ours / name
    try:
        ours.mkdir(mode=0o700, exist_ok=True)
        about = ours.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise PermissionError(f"{ours} is not a folder of yours alone; remove it, or set TMPDIR")
        folder.mkdir(mode=0o700, exist_ok=True)
        if ranks.local_rank == 0:
            start_companion(folder, config.out.name, config.metrics.port, tell)
    except OSError as error:
        tell(f"no metrics are served: {error}")
        return None
    return folder


def resident() -> int:
    """Bytes of this process's memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
