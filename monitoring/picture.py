"""`python -m monitoring.picture URL PNG`: draws a page of monitoring/dashboards/ from what a Prometheus has.

So that one sees what there is to see before Grafana is installed, and which panel would be empty.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from typing import Any

from monitoring.dashboards import FOLDER, PAGES
from monitoring.grafana import Number, View, with_unit

CELL = 0.3  # inches of a row of the grid; of its 24 columns, twice as much
DARK = {"yellow": "#b58900", "green": "#2e7d32", "red": "#c62828", "blue": "#1565c0"}


def draw(url: str, uid: str, run: str, begin: float, end: float, path: str, first_row: bool = False) -> list[str]:
    """-> titles of the panels that are empty. first_row: no more than that."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    page = json.loads((FOLDER / f"{uid}.json").read_text())
    view = View(url, {"namespace": ".*", "rank": ".*", "run": run}, begin, end)
    panels = page["panels"]
    if first_row:
        panels = panels[: next(k for k, one in enumerate(panels) if k and one["type"] == "row")]
    high = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in panels) + 1
    figure = plt.figure(figsize=(48 * CELL, high * CELL))
    figure.text(0.005, 1 - 0.5 / high, f"{page['title']}: {run or 'all'}", fontsize=11, va="center", weight="bold")
    empty = []
    for panel in panels:
        place = panel["gridPos"]
        left, top = place["x"] / 24, 1 - (place["y"] + 1) / high
        if panel["type"] == "row":
            figure.text(0.005, top - 0.5 / high, panel["title"], fontsize=10, va="center", color="#555555")
            continue
        figure.text(left + 0.004, top - 0.4 / high, panel["title"], fontsize=7.5, va="center")
        if panel["type"] == "stat":
            found = view.numbers(panel)
            box = (left + 0.003, top - (place["h"] - 0.1) / high, place["w"] / 24 - 0.006, (place["h"] - 0.9) / high)
            numbers(figure.add_axes(box), found)
        else:
            legend = panel["options"]["legend"]["showLegend"]
            box = (
                left + 0.03,
                top - (place["h"] - (1.9 if legend else 1.0)) / high,
                place["w"] / 24 - 0.04,
                (place["h"] - (2.8 if legend else 1.9)) / high,
            )
            empty += [] if curves(figure.add_axes(box), panel, view, legend) else [panel["title"]]
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return empty


def numbers(axes: Any, found: list[Number]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(0, len(found))
    axes.set_ylim(0, 1)
    for k, one in enumerate(found):
        axes.axvspan(k, k + 1, color=DARK.get(one.colour, one.colour))
        size = min(15, 15 * 22 * axes.get_position().width / len(found) / 0.125 / max(1, len(one.text)) * 0.6)
        axes.text(k + 0.5, 0.5, one.text, fontsize=size, color="white", ha="center", va="center")


def curves(axes: Any, panel: dict[str, Any], view: View, legend: bool) -> bool:
    """-> whether there is any"""
    from matplotlib import dates

    settings, found = panel["fieldConfig"]["defaults"], view.curves(panel)
    for curve in found:
        axes.plot([datetime.fromtimestamp(at, UTC) for at in curve.times], curve.values, label=curve.name, linewidth=1)
    if settings.get("custom", {}).get("thresholdsStyle", {}).get("mode") == "line":
        for step in settings["thresholds"]["steps"][1:]:
            if axes.get_ylim()[0] <= step["value"] <= axes.get_ylim()[1]:
                axes.axhline(step["value"], color=DARK[step["color"]], linewidth=0.8, linestyle="--")
    axes.set_ylim(settings.get("min"), settings.get("max"))
    axes.yaxis.set_major_formatter(lambda value, _: with_unit(value, settings.get("unit", "")))
    axes.set_xlim(datetime.fromtimestamp(view.begin, UTC), datetime.fromtimestamp(view.end, UTC))
    axes.xaxis.set_major_locator(locator := dates.AutoDateLocator(maxticks=5))
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, show_offset=False))
    axes.tick_params(labelsize=6, length=2, pad=1)
    axes.grid(alpha=0.3)
    if not found:
        axes.text(0.5, 0.5, settings.get("noValue", "No data"), transform=axes.transAxes, ha="center", color="gray")
    elif legend:
        axes.legend(
            fontsize=6,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(-0.05, -0.12),
            ncols=4,
            handlelength=1,
            columnspacing=1,
        )
    return bool(found)


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
