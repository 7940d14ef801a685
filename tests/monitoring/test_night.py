"""The first row of a run's page, as somebody sees it who is called at night: it alone says what is the matter.

Ten situations, an hour and a half each, in a real Prometheus; the panels as Grafana would show them (monitoring/grafana.py).
"""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from monitoring import alerts, dashboards, picture
from monitoring.grafana import View, shown
from tests.monitoring.prometheus import Prometheus
from tests.monitoring.test_alerts import HEALTHY, INTERVAL, MINUTES, constant, phase, rises

pytestmark = pytest.mark.slow
END = MINUTES * 60
HEALTHY = {**HEALTHY, "saved_time_seconds": rises(1, -100)}
NONE = dict.fromkeys(HEALTHY)


def until(seconds, values):
    """These, and nothing more from so many seconds before the end on."""
    return [value for k, value in enumerate(expanded(values)) if k * INTERVAL <= END - seconds]


def expanded(values):
    """promtool's notation -> a value, or None, for each interval."""
    if not isinstance(values, str):
        return values
    found = []
    for part in values.split():
        start, step, count = re.fullmatch(r"(_|-?[\d.e-]+?)(?:\+(-?[\d.e-]+))?x(\d+)", part).groups()
        found += [None if start == "_" else float(start) + k * float(step or 0) for k in range(int(count) + 1)]
    return found[: END // INTERVAL + 1]


def gone(seconds, **changed):
    return {name: until(seconds, values) for name, values in {**HEALTHY, **changed}.items()}


BEGAN_JUST_NOW = " ".join(f"{END - 1800 + 250 * k}x{250 // INTERVAL - 1}" for k in range(8))
# name -> what is told; State, its colour; alerts
SITUATIONS = {
    "healthy": ({}, "trains", "green", set()),
    "dead": (gone(700), "no node answers", "red", {"EquiavAbsent"}),
    "stalled": ({"last_step_time_seconds": rises(1, -420)}, "stalled", "red", {"EquiavStalled"}),
    "starved": (phase("data", 0.5, 0.5, 0.5, 0.5), "trains", "green", {"EquiavDataStarved"}),
    "collapsed": ({'effective_rank{modality="image"}': constant(1.2)}, "trains", "green", {"EquiavCollapsed"}),
    "a sick node": ({"world_size": constant(3)}, "trains", "green", {"EquiavWorldShrunk"}),
    "the store is down": (
        {"unsaved_seconds": constant(1200), "failed_saves_total": rises(1 / 300)},
        "trains",
        "green",
        {"EquiavUnsaved", "EquiavSavesFail"},
    ),
    "ended": (gone(600, **{'run_ended_time_seconds{how="finished"}': constant(END - 600)}), "finished", "blue", set()),
    "pending": (
        {**NONE, "rounds_total": constant(0), "world_size_target": constant(4)},
        "waits for nodes",
        "yellow",
        {"EquiavNotBegun"},
    ),
    "restarting": (
        {
            "rounds_total": rises(8 / 1800),
            "run_began_time_seconds": f"7x{(END - 1800) // INTERVAL - 1} {BEGAN_JUST_NOW}",
            "last_step_time_seconds": rises(1, -60),
        },
        "starts",
        "yellow",
        {"EquiavRestartStorm"},
    ),
}


def openmetrics(series, begun):
    """name, labels -> values; as promtool reads it."""
    lines = []
    for (name, labels), values in series.items():
        told = ",".join(f'{label}="{value}"' for label, value in sorted(labels))
        shift = begun if name.endswith("_time_seconds") and "moved" not in name else 0
        lines += [
            f"{name}{{{told}}} {value + shift} {begun + k * INTERVAL}"
            for k, value in enumerate(values)
            if value is not None
        ]
    return "\n".join([*lines, "# EOF", ""])


def fill(folder, name, series, begun):
    (folder / name).write_text(openmetrics(series, begun))
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", name, "data"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def inlined(expr):
    def pods(found):
        phase = alerts.RECORDS["equiav:pods"].replace(
            "(kube_pod_status_phase)", f"(kube_pod_status_phase{{{found[1]}}})"
        )
        return f"({phase}){found[2]}:{INTERVAL}s" if found[2] else f"({phase})"

    expr = re.sub(r'equiav:pods\{(phase="\w+")\}(\[\w+)?', pods, expr)
    while "equiav:" in expr:
        expr = re.sub(r"equiav:\w+", lambda found: f"({alerts.RECORDS[found[0]]})", expr)
    return expr


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    folder = tmp_path_factory.mktemp("night")
    begun = int(time.time()) - END - 60
    series = {}
    for run, (changed, *_) in SITUATIONS.items():
        for told, values in {**HEALTHY, **changed}.items():
            name, _, labels = told.partition("{")
            if values and not name.startswith("kube_"):  # of pods, which the pages do not show
                pairs = re.findall(r'(\w+)="(\w+)"', labels)
                series[f"equiav_{name}", (("namespace", "equiav"), ("run", run), *pairs)] = expanded(values)
    fill(folder, "told", series, begun)
    first = Prometheus(folder, [], "groups: []")
    try:
        recorded, end = {}, begun + END
        index = END // INTERVAL
        for name, expr in alerts.RECORDS.items():
            for one in first.ask(inlined(expr), end):
                value = float(one["value"][1]) - (begun if name.endswith("time_seconds") and "moved" not in name else 0)
                recorded[name, tuple(sorted(one["metric"].items()))] = [None] * (index - 4) + [value] * 5
        for rule in alerts.rules()["groups"][0]["rules"]:
            if "alert" in rule:
                seconds = max(INTERVAL, 60 * int(rule["for"].removesuffix("m")))
                held = f"count_over_time(({inlined(rule['expr'])})[{seconds}s:{INTERVAL}s]) >= {seconds // INTERVAL}"
                for one in first.ask(held, end):
                    labels = {**one["metric"], "alertname": rule["alert"], "alertstate": "firing"}
                    recorded["ALERTS", tuple(sorted(labels.items()))] = [None] * (index - 4) + [1.0] * 5
    finally:
        first.end()
    fill(folder, "recorded", recorded, begun)
    prometheus = Prometheus(folder, [], "groups: []")
    yield prometheus.url, begun, end
    prometheus.end()


PAGE = json.loads((dashboards.FOLDER / "equiav-run.json").read_text())
ROW = {panel["title"]: panel for panel in PAGE["panels"][1 : 1 + len(dashboards.VERDICT)]}


def seen(night, run):
    url, _, end = night
    view = View(url, {"namespace": ".*", "rank": ".*", "run": run}, end - 6 * 3600, end)
    return {title: view.numbers(panel) for title, panel in ROW.items()}


@pytest.mark.parametrize("run", SITUATIONS)
def test_the_first_row_says_what_it_is(night, run):
    _, state, colour, firing = SITUATIONS[run]
    row = seen(night, run)
    assert [(one.text, one.colour) for one in row["State"]] == [(state, colour)]
    assert {(one.text, one.colour) for one in row["Alerts"]} == (
        {(name, "red") for name in firing} or {("none", "green")}
    )
    others = {title: found[0].colour for title, found in row.items() if title not in ("State", "Alerts")}
    red = {title for title, colour in others.items() if colour == "red"}
    if run == "healthy":
        assert set(others.values()) == {"green"}
    if run == "ended":
        assert not red
    if run == "dead":
        assert {"Since the last step", "Throughput", "Processes of those it could use"} <= red
        (since,) = row["Since the last step"]
        assert since.text == "11.8 mins"
    if run == "a sick node":
        assert (row["Processes of those it could use"][0].text, others["Processes of those it could use"]) == (
            "75%",
            "yellow",
        )


def test_no_two_situations_look_alike(night):
    rows = {
        run: tuple((one.text, one.colour) for title in ("State", "Alerts") for one in sorted(seen(night, run)[title]))
        for run in SITUATIONS
    }
    assert len(set(rows.values())) == len(SITUATIONS)


def test_a_run_that_nobody_knows_has_words_for_it(night):
    row = seen(night, "another")
    assert row["State"][0].text == "never seen"
    assert {one.colour for title, found in row.items() for one in found if title != "Alerts"} == {dashboards.GRAY}


def test_all_runs_are_seen_side_by_side(night):
    url, begun, end = night
    page = json.loads((dashboards.FOLDER / "equiav-fleet.json").read_text())
    found = View(url, {"namespace": ".*"}, begun, end).numbers(page["panels"][1])
    assert {one.name: one.text.removeprefix(one.name).strip() for one in found} == {
        run: state for run, (_, state, *_) in SITUATIONS.items()
    }


def test_the_pictures(night, tmp_path):
    from PIL import Image

    url, begun, end = night
    folder = Path(os.environ.get("EQUIAV_PICTURES", tmp_path))
    rows = []
    for run in SITUATIONS:
        picture.draw(url, "equiav-run", run, begun, end, str(tmp_path / f"{run}.png"), first_row=True)
        rows.append(Image.open(tmp_path / f"{run}.png").convert("RGB"))
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for k, row in enumerate(rows):
        whole.paste(row, (0, k * row.height))
    whole.save(folder / "dashboard-night.png")
    picture.draw(url, "equiav-run", "healthy", begun, end, str(folder / "night-whole.png"))


# ---- the rules of Grafana that these depend on


def panel(**defaults):
    return {"fieldConfig": {"defaults": defaults}, "options": {}}


def test_no_value_has_the_colour_of_the_lowest_limit_but_for_a_mapping():
    limits = {"steps": [{"color": "red", "value": None}, {"color": "green", "value": 1}]}
    assert shown(panel(thresholds=limits, noValue="-"), "", None)[1:] == ("-", "red")
    null = {"type": "special", "options": {"match": "null", "result": {"text": "none", "color": "gray"}}}
    assert shown(panel(thresholds=limits, mappings=[null]), "", None)[1:] == ("none", "gray")
    assert shown(panel(thresholds=limits, mappings=[null]), "", 1.0)[1:] == ("1", "green")


def test_without_limits_eighty_is_red():
    assert shown(panel(), "", 80.0).colour == "red"
    assert shown(panel(), "", 79.0).colour == "green"


def test_every_number_is_of_now():
    for uid in dashboards.PAGES:
        for one in json.loads((dashboards.FOLDER / f"{uid}.json").read_text())["panels"]:
            for target in one.get("targets", []):
                assert target.get("instant", False) == (one["type"] == "stat"), one["title"]
                assert target.get("range", True) == (one["type"] != "stat"), one["title"]
            if one["type"] == "timeseries":
                assert one["options"]["legend"]["showLegend"]
