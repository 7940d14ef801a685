"""What Grafana makes of a page's JSON: which queries it asks, how it reduces, names, words and colours the answers.

By its rules, in so far as these pages use them. Pictures and tests see a page through this alone, so that none of them promises
what Grafana does not show.
"""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

LAST = "lastNotNull"
GRAFANA_LIMITS = [{"color": "green", "value": None}, {"color": "red", "value": 80}]  # where a panel has none


class Number(NamedTuple):
    """Of a panel of numbers."""

    name: str
    text: str
    colour: str


class Curve(NamedTuple):
    name: str
    times: list[float]
    values: list[float]


@dataclass(frozen=True)
class View:
    """A page as somebody has it open: of a Prometheus, with values of its variables, from one time to another."""

    url: str
    variables: dict[str, str]
    begin: float
    end: float

    def numbers(self, panel: dict[str, Any]) -> list[Number]:
        """One for each series; where there is none, the word for that."""
        calculations = panel["options"]["reduceOptions"]["calcs"] or ["last"]
        found = []
        for curve in self.curves(panel):
            (calculation,) = calculations
            assert calculation in (LAST, "last"), calculation
            found.append(shown(panel, curve.name, curve.values[-1]))
        return found or [shown(panel, "", None)]

    def curves(self, panel: dict[str, Any]) -> list[Curve]:
        found = []
        for target in panel["targets"]:
            for one in self.ask(target):
                values = one.get("values") or [one["value"]]
                times, numbers = zip(*((float(at), float(value)) for at, value in values), strict=True)
                found.append(Curve(named(target["legendFormat"], one["metric"]), list(times), list(numbers)))
        return found

    def ask(self, target: dict[str, Any]) -> list[dict[str, Any]]:
        step = max(1.0, (self.end - self.begin) / 400)
        query = target["expr"]
        for name, value in {"__rate_interval": f"{max(15, 4 * step):.0f}s", **self.variables}.items():
            query = query.replace(f"${name}", value)
        if target.get("instant") and not target.get("range"):
            values: dict[str, Any] = {"query": query, "time": self.end}
            path = "query"
        else:
            values, path = {"query": query, "start": self.begin, "end": self.end, "step": step}, "query_range"
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(values)}") as answer:
            return json.load(answer)["data"]["result"]


def named(legend: str, labels: dict[str, str]) -> str:
    if not legend:
        return (
            "{" + ", ".join(f'{name}="{value}"' for name, value in sorted(labels.items())) + "}" if labels else "Value"
        )
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), legend).strip()


def shown(panel: dict[str, Any], name: str, value: float | None) -> Number:
    """value: None where there is no series."""
    settings = panel["fieldConfig"]["defaults"]
    text, colour = "", ""
    for mapping in settings.get("mappings", []):
        options = mapping["options"]
        if mapping["type"] == "special":
            found = options["result"] if value is None and options["match"] in ("null", "null+nan") else None
        else:
            found = None if value is None else options.get(f"{value:g}")
        if found:
            text, colour = found.get("text", ""), found.get("color", "")
            break
    if not text:
        text = (settings.get("noValue") or "No data") if value is None else with_unit(value, settings.get("unit", ""))
    mode = panel["options"].get("textMode", "auto")
    if value is not None and mode == "name":
        text = name
    elif value is not None and mode == "value_and_name":
        text = f"{name} {text}"
    return Number(name, text, colour or limit_colour(settings, value))


def limit_colour(settings: dict[str, Any], value: float | None) -> str:
    """Of no value: that of the lowest limit."""
    steps = settings.get("thresholds", {}).get("steps", GRAFANA_LIMITS)
    passed = [step["color"] for step in steps[1:] if value is not None and value >= step["value"]]
    return passed[-1] if passed else steps[0]["color"]


def with_unit(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "dateTimeAsIso":
        return datetime.fromtimestamp(value / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    if unit == "s":
        for size, name in ((86400, "days"), (3600, "hours"), (60, "mins")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return f"{value:.3g} s"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{'' if unit == 'short' else unit}".strip()
    return f"{value:.3g} {'' if unit == 'short' else unit}".strip()
