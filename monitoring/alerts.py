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
PAST = "24h"  # for so long a run that says nothing more is remembered

# Beyond which something is wrong, here and in `equiav top`. early: a share of the run, before which little is to be expected.
LIMITS = {
    "stalled_seconds": 300,
    "unsaved_seconds": 900,
    "effective_rank": 2,
    "gain": 0.005,
    "quarantine": 0.5,
    "rounds_without_progress": 3,
    "early": 0.05,
}


def past(metric: str) -> str:
    return f"max {BY} (max_over_time({metric}[{PAST}]))"


def lately(metric: str) -> str:
    """Rank 0 tells it, and is away for a moment when the run restarts: no reason to begin to wait anew."""
    return f"last_over_time({metric}[5m])"


# When a run last did something: a step, or a start. It is over if it has ended since. What it did is told by whichever pod had
# rank 0.
STEPPED, BEGAN = past("equiav_last_step_time_seconds"), past("equiav_run_began_time_seconds")
RECORDS = {
    "equiav:moved_time_seconds": f"({STEPPED} >= {ON} {BEGAN}) or {BEGAN} or {STEPPED}",
    "equiav:ended_time_seconds": past("equiav_run_ended_time_seconds"),
    "equiav:over": f"equiav:ended_time_seconds unless {ON} (equiav:moved_time_seconds > {ON} equiav:ended_time_seconds)",
    "equiav:live": f"equiav:moved_time_seconds unless {ON} equiav:over",
    # By kube-state-metrics: a pod that waits for a machine, or ends before its program begins, tells nothing itself.
    "equiav:pods": (
        "sum by (namespace, run, phase) (max by (namespace, pod, phase) (kube_pod_status_phase) * on (namespace, pod) "
        "group_left (run) max by (namespace, pod, run) (label_replace("
        'kube_pod_labels{label_app_kubernetes_io_managed_by="equiav"}, '
        '"run", "$1", "label_app_kubernetes_io_instance", "(.+)")))'
    ),
    "equiav:progress_ratio": f"max {BY} ({lately('equiav_step')}) / max {BY} ({lately('equiav_steps_planned')})",
}
THERE = f"(count {BY} (equiav_rounds_total) or count {BY} (equiav_phase_seconds_total))"  # a node, or a run by hand


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
    of_live: bool = True
    """Of no run that is over."""

    @property
    def anchor(self) -> str:
        """Of the runbook: EquiavDataStarved -> equiavdatastarved, as Markdown makes them of headings."""
        return self.name.lower()


def after(share: float) -> str:
    """Of the run's steps."""
    return f"and {ON} equiav:progress_ratio > {share}"


# N clips have N directions at most.
COLLAPSED = (
    f"min {BY} ({lately('equiav_effective_rank')}) < {LIMITS['effective_rank']} "
    f"and {ON} max {BY} (max_over_time(equiav_batch_clips[5m])) > 7"
)
APART = f"unless {ON} ({COLLAPSED})"  # which has its own alert, and all this with it

# Bad data explains both, and has an alert of its own: a loader that passes over samples, clips that are few.
BAD_DATA = (
    f"sum {BY} (max by (namespace, run, reason) (equiav_quarantined_samples)) "
    f"/ max {BY} (equiav_quarantine_limit_samples) > {LIMITS['quarantine']}"
)
PASSED_OVER = f"sum {BY} (increase(equiav_quarantined_samples[5m])) > 0"

FAILED = past('equiav_run_ended_time_seconds{how="failed"}')
INTER = 'equiav_loss_over_chance_ratio{term="inter"}'
OF_SIDE = "by (namespace, run, modality)"


WATCHDOG = "EquiavWatchdog"  # fires always
ALERTS = (
    Alert(
        "EquiavFailed",
        f"{FAILED} unless {ON} (equiav:moved_time_seconds > {ON} {FAILED})",
        "0m",
        "critical",
        "it has ended for good, before its last step",
        "No restart mends it. The log's last line says why: a setting, bad data, a loss that is not finite.",
        of_live=False,
    ),
    Alert(
        "EquiavStalled",
        f"(time() - equiav:live > {LIMITS['stalled_seconds']}) and {ON} {THERE} unless {ON} ({PASSED_OVER})",
        "1m",
        "critical",
        "no step for {{ $value | humanizeDuration }}",
        "Its nodes are there, and no step ends. It restarts by itself after stall_seconds, and what a store may take.",
        of_live=False,
    ),
    Alert(
        "EquiavAbsent",
        f"equiav:live unless {ON} {THERE}",
        "5m",
        "critical",
        "no node of it can be reached",
        "Its pods are gone or cannot be scraped, and it has not said that it ended.",
        of_live=False,
    ),
    Alert(
        "EquiavNotBegun",
        f"{THERE} unless {ON} equiav:live",
        "15m",
        "warning",
        "its nodes are there and wait",
        "Fewer nodes than MIN, or each start fails before its first step.",
        of_live=False,
    ),
    Alert(
        "EquiavPending",
        f'(equiav:pods{{phase="Pending"}} > 0) unless {ON} (equiav:pods{{phase="Running"}} > 0)',
        "15m",
        "warning",
        "{{ $value | humanize }} pods of it wait, and none runs",
        "No machine has room for them, or their image or a volume cannot be had: `torchx status` says which.",
        of_live=False,
    ),
    Alert(
        "EquiavPodsFail",
        'equiav:pods{phase="Failed"} - min_over_time(equiav:pods{phase="Failed"}[30m]) > 4',
        "0m",
        "warning",
        "{{ $value | humanize }} pods of it have failed in 30 minutes",
        "What ends before its program begins tells no metrics: `torchx status` and the pods' logs say why.",
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
        f"min {BY} ({lately(INTER)}) > 0.95 {after(0.2)} {APART}",
        "30m",
        "warning",
        "the inter-modal loss is at {{ $value | humanizePercentage }} of what guessing gives",
        "A fifth of the run is over, and sounds and pictures of a clip are not told from others.",
    ),
    Alert(
        "EquiavCollapsed",
        f"{COLLAPSED} {after(LIMITS['early'])} unless {ON} ({BAD_DATA})",
        "15m",
        "critical",
        "the embeddings fill {{ $value | humanize }} direction(s)",
        "All clips have nearly the same embedding: what is learned on from here is worth nothing.",
    ),
    Alert(
        "EquiavPredictorIdentity",
        # How sensitive it is, not every objective can tell.
        f"((max {OF_SIDE} ({lately('equiav_gain_ratio')}) < {LIMITS['gain']}) unless on (namespace, run, modality) "
        f"(max {OF_SIDE} ({lately('equiav_sensitivity_ratio')}) >= {LIMITS['gain']})) {after(LIMITS['early'])} {APART}",
        "15m",
        "warning",
        "the predictor of the {{ $labels.modality }} gains {{ $value | humanize }} over predicting nothing",
        "It returns what it is given, whatever the augmentation's vector says: the encoder becomes invariant.",
    ),
    Alert(
        "EquiavSimilarityLow",
        f"(min {BY} ({lately('equiav_similarity_ratio')}) < 0.5) {after(0.2)}",
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
        "Each time some seconds are lost and, if a worker or a node was, the steps since the last checkpoint.",
    ),
    Alert(
        "EquiavNoProgress",
        f"max {BY} (equiav_rounds_without_progress) >= {LIMITS['rounds_without_progress']}",
        "0m",
        "critical",
        "{{ $value | humanize }} rounds in a row have failed with no newer step saved",
        "It computes the same steps again and again, and ends at 10 such rounds.",
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
        BAD_DATA,
        "0m",
        "warning",
        "bad samples are at {{ $value | humanizePercentage }} of what stream.max_bad allows",
        "At 100% the run ends for good.",
    ),
    Alert(
        WATCHDOG,
        "vector(1)",
        "0m",
        "none",
        "the rules are evaluated, and what fires arrives",
        "Route it to a dead man's switch: its silence is the alarm.",
        of_live=False,
    ),
)


def rules() -> dict[str, Any]:
    records = [{"record": name, "expr": expr} for name, expr in RECORDS.items()]
    alerts = [
        {
            "alert": alert.name,
            "expr": f"({alert.expr}) unless {ON} equiav:over" if alert.of_live else alert.expr,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary if alert.name == WATCHDOG else f"{{{{ $labels.run }}}}: {alert.summary}",
                "description": alert.meaning,
                "runbook_url": RUNBOOK + alert.anchor,
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
