"""`equiav report`: what runs have become, on one page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from equiav.config import ConfigError, require
from equiav.evaluate.page import page
from equiav.evaluate.report import gather
from equiav.terminal import say


@dataclass(frozen=True)
class ReportConfig:
    """Writes one page about a run, or about several beside each other: verdict, curves, what evaluations and fine-tuning have
    found, examples to look at and listen to. It reads what `equiav eval` left in the runs' folders."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Folders of runs: paths, s3://..., or any others that fsspec reads."""
    out: Path = Path()
    """File to write, .html; its data are beside it, .data.json. By default report.html in the first run's folder, or here."""
    title: str = ""
    """Of the page."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""


def run_report(config: ReportConfig) -> None:
    if not config.runs:
        raise ConfigError("runs: no run is named. Give its folder: equiav report runs/one")
    first = Path(config.runs[0]).expanduser()
    out = config.out
    if out == Path():
        out = first / "report.html" if first.is_dir() else Path("report.html")
    require(out.suffix.lower() in (".html", ".htm"), "out", out, "a name that ends in .html")
    require(out.absolute().parent.is_dir(), "out", out, "a file in a folder that is there")
    runs = [gather(where, config.patience) for where in config.runs]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [{**run, "name": run["where"]} for run in runs]
    title = config.title or " and ".join(run["name"] for run in runs)
    content = page(runs, title)
    data = out.with_suffix(".data.json")  # no run has a file of such a name
    data.write_text(json.dumps({"title": title, "runs": runs}, indent=1, allow_nan=False))
    out.write_text(content, "utf-8")
    say(f"{out}: {len(content.encode()) / 2**20:.1f} MiB, opens in any browser; its data: {data}")
