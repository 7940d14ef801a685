"""What a run writes beside its weights: metrics.jsonl, a function of the run, and timing.jsonl, which is not."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


class Log:
    """One line a step, in order, none lost and none twice: begun again from a checkpoint, it keeps the steps before it."""

    def __init__(self, folder: Path, step: int, token: str = "", elsewhere: Callable[[], Mapping[int, str]] = dict):
        """token: of this start. elsewhere: lines by step that are kept beside the checkpoints, for a disk that lacks them."""
        kept = [_lines(folder / METRICS, step, whole=True), _lines(folder / TIMING, step, whole=False)]
        if len(kept[0]) < step:
            found = elsewhere()
            while len(kept[0]) < step and len(kept[0]) in found:
                kept[0].append(found[len(kept[0])])
        self.missing = step - len(kept[0])  # lines that are nowhere
        self._files = [
            _replaced(folder / name, lines, token) for name, lines in zip((METRICS, TIMING), kept, strict=True)
        ]
        self._recent: deque[tuple[int, str]] = deque()  # lines that no checkpoint has

    def write(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        for file, values in zip(self._files, (metrics, timing), strict=True):
            file.write(json.dumps({"step": step, **values}) + "\n")
        self._recent.append((step, json.dumps({"step": step, **metrics}) + "\n"))

    def since(self, step: int) -> tuple[int, bytes]:
        """The lines from there on, of which a checkpoint of `step` has the ones before; and the first one's step."""
        while self._recent and self._recent[0][0] < step:
            self._recent.popleft()
        first = self._recent[0][0] if self._recent else step
        return first, "".join(line for _, line in self._recent).encode()

    def sync(self) -> None:
        """What was written is on disk: called before a checkpoint is, since no later start writes it again."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files:
            file.close()


def step_of(line: str) -> int | None:
    """None: it is no whole line of a log."""
    try:
        step = json.loads(line)["step"] if line.endswith("}\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


def _lines(path: Path, step: int, whole: bool) -> list[str]:
    """Those of the steps before `step`, as far as they are lines, and `whole`: as far as none lacks."""
    kept: list[str] = []
    if path.exists():
        with path.open(errors="replace") as file:
            for line in file:
                found = step_of(line)
                if found is None or found >= step or (whole and found != len(kept)):
                    break
                kept.append(line)
    return kept


def _replaced(path: Path, lines: list[str], token: str) -> TextIO:
    """The file with these lines, to be gone on with. It is a new file in the old one's place: at no moment are there fewer
    lines, and what an earlier start still writes does not come between."""
    part = path.with_suffix(f".part{token}")
    with part.open("w") as new:
        new.writelines(lines)
        new.flush()
        os.fsync(new.fileno())
    part.replace(path)
    return path.open("a", buffering=1)


def append(path: Path, value: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")
