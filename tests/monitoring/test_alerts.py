"""Each alert fires when it should and only then, as Prometheus itself judges: on either side of its limit, and after the end."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from monitoring import alerts
from monitoring.alerts import ALERTS, WATCHDOG
from monitoring.metrics import METRICS, series

MINUTES, INTERVAL = 90, 15
COUNT = MINUTES * 60 // INTERVAL


def constant(value):
    return f"{value}x{COUNT}"


def rises(per_second, start=0.0):
    return f"{start}+{per_second * INTERVAL}x{COUNT}"


BY_US = 'label_app_kubernetes_io_managed_by="equiav"'


def failed(count):
    """Of its pods, in the last half an hour."""
    return {f'kube_pod_status_phase{{pod="r-{k}",phase="Failed"}}': f"0x260 1x{COUNT}" for k in range(4, 4 + count)}


# A run of two ranks without a fault, at half of its steps.
HEALTHY = {
    "last_step_time_seconds": rises(1),
    "step": constant(5000),
    "steps_planned": constant(10000),
    "clips_total": rises(30),
    "batch_clips": constant(256),
    'loss_over_chance_ratio{term="inter"}': constant(0.5),
    'loss_over_chance_ratio{term="intra_audio"}': constant(0.99),
    "not_finite_steps_total": constant(3),
    'effective_rank{modality="audio"}': constant(30),
    'effective_rank{modality="image"}': constant(40),
    'similarity_ratio{modality="audio"}': constant(0.9),
    'similarity_ratio{modality="image"}': constant(0.8),
    'gain_ratio{modality="audio"}': constant(0.1),
    'gain_ratio{modality="image"}': constant(0.1),
    'sensitivity_ratio{modality="audio"}': constant(0.1),
    'sensitivity_ratio{modality="image"}': constant(0.1),
    **{f'phase_seconds_total{{phase="data",rank="{rank}"}}': rises(0.01) for rank in range(4)},
    **{f'phase_seconds_total{{phase="views",rank="{rank}"}}': rises(0.1) for rank in range(4)},
    "unsaved_seconds": constant(0),
    "failed_saves_total": constant(2),
    "rounds_total": constant(4),
    "rounds_without_progress": constant(1),
    "run_began_time_seconds": constant(7),
    "world_size": constant(4),
    "spare_processes": constant(0),
    "world_size_target": constant(4),
    'quarantined_samples{reason="image"}': constant(10),
    "quarantine_limit_samples": constant(100),
    **{f'kube_pod_labels{{pod="r-{k}",label_app_kubernetes_io_instance="r",{BY_US}}}': constant(1) for k in range(9)},
    **{f'kube_pod_labels{{pod="other-{k}",label_app_kubernetes_io_instance="r"}}': constant(1) for k in range(9)},
    **{f'kube_pod_status_phase{{pod="other-{k}",phase="Failed"}}': f"0x300 1x{COUNT}" for k in range(9)},
    **{f'kube_pod_status_phase{{pod="other-{k}",phase="Pending"}}': constant(1) for k in range(9)},
    'kube_pod_status_phase{pod="r-0",phase="Running"}': constant(1),
    'kube_pod_status_phase{pod="r-1",phase="Pending"}': constant(1),
    **{f'kube_pod_status_phase{{pod="r-{k}",phase="Failed"}}': constant(1) for k in range(2, 4)},
}
RANKS, SIDES = range(4), ("audio", "image")


def phase(name, *rates):
    return {
        f'phase_seconds_total{{phase="{name}",rank="{rank}"}}': rises(rate)
        for rank, rate in zip(RANKS, rates, strict=True)
    }


def began(times):
    """Anew, in the last 30 minutes."""
    return " ".join(["7x260", *(f"{8 + k}x5" for k in range(times - 1)), f"90x{COUNT}"])


GONE = {name: f"{values.split('x')[0]}x200" for name, values in HEALTHY.items()}  # its nodes, for 40 minutes
# name -> what fires it, and what just does not
CASES = {
    "EquiavFailed": (
        {**GONE, 'run_ended_time_seconds{how="failed"}': constant(MINUTES * 60)},
        {'run_ended_time_seconds{how="failed"}': constant(100)},
    ),
    "EquiavNotBegun": ({**dict.fromkeys(HEALTHY), "rounds_total": constant(0)}, {}),
    "EquiavStalled": ({"last_step_time_seconds": rises(1, -320)}, {"last_step_time_seconds": rises(1, -290)}),
    "EquiavAbsent": (GONE, {}),
    "EquiavPending": ({'kube_pod_status_phase{pod="r-0",phase="Running"}': constant(0)}, {}),
    "EquiavPodsFail": (failed(5), failed(4)),
    "EquiavNotFinite": ({"not_finite_steps_total": rises(1 / 600)}, {}),
    "EquiavNotLearning": (
        {'loss_over_chance_ratio{term="inter"}': constant(0.97), "step": constant(2100)},
        {'loss_over_chance_ratio{term="inter"}': constant(0.97), "step": constant(1900)},
    ),
    "EquiavCollapsed": (
        {'effective_rank{modality="image"}': constant(1.9), "step": constant(550), "batch_clips": constant(8)},
        {'effective_rank{modality="image"}': constant(2.1)},
    ),
    "EquiavPredictorIdentity": (
        {f'{what}_ratio{{modality="audio"}}': constant(0.0048) for what in ("gain", "sensitivity")}
        | {"step": constant(550)},
        {'gain_ratio{modality="audio"}': constant(0.0048)},
    ),
    "EquiavSimilarityLow": (
        {'similarity_ratio{modality="image"}': constant(0.48), "step": constant(2100)},
        {'similarity_ratio{modality="image"}': constant(0.52)},
    ),
    "EquiavDataStarved": (phase("data", 0.25, 0.2, 0.2, 0.2), phase("data", 0.25, 0.17, 0.17, 0.17)),
    "EquiavStraggler": (phase("views", 0.1, 0.1, 0.1, 0.16), phase("views", 0.1, 0.1, 0.1, 0.14)),
    "EquiavUnsaved": ({"unsaved_seconds": constant(950)}, {"unsaved_seconds": constant(850)}),
    "EquiavSavesFail": ({"failed_saves_total": rises(1 / 1200)}, {}),
    "EquiavRestartStorm": ({"rounds_total": rises(5.6 / 1800)}, {"rounds_total": rises(4.5 / 1800)}),
    "EquiavNoProgress": ({"rounds_without_progress": constant(3)}, {"rounds_without_progress": constant(2)}),
    "EquiavWorldShrunk": ({"world_size": constant(3)}, {"world_size": constant(3), "spare_processes": constant(1)}),
    "EquiavQuarantine": (
        {'quarantined_samples{reason="image"}': constant(45), 'quarantined_samples{reason="audio"}': constant(6)},
        {'quarantined_samples{reason="image"}': constant(49)},
    ),
}
MORE_THAT_FIRE = {
    "EquiavStraggler": [phase("views", 0.014, 0.014, 0.014, 0.022)],
    "EquiavRestartStorm": [{"run_began_time_seconds": began(6)}],
    # Rank 0 is away for a moment, again and again.
    "EquiavCollapsed": [
        {'effective_rank{modality="image"}': " ".join(["1.9x46 _x6"] * 7)},
        {**CASES["EquiavCollapsed"][0], 'quarantined_samples{reason="image"}': constant(49)},
    ],
    # How sensitive the predictor is cannot be told of every objective.
    "EquiavPredictorIdentity": [
        {'gain_ratio{modality="audio"}': constant(0.0048)}
        | {f'sensitivity_ratio{{modality="{side}"}}': None for side in SIDES}
    ],
}
MORE_THAT_ARE_FINE = {
    # It passes over sample after sample.
    "EquiavStalled": [{**CASES["EquiavStalled"][0], 'quarantined_samples{reason="image"}': rises(1 / 200)}],
    "EquiavNotLearning": [{'loss_over_chance_ratio{term="inter"}': constant(0.94)}],
    "EquiavCollapsed": [
        {'effective_rank{modality="image"}': constant(1.9), "step": constant(450)},
        {'effective_rank{modality="image"}': constant(1.9), "batch_clips": constant(7)},
    ],
    "EquiavPredictorIdentity": [
        {'gain_ratio{modality="audio"}': constant(0.0048), 'sensitivity_ratio{modality="audio"}': constant(0.0052)},
        {'gain_ratio{modality="audio"}': constant(0.0052), 'sensitivity_ratio{modality="audio"}': constant(0.0048)},
        {'gain_ratio{modality="audio"}': constant(0.0048), 'sensitivity_ratio{modality="image"}': constant(0.0048)},
        {f'{what}_ratio{{modality="audio"}}': constant(0.001) for what in ("gain", "sensitivity")}
        | {"step": constant(450)},
    ],
    "EquiavSimilarityLow": [{'similarity_ratio{modality="image"}': constant(0.1), "step": constant(1900)}],
    "EquiavStraggler": [phase("views", 0.001, 0.001, 0.001, 0.018)],
    "EquiavRestartStorm": [{"run_began_time_seconds": began(5)}],
    "EquiavSavesFail": [{"failed_saves_total": f"0+1x8 8x{COUNT}"}],
    "EquiavNotFinite": [{"not_finite_steps_total": f"0+1x8 8x{COUNT}"}],
}

# In a collapse, what follows from it calls nobody beside it.
COLLAPSED = {'effective_rank{modality="image"}': constant(1.9), "step": constant(5000), "batch_clips": constant(8)}
BAD_DATA = CASES["EquiavQuarantine"][0]
FEW_CLIPS = {'effective_rank{modality="image"}': constant(1.9), "batch_clips": constant(7)}  # cannot fill more
NEARLY_COLLAPSED = {'effective_rank{modality="image"}': constant(2.1)}
WITHIN_IT = ("EquiavNotLearning", "EquiavPredictorIdentity")


def case(firing, changed, ended=False):
    """firing: names of the alerts that are expected to, at the end of the hour and a half."""
    kept = {"equiav_": 'namespace="equiav",run="r"', "kube_": 'namespace="equiav"'}
    told = {**HEALTHY, **changed}
    if ended:
        told['run_ended_time_seconds{how="finished"}'] = constant(MINUTES * 60)

    def name(text):
        found, _, labels = text.partition("{")
        found = found if found.startswith("kube_") else f"equiav_{found}"
        of = kept[f"{found.split('_')[0]}_"]
        return f"{found}{{{of}{',' if labels else ''}{labels.removesuffix('}')}}}"

    return {
        "interval": f"{INTERVAL}s",
        "input_series": [{"series": name(key), "values": values} for key, values in told.items() if values],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing",alertname!="EquiavWatchdog"})',
                "eval_time": f"{MINUTES}m",
                "exp_samples": [{"labels": f'{{alertname="{one}"}}', "value": 1} for one in firing],
            }
        ],
    }


ALONE = ("EquiavAbsent",)


def of(alert):
    fires, fine = CASES[alert]
    if alert in ("EquiavFailed", "EquiavNotBegun", "EquiavPending"):
        return [case([alert], fires), case([], fine)]
    return [
        case([alert], fires),
        case([] if alert in ALONE else ["EquiavNotBegun"], fires, ended=True),  # its nodes are there still
        case([], fine),
        *(case([alert], changed) for changed in MORE_THAT_FIRE.get(alert, ())),
        *(case([], changed) for changed in MORE_THAT_ARE_FINE.get(alert, ())),
        *(case(["EquiavQuarantine"], fires | BAD_DATA) for _ in range(alert == "EquiavCollapsed")),
        *(case(["EquiavCollapsed"], fires | COLLAPSED) for _ in range(alert in WITHIN_IT)),
        *(case([alert], fires | other) for other in (NEARLY_COLLAPSED, FEW_CLIPS) if alert in WITHIN_IT),
    ]


def judge(folder, cases, rules=None):
    """-> what promtool has to say, empty if nothing."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules or alerts.rules()))
    (folder / "cases.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": cases}))
    done = subprocess.run(["promtool", "test", "rules", "cases.yaml"], cwd=folder, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_the_file_is_what_the_code_makes():
    assert alerts.FILE.read_text() == alerts.text(), "run `python -m monitoring.alerts`"
    done = subprocess.run(["promtool", "check", "rules", str(alerts.FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_watchdog_fires_with_and_without_runs(tmp_path):
    always = {"expr": 'ALERTS{alertname="EquiavWatchdog"}', "eval_time": "1m"}
    always["exp_samples"] = [
        {"labels": 'ALERTS{alertname="EquiavWatchdog",alertstate="firing",severity="none"}', "value": 1}
    ]
    nothing = {"interval": "15s", "input_series": [], "promql_expr_test": [always]}
    assert judge(tmp_path, [nothing]) == ""


def test_a_run_without_a_fault_calls_nobody(tmp_path):
    assert judge(tmp_path, [case([], {})]) == ""


@pytest.mark.parametrize("alert", [alert.name for alert in ALERTS if alert.name != WATCHDOG])
def test_it_fires_when_it_should_and_only_then(alert, tmp_path):
    assert judge(tmp_path, of(alert)) == ""


def mutations(expr):
    """The expression with one comparison turned round, one limit twice or half as large, or one condition for its opposite."""
    for match in re.finditer(r" (and|unless) ", expr):
        yield expr[: match.start(1)] + {"and": "unless", "unless": "and"}[match[1]] + expr[match.end(1) :]
    for match in re.finditer(r" (<|>=?) ", expr):
        yield expr[: match.start(1)] + {"<": ">", ">": "<", ">=": "<"}[match[1]] + expr[match.end(1) :]
    for match in re.finditer(r"(?<=[<>=] )(\d+(\.\d+)?)|(\d\.\d+)(?= \* )", expr):
        for factor in (0.5, 2):
            if float(match[0]):
                yield f"{expr[: match.start()]}{float(match[0]) * factor:g}{expr[match.end() :]}"


@pytest.mark.slow
@pytest.mark.parametrize("alert", [alert for alert in ALERTS if alert.name != WATCHDOG], ids=lambda alert: alert.name)
def test_a_wrong_expression_is_caught(alert, tmp_path):
    cases, tried = of(alert.name), 0
    for wrong in mutations(alert.expr):
        rules = alerts.rules()
        (rule,) = (one for one in rules["groups"][0]["rules"] if one.get("alert") == alert.name)
        rule["expr"] = rule["expr"].replace(alert.expr, wrong)
        assert judge(tmp_path, cases, rules), wrong
        tried += 1
    assert tried


def test_what_fails_before_its_first_step_calls_too(tmp_path):
    nothing = dict.fromkeys(HEALTHY)
    storm = {**nothing, "rounds_total": rises(20 / 1800), "world_size_target": constant(4)}
    assert judge(tmp_path, [case(["EquiavNotBegun", "EquiavRestartStorm"], storm)]) == ""
    begun = {**nothing, "run_began_time_seconds": constant(100), "rounds_total": constant(1)}
    assert judge(tmp_path, [case(["EquiavStalled"], begun)]) == ""
    refused = {**nothing, 'run_ended_time_seconds{how="failed"}': constant(100)}
    assert judge(tmp_path, [case(["EquiavFailed"], refused)]) == ""


def test_each_refers_to_what_is_told_and_to_what_is_to_be_done():
    known = {name for metric in METRICS for name in series(metric)}
    expressions = [*alerts.RECORDS.values(), *(alert.expr for alert in ALERTS)]
    assert {name for expr in expressions for name in re.findall(r"\bequiav_[a-z_]+", expr)} <= known
    headings = re.findall(r"^#+ (.+)$", Path("docs/operations.md").read_text(), re.MULTILINE)
    assert [alert.name for alert in ALERTS if alert.name not in headings] == []
