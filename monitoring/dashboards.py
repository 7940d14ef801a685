"""`python -m monitoring.dashboards`: writes monitoring/dashboards/*.json, for Grafana: one run, and all runs side by side.

A page answers the questions of somebody who is called at night, in their order: is it well, does it learn, is it equivariant,
what holds it up, who takes part, what would a crash cost, do the machines have room. Each panel says what good looks like.

A panel of one number asks for the value of now, and has a word for none: of a range, Grafana shows the last value that there was
in it, of a run that is dead for hours, too. monitoring/alerts.yaml has to be loaded: what has to be remembered of a run whose
nodes are gone is recorded there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring import metrics as m
from monitoring.alerts import BEGAN, LIMITS, ON, THERE, WATCHDOG, past
from monitoring.metrics import Metric

FOLDER = Path(__file__).parent / "dashboards"
# What a page shows, by its variables: one run, or all of some namespaces.
CHOSEN = {"equiav-run": 'namespace=~"$namespace",run="$run"', "equiav-fleet": 'namespace=~"$namespace"'}
BY = "by (namespace, run)"


@dataclass(frozen=True)
class Query:
    expr: str
    """`{}` stands for the labels that choose the run."""
    legend: str = ""

    def of(self, chosen: str) -> str:
        return self.expr.replace("{}", f"{{{chosen}}}").replace("{,", f"{{{chosen},")


@dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[Query, ...]
    good: str
    """What good looks like, and what to do otherwise."""
    unit: str = "short"
    limits: tuple[tuple[float, str], ...] = ()
    """From where on a value has a colour; before the first: green."""
    number: bool = False
    """One number, of now, instead of a curve."""
    width: int = 0
    """Of 24; 0: all of a row have the same."""
    least: float | None = None
    most: float | None = None
    words: tuple[tuple[str, str], ...] = ()
    """In place of the numbers 0, 1, ...: a word and its colour."""
    none: str = "no data"
    """Where there is no number."""
    names: bool = False
    """What is shown are the names of the curves, not their numbers."""


def last(metric: Metric, label: str = "", fold: str = "max") -> Query:
    """What rank 0 tells: of whichever pod it is in."""
    by = f"namespace, run, {label}" if label else "namespace, run"
    return Query(f"{fold} by ({by}) ({metric.full_name}{{}})", f"{{{{{label}}}}}" if label else "{{run}}")


def rate(metric: Metric, *labels: str, chosen: str = "") -> Query:
    by = ", ".join(("namespace", "run", *labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in labels) or "{{run}}"
    where = f"{{,{chosen}}}" if chosen else "{}"
    return Query(f"sum by ({by}) (rate({metric.full_name}{where}[$__rate_interval]))", legend)


def age(metric: Metric) -> Query:
    """Of a run that is not over: told by whoever told it last."""
    return Query(f"(time() - {past(metric.full_name + '{}')}) unless {ON} equiav:over{{}}", "{{run}}")


def top(query: str, worst: str = "topk") -> str:
    """Of a thousand ranks, the ten that matter."""
    return f"{worst}(10, {query})"


WORLD, HITS, MISSES = last(m.WORLD).expr, rate(m.HITS).expr, rate(m.MISSES).expr
BUCKETS = f"{m.STEP_TIME.full_name}_bucket"
GREEN, YELLOW, RED, BLUE, GRAY = "green", "yellow", "red", "blue", "#808080"
LIVE = "equiav:live{}"
FIRING = f'alertstate="firing",alertname!="{WATCHDOG}"'
NO_ALERT = 'label_replace(vector(0), "alertname", "none", "", "")'


def chosen_in(records: str) -> str:
    """An expression of monitoring/alerts.py, of the run that is chosen."""
    return re.sub(r"equiav_\w+", r"\g<0>{}", records)


def ended(how: str) -> str:
    return f"equiav:over{{}} == {ON} {past(f'{m.ENDED.full_name}{{,how={how!r}}}')}"


# What is true of a run first: a word, its colour, and when. Each is a number: its place.
STATES = (
    ("trains", GREEN, LIVE),
    ("starts", YELLOW, f"{LIVE} == {ON} {chosen_in(BEGAN)}"),
    ("stalled", RED, f"(time() - {LIVE}) > {LIMITS['stalled_seconds']}"),
    ("no node answers", RED, f"{LIVE} unless {ON} {chosen_in(THERE)}"),
    ("waits for nodes", YELLOW, f"{chosen_in(THERE)} unless {ON} (equiav:live{{}} or equiav:over{{}})"),
    ("failed", RED, "equiav:over{}"),
    ("ended, as asked", BLUE, ended("asked")),
    ("finished", BLUE, ended("finished")),
)
STATE = " or ".join(f"0 * ({when}) + {place}" for place, (_, _, when) in reversed(list(enumerate(STATES))))
WORDS = tuple((word, colour) for word, colour, _ in STATES)
VERDICT = (
    Panel("State", (Query(STATE, "{{run}}"),), "trains.", number=True, width=4, words=WORDS, none="never seen"),
    Panel(
        "Alerts",
        (Query(f"count by (alertname) (ALERTS{{,{FIRING}}}) or on () {NO_ALERT}", "{{alertname}}"),),
        "none. Each name is a heading in docs/operations.md.",
        limits=((1, RED),),
        number=True,
        width=5,
        names=True,
    ),
    Panel(
        "Done",
        (Query(f"{past(m.STEP.full_name + '{}')} / {past(m.STEPS_PLANNED.full_name + '{}')}"),),
        m.STEP.why,
        "percentunit",
        number=True,
        width=3,
        none="no step",
    ),
    Panel(
        "Since the last step",
        (age(m.LAST_STEP),),
        m.LAST_STEP.why,
        "s",
        ((60, YELLOW), (LIMITS["stalled_seconds"], RED)),
        True,
        3,
        none="-",
    ),
    Panel(
        "Throughput",
        (Query(f"{rate(m.CLIPS).expr} or 0 * {LIVE}"),),
        "As at its beginning. " + m.CLIPS.why,
        "clips/s",
        ((0, RED), (1e-9, GREEN)),
        True,
        3,
        none="-",
    ),
    Panel(
        "Processes of those it could use",
        (Query(f"({WORLD} / ({last(m.WORLD_TARGET).expr} or {WORLD}) or 0 * {LIVE}) unless {ON} equiav:over{{}}"),),
        m.WORLD.why,
        "percentunit",
        ((0, RED), (0.5, YELLOW), (1, GREEN)),
        True,
        3,
        none="-",
    ),
    Panel(
        "A crash would cost",
        (age(m.SAVED_TIME),),
        m.SAVED_TIME.why,
        "s",
        ((1800, YELLOW), (7200, RED)),
        True,
        3,
        none="-",
    ),
)
LEARNING = (
    Panel("Loss", (last(m.LOSS, "term"),), m.LOSS.why),
    Panel(
        "Loss over chance", (last(m.CHANCE, "term"),), m.CHANCE.why, "percentunit", ((0.95, YELLOW), (1, RED)), least=0
    ),
    Panel("Accuracy", (last(m.ACCURACY, "term"),), m.ACCURACY.why, "percentunit", least=0, most=1),
    Panel("Gradient's norm", (last(m.GRADIENT),), m.GRADIENT.why),
    Panel("Learning rate", (last(m.RATE),), m.RATE.why),
    Panel(
        "Steps that were not finite",
        (Query(f"sum {BY} (increase({m.NOT_FINITE.full_name}{{}}[$__rate_interval]))", "now"), last(m.SKIPPED)),
        m.NOT_FINITE.why,
        limits=((1, RED),),
    ),
)
EQUIVARIANCE = (
    Panel("Predictor's similarity", (last(m.SIMILARITY, "modality"),), m.SIMILARITY.why, least=-1, most=1),
    Panel("Gain over predicting nothing", (last(m.GAIN, "modality"),), m.GAIN.why),
    Panel("Sensitivity to another vector", (last(m.SENSITIVITY, "modality"),), m.SENSITIVITY.why),
    Panel("Spread of the centroid", (last(m.SPREAD, "modality"),), m.SPREAD.why),
    Panel("Effective rank", (last(m.EFFECTIVE_RANK, "modality"),), m.EFFECTIVE_RANK.why, least=0),
)
DATA = (
    Panel(
        "Seconds of each second, by phase",
        (Query(f"avg by (namespace, run, phase) (rate({m.PHASE.full_name}{{}}[$__rate_interval]))", "{{phase}}"),),
        m.PHASE.why,
        "percentunit",
        least=0,
    ),
    Panel(
        "Batches that are ready",
        (Query(top(f"min by (namespace, run, rank) ({m.READY.full_name}{{}})", "bottomk"), "{{rank}}"),),
        m.READY.why,
        least=0,
    ),
    Panel("Decoding, processes", (Query(top(rate(m.DECODE, "rank").expr), "{{rank}}"),), m.DECODE.why, least=0),
    Panel("Samples decoded", (rate(m.DECODED),), m.DECODED.why, "clips/s", least=0),
    Panel("Read from the store", (rate(m.READ_BYTES),), m.READ_BYTES.why, "Bps", least=0),
    Panel(
        "Requests",
        (Query(rate(m.READS).expr, "all"), Query(rate(m.RETRIES).expr, "again"), Query(rate(m.HEDGED).expr, "hedged")),
        m.RETRIES.why,
        "reqps",
        least=0,
    ),
    Panel(
        "Share of windows on the disk",
        (Query(f"{HITS} / ({HITS} + {MISSES})", "{{run}}"),),
        m.HITS.why,
        "percentunit",
        least=0,
        most=1,
    ),
    Panel(
        "Quarantine",
        (
            Query(f"max by (namespace, run, reason) ({m.QUARANTINED.full_name}{{}})", "{{reason}}"),
            Query(last(m.LIMIT).expr, "limit"),
        ),
        m.QUARANTINED.why,
        least=0,
    ),
    Panel("Epoch", (last(m.EPOCH), Query(last(m.SAMPLES).expr, "samples")), m.EPOCH.why),
    Panel("Clips of a step", (Query(last(m.BATCH).expr, "used"), Query(last(m.BAD).expr, "bad")), m.BATCH.why, least=0),
)
RANKS = (
    Panel(
        "Seconds of a step",
        tuple(
            Query(
                f"histogram_quantile({q}, sum by (namespace, run, le) (rate({BUCKETS}{{}}[$__rate_interval])))",
                f"{q:.0%}",
            )
            for q in (0.5, 0.9, 0.99)
        ),
        m.STEP_TIME.why,
        "s",
        least=0,
    ),
    Panel(
        "Own computing (views) by rank",
        (Query(top(rate(m.PHASE, "rank", chosen='phase="views",rank=~"$rank"').expr), "{{rank}}"),),
        m.PHASE.why,
        "percentunit",
        least=0,
    ),
    Panel(
        "Waiting for data by rank",
        (Query(top(rate(m.PHASE, "rank", chosen='phase="data",rank=~"$rank"').expr), "{{rank}}"),),
        m.PHASE.why,
        "percentunit",
        ((0.2, YELLOW),),
        least=0,
    ),
    Panel(
        "Steps and clips",
        (Query(rate(m.STEPS).expr, "steps"), Query(last(m.THROUGHPUT).expr, "clips, last step")),
        m.STEPS.why,
        least=0,
    ),
)
KEPT = (
    Panel("Unsaved since a save is due", (last(m.UNSAVED),), m.UNSAVED.why, "s", ((300, YELLOW), (900, RED)), least=0),
    Panel(
        "Saves",
        (
            Query(f"sum {BY} ({m.SAVES.full_name}{{}})", "durable"),
            Query(f"sum {BY} ({m.FAILED_SAVES.full_name}{{}})", "failed"),
            Query(last(m.FAILED).expr, "failed in this start"),
        ),
        m.FAILED_SAVES.why,
        least=0,
    ),
    Panel("A save's size", (last(m.SAVED_BYTES),), m.SAVED_BYTES.why, "bytes", least=0),
    Panel("Held up by a save", (last(m.SAVE_HOLD),), m.SAVE_HOLD.why, "s", least=0),
    Panel("Saved step", (Query(last(m.SAVED_STEP).expr, "saved"), Query(last(m.STEP).expr, "done")), m.SAVED_STEP.why),
    Panel(
        "Processes",
        (
            Query(last(m.WORLD).expr, "take part"),
            Query(last(m.WORLD_TARGET).expr, "could"),
            Query(last(m.SPARES).expr, "spare"),
        ),
        m.WORLD.why,
        least=0,
    ),
    Panel(
        "Rounds and lost workers",
        (
            Query(f"sum {BY} ({m.ROUNDS.full_name}{{}})", "rounds"),
            Query(f"sum by (namespace, run, how) ({m.LOST.full_name}{{}})", "{{how}}"),
        ),
        m.LOST.why,
        least=0,
    ),
    Panel(
        "Seconds lost to starts",
        (
            Query(f"sum {BY} ({m.JOINING.full_name}{{}})", "waiting for nodes"),
            Query(f"max {BY} ({m.STARTING.full_name}{{}})", "starting"),
        ),
        m.STARTING.why,
        "s",
        least=0,
    ),
)
COMPUTED = f"{rate(m.CLIPS).expr} * on (namespace, run) {last(m.FLOPS).expr}"
MACHINES = (
    Panel("Operations of the model", (Query(COMPUTED, "{{run}}"),), m.FLOPS.why, "flops", least=0),
    Panel(
        "Of what the GPUs can do (MFU)",
        (Query(f"{COMPUTED} / on (namespace, run) {last(m.PEAK).expr}", "{{run}}"),),
        m.PEAK.why + " On CPUs: empty.",
        "percentunit",
        least=0,
        most=1,
    ),
    Panel(
        "Memory of a process",
        (Query(top(f'max by (namespace, run, rank) ({m.MEMORY.full_name}{{,rank=~"$rank"}})'), "{{rank}}"),),
        m.MEMORY.why,
        "bytes",
        least=0,
    ),
    Panel(
        "GPU memory, most of what there is",
        (Query(top(f"{last(m.GPU_PEAK, 'rank').expr} / {last(m.GPU_TOTAL, 'rank').expr}"), "{{rank}}"),),
        m.GPU_PEAK.why + " On CPUs: empty.",
        "percentunit",
        ((0.95, YELLOW),),
        least=0,
        most=1,
    ),
    Panel(
        "Releases",
        (
            Query(
                f"max by (namespace, run, version, code, torch, device) ({m.BUILD.full_name}{{}})",
                "{{version}} {{code}} torch {{torch}} {{device}}",
            ),
        ),
        m.BUILD.why,
    ),
    Panel(
        "Ended",
        (Query(f"max by (namespace, run, how) ({m.ENDED.full_name}{{}}) * 1000", "{{how}}"),),
        m.ENDED.why,
        "dateTimeAsIso",
    ),
)
RUN_PAGE = {
    "Is it well?": VERDICT,
    "Does it learn?": LEARNING,
    "Is it equivariant?": EQUIVARIANCE,
    "What does it read?": DATA,
    "Who is slow?": RANKS,
    "What is kept, who takes part?": KEPT,
    "Do the machines have room?": MACHINES,
}
FLEET_PAGE = {
    "All runs": (
        Panel("State", (Query(STATE, "{{run}}"),), "trains.", number=True, width=24, words=WORDS, none="no run"),
        Panel(
            "Alerts",
            (
                Query(
                    f"count by (namespace, run, alertname) (ALERTS{{,{FIRING}}}) or on () {NO_ALERT}",
                    "{{run}} {{alertname}}",
                ),
            ),
            "None.",
            limits=((1, RED),),
        ),
        Panel("Done", (Query(VERDICT[2].queries[0].expr, "{{run}}"),), "Rises.", "percentunit", least=0, most=1),
        Panel("Throughput", (rate(m.CLIPS),), m.CLIPS.why, "clips/s", least=0),
        Panel(
            "Since the last step",
            (Query(age(m.LAST_STEP).expr, "{{run}}"),),
            m.LAST_STEP.why,
            "s",
            ((LIMITS["stalled_seconds"], RED),),
        ),
        Panel(
            "Inter-modal loss over chance",
            (Query(f'max {BY} ({m.CHANCE.full_name}{{,term="inter"}})', "{{run}}"),),
            m.CHANCE.why,
            "percentunit",
            least=0,
        ),
        Panel("Processes", (last(m.WORLD),), m.WORLD.why, least=0),
    )
}
PAGES = {"equiav-run": ("EquiAV: a run", RUN_PAGE), "equiav-fleet": ("EquiAV: all runs", FLEET_PAGE)}


def panels() -> Iterator[tuple[str, str, Panel]]:
    """-> page, row, panel"""
    for page, (_, rows) in PAGES.items():
        for row, listed in rows.items():
            yield from ((page, row, panel) for panel in listed)


def dashboard(uid: str) -> Any:
    from grafana_foundation_sdk.builders import dashboard as d
    from grafana_foundation_sdk.models import dashboard as model

    title, rows = PAGES[uid]
    source = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
    page = (
        d.Dashboard(title).uid(uid).tags(["equiav"]).refresh("15s").time("now-6h", "now").timezone("browser").readonly()
    )
    page.tooltip(model.DashboardCursorSync.CROSSHAIR)
    for other, (name, _) in PAGES.items():
        if other != uid:
            link = d.DashboardLink(name).type(model.DashboardLinkType.LINK).url(f"/d/{other}")
            page.link(link.include_vars(True).keep_time(True))
    page.with_variable(d.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for name, label in (("namespace", "namespace"), ("run", "run"), ("rank", "rank")):
        if uid == "equiav-run" or name == "namespace":
            page.with_variable(_variable(d, model, source, name, label))
    page.annotation(_restarts(d, source, CHOSEN[uid]))
    for row, listed in rows.items():
        page.with_row(d.Row(row))
        for panel, width in zip(listed, widths(listed), strict=True):
            page.with_panel(_drawn(panel, width, source, model, uid))
    return page.build()


def _variable(d: Any, model: Any, source: Any, name: str, label: str) -> Any:
    chosen = {"namespace": "", "run": '{namespace=~"$namespace"}', "rank": '{namespace=~"$namespace",run="$run"}'}[name]
    # A run that waits for its first node has done no step.
    of = m.READY.full_name if name == "rank" else f'{{__name__=~"{m.STEP.full_name}|{m.ROUNDS.full_name}"}}'
    query = f"label_values({of.replace('}', ',' + chosen[1:]) if chosen and of[0] == '{' else of + chosen}, {label})"
    made = (
        d.QueryVariable(name)
        .label(label)
        .datasource(source)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
    )
    if name == "run":
        return made
    return made.include_all(True).all_value(".*").multi(True).current(model.VariableOption(text="All", value="$__all"))


def _restarts(d: Any, source: Any, chosen: str) -> Any:
    began = f"max {BY} ({m.BEGAN.full_name}{{{chosen}}})"  # by whichever node has rank 0
    expr = f"changes({began}[1m:15s]) > 0"
    return d.AnnotationQuery().name("restarts").datasource(source).enable(True).icon_color("orange").expr(expr)


def widths(listed: tuple[Panel, ...]) -> list[int]:
    """Lines of at most five panels, each of them full."""
    if listed[0].width:
        first = [panel.width for panel in listed if panel.width]
        return first + (widths(listed[len(first) :]) if listed[len(first) :] else [])
    lines = -(-len(listed) // 5)
    found = []
    for line in range(lines):
        count = len(listed) // lines + (line < len(listed) % lines)
        found += [24 // count + (k < 24 % count) for k in range(count)]
    return found


def _drawn(panel: Panel, width: int, source: Any, model: Any, uid: str) -> Any:
    from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
    from grafana_foundation_sdk.builders import dashboard as d
    from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
    from grafana_foundation_sdk.models import common as c

    made: Any = (stat if panel.number else timeseries).Panel()
    made.title(panel.title).description(panel.good).datasource(source).unit(panel.unit).no_value(panel.none)
    made.span(width).height(4 if panel.number else 6)
    if panel.number:
        made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).graph_mode(c.BigValueGraphMode.NONE)
        made.color_mode(c.BigValueColorMode.BACKGROUND_SOLID)
        named = c.BigValueTextMode.NAME if panel.names else c.BigValueTextMode.VALUE_AND_NAME
        made.text_mode(named if panel.names or uid == "equiav-fleet" else c.BigValueTextMode.VALUE)
    else:
        legend = common.VizLegendOptions().show_legend(True).display_mode(c.LegendDisplayMode.LIST)
        made.legend(legend.placement(c.LegendPlacement.BOTTOM)).show_points(c.VisibilityMode.NEVER)
        made.tooltip(common.VizTooltipOptions().mode(c.TooltipDisplayMode.MULTI).sort(c.SortOrder.DESCENDING))
    if panel.number:  # the word for none has a colour by a mapping alone: else it would be that of the lowest limit
        none = model.DashboardSpecialValueMapOptions(
            match=model.SpecialValueMatch.NULL,
            result=model.ValueMappingResult(text=panel.none, color=GRAY, index=len(panel.words)),
        )
        words = {
            str(place): model.ValueMappingResult(text=word, color=colour, index=place)
            for place, (word, colour) in enumerate(panel.words)
        }
        made.mappings([*([model.ValueMap(options=words)] if words else []), model.SpecialValueMap(options=none)])
    if uid == "equiav-fleet":
        where = "/d/equiav-run?var-namespace=${__field.labels.namespace}&var-run=${__field.labels.run}"
        made.data_links([d.DashboardLink("this run").url(where + "&${__url_time_range}")])
    if panel.limits or panel.number:  # Grafana's own limit is 80
        steps = panel.limits if panel.limits and panel.limits[0][0] == 0 else ((0.0, GREEN), *panel.limits)
        steps = [
            model.Threshold(value=None if k == 0 else value, color=color) for k, (value, color) in enumerate(steps)
        ]
        made.thresholds(ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
        if not panel.number:
            made.thresholds_style(common.GraphThresholdsStyleConfig().mode(c.GraphThresholdsStyleMode.LINE))
    for bound, value in ((made.min, panel.least), (made.max, panel.most)):
        if value is not None:
            bound(value)
    for k, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.of(CHOSEN[uid])).legend_format(query.legend)
        target.ref_id(chr(ord("A") + k))
        made.with_target(target.instant() if panel.number else target.range())
    return made


def text(uid: str) -> str:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    return JSONEncoder(sort_keys=True, indent=1).encode(dashboard(uid)) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for uid in PAGES:
        (FOLDER / f"{uid}.json").write_text(text(uid))
