"""Several agents of torchrun, on hosts of their own: some are killed, some come, some are cut off, and the run stays the same."""

import os
import signal
import subprocess
import sys
import time
from random import Random

import pytest
import yaml

from tests.train.hosts import Hosts
from tests.train.ranks import free_port
from tests.train.test_pretrain import ENV, Run, lines, same_run, same_weights, steps, workers

pytestmark = pytest.mark.slow


class Nodes:
    """Agents by number; the first hosts the rendezvous. As Kubernetes would, `until` starts again what has failed."""

    def __init__(self, hosts, config, out):
        self.hosts, self.config, self.out, self.port = hosts, config, out, free_port()
        self.agents, self.wanted = {}, set()
        self.log = (out / "agents.log").open("ab")

    def start(self, number):
        self.wanted.add(number)
        endpoint = f"node-0:{self.port}" if self.hosts.apart else f"127.0.0.1:{self.port}"
        rendezvous = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            endpoint,
            "--rdzv-id",
            "run",
            "--rdzv-conf",
            f"is_host={int(number == 0)},last_call_timeout=2",
            "--local-addr",
            f"node-{number}" if self.hosts.apart else self.hosts.address(number),
        ]
        size = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "20"]
        command = [sys.executable, "-m", "torch.distributed.run", *size, *rendezvous, "-m", "equiav", "pretrain"]
        command += ["--config", str(self.config), "--out", str(self.out), "--stall_seconds", "10"]
        env = {**ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.agents[number] = subprocess.Popen(
            self.hosts.on(number, command), env=env, stdout=self.log, stderr=self.log
        )

    def kill(self, number):
        """A machine that is gone: its workers end with their agent."""
        self.wanted.discard(number)
        self.agents[number].send_signal(signal.SIGKILL)
        self.agents[number].wait()

    def workers(self):
        return list(workers([agent.pid for agent in self.agents.values()]).values())

    def until(self, condition, seconds=300):
        begun = time.monotonic()
        while not condition():
            for number in self.wanted:
                if self.agents[number].poll() not in (None, 0):
                    self.start(number)
            assert time.monotonic() - begun < seconds, (self.out / "agents.log").read_text()[-5000:]
            time.sleep(0.1)
        return time.monotonic() - begun

    def moved(self, ranks=None):
        """A condition: a start after those so far, of this many ranks, has done a step."""
        before = len(lines(self.out / "starts.jsonl"))

        def condition():
            after = lines(self.out / "starts.jsonl")[before:]
            if not after or ranks not in (None, after[-1]["ranks"]):
                return False
            return max(steps(self.out), default=-1) > after[-1]["step"]

        return condition

    def finish(self):
        self.until(lambda: (self.out / "model" / "config.json").exists())
        self.until(lambda: all(agent.poll() is not None for agent in self.agents.values()))

    def end(self):
        for agent in self.agents.values():
            agent.kill()
            agent.wait()


@pytest.fixture(scope="module")
def hosts():
    with Hosts(2) as hosts:
        yield hosts


STEPS = 240


@pytest.fixture(scope="module")
def long_config(run_config, tmp_path_factory):
    settings = yaml.safe_load(run_config.read_text())
    settings["train"] |= {"steps": STEPS}
    settings["checkpoint"] |= {"every_steps": 8}
    path = tmp_path_factory.mktemp("long") / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(long_config):
    out = long_config.parent / "whole"
    out.mkdir()
    Run(long_config, out).end()
    return out


@pytest.fixture
def nodes(hosts, long_config, tmp_path):
    nodes = Nodes(hosts, long_config, tmp_path)
    yield nodes
    nodes.end()
    print([(row["ranks"], row["step"]) for row in lines(tmp_path / "starts.jsonl")])


def test_whatever_is_killed_and_comes_the_run_is_the_same(nodes, whole):
    seconds, random = {}, Random(0)

    def happens(what, ranks, *actions):
        moved = nodes.moved(ranks)
        for action in actions:
            action()
        seconds[what] = round(nodes.until(moved), 1)

    nodes.start(0)
    nodes.start(1)
    nodes.until(lambda: 5 in steps(nodes.out))
    for k in range(3):
        happens(f"worker {k} is killed", 2, lambda: os.kill(random.choice(nodes.workers()), signal.SIGKILL))
    happens("a node is killed", 1, lambda: nodes.kill(1))
    happens("a node comes", 2, lambda: nodes.start(1))
    happens("the rendezvous host is killed", None, lambda: nodes.kill(0), lambda: nodes.start(0))
    nodes.finish()
    print(seconds)
    same_run(nodes.out, whole, STEPS)


def test_the_rendezvous_host_cut_off_for_half_a_minute(nodes, whole):
    """Another machine that is cut off: tests/cluster."""
    if not nodes.hosts.apart:
        pytest.skip("needs network namespaces (root)")
    nodes.start(0)
    nodes.start(1)
    nodes.until(lambda: 5 in steps(nodes.out))
    workers = nodes.workers()
    nodes.hosts.cut(0)
    begun = time.monotonic()
    nodes.until(lambda: time.monotonic() - begun > 30)
    assert len(workers) == 2
    assert not set(workers) & set(nodes.workers())  # neither waits for what may never come
    nodes.hosts.join(0)
    print("back at", max(steps(nodes.out)))
    nodes.finish()
    same_run(nodes.out, whole, STEPS)


def test_a_name_that_does_not_resolve_yet(nodes):
    if not nodes.hosts.apart:
        pytest.skip("needs network namespaces (root)")
    nodes.hosts.resolve(1, [])
    nodes.start(1)
    nodes.until(lambda: "node-0" in (told := (nodes.out / "agents.log").read_text()) and "cannot be retrieved" in told)
    nodes.start(0)
    nodes.hosts.resolve(1, [0, 1])
    nodes.until(lambda: 5 in steps(nodes.out))
    assert [row["ranks"] for row in lines(nodes.out / "starts.jsonl")][-1] == 2


def test_hosts_with_addresses_of_ipv6_alone(long_config, whole, tmp_path):
    with Hosts(2, family=6) as hosts:
        if not hosts.apart:
            pytest.skip("needs network namespaces (root)")
        nodes = Nodes(hosts, long_config, tmp_path)
        try:
            nodes.start(0)
            nodes.start(1)
            nodes.finish()
        finally:
            nodes.end()
    same_run(tmp_path, whole, STEPS)
    (start,) = lines(tmp_path / "starts.jsonl")
    assert (start["ranks"], start["shard"]) == (2, 1)  # a copy on each node


def test_of_two_that_are_the_same_node_one_leaves(long_config, whole, tmp_path):
    """It was cut off, replaced, and comes back: two agents with a rendezvous each, and one place for checkpoints."""
    place = ["--checkpoint.url", str(tmp_path / "checkpoints")]
    first = Run(long_config, tmp_path / "first", 1, *place)
    first.reach(20)
    second = Run(long_config, tmp_path / "second", 1, *place)
    told = first.process.communicate(timeout=120)[0]
    assert first.process.returncode != 0
    assert "taken over" in told
    (start,) = lines(first.out / "starts.jsonl")  # its agent did not start it again
    second.end()
    same_weights(second.out, whole)
    (goes_on,) = lines(second.out / "starts.jsonl")
    published = [path.parent.name for path in (tmp_path / "checkpoints").glob("step-*/manifest.json")]
    assert all(int(name[5:13]) <= goes_on["step"] for name in published if name.endswith(start["token"]))
    assert max(published).endswith(goes_on["token"])
