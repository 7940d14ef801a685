"""The data of `equiav report` as one HTML page: nothing fetched, readable on a phone, in the dark and on paper. A little script
of our own shows values, smooths, and draws logarithms; without it the page says the same."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from equiav.config import ConfigError
from equiav.evaluate.localize import percent
from equiav.terminal import masked, plain

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 220, 46, 26, 8  # of a chart, in its own pixels
JPEG, PNG, MP3 = "image/jpeg", "image/png", "audio/mpeg"
COLOURS = 8  # then they begin again
AT = ("R@1", "R@5", "R@10", "median rank")
FOUND = ("pictures found", "sounds found")
DIRECTIONS = ("image to audio", "audio to image")
TITLES = {  # metric -> what is written above its chart
    "loss": "Loss",
    "accuracy_ratio": "Accuracy",
    "similarity_ratio": "Predictor similarity",
    "loss_over_chance_ratio": "Loss over chance",
    "gradient_norm": "Norm of the gradient",
    "gain_ratio": "Gain over no prediction",
    "sensitivity_ratio": "Sensitivity to another vector",
    "effective_rank": "Effective rank of embeddings",
    "learning_rate": "Learning rate",
    "clips_per_second": "Clips per second",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5a6372; --line: #d9dde4; --paper: #ffffff; --card: #f6f7f9; --good: #12743c;
  --bad: #b3261e; --c0: #2563c9; --c1: #c2410c; --c2: #0f7b6c; --c3: #8b2fb8; --c4: #94700b; --c5: #c0246b; --c6: #4b5563; --c7: #3f7d1f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a2abba; --line: #363d4a; --paper: #14171d; --card: #1c2028;
  --good: #5fce8e; --bad: #ff8a80; --c0: #7fb0ff; --c1: #ff9d66; --c2: #5bd6c2; --c3: #d59bff; --c4: #e3c04d; --c5: #ff8fbf;
  --c6: #b7c0ce; --c7: #a0dd77; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; margin: 0.2em 0; } h2 { font-size: 1.2rem; margin: 2em 0 0.5em; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1em 0 0.3em; } p { margin: 0.4em 0; } .soft { color: var(--soft); font-size: 0.9rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.paper td { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 0.6rem; break-inside: avoid; }
figcaption { font-weight: 600; font-size: 0.95rem; } figure svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; } svg .axis { stroke: var(--line); fill: none; }
svg .mark { stroke: var(--soft); stroke-dasharray: 2 3; } svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { font-size: 0.8rem; color: var(--soft); } .legend span { margin-right: 0.9em; white-space: nowrap; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin-right: 0.3em; vertical-align: -0.05em; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
.example { background: var(--card); border-radius: 8px; padding: 0.7rem; break-inside: avoid; min-width: 0; }
.example h3 { margin: 0; overflow-wrap: anywhere; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0.4rem; margin: 0.4rem 0; }
.shown { aspect-ratio: 1; border-radius: 4px; background: var(--p) center / cover; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.seen { position: relative; } .seen .heat { position: absolute; inset: 0; width: 100%; height: 100%; } .under { filter: brightness(0.55); }
.heard { width: 100%; height: 70px; object-fit: fill; display: block; border-radius: 4px; } audio { width: 100%; height: 36px; margin: 0.3rem 0; }
.found { display: flex; gap: 0.4rem; } .found div { width: 33%; min-width: 0; font-size: 0.75rem; color: var(--soft); }
.found img { width: 100%; border-radius: 4px; display: block; } .found .it img { outline: 3px solid var(--good); }
.cut { overflow-wrap: anywhere; } .lead { font-size: 1.1rem; max-width: 46em; }
pre { background: var(--card); padding: 0.7rem; border-radius: 8px; overflow-x: auto; font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { :root { --paper: #fff; --ink: #000; --card: #fff; --soft: #444; --line: #bbb; } audio { display: none; }
  body { max-width: none; padding: 0; font-size: 11px; } .examples, .charts { grid-template-columns: repeat(2, 1fr); } }
"""


SCRIPT = """
"use strict";
const charts = [...document.querySelectorAll("svg[data-y]")].map(svg => {
  const [x0, x1] = svg.dataset.x.split(" ").map(Number), [y0, y1] = svg.dataset.y.split(" ").map(Number);
  const [left, right, top, bottom] = svg.dataset.at.split(" ").map(Number);
  const lines = [...svg.querySelectorAll("polyline")].map(line => ({line,
    points: line.dataset.p.split(" ").filter(Boolean).map(p => p.split(",").map(Number))}));
  return {svg, x0, x1, y0, y1, left, right, top, bottom, lines, legend: svg.parentElement.querySelectorAll(".legend b")};
});
let share = 0, powers = false;
const smooth = points => { let mean; return points.map(([x, y]) => [x, mean = mean === undefined ? y : share * mean + (1 - share) * y]); };
function draw(c) {
  const least = Math.min(...c.lines.flatMap(l => l.points.map(p => p[1])).filter(y => y > 0)), log = powers && isFinite(least);
  const low = log ? Math.log(least) : c.y0, high = log ? Math.log(Math.max(c.y1, least * 1.001)) : c.y1;
  c.u = x => c.left + (x - c.x0) / (c.x1 - c.x0) * (c.right - c.left);
  c.v = y => c.top + (high - (log ? Math.log(y) : y)) / (high - low) * (c.bottom - c.top);
  for (const l of c.lines) {
    l.shown = smooth(l.points).filter(p => !log || p[1] > 0);
    l.line.setAttribute("points", l.shown.map(([x, y]) => `${c.u(x).toFixed(1)},${c.v(y).toFixed(1)}`).join(" "));
  }
  for (const mark of c.svg.querySelectorAll("[data-of]")) {
    const y = Number(mark.dataset.of), v = log && y < least ? NaN : c.v(y);
    mark.style.display = isNaN(v) ? "none" : "";
    if (!isNaN(v)) for (const name of mark.tagName === "text" ? ["y"] : ["y1", "y2"]) mark.setAttribute(name, mark.tagName === "text" ? v + 3 : v);
  }
}
for (const c of charts) {
  draw(c);
  const cursor = c.svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "line"));
  cursor.setAttribute("class", "mark"); cursor.style.display = "none"; cursor.setAttribute("y1", c.top); cursor.setAttribute("y2", c.bottom);
  c.svg.addEventListener("pointermove", event => {
    const box = c.svg.getBoundingClientRect(), u = (event.clientX - box.left) / box.width * c.svg.viewBox.baseVal.width;
    let at;
    c.lines.forEach((l, k) => {
      const near = l.shown.reduce((a, b) => Math.abs(c.u(b[0]) - u) < Math.abs(c.u(a[0]) - u) ? b : a, l.shown[0]);
      if (near) { c.legend[k].textContent = " " + near[1].toPrecision(4); at = at ?? near[0]; }
    });
    if (at !== undefined) {
      cursor.style.display = ""; cursor.setAttribute("x1", c.u(at)); cursor.setAttribute("x2", c.u(at));
      c.svg.parentElement.querySelector(".at").textContent = `${c.svg.dataset.name} ${Math.round(at).toLocaleString()}`;
    }
  });
  c.svg.addEventListener("pointerleave", () => {
    cursor.style.display = "none"; c.legend.forEach(b => b.textContent = ""); c.svg.parentElement.querySelector(".at").textContent = "";
  });
}
const tools = document.querySelector(".tools");
if (tools) {
  tools.hidden = false;
  tools.querySelector("[type=range]").addEventListener("input", event => { share = Number(event.target.value); charts.forEach(draw); });
  tools.querySelector("[type=checkbox]").addEventListener("change", event => { powers = event.target.checked; charts.forEach(draw); });
}
"""
TOOLS = (
    '<p class="tools soft" hidden><label>smoothing <input type="range" min="0" max="0.98" step="0.02" value="0"></label> '
    '<label><input type="checkbox"> logarithmic</label></p>'
)


class Line(NamedTuple):
    name: str
    colour: int
    points: Sequence[Sequence[float]]  # (x, y)


def page(runs: Sequence[Mapping[str, Any]], title: str) -> str:
    """runs: of `report.gather`."""
    parts = [head(runs, title)]
    for section in (
        summary,
        learning,
        retrieval,
        classes,
        similarity,
        centroid,
        localization,
        attention,
        examples,
        settings,
    ):
        try:
            parts.append(section(runs))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"runs: the files on {section.__name__} of {', '.join(str(run['where']) for run in runs)} are not as `equiav` "
                f"writes them ({type(error).__name__}: {error}); evaluate again, or move them away"
            ) from None
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def data(value: Any, kind: str) -> str:
    """An address that has its content in itself; anything else is nothing: a page fetches nothing, whoever wrote its data."""
    return value if isinstance(value, str) and re.fullmatch(rf"data:{kind};base64,[A-Za-z0-9+/=]*", value) else "data:,"


def text(value: Any) -> str:
    """Names are a store's word."""
    return escape(plain(value), quote=True)


def head(runs: Sequence[Mapping[str, Any]], title: str) -> str:
    lines = [f"<h1>{text(title)}</h1>"]
    for run in runs:
        if found := headline(run):
            lines.append(f'<p class="lead">{text(run["name"]) + ": " if len(runs) > 1 else ""}{text(found)}</p>')
    for run in runs:
        if not run["verdict"]:
            continue
        how, *wrong = run["verdict"]
        mood = "bad" if wrong or how == "failed" else "good" if how in ("finished", "asked") else "soft"
        said = "; ".join([how, *wrong])
        lines.append(f'<p>{text(run["name"])}: <span class="{mood}">{text(said)}</span></p>')
    return "\n".join(lines)


def headline(run: Mapping[str, Any]) -> str:
    """What came out, in a sentence; empty, where nothing has yet. What is not as it should be is told by its own section."""

    def number(*path: str) -> float | None:
        value = _within({**run["evaluated"], "results": run["results"], "last": run["last"]}, *path)
        return value if isinstance(value, int | float) else None

    said = []
    clips = number("results", "clips")
    for name in ("accuracy", "mAP"):
        if clips and not said and (value := number("results", name)) is not None:
            said.append(f"{name} {100 * value:.1f} % on {clips:,} clips")
    clips, ten = number("retrieval", "clips"), [number("retrieval", f"{way} R@10", "mean") for way in DIRECTIONS]
    if clips and None not in ten:
        ways = ", ".join(f"{way} {value:.0f} %" for way, value in zip(DIRECTIONS, ten, strict=True))
        said.append(f"R@10 among {clips:,} clips: {ways}, chance {100 * min(1, 10 / clips):.1f} %")
    points = [number("localize", "all", what, "pointing") for what in ("heat map", "centre")]
    if None not in points:
        said.append("pointing at what sounds: {:.0f} %, the centre {:.0f} %".format(*(100 * (x or 0) for x in points)))
    if not said and (loss := number("last", "loss")) is not None:
        said.append(f"loss {loss:.3g} after {run['steps'] or 0:,} steps; not evaluated yet")
    return "; ".join(said)


def summary(runs: Sequence[Mapping[str, Any]]) -> str:
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, values: list[Any], form: str = "{:.3g}") -> None:
        if any(value is not None for value in values):
            rows.append((name, ["-" if value is None else form.format(value) for value in values]))

    def setting(*path: str) -> list[Any]:
        return [_within(run["settings"], *path) for run in runs]

    row("steps", [f"{run['steps']:,}" + (f" of {run['planned']:,}" if isinstance(run["planned"], int) else "") if run["steps"] else None
                  for run in runs], "{}")  # fmt: skip
    row("batch", setting("train", "batch_size"), "{}")
    row("model", setting("model", "size"), "{}")
    row("seed", setting("seed"), "{}")
    row("seconds, first start to end", [run["seconds"] for run in runs], "{:,.0f}")
    row("starts", [len(run["starts"]) or None for run in runs], "{}")
    for key in sorted({key for run in runs for key in run["last"]}):
        if key.startswith(("loss", "accuracy", "similarity", "gain", "effective_rank")):
            row(f"{key.replace('_', ' ')}", [run["last"].get(key) for run in runs])
    if not rows:
        return ""
    body = [[name, *values] for name, values in rows]
    note = '<p class="soft">Losses and what follows: means over the last twentieth of the steps.</p>'
    return f"<h2>In short</h2>{table(['', *(run['name'] for run in runs)], body)}{note}"


def learning(runs: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    names = [name for name in TITLES if any(name in run["curves"] for run in runs)]
    for name in names:
        labels = list(dict.fromkeys(label for run in runs for label in run["curves"].get(name, {})))
        if len(runs) == 1:
            lines = [Line(label.replace("_", " ") or TITLES[name].lower(), k, points)
                     for k, (label, points) in enumerate(runs[0]["curves"][name].items())]  # fmt: skip
            marks = [start["step"] for start in runs[0]["starts"][1:] if isinstance(start.get("step"), int)]
            figures.append(chart(TITLES[name], lines, "step", marks))
            continue
        for label in labels:
            lines = [
                Line(run["name"], k, run["curves"][name][label])
                for k, run in enumerate(runs)
                if label in run["curves"].get(name, {})
            ]
            figures.append(chart(f"{TITLES[name]} {label.replace('_', ' ')}".rstrip(), lines, "step"))
    if not figures:
        return ""
    restarts = any(len(run["starts"]) > 1 for run in runs) and len(runs) == 1
    note = '<p class="soft">Dotted: the run was started again there.</p>' if restarts else ""
    return f'<h2>Learning</h2>{TOOLS}<div class="charts">{"".join(figures)}</div>{note}'


def retrieval(runs: Sequence[Mapping[str, Any]]) -> str:
    rows: list[list[str]] = []
    papers: dict[str, None] = {}
    for run in runs:
        said = run["evaluated"].get("retrieval")
        if not said:
            continue
        for direction in DIRECTIONS:
            cells = [said.get(f"{direction} {name}", {}) for name in AT]
            rows.append(
                [f"{run['name']}, {direction}, {said.get('clips', 0):,} clips", *(spread(cell) for cell in cells)]
            )
        if said.get("benchmark"):
            papers[said["benchmark"]] = None
    if not rows:
        return ""
    for run in runs[:1]:
        for benchmark in papers:
            for direction, values in zip(DIRECTIONS, run["paper"]["retrieval"].get(benchmark, ()), strict=False):
                rows.append(
                    [f"EquiAV, the paper (Table 4, {benchmark}), {direction}", *(f"{x:.1f}" for x in values), ""]
                )
    clips = {run["evaluated"]["retrieval"].get("clips") for run in runs if run["evaluated"].get("retrieval")}
    for count in sorted(count for count in clips if isinstance(count, int) and count):
        rows.append(
            [
                f"chance among {count:,}",
                *(f"{100 * min(1, k / count):.2f}" for k in (1, 5, 10)),
                f"{(count + 1) / 2:.1f}",
            ]
        )
    return f'<h2>Zero-shot retrieval, %</h2>{table(["", *AT], rows)}<p class="soft">± is half the spread over draws of the centroid\'s vectors.</p>'


def classes(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        said = run["results"]
        if not said:
            continue
        for part in (said, *(said.get(name) for name in ("linear", "nearest"))):
            if not isinstance(part, dict):
                continue
            for name in ("accuracy", "mAP", "AUC"):
                if isinstance(part.get(name), int | float):
                    low, high = part.get(f"{name} 95%") or (None, None)
                    between = f"{100 * low:.1f} to {100 * high:.1f}" if low is not None and high is not None else "-"
                    what = "" if part is said else next(key for key in ("linear", "nearest") if said.get(key) is part)
                    rows.append(
                        [
                            f"{run['name']} {what}".rstrip(),
                            name,
                            f"{100 * part[name]:.1f}",
                            between,
                            f"{part.get('clips', said.get('clips', '-'))}",
                        ]
                    )
        if said and (published := run["paper"]["classes"]):
            value = "not reported" if published["value"] is None else f"{published['value']:.1f}"
            where = f"EquiAV, the paper ({published['table']}, {published['benchmark']})"
            rows.append([where, published["measure"], value, "", ""])
    return f"<h2>Classification, %</h2>{table(['', '', 'here', '95% interval', 'clips'], rows)}" if rows else ""


def similarity(runs: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for run in runs:
        said = run["evaluated"].get("similarity")
        if not said:
            continue
        rows = [
            [
                f"{side}, {kind}",
                *(f"{row[name]:.3f} ± {row[f'{name} error']:.3f}" for name in ("similarity", "gain", "sensitivity")),
            ]
            for side in ("audio", "image")
            for kind, row in said[side].items()
        ]
        rows += [
            [f"the paper (Table 7, AudioSet), {side}", f"{value:.2f}", "", ""]
            for side, value in run["paper"]["similarity"].items()
        ]
        parts.append(
            f"<h3>{text(run['name'])}, {said['clips']:,} clips</h3>{table(['augmentation', 'similarity', 'gain', 'sensitivity'], rows)}"
        )
    note = (
        '<p class="soft">Similarity: cosine of the predicted and the augmented embedding. Gain: less that without prediction. Sensitivity: '
        "less that of another draw's prediction. × says by how much the ranges are wider than in training.</p>"
    )
    return f"<h2>What the predictors know</h2>{''.join(parts)}{note}" if parts else ""


def centroid(runs: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for side in ("audio", "image"):
        lines, colour = [], 0
        for run in runs:
            said = run["evaluated"].get("centroid")
            if not said:
                continue
            for what in ("centroid", "encoded views"):
                points = [[math.log2(int(S)), row[what]] for S, row in said[side]["S"].items()]
                lines.append(Line(f"{run['name']}, {what}" if len(runs) > 1 else what, colour, points))
                colour += 1
            end = lines[-1].points[-1][0]
            lines.append(
                Line(
                    f"{run['name']}, original" if len(runs) > 1 else "original",
                    colour,
                    [[0, said[side]["original"]], [end, said[side]["original"]]],
                )
            )
            colour += 1
        if lines:
            figures.append(chart(f"Distance to the true mean, {side}", lines, "S", powers=True, zero=True))
    note = (
        '<p class="soft">Squared distance of the centroid of S predictions to the mean of many encoded views, as a share of the variance '
        "between clips. Encoded views: the mean of S of them. Original: the clip itself.</p>"
    )
    return f'<h2>The centroid</h2><div class="charts">{"".join(figures)}</div>{note}' if figures else ""


def localization(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        said = run["evaluated"].get("localize") or {}
        for which in ("all", "beside something silent"):
            for name in ("heat map", "objectness", "position only", "centre", "chance"):
                if name in said.get(which, {}):
                    row = said[which][name]
                    rows.append([f"{run['name']}, {name}", which, f"{said[which]['clips']:,}", percent(row)])
    return f"<h2>Pointing at what sounds, %</h2>{table(['', '', 'clips', 'right'], rows)}" if rows else ""


def attention(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        said = run["evaluated"].get("attention") or {}
        for side in ("audio", "image"):
            for kind, row in said.get(side, {}).items():
                inside = f"{row['inside the crop']:.2f}" if "inside the crop" in row else "-"
                rows.append([f"{run['name']}, {side}, {kind}", f"{100 * row['looked at']:.1f}", inside])
    return (
        f"<h2>What the predictors look at</h2>{table(['', 'patches looked at, %', 'inside a crop, times its area'], rows)}"
        if rows
        else ""
    )


def examples(runs: Sequence[Mapping[str, Any]]) -> str:
    return "".join(examples_of(run, len(runs) > 1) for run in runs)


def examples_of(run: Mapping[str, Any], named: bool) -> str:
    said = run["evaluated"].get("examples")
    if not said:
        return ""
    named_so = [hit["name"] for one in said["examples"] for what in FOUND for hit in one[what]]
    shared = len(os.path.commonprefix(named_so)) if len(set(named_so)) > 1 else 0  # noqa: RUF071  letters
    cards = [example(one, said["clips"], shared) for one in said["examples"]]
    title = f"Examples, {text(run['name'])}" if named else "Examples"
    note = (
        '<p class="soft">Beside each picture, bright: what adds to its score with the sound, beyond what it has in common with other '
        "sounds. Below: the view that stands for the centroid. Found by the sound: pictures, the nearest first; found by the picture: "
        "sounds, shown by their pictures. Framed: the right one.</p>"
    )
    return f'<h2>{title}</h2>{note}<div class="examples">{"".join(cards)}</div>{scatter(said)}'


def example(one: Mapping[str, Any], clips: int, shared: int) -> str:
    """shared: letters with which all names begin."""

    def seen(picture: str, heat: str, what: str) -> str:
        # The picture is there once, as a variable, and shown twice.
        plain, under = (f'<div class="shown{more}" role="img" aria-label="{what}"></div>' for more in ("", " under"))
        over = f'<img class="heat" src="{data(heat, PNG)}" alt="what sounds of it">'
        return f'<div class="pair" style="--p: url({data(picture, JPEG)})">{plain}<div class="seen">{under}{over}</div></div>'

    def found(what: str, of: Iterable[Mapping[str, Any]]) -> str:
        tiles = "".join(
            f'<div{" class=it" if hit["name"] == one["name"] else ""}><img src="{data(hit["picture"], JPEG)}" alt=""><div class="cut" title="{text(hit["name"])}">{text("…" * (shared > 0) + hit["name"][shared:])}</div>{hit["score"]:.2f}</div>'
            for hit in of
        )
        return f'<p class="soft">{what}</p><div class="found">{tiles}</div>'

    name, place, other = text(one["name"]), one["place of the picture"], one["place of the sound"]
    view = (
        seen(one["nearest to centroid"], one["its heat"], "view nearest to the centroid")
        if "nearest to centroid" in one
        else ""
    )
    return (
        f'<div class="example"><h3>{name}</h3>{seen(one["picture"], one["heat"], "picture")}{view}'
        f'<img class="heard" src="{data(one["spectrogram"], JPEG)}" alt="spectrogram, low tones below">'
        f'<audio controls preload="none" src="{data(one["sound"], MP3)}"></audio>'
        f'<p class="soft">Score {one["score"]:.2f}. Among {clips:,}, its picture is number {place:,}, its sound number {other:,}.</p>'
        f"{found('Found by the sound', one[FOUND[0]])}{found('Found by the picture', one[FOUND[1]])}</div>"
    )


def scatter(said: Mapping[str, Any]) -> str:
    points = [(side, x, y) for side in ("audio", "image") for x, y in said["map"][side]]
    if not points:
        return ""
    reach = max(max(abs(x), abs(y)) for _, x, y in points) or 1.0
    names = said["map"]["names"]
    dots = []
    for colour, side in enumerate(("audio", "image")):
        for name, (x, y) in zip(names, said["map"][side], strict=True):
            dots.append(
                f'<circle cx="{180 + 170 * x / reach:.1f}" cy="{180 - 170 * y / reach:.1f}" r="2" fill="var(--c{colour})" '
                f'fill-opacity="0.55"><title>{text(name)}</title></circle>'
            )
    legend = '<div class="legend"><span><i style="background:var(--c0)"></i>sounds</span><span><i style="background:var(--c1)"></i>pictures</span></div>'
    return (
        '<div class="charts"><figure><figcaption>Embeddings, in the plane of their two main directions</figcaption>'
        f'<svg viewBox="0 0 360 360" role="img" aria-label="map of embeddings">{"".join(dots)}</svg>{legend}</figure></div>'
    )


def settings(runs: Sequence[Mapping[str, Any]]) -> str:
    import yaml

    parts = []
    for run in runs:
        lines = []
        if run["settings"]:
            command = "finetune" if "tune" in run["settings"] else "pretrain"
            lines.append(f"equiav {command} --config {run['where']}/config.yaml --out ANOTHER")
        for what, said in run["evaluated"].items():
            lines.append(
                f"equiav eval {what} --weights {masked(str(said.get('model', run['where'])))} --stream.url {masked(str(said.get('dataset', '')))}"
            )
        starts = "".join(
            f'<p class="soft">Started at step {text(start["step"])} with {text(start["ranks"])} process(es), equiav {text(start["equiav"])} {text(start["code"] or "")}</p>'
            for start in run["starts"][:50]
        )
        written = text_block(yaml.safe_dump(run["settings"], sort_keys=False)) if run["settings"] else ""
        parts.append(
            f"<h3>{text(run['name'])}</h3>{text_block(chr(10).join(lines))}{starts}<details><summary>Settings</summary>{written}</details>"
        )
    return f"<h2>To make it again</h2>{''.join(parts)}"


def text_block(content: str) -> str:
    return f"<pre>{escape(content)}</pre>"


# ---- parts


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{text(name)}</th>" for name in names)
    body = "".join(
        f"<tr{' class=paper' if 'the paper' in row[0] or row[0].startswith('chance') else ''}>"
        + "".join(f"<td>{text(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def spread(cell: Mapping[str, float]) -> str:
    return f"{cell['mean']:.1f} ± {cell['half spread']:.1f}" if cell else "-"


def chart(
    title: str,
    lines: Sequence[Line],
    x_name: str,
    marks: Sequence[float] = (),
    powers: bool = False,
    zero: bool = False,
) -> str:
    """powers: x is a power of two. zero: y begins there."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    if not ys:
        return ""
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(0.0, *ys) if zero else min(ys), max(ys))
    if powers:
        x_ticks = sorted(set(xs))
    (x0, x1), (y0, y1) = (
        (low, high if high > low else low + 1)
        for low, high in ((min(xs), max(xs)), (min(*y_ticks, *ys), max(*y_ticks, *ys)))
    )

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 10), TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for y in y_ticks:
        _, v = at(x0, y)
        drawn.append(
            f'<line class="axis" data-of="{y}" x1="{LEFT}" x2="{WIDTH - 10}" y1="{v:.1f}" y2="{v:.1f}"/>'
            f'<text data-of="{y}" x="{LEFT - 4}" y="{v + 3:.1f}" text-anchor="end">{short(y)}</text>'
        )
    for x in x_ticks:
        u, _ = at(x, y0)
        drawn.append(
            f'<text x="{u:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{short(2**x if powers else x)}</text>'
        )
    drawn.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 2}" text-anchor="end">{text(x_name)}</text>')
    for x in marks:
        if x0 <= x <= x1:
            u, _ = at(x, y0)
            drawn.append(f'<line class="mark" x1="{u:.1f}" x2="{u:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for line in lines:
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line.points if math.isfinite(y))
        values = "" if powers else " ".join(f"{x:.6g},{y:.6g}" for x, y in line.points if math.isfinite(y))
        drawn.append(
            f'<polyline points="{points}" data-p="{values}" stroke="var(--c{line.colour % COLOURS})"><title>{text(line.name)}</title></polyline>'
        )
    legend = "".join(
        f'<span><i style="background:var(--c{line.colour % COLOURS})"></i>{text(line.name) if len(lines) > 1 else ""}<b></b></span>'
        for line in lines
    )
    where = f'data-x="{x0} {x1}" data-y="{y0} {y1}" data-at="{LEFT} {WIDTH - 10} {TOP} {HEIGHT - BOTTOM}" data-name="{text(x_name)}"'
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}" '
        f'{"" if powers else where}>{"".join(drawn)}</svg><div class="legend">{legend}<span class="at"></span></div></figure>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Some round numbers from about low to about high."""
    if not high > low:
        return [low]
    raw = (high - low) / 4
    size = 10 ** math.floor(math.log10(raw))
    step = next(k * size for k in (1, 2, 2.5, 5, 10) if k * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(x: float) -> str:
    if x and (abs(x) >= 1e5 or abs(x) < 1e-3):
        return f"{x:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{x:.10g}" if abs(x) < 10 else f"{x:,.6g}"


def _within(values: Any, *path: str) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values
