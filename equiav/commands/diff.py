"""`equiav diff RUN RUN`: two runs are equal, or this is where they part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from equiav.commands.settings import DiffConfig
from equiav.config import ConfigError, RunConfig, flat, from_dict, to_dict, without_effect
from equiav.config.settings import ROUNDING
from equiav.train.log import step_of
from equiav.train.manifest import manifests
from streaming import Store

ENVIRONMENT = ("equiav", "code", "torch", "python", "threads", "gpu")  # beside the settings, what numbers depend on


class Recorded:
    """What is left of a run."""

    def __init__(self, place: str):
        self.place, folder = place, Path(place)
        config, self.metrics = folder / "config.yaml", folder / "metrics.jsonl"
        settings = (yaml.safe_load(config.read_text()) if config.is_file() else None) or {}
        url = settings.get("checkpoint", {}).get("url") or str(folder / "checkpoints")
        self.checkpoints = manifests(Store(url if settings else place))  # step -> manifest
        if not settings and not self.checkpoints:
            raise ConfigError(
                f"{place}: neither a run's folder (config.yaml) nor one of checkpoints (step-...) is there"
            )
        newest = self.checkpoints[max(self.checkpoints)] if self.checkpoints else {}
        self.settings = flat(newest.get("config") or settings)
        self.environment = {name: newest.get(name, "?") for name in ENVIRONMENT}


def run_diff(config: DiffConfig) -> int:
    """-> 1 where they differ."""
    one, two = Recorded(config.one), Recorded(config.two)
    different: list[str] = []
    size = {"model": {"size": one.settings.get("model.size", "vit_b16")}}
    defaults = flat(to_dict(from_dict(RunConfig, size, "defaults")))
    for recorded in (one, two):  # by an earlier release, perhaps
        recorded.settings = defaults | recorded.settings
    names = one.settings.keys() | two.settings.keys()
    for name in sorted(name for name in names if one.settings.get(name) != two.settings.get(name)):
        effect = ": rounds otherwise" if name in ROUNDING else ": without effect" if without_effect(name) else ""
        print(f"setting {name}: {one.settings.get(name)} and {two.settings.get(name)}{effect}")
        if not effect:
            different.append(f"setting {name}")
    for name in ENVIRONMENT:
        if one.environment[name] != two.environment[name]:
            print(f"{name}: {one.environment[name]} and {two.environment[name]}")
    compared = [compare_metrics(one, two, different), compare_weights(one, two, different)]
    if different:
        print(f"the runs differ: {'; '.join(different)}")
        return 1
    if not any(compared):
        raise ConfigError(f"{one.place} and {two.place} have no step and no checkpoint in common: nothing to compare")
    print(f"the runs are equal, as far as both go: {compared[0]} step(s), weights of {compared[1]} checkpoint(s)")
    return 0


def compare_metrics(one: Recorded, two: Recorded, different: list[str]) -> int:
    """Line by line. -> steps compared."""
    if not (one.metrics.is_file() and two.metrics.is_file()):
        return 0
    ours, theirs = ([line for line in run.metrics.open() if step_of(line) is not None] for run in (one, two))
    count = 0
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            different.append(_first_difference(json.loads(mine), json.loads(other)))
            break
        count += 1
    print(f"metrics: {count} steps are equal, of {len(ours)} and {len(theirs)}")
    return count


def _first_difference(one: dict[str, Any], two: dict[str, Any]) -> str:
    for name in dict.fromkeys((*one, *two)):
        if repr(one.get(name)) != repr(two.get(name)):  # nan is nan
            return f"step {one['step']}, {name}: {one.get(name)!r} and {two.get(name)!r}"
    return f"step {one['step']}: the same numbers, written otherwise"


def compare_weights(one: Recorded, two: Recorded, different: list[str]) -> int:
    """At the steps that both have a checkpoint of. -> how many."""
    steps = sorted(one.checkpoints.keys() & two.checkpoints.keys())
    for step in steps:
        ours, theirs = one.checkpoints[step], two.checkpoints[step]
        if ours["digest"] == theirs["digest"]:
            print(f"weights of step {step}: {ours['digest']} in both")
            continue
        everyones = dict.fromkeys((*ours["weights"], *theirs["weights"]))
        names = [name for name in everyones if ours["weights"].get(name) != theirs["weights"].get(name)]
        first = f", {names[0]} the first" if names else ", by the digest of all alone"
        different.append(f"weights of step {step}: {len(names)} of {len(everyones)} tensors{first}")
        break
    return len(steps)
