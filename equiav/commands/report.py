"""`equiav report`: what runs have become, on one page."""

from __future__ import annotations

import json
from pathlib import Path

from equiav.commands.settings import ReportConfig
from equiav.config import require
from equiav.evaluate.page import page
from equiav.evaluate.report import gather
from equiav.terminal import say


def run_report(config: ReportConfig) -> None:
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
