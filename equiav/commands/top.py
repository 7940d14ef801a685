"""`equiav top`: a run in a terminal, verdict first, from what its nodes serve or from its folder."""

from __future__ import annotations

import math
import time
import urllib.request
from collections import deque
from http.client import HTTPException
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.text import Text

from equiav.commands.settings import TopConfig
from equiav.config import ConfigError
from equiav.train.log import METRICS
from equiav.train.status import CURVES, HISTORY, Folder, RunStatus, over, verdicts
from monitoring import metrics as m
from monitoring.metrics import COUNTER, Metric

BARS = "▁▂▃▄▅▆▇█"


class Served:
    """What nodes serve; numbers that several tell are added up where they count, else the largest holds."""

    def __init__(self, addresses: tuple[str, ...]):
        self.addresses = addresses
        self.curves: dict[tuple[str, tuple[str, ...]], deque[float]] = {}
        self.known = {metric.full_name: metric for metric in m.METRICS}

    def look(self) -> RunStatus:
        seen, answered, problems = RunStatus(), 0, []
        for address in self.addresses:
            url = address if "://" in address else f"http://{address}"
            try:
                with urllib.request.urlopen(f"{url.removesuffix('/metrics')}/metrics", timeout=5) as answer:
                    families = list(text_string_to_metric_families(answer.read().decode()))
            except (OSError, HTTPException, ValueError) as error:
                problems.append(f"{address}: {error}")
                continue  # of a node that is gone, the others may tell
            answered += 1
            for family in families:
                for sample in family.samples:
                    metric = self.known.get(sample.name)
                    if metric:
                        key = metric.name, tuple(sample.labels.get(name, "") for name in metric.labels)
                        before = seen.values.get(key)
                        together = (
                            sample.value + (before or 0) if metric.kind == COUNTER else max(sample.value, before or 0)
                        )
                        seen.values[key] = sample.value if before is None else together
        if not answered:
            raise ConfigError(f"where: there is no such folder, and no node answers at {'; '.join(problems)}")
        for metric, labels in CURVES:
            if not math.isnan(value := seen.get(metric, *labels)):
                self.curves.setdefault((metric.name, labels), deque(maxlen=HISTORY)).append(value)
        seen.curves = {key: list(values) for key, values in self.curves.items()}
        seen.age = time.time() - seen.get(m.LAST_STEP)
        return seen


def shown(seen: RunStatus) -> Text:
    """Rows of at most 80 columns."""
    text, wrong = Text(), verdicts(seen)
    step, planned = seen.get(m.STEP), seen.get(m.STEPS_PLANNED)
    of = "" if math.isnan(planned) else f" of {planned:.0f} ({step / planned:.0%})"
    how = over(seen)
    if math.isnan(step):
        wrong.insert(0, "no step yet")
    well = how in ("finished", "asked") or not (how or wrong)
    text.append(f"{how or '; '.join(wrong) or 'well'}"[:80] + "\n", "bold green" if well else "bold red")
    row(text, "step", f"{step:.0f}{of}, the last {seen.age:.0f} s ago")
    curve(text, seen, "loss", m.LOSS, "total", form="{:.3f}")
    for term in ("inter", m.CLASS):  # of pretraining, of fine-tuning
        curve(text, seen, "loss over chance", m.CHANCE, term, form="{:.1%}")
        curve(text, seen, "accuracy", m.ACCURACY, term, form="{:.1%}")
    for side in m.SIDES:
        curve(text, seen, f"similarity {side}", m.SIMILARITY, side, form="{:.3f}")
    if seen.all(m.GAIN):
        row(text, "gain, sensitivity", ", ".join(
            f"{side} {seen.get(m.GAIN, side):.3f} {seen.get(m.SENSITIVITY, side):.3f}" for side in m.SIDES))  # fmt: skip
    for side in m.SIDES:
        curve(text, seen, f"effective rank {side}", m.EFFECTIVE_RANK, side, form="{:.1f}")
    curve(text, seen, "clips/s", m.THROUGHPUT, form="{:.0f}")
    mfu = seen.get(m.THROUGHPUT) * seen.get(m.FLOPS) / seen.get(m.PEAK)
    if not math.isnan(mfu):
        row(text, "MFU", f"{mfu:9.1%}")
    row(text, "processes", f"{seen.get(m.WORLD):.0f} of {seen.get(m.WORLD_TARGET):.0f}, {seen.get(m.SPARES):.0f} spare, "
        f"{seen.get(m.ROUNDS):.0f} round(s)")  # fmt: skip
    spent = [value for (phase, _), value in seen.all(m.PHASE).items() if phase == "data"]
    every = sum(seen.all(m.PHASE).values())
    waits = f"{sum(spent) / every:.1%} of the time" if every else "?"
    row(text, "data", f"waits {waits}, {sum(seen.all(m.QUARANTINED).values()):.0f} in quarantine, "
        f"{sum(seen.all(m.RETRIES).values()):.0f} retries")  # fmt: skip
    saved = step if how in ("finished", "asked") else seen.get(m.SAVED_STEP)  # it ends when its last save is durable
    row(text, "saved", f"step {saved:.0f}, due for {seen.get(m.UNSAVED):.0f} s, "
        f"{seen.get(m.FAILED):.0f} failed")  # fmt: skip
    text.rstrip()
    return text


def row(text: Text, name: str, said: str) -> None:
    text.append(f"{name:22s} {said}"[:80].replace("nan", "?") + "\n")


def curve(text: Text, seen: RunStatus, name: str, metric: Metric, *labels: str, form: str) -> None:
    values = seen.curves.get((metric.name, labels), [])
    if math.isnan(seen.get(metric, *labels)):
        return
    row(text, name, f"{form.format(seen.get(metric, *labels)):>9s} {sparkline(values[-46:])}")


def sparkline(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if 0 < high - low < math.inf else 0.0
    return "".join(
        BARS[round((value - low) * scale) if scale else 0] if math.isfinite(value) else "!" for value in values
    )


def run_top(config: TopConfig) -> None:
    folder = Path(config.where[0])
    if len(config.where) > 1 and any(Path(where).is_dir() for where in config.where):
        raise ConfigError("where: expected one folder, or one HOST:PORT for each node")
    if folder.exists() and not (folder / METRICS).exists():
        raise ConfigError(f"where: {folder} has no {METRICS}: no run has written there")
    source = Folder(folder) if folder.exists() else Served(config.where)
    if config.once:
        Console(highlight=False).print(shown(source.look()))
        return
    with Live(shown(source.look()), auto_refresh=False) as live:
        while True:
            seen = source.look()
            live.update(shown(seen), refresh=True)
            if over(seen):
                return
            time.sleep(config.seconds)
