"""What a run writes beside its weights: metrics.jsonl, a function of the run, and timing.jsonl, which is not."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class Log:
    """One line a step, in order, none lost and none twice: begun again from a checkpoint, it keeps the steps before it."""

    def __init__(self, folder: Path, step: int):
        self._files = [_from(folder / name, step) for name in ("metrics.jsonl", "timing.jsonl")]

    def write(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        for file, values in zip(self._files, (metrics, timing), strict=True):
            file.write(json.dumps({"step": step, **values}) + "\n")

    def sync(self) -> None:
        """What was written is on disk: called before a checkpoint is, since no later start writes it again."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files:
            file.close()


def _from(path: Path, step: int) -> TextIO:
    """The file with the lines of the steps before `step`, to be gone on with. It is a new file in the old one's place: at no
    moment are there fewer lines, and what an earlier start still writes does not come between."""
    kept = 0
    if path.exists():
        with path.open("rb") as old:
            for line in old:
                if not line.endswith(b"}\n") or json.loads(line)["step"] >= step:
                    break
                kept += len(line)
    part = path.with_suffix(".part")
    with part.open("wb") as new:
        if kept:
            with path.open("rb") as old:
                while kept and (block := old.read(min(kept, 1 << 20))):
                    kept -= len(block)
                    new.write(block)
        new.flush()
        os.fsync(new.fileno())
    part.replace(path)
    return path.open("a", buffering=1)


def append(path: Path, value: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")
