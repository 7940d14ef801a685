"""What one process tells of itself: numbers in memory, which a thread writes to a file of this process once a second.

A step costs some entries of a dictionary. Nothing waits: no socket, no lock that a reader can hold, no disk. Whoever serves
the numbers reads the files (exporter.py), in another process, which outlives this one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monitoring.metrics import STEP_SECONDS, Metric

SECONDS = 1.0  # between two writes
Key = tuple[str, tuple[str, ...]]  # name of the metric, values of its labels


class Board:
    """Without a folder, it keeps the numbers for this process alone."""

    def __init__(self, folder: Path | None, name: str, rank: int | None = None, tell: Callable[[str], None] = print):
        """name: of this process among those that share the folder. rank: the value of that label."""
        self.values: dict[Key, Any] = {}
        self._rank, self._tell = () if rank is None else (str(rank),), tell
        self._about: dict[str, Any] = {"pid": os.getpid(), "start": started(os.getpid()), "began": since_boot()}
        self._ended, self._looked, self._thread = threading.Event(), 0.0, None
        if folder:
            self._path = folder / f"{name}-{os.getpid()}-{self._about['start']}.json"
            self._thread = threading.Thread(target=self._keep_writing, daemon=True, name="board")
            self._thread.start()

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        self.values[self._key(metric, labels)] = value

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        key = self._key(metric, labels)
        self.values[key] = self.values.get(key, 0) + amount

    def observe(self, metric: Metric, value: float) -> None:
        """Of a histogram."""
        key = self._key(metric, ())
        before = self.values.get(key) or [0.0] * (len(STEP_SECONDS) + 2)  # the sum, then how many are in each bucket
        after = list(before)  # a new one: another thread may be writing the old
        after[0] += value
        after[1 + bisect_left(STEP_SECONDS, value)] += 1
        self.values[key] = after

    def value(self, metric: Metric, *labels: str) -> float:
        return self.values.get(self._key(metric, labels), 0)

    def due(self) -> bool:
        """Whether what takes some effort to find out is to be told again."""
        now = time.monotonic()
        if self._thread is None or now - self._looked < SECONDS:
            return False
        self._looked = now
        return True

    def close(self) -> None:
        """The last word: what it has told stays to be seen, until another process tells something."""
        if self._thread:
            self._ended.set()
            self._thread.join(5 * SECONDS)  # a disk that hangs

    def _key(self, metric: Metric, labels: tuple[str, ...]) -> Key:
        return metric.name, labels + self._rank if metric.per_rank else labels

    def _keep_writing(self) -> None:
        said = ended = False
        while True:
            about = {**self._about, "ended": since_boot() if ended else 0}
            try:
                self._path.parent.mkdir(mode=0o700, exist_ok=True)  # an exporter that ends takes it along
                write(self._path, {**about, "values": [[*key, value] for key, value in dict(self.values).items()]})
            except OSError as error:
                if not said:
                    self._tell(
                        f"metrics cannot be written to {self._path.parent} ({error}); the run goes on without them"
                    )
                    said = True
            if ended:
                return
            ended = self._ended.wait(SECONDS)


def write(path: Path, content: Any, indent: int | None = None) -> None:
    """Whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=indent))
    part.replace(path)


def since_boot() -> float:
    """Seconds, by a clock that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started(pid: int) -> int:
    """When a process was started, in ticks of this machine; 0: there is none. With it, a number is one process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
