"""The node program: what is lost is replaced, what is over stays over, and the run is the same."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from equiav.data.local_s3 import LocalS3
from launch.ended import Ended, Record
from tests import forks
from tests.launch.nodes import Nodes
from tests.train.ranks import free_port
from tests.train.test_pretrain import ENV, Run, lines, same_run, steps


@pytest.fixture(scope="module")
def long_config(run_config, tmp_path_factory):
    settings = yaml.safe_load(run_config.read_text())
    settings["train"] |= {"steps": STEPS}
    settings["checkpoint"] |= {"every_steps": 8}
    path = tmp_path_factory.mktemp("long") / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


STEPS = 160


@pytest.fixture(scope="module")
def whole(long_config):
    out = long_config.parent / "whole"
    Run(long_config, out).end()
    return out


@pytest.fixture
def nodes(long_config, tmp_path):
    nodes = Nodes(long_config, tmp_path / "out", port=free_port())
    yield nodes
    nodes.end()


@pytest.mark.slow
def test_what_is_asked_to_end_saves_and_the_others_go_on(nodes, whole):
    nodes.start(0)
    nodes.start(1)
    nodes.until(lambda: 5 in steps(nodes.out))
    alone = nodes.moved(1)
    nodes.wanted.discard(1)
    os.kill(nodes.running[1].pid, signal.SIGTERM)  # to the node program, as Kubernetes does
    nodes.until(alone)
    assert nodes.running[1].wait(60) == 143
    first, second = lines(nodes.out / "starts.jsonl")
    assert (first["ranks"], second["ranks"]) == (2, 1)
    assert second["step"] > 0
    assert f"step {second['step']} is saved" in nodes.told()  # nothing is done twice
    nodes.finish()
    assert nodes.ended[0] == [0]
    same_run(nodes.out, whole, STEPS)


@pytest.mark.slow
def test_whatever_is_killed_and_comes_the_run_is_the_same(nodes, whole):
    seconds = {}

    def happens(what, ranks, *actions):
        moved = nodes.moved(ranks)
        for action in actions:
            action()
        seconds[what] = round(nodes.until(moved), 1)

    nodes.start(0)
    nodes.start(1)
    nodes.until(lambda: 5 in steps(nodes.out))
    for number in (0, 1):
        happens(f"a worker of node {number} is killed", 2, lambda n=number: os.kill(nodes.worker(n), signal.SIGKILL))
    happens("a node is killed", 1, lambda: nodes.kill(1))
    happens("a node comes", 2, lambda: nodes.start(1))
    happens("the rendezvous host is killed", None, lambda: nodes.kill(0), lambda: nodes.start(0))
    nodes.finish()
    print(seconds)
    same_run(nodes.out, whole, STEPS)


@pytest.mark.slow
def test_two_workers_of_one_node(long_config, whole, tmp_path):
    nodes = Nodes(long_config, tmp_path / "out", nodes="1:1", workers=2, port=free_port())
    seconds = []
    try:
        nodes.start(0)
        nodes.until(lambda: 5 in steps(nodes.out))
        for _ in range(3):
            moved = nodes.moved(2)
            os.kill(nodes.worker(0), signal.SIGKILL)
            seconds.append(round(nodes.until(moved), 1))
        nodes.finish()
    finally:
        nodes.end()
        print("a worker is killed:", seconds)
    same_run(nodes.out, whole, STEPS)


@pytest.mark.slow
def test_an_end_for_good_is_remembered(nodes, long_config):
    """Here: a setting that the checkpoints do not have. No node starts again, and those that come look first."""
    nodes.start(0)
    nodes.until(lambda: 12 in steps(nodes.out))
    nodes.kill(0)
    nodes.fails_for_good = True
    nodes.start(0, "--seed", "7")
    nodes.start(1, "--seed", "7")
    nodes.finish()
    assert nodes.ended == {0: [2], 1: [0]}  # one says so, the other is not to be started again
    assert "seed is 7, was 0" in nodes.told()
    (path,) = (nodes.out / "checkpoints").glob("ended-*")
    ended = json.loads(path.read_text())
    assert ended["status"] == 2
    assert "seed is 7" in ended["error"]
    before = len(lines(nodes.out / "starts.jsonl"))
    nodes.ended.clear()
    nodes.start(0)  # of the same submission: it does not come as far as the right settings
    nodes.finish()
    assert nodes.ended == {0: [2]}
    assert "the run has ended for good" in nodes.told()
    nodes.ended.clear()
    nodes.submission = "two"  # submitted again, mended
    nodes.start(0)
    nodes.until(lambda: len(lines(nodes.out / "starts.jsonl")) > before)


@pytest.mark.slow
def test_a_run_that_another_submission_has_taken_over_ends(nodes, long_config):
    nodes.fails_for_good = True
    nodes.start(0)
    nodes.until(lambda: 5 in steps(nodes.out))
    other = Nodes(long_config, nodes.out, nodes="1:1", port=free_port(), submission="two")
    other.log = nodes.out / "other.log"
    other.start(0)
    try:
        nodes.finish(60)
        assert nodes.ended == {0: [144]}
        assert "has taken over" in nodes.told()
        assert (nodes.out / "checkpoints" / "ended-one").exists()
        assert not (nodes.out / "checkpoints" / "ended-two").exists()
    finally:
        other.end()


@pytest.mark.slow
def test_a_second_node_of_one_index_leaves_without_ending_the_run(nodes, long_config):
    """A machine was cut off, its pod replaced, and it comes back."""
    nodes.fails_for_good = True
    nodes.start(0)
    nodes.until(lambda: 5 in steps(nodes.out))
    twin = Nodes(long_config, nodes.out, nodes="1:1", port=free_port(), submission="one")
    twin.log = nodes.out / "other.log"
    twin.start(0)
    try:
        nodes.finish(60)
        assert nodes.ended == {0: [144]}
        assert not list((nodes.out / "checkpoints").glob("ended-*"))
    finally:
        twin.end()


@pytest.mark.slow
def test_a_node_waits_for_a_host_that_is_not_there_yet(nodes):
    nodes.start(1)
    nodes.until(lambda: "waits for node 0 at" in nodes.told())
    nodes.start(0)
    nodes.until(lambda: 3 in steps(nodes.out))
    assert lines(nodes.out / "starts.jsonl")[-1]["ranks"] == 2


def test_asked_to_end_before_there_are_workers(nodes):
    nodes.start(1)
    nodes.until(lambda: "waits for node 0" in nodes.told())
    nodes.wanted.discard(1)
    nodes.running[1].terminate()
    assert nodes.running[1].wait(20) == 143
    assert "ends; no worker of this node runs" in nodes.told()


def test_nothing_of_a_node_outlives_it(nodes):
    nodes.start(0)
    nodes.until(lambda: 3 in steps(nodes.out))
    all_of_it = nodes.of(0)
    assert len(all_of_it) > 2
    nodes.wanted.clear()
    os.kill(nodes.running[0].pid, signal.SIGKILL)  # it alone
    nodes.running[0].wait()
    deadline = time.monotonic() + 20
    while left := [pid for pid in all_of_it if os.path.exists(f"/proc/{pid}/exe")]:
        assert time.monotonic() < deadline, [
            (pid, forks.kind(pid), Path(f"/proc/{pid}/wchan").read_text()) for pid in left
        ]
        time.sleep(0.1)


def test_a_folder_that_refuses_is_tried_again_later(tmp_path):
    """Nobody can write there that it is final; whoever mends the credentials has not to start the run again."""
    (tmp_path / "runs").mkdir()
    with LocalS3(tmp_path) as s3:
        env = {
            "AWS_ACCESS_KEY_ID": s3.key,
            "AWS_SECRET_ACCESS_KEY": "wrong",
            "AWS_ENDPOINT_URL": s3.options["endpoint_url"],
        }
        command = [sys.executable, "-m", "launch.node", "--run", "a", "--folder", "s3://runs/a", "--", "pretrain"]
        done = subprocess.run(
            command, env={**os.environ, **env, "EQUIAV_SUBMISSION": "one"}, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "Mend the credentials" in done.stderr


def test_data_that_is_refused_is_asked_for_once_again(long_config, tmp_path, monkeypatch):
    """A store may refuse for a moment; a run of many nodes does not end for good by that."""
    (tmp_path / "clips").mkdir()
    with LocalS3(tmp_path) as s3:
        monkeypatch.setitem(ENV, "AWS_ACCESS_KEY_ID", s3.key)
        monkeypatch.setitem(ENV, "AWS_SECRET_ACCESS_KEY", "wrong")
        monkeypatch.setitem(ENV, "AWS_ENDPOINT_URL", s3.options["endpoint_url"])
        nodes = Nodes(long_config, tmp_path / "out", nodes="1:1", port=free_port())
        nodes.fails_for_good = True
        try:
            nodes.start(0, "--stream.url", "s3://clips/a", "--stream.cache", str(tmp_path / "cache"))
            nodes.finish()
        finally:
            nodes.end()
        assert nodes.ended == {0: [1]}
        assert nodes.told().count("access is refused") > 2
        assert "round 2" in nodes.told()
        assert "round 3" not in nodes.told()
        assert "the run has ended for good" in nodes.told()


def test_what_fails_in_the_same_place_each_time_ends_the_run(long_config, tmp_path):
    """An out-of-memory, or an error, between two saves: computed again and again, it would be so for weeks."""
    code = "import sys, launch.agent; launch.agent.NO_PROGRESS = 3; from launch import node; from tests.launch import fails_at; "
    code += "launch.agent.worker = fails_at.worker; sys.exit(node.main(sys.argv[1:]))"
    nodes = Nodes(long_config, tmp_path / "out", nodes="1:1", port=free_port(), program=["-c", code])
    nodes.fails_for_good = True
    try:
        nodes.start(0)
        nodes.finish()
    finally:
        nodes.end()
    told = nodes.told()
    assert nodes.ended == {0: [1]}
    assert re.search(
        r"3 rounds in a row have failed, and no step is saved beyond (\d+); the last: rank 0 ended by SIGKILL", told
    )
    assert "round 3" in told
    assert "round 5" not in told  # the first of them had saved
    assert Record(str(nodes.out / "checkpoints"), "one", 0).saved() > 0
    with pytest.raises(Ended, match="the run has ended for good"):
        Record(str(nodes.out / "checkpoints"), "one", 0).look()


@pytest.mark.slow
def test_trouble_of_one_machine_is_that_nodes_alone(long_config, tmp_path):
    nodes = Nodes(long_config, tmp_path / "out", nodes="1:2", port=free_port())
    nodes.fails_for_good = True
    try:
        nodes.start(0)
        nodes.until(nodes.moved())
        (tmp_path / "file").touch()
        nodes.start(1, "--out", str(tmp_path / "file" / "out"))
        moved = nodes.moved(ranks=1)
        nodes.until(lambda: 1 in nodes.ended and moved())
        assert nodes.ended == {1: [2]}
        assert "cannot be made" in nodes.told()
        assert not list((nodes.out / "checkpoints").glob("ended-*"))
    finally:
        nodes.end()


@pytest.mark.parametrize(("ended", "index", "status"), [(0, 0, 0), (0, 1, 0), (2, 0, 2), (2, 1, 0)])
def test_a_node_that_begins_after_the_end_leaves(ended, index, status, tmp_path):
    """The first node may be lost when the others have finished: nobody would ever join it."""
    Record(str(tmp_path), "one", 1).write(ended, "how it ended")
    command = [sys.executable, "-m", "launch.node", "--run", "a", "--nodes", "2:2", "--index", str(index)]
    command += ["--folder", str(tmp_path), "--", "pretrain"]
    done = subprocess.run(
        command, env={**os.environ, "EQUIAV_SUBMISSION": "one"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status
    assert "how it ended" in done.stderr
    assert ("for good" in done.stderr) is bool(ended)


@pytest.mark.parametrize(("final", "index", "status"), [(True, 0, 2), (True, 1, 0), (False, 0, 2), (False, 1, 2)])
def test_one_node_says_that_a_run_is_over_for_good(final, index, status):
    assert Ended(2, "why", final).status_of(index) == status


@pytest.mark.slow
def test_too_few_nodes_for_a_long_time_are_waited_for(long_config, tmp_path):
    """The first node hosts the rendezvous anew each time: its port has to be free again."""
    code = "import sys, launch.agent; launch.agent.JOIN = 3; from launch import node; sys.exit(node.main(sys.argv[1:]))"
    nodes = Nodes(long_config, tmp_path / "out", nodes="2:2", port=free_port(), program=["-c", code])
    try:
        nodes.start(0)
        nodes.until(lambda: nodes.told().count("no rendezvous at") >= 2)
        nodes.start(1)
        nodes.until(lambda: 3 in steps(nodes.out))
    finally:
        nodes.end()


@pytest.mark.slow
def test_a_model_that_takes_long_to_write_is_waited_for_by_all(run_config, tmp_path):
    code = "import sys, launch.agent; from launch import node; from tests.launch import slow_end; "
    code += "launch.agent.worker = slow_end.worker; sys.exit(node.main(sys.argv[1:]))"
    nodes = Nodes(run_config, tmp_path / "out", nodes="2:2", port=free_port(), program=["-c", code])
    try:
        nodes.start(0)
        nodes.start(1)
        nodes.finish()
        assert nodes.ended == {0: [0], 1: [0]}
        assert "is lost" not in nodes.told()
        assert len(lines(nodes.out / "starts.jsonl")) == 1
        assert (nodes.out / "model" / "config.json").exists()
    finally:
        nodes.end()


def test_an_end_that_cannot_be_written_down_is_none_for_good(long_config, tmp_path):
    """Each node then says it by its own status."""
    nodes = Nodes(long_config, tmp_path / "out", nodes="1:1", port=free_port(), submission="")
    nodes.fails_for_good = True
    try:
        nodes.start(0, "--train.lr", "-1")
        nodes.finish()
        assert nodes.ended == {0: [2]}
        assert "for good" not in nodes.told()
    finally:
        nodes.end()


def test_a_signal_to_all_its_processes_saves(nodes, long_config):
    """As `torchx run -s local_cwd` passes Ctrl-C on: to the node program, the server and the workers at once."""
    nodes.start(0)
    nodes.until(lambda: 12 in steps(nodes.out))
    for pid in nodes.of(0):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    assert nodes.running[0].wait(60) == 143
    assert re.search(r"asked to end by SIGTERM; step \d+ is saved", nodes.told())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nodes", "2:x", "--", "pretrain"], "--nodes is '2:x', expected MIN:MAX"),
        (["--nodes", "4:2", "--", "pretrain"], "--nodes is '4:2'"),
        (["--workers", "-1", "--", "pretrain"], "--workers"),
        (["--", "pretrian"], "begins with 'pretrian', expected pretrain"),
    ],
)
def test_a_mistake_on_its_command_line_is_told(arguments, told):
    command = [sys.executable, "-m", "launch.node", "--run=-x", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


# ---- what Prometheus is told


@pytest.mark.slow
def test_counters_outlive_workers_and_the_end_is_scraped(nodes):
    """Two nodes: a worker of one is killed, the other node is lost; then the run ends."""
    nodes.metrics = free_port()

    def scrape(number=0):
        """name{labels} -> value"""
        with suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{nodes.metrics + number}/metrics", timeout=5) as answer:
                told = [line.rpartition(" ") for line in answer.read().decode().splitlines() if line[0] != "#"]
            return {
                name.replace('run="test"', "").replace(",}", "}").replace("{}", ""): float(x) for name, _, x in told
            }
        return {}

    def has(name, least=1, number=0):
        return lambda: scrape(number).get(name, -1) >= least

    nodes.start(0)
    nodes.start(1)
    nodes.until(lambda: 5 in steps(nodes.out))
    nodes.until(has("equiav_rounds_total"))
    nodes.until(has("equiav_rounds_total", number=1))
    both = {**scrape(0), **scrape(1)}
    nodes.until(lambda: "equiav_step" in {**scrape(0), **scrape(1)})
    assert both["equiav_world_size_target"] == 2
    before, moved = scrape(0), nodes.moved(2)
    os.kill(nodes.worker(0), signal.SIGKILL)
    nodes.until(has('equiav_lost_workers_total{how="SIGKILL"}'))
    nodes.until(has("equiav_rounds_total", 2))
    nodes.until(moved)
    after = scrape(0)
    falls = [name for name in before if "_total" in name and name in after and after[name] < before[name]]
    assert not falls
    moved = nodes.moved(1)
    nodes.kill(1)
    nodes.until(moved)
    nodes.until(lambda: scrape(0).get("equiav_world_size") == 1)  # of two: `world_size_target` says so
    assert 'rank="1"' not in " ".join(scrape(0))
    assert scrape(1) == {}
    nodes.until(lambda: 'equiav_run_ended_time_seconds{how="finished"}' in scrape(0))
    last = scrape(0)
    assert last["equiav_step"] == STEPS
    assert last["equiav_steps_total"] >= STEPS - 16
    nodes.until(lambda: scrape(0) == {}, 20)  # after two scrapes
    nodes.finish(20)
