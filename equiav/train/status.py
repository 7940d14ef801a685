"""What is known of a run from outside, and the verdict on it, by the limits of the alerts."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from equiav.train.log import METRICS, TIMING, step_of
from equiav.train.numbers import SUMMARY
from monitoring import metrics as m
from monitoring.alerts import LIMITS
from monitoring.metrics import Metric

HISTORY = 60  # values of a curve: as wide as it is drawn
LONG = 4000  # bytes of a log that are read for each of them


@dataclass
class RunStatus:
    """What is known of a run now."""

    values: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)  # metric, labels beside `run`
    curves: dict[tuple[str, tuple[str, ...]], list[float]] = field(default_factory=dict)
    age: float = math.nan  # seconds since the last step

    def get(self, metric: Metric, *labels: str) -> float:
        return self.values.get((metric.name, labels), math.nan)

    def all(self, metric: Metric) -> dict[tuple[str, ...], float]:
        return {labels: value for (name, labels), value in self.values.items() if name == metric.name}


CURVES = [(m.LOSS, ("total",)), (m.THROUGHPUT, ())]
CURVES += [(metric, (term,)) for metric in (m.CHANCE, m.ACCURACY) for term in ("inter", m.CLASS)]
CURVES += [(metric, (side,)) for metric in (m.SIMILARITY, m.EFFECTIVE_RANK) for side in m.SIDES]


class Folder:
    """metrics.jsonl and timing.jsonl of a run on this machine."""

    def __init__(self, folder: Path):
        self.folder, self.keys = folder, m.by_key()

    def look(self) -> RunStatus:
        seen, summary, ended = RunStatus(), self.folder / SUMMARY, {}
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
            planned = yaml.safe_load((self.folder / "config.yaml").read_text())["train"]["steps"]
            seen.values[m.STEPS_PLANNED.name, ()] = float(planned)
        if summary.is_file():  # it has ended
            with suppress(ValueError, RecursionError):  # it is being written
                ended = json.loads(summary.read_text())
            for name, value in ended.items() if isinstance(ended, dict) else ():
                for labels, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, int | float):
                        seen.values[name.removeprefix(m.PREFIX), tuple(labels.split())] = number
        for name in (METRICS, TIMING):
            path = self.folder / name
            if not path.is_file():
                continue
            rows = list(tail(path))
            for row in rows:
                for key, value in row.items():
                    metric, labels = self.keys.get(key, (None, ()))
                    if metric and isinstance(value, int | float):
                        seen.values[metric.name, labels] = value + (key == "step")  # steps that are done
                        if (metric, labels) in CURVES:
                            seen.curves.setdefault((metric.name, labels), []).append(value)
            seen.age = time.time() - path.stat().st_mtime
        return seen


def tail(path: Path) -> Iterator[dict[str, float]]:
    """The last whole lines."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - HISTORY * LONG))
        for line in deque(file.read().decode(errors="replace").splitlines(keepends=True), HISTORY):
            if step_of(line) is not None:
                yield json.loads(line)


def verdicts(seen: RunStatus) -> list[str]:
    """What is wrong, by the limits of the alerts. Comparisons with what is not known are false."""
    ended = over(seen)
    done = seen.get(m.STEP) / seen.get(m.STEPS_PLANNED)
    early = not done > LIMITS["early"]  # where it is not known, too
    wrong = []
    if seen.age > LIMITS["stalled_seconds"] and not ended:
        wrong.append(f"no step for {seen.age:.0f} s")
    if seen.get(m.UNSAVED) > LIMITS["unsaved_seconds"]:
        wrong.append(f"nothing saved for {seen.get(m.UNSAVED):.0f} s")
    for (side,), rank in seen.all(m.EFFECTIVE_RANK).items():
        if rank < LIMITS["effective_rank"] and not early and not seen.get(m.BATCH) < 8:
            wrong.append(f"embeddings of the {side} fill {rank:.1f} direction(s)")
    for (side,), gain in seen.all(m.GAIN).items():
        if not early and gain < LIMITS["gain"] and seen.get(m.SENSITIVITY, side) < LIMITS["gain"]:
            wrong.append(f"the predictor of the {side} does nothing")
    if seen.get(m.WORLD) + seen.get(m.SPARES) < seen.get(m.WORLD_TARGET):
        wrong.append(f"{seen.get(m.WORLD_TARGET) - seen.get(m.WORLD) - seen.get(m.SPARES):.0f} processes are missing")
    if sum(seen.all(m.QUARANTINED).values()) > LIMITS["quarantine"] * seen.get(m.LIMIT):
        wrong.append("much bad data")
    return wrong


def over(seen: RunStatus) -> str:
    """How it has ended, unless it has gone on since."""
    ends = {
        labels[0]: when for labels, when in seen.all(m.ENDED).items() if labels and not when < seen.get(m.LAST_STEP)
    }
    return max(ends, key=lambda how: ends[how], default="")
