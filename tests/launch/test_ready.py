"""A node that cannot do its part stays outside: the others train, and it comes back by itself."""

import contextlib
import os
import signal
import socket
import subprocess
import time

import pytest
import yaml

from equiav.data.local_s3 import LocalS3
from launch import ready
from launch.ended import Ended, Record
from tests.launch.nodes import Nodes
from tests.train.hosts import Hosts
from tests.train.ranks import free_port
from tests.train.test_pretrain import steps


@pytest.fixture
def endless(run_config, tmp_path):
    settings = yaml.safe_load(run_config.read_text())
    settings["train"] |= {"steps": 100_000}
    settings["checkpoint"] |= {"every_steps": 8, "patience": 65.0}
    path = tmp_path / "endless.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


# ---- who stands back


@pytest.mark.parametrize(
    ("missed", "outside"),
    [
        ({}, set()),
        ({1: {2}}, {2}),  # the later one
        ({2: {1}}, {2}),
        ({1: {2, 3}, 2: {1}, 3: {1}}, {1}),  # who misses more
        ({0: {3}, 1: {2}}, {2, 3}),
        ({0: {1, 2, 3}}, {0}),
    ],
)
def test_the_fewest_stand_back(missed, outside):
    """As they would, one after the other."""
    present, out = {0, 1, 2, 3}, set()
    for _ in range(4):
        for index in sorted(present - out, reverse=True):
            told = {one: others - out for one, others in missed.items() if one not in out}
            worse = {one for one in present - out if ready.stands_back(one, told, present - out)}
            out |= worse & {index}
    assert out == outside


def test_two_of_a_pair_that_does_not_meet_do_not_both_stand_back():
    for missed in ({0: {1}}, {1: {0}}, {0: {1}, 1: {0}}):
        back = [index for index in (0, 1) if ready.stands_back(index, missed, {0, 1})]
        assert back == [1]


# ---- meeting


@pytest.fixture
def greeter():
    greeter = ready.Greeter()
    yield greeter
    greeter.close()


def test_nodes_meet_and_know_each_others_time(greeter):
    other = ready.Greeter()
    assert ready.meets("127.0.0.1", greeter.port, other.port)
    assert abs(ready.ahead("127.0.0.1", greeter.port)) < 0.5
    assert ready.meet_all({0: ("127.0.0.1", greeter.port), 3: ("127.0.0.1", free_port())}, other.port) == {3}
    other.close()


def test_one_that_reaches_and_cannot_be_reached_does_not_meet(greeter):
    assert not ready.meets("127.0.0.1", greeter.port, free_port())


def test_who_says_nothing_or_nonsense_holds_nobody_up(greeter, monkeypatch):
    monkeypatch.setattr(ready, "MEET", 0.5)
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", greeter.port)))
        for word in (b"", b"\n", b"x" * 100, b"99999999", b"-1\n", b"\xff\xfe"):
            with socket.create_connection(("127.0.0.1", greeter.port)) as one:
                one.sendall(word)
        own = ready.Greeter()
        assert ready.meets("127.0.0.1", greeter.port, own.port)
        own.close()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        assert ready.ahead("127.0.0.1", silent.getsockname()[1]) is None
        assert not ready.meets("127.0.0.1", silent.getsockname()[1], own.port)


# ---- staying outside


def test_it_leaves_once_says_why_once_and_comes_back():
    troubles, did = ["a", "a", "b", ""], []
    assert ready.stay_outside(lambda: troubles.pop(0), lambda: did.append("left"), did.append, 0, 60)
    assert [word[:4] for word in did] == ["left", "stay", "stay", "take"]
    assert not ready.stay_outside(lambda: "", lambda: did.append("left"), did.append, 0, 60)
    assert len(did) == 4


def test_after_long_it_ends():
    with pytest.raises(Ended, match="could not take part: no store") as caught:
        ready.stay_outside(lambda: "no store", lambda: None, lambda text: None, 0, -1)
    assert (caught.value.status, caught.value.final) == (1, False)


def test_stores_that_do_not_answer_are_trouble_and_those_that_refuse_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "QUESTION", 30.0)
    monkeypatch.setattr("launch.ended.QUESTION", 30.0)
    closed = f"http://127.0.0.1:{free_port()}"
    with LocalS3(tmp_path) as s3:
        (tmp_path / "bucket").mkdir()
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.options["endpoint_url"])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
        whole = ready.Stores(Record("s3://bucket/run", "one", 0), "s3://bucket/data")
        assert whole.trouble() == ""
        assert (tmp_path / "bucket/run/node-0").exists()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert whole.trouble() == ""
        monkeypatch.setenv("AWS_ENDPOINT_URL", closed)
        monkeypatch.setattr(ready, "QUESTION", 1.0)
        monkeypatch.setattr("launch.ended.QUESTION", 1.0)
        assert "s3://bucket/run" in whole.trouble()
        assert (
            "s3://bucket/data" in ready.Stores(Record(str(tmp_path / "here"), "one", 0), "s3://bucket/data").trouble()
        )


# ---- nodes


def on_s3(endless, tmp_path, s3):
    code = "import sys, launch.agent; from launch import node, ready; launch.agent.CUT_OFF, ready.LOOK = 8.0, 2.0; "
    code += "launch.agent.LOOK = 2.0; sys.exit(node.main(sys.argv[1:]))"  # as there, in less time
    nodes = Nodes(endless, tmp_path / "out", port=free_port(), program=["-c", code])
    nodes.folder = "s3://bucket/run/checkpoints"
    (s3.folder / "bucket").mkdir(parents=True)
    access = {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret}
    nodes.env = {number: {**access, "AWS_ENDPOINT_URL": s3.options["endpoint_url"]} for number in (0, 1)}
    return nodes


@pytest.mark.slow
@pytest.mark.parametrize("sick", [0, 1])
def test_a_node_without_the_store_stays_outside(sick, endless, tmp_path):
    """Its endpoint is a port at which nobody answers, and later somebody does."""
    port = free_port()
    with LocalS3(tmp_path / "store") as s3:
        nodes = on_s3(endless, tmp_path, s3)
        nodes.env[sick]["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        try:
            for number in (0, 1):
                nodes.start(number, "--checkpoint.url", nodes.folder)
            print("first step with one:", round(nodes.until(lambda: 20 in steps(nodes.out)), 1))
            nodes.until(lambda: f"node {sick}: stays outside, and the others go on without it" in nodes.told())
            assert nodes.told().count("round 1") == 1
            both = nodes.moved(2)
            forward = subprocess.Popen(
                ["python3", "-c", FORWARD, str(port), s3.options["endpoint_url"].rpartition(":")[2]],
                stdout=subprocess.DEVNULL,
            )
            try:
                nodes.until(both)
                assert "takes part again" in nodes.told()
            finally:
                forward.kill()
            # Once it is inside, too: while others reach it.
            alone = nodes.moved(1)
            print("after it has lost the store:", round(nodes.until(alone, 180), 1))
        finally:
            nodes.end()


FORWARD = """
import socket, sys, threading
here, there = int(sys.argv[1]), int(sys.argv[2])
def copy(a, b):
    try:
        while part := a.recv(1 << 16):
            b.sendall(part)
    except OSError:
        pass
    finally:
        b.close()
with socket.create_server(("127.0.0.1", here)) as server:
    while True:
        one = server.accept()[0]
        other = socket.create_connection(("127.0.0.1", there))
        threading.Thread(target=copy, args=(one, other), daemon=True).start()
        threading.Thread(target=copy, args=(other, one), daemon=True).start()
"""


@pytest.mark.slow
def test_a_store_that_is_down_for_all_is_waited_for(endless, tmp_path):
    with LocalS3(tmp_path / "store") as s3:
        nodes = on_s3(endless, tmp_path, s3)
        port = free_port()
        for number in (0, 1):
            nodes.env[number]["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
            nodes.start(number, "--checkpoint.url", nodes.folder)
        try:
            nodes.until(lambda: nodes.told().count("stays outside") == 2)
            both = nodes.moved(2)
            forward = subprocess.Popen(
                ["python3", "-c", FORWARD, str(port), s3.options["endpoint_url"].rpartition(":")[2]]
            )
            try:
                nodes.until(both)
            finally:
                forward.kill()
        finally:
            nodes.end()


@pytest.mark.slow
def test_a_node_whose_clock_is_wrong_stays_outside_and_few_never_begin(endless, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.touch()
    nodes = Nodes(endless, tmp_path / "out", nodes="2:2", port=free_port())
    nodes.programs[1] = ["tests/launch/skewed.py", "30", str(wrong)]
    try:
        nodes.start(0)
        nodes.start(1)
        nodes.until(lambda: "its clock is 30.0 s ahead of that of node 0" in nodes.told())
        time.sleep(8)  # by its clock, all others are lost
        assert "round 1" not in nodes.told()
        moved = nodes.moved(2)
        wrong.unlink()
        nodes.until(moved)
        moved = nodes.moved(2)
        wrong.touch()  # while it trains
        time.sleep(10)
        assert " 1 node(s) of 2" not in nodes.told()
        wrong.unlink()
        nodes.until(moved)
    finally:
        nodes.end()


@pytest.mark.slow
def test_two_nodes_between_which_nothing_passes(endless, tmp_path):
    """Of three: both reach the first."""
    with Hosts(3) as hosts:
        if not hosts.apart:
            pytest.skip("no network namespaces here")
        nodes = Nodes(endless, tmp_path / "out", nodes="1:3", hosts=hosts)
        wall = ["iptables", "-I", "INPUT", "-s", hosts.address(1), "-j", "DROP"]
        subprocess.run(hosts.on(2, wall), check=True)
        try:
            for number in range(3):
                nodes.start(number)
            print("two train:", round(nodes.until(lambda: 5 in steps(nodes.out), 240), 1))
            assert "node 2: stays outside" in nodes.told()
            three = nodes.moved(3)
            subprocess.run(hosts.on(2, [*wall[:1], "-D", *wall[2:]]), check=True)
            nodes.until(three, 240)
            moved = nodes.moved(2)
            subprocess.run(hosts.on(2, wall), check=True)
            os.kill(nodes.worker(0), signal.SIGKILL)  # so that all meet anew
            print("two train again:", round(nodes.until(moved, 400), 1))
        finally:
            nodes.end()
