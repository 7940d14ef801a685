"""Several agents of torchrun, as on several machines: some are killed, some come, and the run stays the same run."""

import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.train.ranks import free_port
from tests.train.test_pretrain import ENV, Run, lines, same_run, steps


class Nodes:
    """Agents by number; the first hosts the rendezvous. As Kubernetes would, `supervise` starts again what has failed."""

    def __init__(self, config, out):
        self.config, self.out, self.port, self.agents, self.wanted = config, out, free_port(), {}, set()
        self.log = (out / "agents.log").open("ab")

    def start(self, number):
        self.wanted.add(number)
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.port}", "--rdzv-id", "run", "--rdzv-conf",
                      f"is_host={int(number == 0)},last_call_timeout=2", "--local-addr", "127.0.0.1"]  # fmt: skip
        size = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "20"]
        command = [sys.executable, "-m", "torch.distributed.run", *size, *rendezvous, "-m", "equiav", "pretrain"]
        command += ["--config", str(self.config), "--out", str(self.out), "--stall_seconds", "15"]
        env = {**ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.agents[number] = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log)

    def kill(self, number):
        """A machine that is gone: its workers end with their agent."""
        self.wanted.discard(number)
        self.agents[number].send_signal(signal.SIGKILL)
        self.agents[number].wait()

    def until(self, condition, seconds=120):
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
            return (
                bool(after)
                and ranks in (None, after[-1]["ranks"])
                and max(steps(self.out), default=-1) > after[-1]["step"]
            )

        return condition

    def end(self):
        for agent in self.agents.values():
            agent.kill()
            agent.wait()


@pytest.mark.slow
def test_nodes_go_and_come_and_the_run_is_the_same(run_config, tmp_path):
    settings = yaml.safe_load(run_config.read_text())
    settings["train"] |= {"steps": 60}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    out.mkdir()
    Run(tmp_path / "config.yaml", whole).end()
    nodes = Nodes(tmp_path / "config.yaml", out)
    seconds = {}
    try:
        nodes.start(0)
        nodes.start(1)
        nodes.until(lambda: 5 in steps(out))
        moved = nodes.moved(1)
        nodes.kill(1)
        seconds["a node is killed"] = nodes.until(moved)
        moved = nodes.moved(2)
        nodes.start(1)
        seconds["a node comes"] = nodes.until(moved)
        moved = nodes.moved()
        nodes.kill(0)
        nodes.start(0)
        seconds["the rendezvous host is killed"] = nodes.until(moved)
        nodes.until(lambda: (out / "model" / "config.json").exists())
        nodes.until(lambda: all(agent.poll() is not None for agent in nodes.agents.values()))
    finally:
        nodes.end()
    print(seconds, [(row["ranks"], row["step"]) for row in lines(out / "starts.jsonl")])
    same_run(out, whole, 60)
