"""What is known of runs, gathered from what they and their evaluations have left: the data of `equiav report`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from equiav.config import ConfigError
from equiav.evaluate import paper
from equiav.terminal import masked
from equiav.train.log import METRICS, TIMING, step_of
from equiav.train.numbers import SUMMARY
from equiav.train.status import Folder, over, verdicts
from monitoring import metrics as m
from streaming import Store
from streaming.store import Missing

POINTS = 200  # of a curve
STARTS = "starts.jsonl"
PLACES = ("", "model/", "checkpoints/", "checkpoints/model/")  # where a run, or one on a cluster, leaves what
EVALUATED = ("retrieval", "similarity", "centroid", "localize", "attention", "examples")
CURVES = (
    m.LOSS,
    m.CHANCE,
    m.GRADIENT,
    m.ACCURACY,
    m.SIMILARITY,
    m.GAIN,
    m.SENSITIVITY,
    m.EFFECTIVE_RANK,
    m.RATE,
    m.THROUGHPUT,
)


def gather(where: str, patience: float = 600.0) -> dict[str, Any]:
    """Of one run: a folder on this machine, or s3://..."""
    store = Store(where, patience)

    def find(name: str) -> str | None:
        for place in PLACES:
            try:
                return store.read(f"{place}{name}").decode(errors="replace")
            except (Missing, NotADirectoryError):
                continue
        return None

    files = {name: find(name) for name in (METRICS, TIMING, STARTS, SUMMARY, "config.yaml")}
    found = {what: find(f"eval/{what}.json") for what in EVALUATED}
    results = find("results.json")
    if files[METRICS] is None and results is None and not any(found.values()):
        raise ConfigError(f"run: {where} has no {METRICS}, no results.json, no eval folder: no run has written there")
    rows = {name: _rows(files[name] or "") for name in (METRICS, TIMING)}
    settings = _of_yaml(files["config.yaml"])
    return {
        "name": where.rstrip("/").rpartition("/")[2] or where,
        "where": masked(where),
        "verdict": _verdict(files) if files[METRICS] else [],
        "settings": settings,
        "steps": len(rows[METRICS]),
        "planned": _within(settings, "train", "steps"),
        "last": _last(rows[METRICS]),
        "curves": _curves(rows[METRICS], rows[TIMING]),
        "starts": _starts(files[STARTS] or ""),
        "seconds": _seconds(files[SUMMARY]),
        "evaluated": {what: _of_json(text, f"{where}: {what}.json") for what, text in found.items() if text},
        "results": _of_json(results, f"{where}: results.json") if results else None,
        "paper": {
            "retrieval": paper.RETRIEVED,
            "similarity": paper.SIMILAR,
            "classes": _published(settings.get("tune")),
        },
    }


def _within(values: Any, *path: str) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _published(tune: Any) -> dict[str, Any] | None:
    """What the paper has of the dataset that was fine-tuned on, from the same modalities."""
    benchmark, modality = (tune.get(name) if isinstance(tune, dict) else None for name in ("benchmark", "modality"))
    if not isinstance(benchmark, str) or benchmark not in paper.FINE_TUNED:
        return None
    table, measure, numbers = paper.FINE_TUNED[benchmark]
    return {"benchmark": benchmark, "table": table, "measure": measure, "value": numbers.get(str(modality))}


def _rows(text: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in text.splitlines(keepends=True) if step_of(line) is not None]


def _of_json(text: str, source: str) -> dict[str, Any]:
    def number(given: str) -> float:
        if not math.isfinite(value := float(given)):
            raise ValueError(f"{given} is no finite number")
        return value

    try:
        found = json.loads(text, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: expected results, found {type(found).__name__}")
    return found


def _of_yaml(text: str | None) -> dict[str, Any]:
    try:
        found = yaml.safe_load(masked(text or ""))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _verdict(files: dict[str, str | None]) -> list[str]:
    """Of `equiav top`: how it ended, and what is wrong."""
    with TemporaryDirectory(prefix="equiav-") as temporary:
        for name, text in files.items():
            if text is not None:
                Path(temporary, name).write_text(text)
        seen = Folder(Path(temporary)).look()
        how = over(seen)
    wrong = [one for one in verdicts(seen) if not one.startswith("no step for")]
    return [how or "not ended", *wrong]


def _last(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the last twentieth."""
    last = rows[-max(1, len(rows) // 20) :]
    keys = {key for row in last for key, value in row.items() if _number(value) and key != "step"}
    return {key: _mean([row[key] for row in last if _number(row.get(key))]) for key in sorted(keys)}


def _curves(rows: list[dict[str, float]], timing: list[dict[str, float]]) -> dict[str, dict[str, list[list[float]]]]:
    """metric -> label -> points (step, mean over as many steps as lie between two points)."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for metric in CURVES:
        for key, labels in metric.logged.items():
            given = [(row["step"], row[key]) for row in (*rows, *timing) if _number(row.get(key))]
            if not given:
                continue
            width = math.ceil(len(given) / POINTS)
            parts = [given[k : k + width] for k in range(0, len(given), width)]
            points = [[_mean([x for x, _ in part]), _mean([y for _, y in part])] for part in parts]
            found.setdefault(metric.name, {})[" ".join(labels)] = points
    return found


def _starts(text: str) -> list[dict[str, Any]]:
    """Each start of the run: at which step, with how many processes."""
    found = []
    for row in _rows(text):
        found.append({name: row.get(name) for name in ("time", "step", "ranks", "code", "equiav", "gpu")})
    return found


def _seconds(text: str | None) -> float | None:
    """From the first start to the end."""
    said = _of_yaml(text)
    began, ended = said.get("equiav_run_began_time_seconds"), said.get("equiav_run_ended_time_seconds")
    if not _number(began) or not isinstance(ended, dict):
        return None
    times = [time for time in ended.values() if _number(time)]
    return max(times) - began if times else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
