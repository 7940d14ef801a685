"""The definitions, held to Prometheus' customs by its own linter and to what a run writes."""

import re
import subprocess

import pytest

from monitoring import metrics, reference
from monitoring.board import Board
from monitoring.exporter import Exporter
from monitoring.metrics import COUNTER, HISTOGRAM, METRICS

LABELS = {"rank", "term", "modality", "phase", "reason", "how", "version", "code", "torch", "device"}


def exposed(tmp_path, values=None):
    """Everything that is defined, as an exporter shows it."""
    board = Board(tmp_path, "all", rank=0)
    for metric in METRICS:
        for labels in set(metric.logged.values()) or {tuple("x" for name in metric.labels if name != "rank")}:
            board.observe(metric, 0.3) if metric.kind == HISTOGRAM else board.set(metric, 1.5, *labels)
    board.close()
    return Exporter(tmp_path, "run").answer().decode()


def test_the_names_are_those_of_prometheus(tmp_path):
    """Base units, `_total` on counters and on them alone, help: what its linter asks for."""
    text = exposed(tmp_path)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for metric in METRICS:
        assert re.fullmatch("[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == COUNTER)
        assert f"# TYPE {metric.full_name.removesuffix('_total')}" in text or f"# TYPE {metric.full_name}" in text
        assert set(metric.labels) <= LABELS
        assert metric.help.endswith(".")
        assert metric.why.endswith(".")
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_rank_has_few_series(tmp_path):
    lines = [line for line in exposed(tmp_path).splitlines() if not line.startswith("#")]
    assert 50 < len(lines) <= 120
    phases = len(metrics.PHASES) - 1
    assert sum('rank="' in line for line in lines) + phases <= 30  # what each further rank adds


def test_the_reference_is_what_the_definitions_make():
    assert reference.FILE.read_text() == reference.text(), "run `python -m monitoring.reference`"


def test_a_key_of_the_log_has_one_metric():
    keys = [key for metric in METRICS for key in metric.logged]
    assert len(keys) == len(set(keys))
    for metric, labels in metrics.by_key().values():
        assert len(labels) == len(metric.labels)


def test_a_step_in_a_few_words():
    values = {"loss": 2.345, "loss_inter": 1.0, "accuracy_inter": 0.25, "clips_per_second": 31.6}
    assert metrics.brief(values) == "loss 2.35, accuracy 0.25, 32 clips/s" or "loss 2.34" in metrics.brief(values)
    assert metrics.brief({}) == ""


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_what_is_defined_is_told_somewhere(metric, request):
    """No definition that nobody uses."""
    if metric.logged:
        return
    name = next(name for name, value in vars(metrics).items() if value is metric)
    sources = [*(request.config.rootpath / "equiav").rglob("*.py"), *(request.config.rootpath / "launch").rglob("*.py")]
    assert any(re.search(rf"\b(m|metrics)\.{name}\b", path.read_text()) for path in sources)


def test_every_number_of_a_step_has_a_metric():
    """Whatever the objective: what the loop reports, and what stands beside it."""
    from equiav.config import ObjectiveConfig
    from equiav.objective import equiav_loss, weights_at
    from tests.test_objective import embeddings

    _, terms = equiav_loss(embeddings(), weights_at(0, 1, ObjectiveConfig()), ObjectiveConfig())
    names = {name.replace("crowding", "effective_rank") for name in terms} | {
        "accuracy_class",
        "loss_class",
    }  # of fine-tuning
    beside = {"step", "bad", "gradient_norm", "lr", "clips", "skipped"}
    timing = {"clips_per_second", "saved_step", "save_seconds", "failed_saves", "unsaved_seconds"}
    assert names | beside | timing == set(metrics.by_key())
