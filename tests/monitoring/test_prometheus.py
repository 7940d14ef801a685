"""A real run of two nodes, with a worker killed and a node lost, and a real Prometheus that watches it."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from monitoring import alerts
from monitoring.dashboards import CHOSEN, panels
from monitoring.metrics import COUNTER, METRICS
from monitoring.picture import draw
from tests.launch.nodes import Nodes
from tests.monitoring.prometheus import Prometheus
from tests.train.ranks import free_port
from tests.train.test_pretrain import steps

pytestmark = pytest.mark.slow
STEPS = 300
EMPTY_HERE = {"GPU memory, most of what there is", "Of what the GPUs can do (MFU)"}
NOTHING_HERE = {
    "equiav_gpu_memory_peak_bytes",
    "equiav_gpu_memory_bytes",
    "equiav_peak_flops_per_second",
    "equiav_quarantined_samples",
}  # no GPU, good data


@pytest.fixture(scope="module")
def watched(run_config, tmp_path_factory):
    """-> Prometheus, when it began, when it ended"""
    folder = tmp_path_factory.mktemp("watched")
    settings = yaml.safe_load(run_config.read_text())
    settings["train"] |= {"steps": STEPS}
    settings["checkpoint"] |= {"every_steps": 20}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    nodes = Nodes(folder / "config.yaml", folder / "out", port=free_port())
    nodes.metrics = free_port()
    prometheus = Prometheus(folder, [nodes.metrics, nodes.metrics + 1], alerts.text())
    begun = time.time()
    try:
        nodes.start(0)
        nodes.start(1)
        nodes.until(lambda: 40 in steps(nodes.out))
        moved = nodes.moved(2)
        os.kill(nodes.worker(0), signal.SIGKILL)
        nodes.until(moved)
        nodes.until(lambda: 120 in steps(nodes.out))
        moved = nodes.moved(1)
        nodes.kill(1)
        nodes.until(moved)
        moved = nodes.moved(2)
        nodes.start(1)  # in its place: the workers of the other are asked to end, and begin again with it
        nodes.until(moved)
        nodes.finish(240)
        yield prometheus, begun, time.time()
    finally:
        nodes.end()
        prometheus.end()


def test_no_panel_is_empty(watched, tmp_path):
    prometheus, begun, ended = watched
    answers = {
        (uid, panel.title, query.expr): bool(seen(watched, query.of(CHOSEN[uid])))
        for uid, _, panel in panels()
        for query in panel.queries
    }
    shown = {(uid, title) for (uid, title, _), answer in answers.items() if answer}
    assert {title for uid, title, _ in answers if (uid, title) not in shown} == EMPTY_HERE
    names = {
        answer: {
            name
            for (*_, expr), given in answers.items()
            if given is answer
            for name in re.findall("equiav_[a-z_]+", expr)
        }
        for answer in (True, False)
    }
    assert names[False] - names[True] == NOTHING_HERE
    for uid, nothing in (("equiav-run", EMPTY_HERE), ("equiav-fleet", set())):
        path = Path(os.environ.get("EQUIAV_PICTURES", tmp_path)) / f"{uid.replace('equiav', 'dashboard')}.png"
        assert set(draw(prometheus.url, uid, "test", begun, ended, str(path))) == nothing


def seen(watched, query):
    """Whether it ever had an answer."""
    prometheus, begun, ended = watched
    for name, value in {"$__rate_interval": "15s", "$namespace": ".*", "$rank": ".*", "$run": "test"}.items():
        query = query.replace(name, value)
    return prometheus.ask(f"last_over_time(({query})[{int(ended - begun)}s:1s])", ended)


def test_a_run_that_recovers_calls_nobody_but_for_what_was_done_to_it(watched):
    prometheus, begun, ended = watched
    firing = 'ALERTS{alertstate="firing",alertname!="EquiavWatchdog"}'
    fired = prometheus.ask(f"max_over_time({firing}[{int(ended - begun)}s])", ended)
    assert {one["metric"]["alertname"] for one in fired} == set()


def test_counters_never_fall_on_a_node(watched):
    prometheus, begun, ended = watched
    for metric in METRICS:
        if metric.kind == COUNTER:
            of_the_first = f'{{instance="127.0.0.1:{prometheus.ports[0]}"}}'  # the other was another program later
            falls = prometheus.ask(f"resets({metric.full_name}{of_the_first}[{int(ended - begun)}s]) > 0", ended)
            assert falls == [], metric.name


def test_the_end_was_scraped(watched):
    prometheus, begun, ended = watched
    seconds = int(ended - begun)
    (last,) = prometheus.ask(f"max(max_over_time(equiav_step[{seconds}s]))", ended)
    assert float(last["value"][1]) == STEPS
    ends = prometheus.ask(f"max by (how) (last_over_time(equiav_run_ended_time_seconds[{seconds}s]))", ended)
    assert [end["metric"]["how"] for end in ends] == ["finished"]  # and at no time another
