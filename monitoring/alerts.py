"""`python -m monitoring.alerts`: writes monitoring/alerts.yaml, the rules by which Prometheus calls somebody.

Each alert says what is wrong, what that costs, and where docs/operations.md says what to do. A run that has ended calls nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parent / "alerts.yaml"
RUNBOOK = "docs/operations.md#"
BY = "by (namespace, run)"
ON = "on (namespace, run)"
PAST = "2h"  # for so long a run that says nothing more is remembered

# Beyond which something is wrong, here and in `equiav top`. early: a share of the run, before which little is to be expected.
LIMITS = {
    "stalled_seconds": 300,
    "unsaved_seconds": 900,
    "effective_rank": 2,
    "gain": 0.005,
    "quarantine": 0.5,
    "early": 0.05,
}

# The last step is of whichever pod had rank 0. A run lives if it has not ended since.
RECORDS = {
    "equiav:last_step_time_seconds": f"max {BY} (max_over_time(equiav_last_step_time_seconds[{PAST}]))",
    "equiav:ended_time_seconds": f"max {BY} (max_over_time(equiav_run_ended_time_seconds[{PAST}]))",
    "equiav:live": f"equiav:last_step_time_seconds unless {ON} (equiav:ended_time_seconds >= equiav:last_step_time_seconds)",
    "equiav:progress_ratio": f"max {BY} (equiav_step) / max {BY} (equiav_steps_planned)",
}


@dataclass(frozen=True)
class Alert:
    name: str
    expr: str
    wait: str
    """For so long it has to hold."""
    severity: str
    """critical: the run is lost, or works in vain. warning: it costs time, or may come to that."""
    summary: str
    meaning: str

    @property
    def anchor(self) -> str:
        """Of the runbook: EquiavDataStarved -> equiavdatastarved, as Markdown makes them of headings."""
        return self.name.lower()


def after(share: float) -> str:
    """Of the run's steps."""
    return f"and {ON} equiav:progress_ratio > {share}"


COLLAPSED = f"min {BY} (equiav_effective_rank) < {LIMITS['effective_rank']}"
APART = f"unless {ON} {COLLAPSED}"  # which has its own alert, and all this with it


ALERTS = (
    Alert(
        "EquiavStalled",
        f"(time() - equiav:live > {LIMITS['stalled_seconds']}) and {ON} count {BY} (equiav_clips_total)",
        "1m",
        "critical",
        "no step for {{ $value | humanizeDuration }}",
        "Its nodes are there, and no step ends. It restarts by itself after stall_seconds; this has not helped.",
    ),
    Alert(
        "EquiavAbsent",
        f"equiav:live unless {ON} count {BY} (equiav_clips_total)",
        "5m",
        "critical",
        "no node of it can be reached",
        "Its pods are gone or cannot be scraped, and it has not said that it ended.",
    ),
    Alert(
        "EquiavNotFinite",
        f"sum {BY} (increase(equiav_not_finite_steps_total[15m])) > 0",
        "0m",
        "warning",
        "{{ $value | humanize }} steps without a finite loss or gradient in 15 minutes",
        "Such a step updates nothing. After train.max_skipped in a row the run ends.",
    ),
    Alert(
        "EquiavNotLearning",
        f'min {BY} (equiav_loss_over_chance_ratio{{term="inter"}}) > 0.95 {after(0.2)} {APART}',
        "30m",
        "warning",
        "the inter-modal loss is at {{ $value | humanizePercentage }} of what guessing gives",
        "A fifth of the run is over, and sounds and pictures of a clip are not told from others.",
    ),
    Alert(
        "EquiavCollapsed",
        f"{COLLAPSED} {after(LIMITS['early'])}",
        "15m",
        "critical",
        "the embeddings fill {{ $value | humanize }} direction(s)",
        "All clips have nearly the same embedding: what is learned on from here is worth nothing.",
    ),
    Alert(
        "EquiavPredictorIdentity",
        f"(max by (namespace, run, modality) (equiav_gain_ratio) < {LIMITS['gain']}) and on (namespace, run, modality) "
        f"(max by (namespace, run, modality) (equiav_sensitivity_ratio) < {LIMITS['gain']}) {after(LIMITS['early'])} {APART}",
        "15m",
        "warning",
        "the predictor of the {{ $labels.modality }} gains {{ $value | humanize }} over predicting nothing",
        "It returns what it is given, whatever the augmentation's vector says: the encoder becomes invariant.",
    ),
    Alert(
        "EquiavSimilarityLow",
        f"(min {BY} (equiav_similarity_ratio) < 0.5) {after(0.2)}",
        "30m",
        "warning",
        "predicted embeddings have a cosine of {{ $value | humanize }} with those of the augmented views",
        "A fifth of the run is over, and the predictor does not find where an augmentation leads.",
    ),
    Alert(
        "EquiavDataStarved",
        f'avg {BY} (sum by (namespace, run, rank) (rate(equiav_phase_seconds_total{{phase="data"}}[5m]))) > 0.2',
        "10m",
        "warning",
        "{{ $value | humanizePercentage }} of the time its ranks wait for data",
        "The devices are paid for and idle.",
    ),
    Alert(
        "EquiavStraggler",
        'sum by (namespace, run, rank) (rate(equiav_phase_seconds_total{phase="views"}[5m])) > 0.02 and '
        'sum by (namespace, run, rank) (rate(equiav_phase_seconds_total{phase="views"}[5m])) > on (namespace, run) '
        "group_left () 1.5 * quantile by (namespace, run) (0.25, "
        'sum by (namespace, run, rank) (rate(equiav_phase_seconds_total{phase="views"}[5m])))',
        "10m",
        "warning",
        "rank {{ $labels.rank }} takes far longer than the others for what it does by itself",
        "All others wait for it at every step.",
    ),
    Alert(
        "EquiavUnsaved",
        f"max {BY} (equiav_unsaved_seconds) > {LIMITS['unsaved_seconds']}",
        "0m",
        "critical",
        "a save is due for {{ $value | humanizeDuration }}, and none has succeeded",
        "It trains on, and a crash loses all since the last checkpoint.",
    ),
    Alert(
        "EquiavSavesFail",
        f"sum {BY} (increase(equiav_failed_saves_total[30m])) > 0",
        "0m",
        "warning",
        "{{ $value | humanize }} checkpoints came to nothing in 30 minutes",
        "The next one may succeed; EquiavUnsaved calls if none does.",
    ),
    Alert(
        "EquiavRestartStorm",
        f"max {BY} (increase(equiav_rounds_total[30m])) > 5 "
        f"or changes(max {BY} (equiav_run_began_time_seconds)[30m:15s]) > 5",
        "0m",
        "warning",
        "it has begun {{ $value | humanize }} times in 30 minutes",
        "Each time the steps since the last checkpoint are done again.",
    ),
    Alert(
        "EquiavWorldShrunk",
        f"max {BY} (equiav_world_size) + max {BY} (equiav_spare_processes) < max {BY} (equiav_world_size_target)",
        "15m",
        "warning",
        "{{ $value | humanize }} processes take part, fewer than it could use",
        "Its result is the same; it takes longer.",
    ),
    Alert(
        "EquiavQuarantine",
        f"sum {BY} (equiav_quarantined_samples) / max {BY} (equiav_quarantine_limit_samples) > {LIMITS['quarantine']}",
        "0m",
        "warning",
        "bad samples are at {{ $value | humanizePercentage }} of what stream.max_bad allows",
        "At 100% the run ends for good.",
    ),
)


def rules() -> dict[str, Any]:
    records = [{"record": name, "expr": expr} for name, expr in RECORDS.items()]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expr if "equiav:live" in alert.expr else f"({alert.expr}) and {ON} equiav:live",
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": f"{{{{ $labels.run }}}}: {alert.summary}",
                "description": alert.meaning,
                "runbook": RUNBOOK + alert.anchor,
            },
        }
        for alert in ALERTS
    ]
    # Each group is evaluated from top to bottom: an alert sees what was recorded just before.
    return {"groups": [{"name": "equiav", "interval": "15s", "rules": [*records, *alerts]}]}


def text() -> str:
    head = "# Written by `python -m monitoring.alerts` from monitoring/alerts.py. What to do: docs/operations.md.\n"
    return head + yaml.safe_dump(rules(), sort_keys=False, width=1000)


if __name__ == "__main__":
    FILE.write_text(text())
