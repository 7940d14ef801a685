"""What a run writes beside its weights: metrics.jsonl, a function of the run, and timing.jsonl, which is not."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from xxhash import xxh3_128

from equiav.config import NotHere
from streaming.outside import Malformed, parse

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


class Log:
    """One line a step, in order, none lost and none twice: begun again from a checkpoint, it keeps the steps before it."""

    def __init__(
        self,
        folder: Path,
        step: int,
        token: str = "",
        elsewhere: Callable[[], Mapping[int, str]] = dict,
        digest: str = "",
    ):
        """token: of this start. elsewhere: lines by step that are kept beside the checkpoints, for a disk that lacks them, or has
        others. digest: of the lines before `step`, as the checkpoint says; empty: it does not say."""
        self.folder = folder
        lines, timing = _lines(folder / METRICS, step, whole=True), _lines(folder / TIMING, step, whole=False)
        if len(lines) < step or (digest and _digest(lines).hexdigest() != digest):
            found = elsewhere()
            own = dict(enumerate(lines))
            for of_both in ({**own, **found}, {**found, **own}):  # a file of the store may be the one that lies
                lines = [of_both[k] for k in takewhile(of_both.__contains__, range(step))]
                if not digest or _digest(lines).hexdigest() == digest:
                    break
        self.missing = step - len(lines)  # lines that are nowhere
        self._digest = _digest(lines)
        self.others = (
            bool(digest) and not self.missing and self._digest.hexdigest() != digest
        )  # than those that were saved
        self._known = not (self.missing or self.others)  # all of them, as they were written
        with writing(folder):
            self._files = [_replaced(folder / METRICS, lines, token), _replaced(folder / TIMING, timing, token)]
        self._recent: deque[tuple[int, str]] = deque()  # lines that no checkpoint has

    def write(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        line = json.dumps({"step": step, **metrics}) + "\n"
        with writing(self.folder):
            self._files[0].write(line)
            self._files[1].write(json.dumps({"step": step, **timing}) + "\n")
        self._digest.update(line.encode())
        self._recent.append((step, line))

    def digest(self) -> str:
        """Of all lines so far; empty where some are not known."""
        return self._digest.hexdigest() if self._known else ""

    def since(self, step: int) -> tuple[int, bytes]:
        """The lines from there on, of which a checkpoint of `step` has the ones before; and the first one's step."""
        while self._recent and self._recent[0][0] < step:
            self._recent.popleft()
        first = self._recent[0][0] if self._recent else step
        return first, "".join(line for _, line in self._recent).encode()

    def sync(self) -> None:
        """What was written is on disk: called before a checkpoint is, since no later start writes it again."""
        with writing(self.folder):
            for file in self._files:
                os.fsync(file.fileno())

    def close(self) -> None:
        with writing(self.folder):
            for file in self._files:
                file.close()


def step_of(line: str) -> int | None:
    """None: it is no whole line of a log."""
    try:
        found = parse(line, finite=False) if line.endswith("}\n") else None  # a loss may be none
    except Malformed:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int and step >= 0 else None


def _digest(lines: Iterable[str]) -> xxh3_128:
    state = xxh3_128()
    for line in lines:
        state.update(line.encode())
    return state


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """What goes wrong while something is written there names it. The disk is this node's: another node may go on."""
    try:
        yield path
    except OSError as error:
        where = error.filename or path
        why = error.strerror or error
        raise NotHere(f"out: {where} cannot be written ({why}); free the disk, or set another folder") from None


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
    with writing(path), path.open("a") as file:
        file.write(json.dumps(value) + "\n")
