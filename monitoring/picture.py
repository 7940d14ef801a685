"""`python -m monitoring.picture URL PNG`: draws a dashboard from what a Prometheus has, each panel in its place.

So that one sees what there is to see before Grafana is installed, and which panel would be empty.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from typing import Any

from monitoring.dashboards import CHOSEN, PAGES, Panel, Query

Series = tuple[str, list[float], list[float]]  # legend, times, values
BYTES, PERCENT, DATE = "bytes", "percentunit", "dateTimeAsIso"


def ask(url: str, query: str, begin: float, end: float, step: float) -> list[dict[str, Any]]:
    values = {"query": query, "start": begin, "end": end, "step": step}
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(values)}") as answer:
        return json.load(answer)["data"]["result"]


def filled(query: Query, uid: str, run: str, interval: str) -> str:
    """With what Grafana puts in place of a page's variables."""
    text = query.of(CHOSEN[uid])
    for name, value in {"$__rate_interval": interval, "$namespace": ".*", "$rank": ".*", "$run": run}.items():
        text = text.replace(name, value)
    return text


def curves(url: str, uid: str, panel: Panel, run: str, begin: float, end: float) -> list[Series]:
    step = max(1.0, (end - begin) / 200)
    found = []
    for query in panel.queries:
        for one in ask(url, filled(query, uid, run, f"{max(15, 4 * step):.0f}s"), begin, end, step):
            legend = query.legend
            for name, value in one["metric"].items():
                legend = legend.replace(f"{{{{{name}}}}}", value)
            legend = re.sub(r"\{\{\w+\}\}", "", legend).strip()
            times, values = zip(*((at - begin, float(value)) for at, value in one["values"]), strict=True)
            found.append((legend, list(times), list(values)))
    return found


def draw(url: str, uid: str, run: str, begin: float, end: float, path: str) -> list[str]:
    """-> titles of the panels that are empty"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    title, rows = PAGES[uid]
    lines = [(row, line) for row, listed in rows.items() for line in wrapped(listed)]
    heights = [1.3 if line[0].number else 2.6 for _, line in lines]
    figure = plt.figure(figsize=(17, 1.25 * sum(heights)), layout="constrained")
    figure.suptitle(f"{title}: {run}", fontsize=15)
    grid = figure.add_gridspec(len(lines), 24, height_ratios=heights)
    empty = []
    for place, (row, line) in enumerate(lines):
        column = 0
        for panel in line:
            axes = figure.add_subplot(grid[place, column : column + panel.width])
            found = curves(url, uid, panel, run, begin, end)
            (number if panel.number else plot)(axes, panel, found)
            axes.set_title(f"{row}  {panel.title}" if not column else panel.title, fontsize=9, loc="left")
            empty += [] if found else [panel.title]
            column += panel.width
    figure.savefig(path, dpi=70)
    plt.close(figure)
    return empty


def wrapped(listed: tuple[Panel, ...]) -> list[list[Panel]]:
    """As Grafana lays them out: from left to right, 24 columns."""
    lines: list[list[Panel]] = [[]]
    for panel in listed:
        if sum(one.width for one in lines[-1]) + panel.width > 24:
            lines.append([])
        lines[-1].append(panel)
    return lines


def shown(value: float, unit: str) -> str:
    if unit == PERCENT:
        return f"{100 * value:.3g}%"
    if unit == DATE:
        return time.strftime("%H:%M:%S", time.gmtime(value / 1000))
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def number(axes: Any, panel: Panel, found: list[Series]) -> None:
    axes.axis("off")
    value = found[-1][2][-1] if found else None
    colour = "green"
    for limit, name in panel.limits:
        colour = name if value is not None and value >= limit else colour
    suffix = "" if panel.unit in (PERCENT, "short") else f" {panel.unit}"
    text = "no data" if value is None else shown(value, panel.unit) + suffix
    axes.text(0.02, 0.4, text, fontsize=20, color={"yellow": "darkorange"}.get(colour, colour), va="center")


def plot(axes: Any, panel: Panel, found: list[Series]) -> None:
    for legend, times, values in found:
        axes.plot(times, values, label=legend, linewidth=1.2)
    for limit, name in panel.limits:
        if axes.get_ylim()[0] <= limit <= axes.get_ylim()[1]:
            axes.axhline(limit, color={"yellow": "orange"}.get(name, name), linewidth=0.8, linestyle="--")
    if not found:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray")
    axes.set_ylim(panel.least, panel.most)
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, panel.unit))
    axes.set_xlabel("seconds", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if 0 < len(found) <= 10:
        axes.legend(fontsize=7, frameon=False, loc="best")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m monitoring.picture", description=__doc__)
    parser.add_argument("url", help="of Prometheus, such as http://localhost:9090")
    parser.add_argument("png")
    parser.add_argument("--page", choices=PAGES, default="equiav-run")
    parser.add_argument("--run", default="", help="its name, for the page of one run")
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    if given.page == "equiav-run" and not given.run:
        parser.error("--run: which run is it to be?")
    end = time.time()
    empty = draw(given.url, given.page, given.run, end - 60 * given.minutes, end, given.png)
    print(f"{given.png}; empty: {', '.join(empty) or 'none'}")


if __name__ == "__main__":
    main()
