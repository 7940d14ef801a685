"""Samples that cannot be used: named, counted by reason, left out from then on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class BadSample(ValueError):  # noqa: N818
    """A decoder's word that a sample cannot be used. `reason` is what is counted, in a few words; the detail is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class TooManyBadSamples(RuntimeError):  # noqa: N818
    """More of the dataset is unusable than the run accepts."""


class Quarantine:
    """Grows as bad samples are met. Its state belongs in a checkpoint: what was left out once stays left out in a replay."""

    def __init__(self, total: int, max_bad: float = 0.01, path: Path | None = None):
        self.total, self.max_bad, self.path = total, max_bad, path
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

    def __contains__(self, sample: int) -> bool:
        return sample in self._reasons

    def add(self, sample: int, reason: str, where: str, detail: str = "") -> None:
        if sample in self._reasons:
            return
        self._reasons[sample] = reason
        if self.path and sample not in self._listed:
            self._listed.add(sample)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"sample": sample, "where": where, "reason": reason, "detail": detail}) + "\n"
            with self.path.open("a") as file:  # one write to the end: processes may share the file
                file.write(line)
        if len(self) > self.max_bad * self.total + 1e-6:
            counts = ", ".join(f"{count} {name}" for name, count in self.counts().most_common())
            raise TooManyBadSamples(
                f"{len(self)} of {self.total} samples cannot be used ({counts}), more than "
                f"max_bad={self.max_bad:g} allows; the last was sample {sample}, {where}: {detail or reason}"
                + (f". All are listed in {self.path}" if self.path else "")
            )

    def counts(self) -> Counter[str]:
        return Counter(self._reasons.values())

    def state(self) -> dict[int, str]:
        return dict(self._reasons)

    def load(self, state: Mapping[Any, str]) -> None:
        """What `state()` was, at a checkpoint; JSON makes its keys text."""
        self._reasons.update({int(sample): reason for sample, reason in state.items()})
