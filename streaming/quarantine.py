"""Samples that cannot be used: named, and counted by reason until there are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FEW = 3  # samples that may be bad however small the dataset is, unless none may


class BadSample(ValueError):  # noqa: N818
    """A decoder's word that a sample cannot be used. `reason` is what is counted, in a few words; the detail is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Bad(NamedTuple):
    """A use of a sample that failed."""

    sample: int
    reason: str  # what is counted
    where: str  # shard, place in it, key
    detail: str  # for people


class TooManyBadSamples(RuntimeError):  # noqa: N818
    """More of the dataset is unusable than the run accepts."""


class Quarantine:
    """Grows as the batches name bad samples, each counted once. It keeps none of them from being tried again: of a sample that
    is damaged in part, another draw may use what is whole."""

    def __init__(self, total: int, max_bad: float = 0.01, path: Path | None = None):
        self.total, self.max_bad, self.path = total, max_bad, path
        self.limit = max(max_bad * total, FEW) if max_bad else 0.0
        self._reasons: dict[int, str] = {}
        self._listed: set[int] = set()
        if path and path.exists():  # of an earlier start of this run: not to be listed twice
            text = path.read_text()
            for line in text.splitlines():
                try:
                    self._listed.add(json.loads(line)["sample"])
                except ValueError:
                    continue  # a line cut by a crash; it will be listed again
            if text and not text.endswith("\n"):
                with path.open("a") as file:
                    file.write("\n")

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, bad: Iterable[Bad]) -> None:
        """Records all of them, and then raises if they are too many."""
        last = None
        for one in bad:
            if one.sample not in self._reasons:
                self._reasons[one.sample] = one.reason
                self._list(one)
                last = one
        if last and len(self) > self.limit + 1e-6:
            counts = ", ".join(f"{count} {name}" for name, count in self.counts().most_common())
            raise TooManyBadSamples(
                f"{len(self)} of {self.total} samples cannot be used ({counts}), more than the {self.limit:g} that "
                f"stream.max_bad={self.max_bad:g} allows; the last was sample {last.sample}, {last.where}: "
                f"{last.detail or last.reason}" + (f". All are listed in {self.path}" if self.path else "")
            )

    def _list(self, bad: Bad) -> None:
        if self.path and bad.sample not in self._listed:
            self._listed.add(bad.sample)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:  # one write to the end: processes may share the file
                file.write(json.dumps(bad._asdict()) + "\n")

    def counts(self) -> Counter[str]:
        return Counter(self._reasons.values())

    def state(self) -> dict[int, str]:
        return dict(self._reasons)

    def load(self, state: Mapping[Any, str]) -> None:
        """What `state()` was, at a checkpoint; JSON makes its keys text."""
        self._reasons.update({int(sample): reason for sample, reason in state.items()})
