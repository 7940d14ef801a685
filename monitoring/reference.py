"""`python -m monitoring.reference`: writes docs/metrics.md from the definitions."""

from __future__ import annotations

from pathlib import Path

from monitoring.metrics import METRICS

FILE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """\
# Metrics

Written by `python -m monitoring.reference` from `monitoring/metrics.py`. All have the label `run`. In brackets: the keys of
`metrics.jsonl` and `timing.jsonl`. How they get to Prometheus: docs/monitoring.md.

| metric | kind | what it is | what one reads from it |
|---|---|---|---|
"""


def text() -> str:
    rows = []
    for metric in METRICS:
        labels = "".join(f" `{label}`" for label in metric.labels)
        keys = f" ({', '.join(f'`{key}`' for key in metric.logged)})" if metric.logged else ""
        rows.append(f"| `{metric.full_name}`{labels} | {metric.kind} | {metric.help}{keys} | {metric.why} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    FILE.write_text(text())
