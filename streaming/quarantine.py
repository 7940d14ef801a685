"""Samples that cannot be used: named, and counted by reason until there are too many."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from streaming.outside import Malformed, entry, parse, table, whole

FEW = 3  # samples that may be bad however small the dataset is, unless none may


class BadSample(ValueError):  # noqa: N818
    """A decoder's word that a sample cannot be used. `reason` is what is counted, in a few words; the detail is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(decoder: Any, key: str, members: dict[str, bytes], out: dict[str, Any]) -> None:
    """By a decoder. Whatever it raises is said of the sample: bytes from a store find errors that nobody has thought of, and one
    sample ends no run. A decoder that is wrong is wrong for too many samples, and the run says so."""
    try:
        decoder.decode(key, members, out)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("decoder failed", f"{', '.join(members)}: {type(error).__name__}: {error}") from error


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
        self._listed: set[int] | None = None  # not read yet

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
        if not self.path:
            return
        if self._listed is None:
            self._listed = self._earlier(self.path)
        if bad.sample not in self._listed:
            self._listed.add(bad.sample)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:  # one write to the end: processes may share the file
                file.write(json.dumps(bad._asdict()) + "\n")

    @staticmethod
    def _earlier(path: Path) -> set[int]:
        """Those that earlier starts of this run have listed: each stays once, and a line that a crash has cut goes."""
        lines: dict[int, str] = {}
        there = path.read_text(errors="replace").splitlines() if path.exists() else []
        for line in there:
            with suppress(Malformed):
                lines.setdefault(whole(entry(table(parse(line), "a line"), "sample"), "sample"), line)
        if len(lines) < len(there):
            part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            part.write_text("".join(line + "\n" for line in lines.values()))
            part.replace(path)
        return set(lines)

    def counts(self) -> Counter[str]:
        return Counter(self._reasons.values())

    def state(self) -> dict[int, str]:
        return dict(self._reasons)

    def load(self, state: Mapping[Any, str], where: Callable[[int], str] = str) -> None:
        """What `state()` was, at a checkpoint; JSON makes its keys text. where: a sample is, for the list, which may have been
        left on another disk."""
        for sample, reason in ((int(sample), reason) for sample, reason in state.items()):
            if sample not in self._reasons:
                self._reasons[sample] = reason
                self._list(Bad(sample, reason, where(sample), "found by an earlier start"))
