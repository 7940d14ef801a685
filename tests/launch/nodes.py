"""Node programs on this machine, as Kubernetes would run them: what has failed is started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import forks
from tests.train.test_pretrain import ENV, lines, steps


class Nodes:
    def __init__(
        self,
        config,
        out,
        nodes="1:2",
        workers=1,
        port=29400,
        submission="one",
        hosts=None,
        program=("-m", "launch.node"),
    ):
        self.config, self.out, self.nodes, self.workers, self.port = config, out, nodes, workers, port
        self.submission, self.hosts, self.program = submission, hosts, program
        self.metrics = 0  # port of node 0; that of node 1 is the next
        self.folder = out / "checkpoints"
        self.env, self.programs = {}, {}  # of one node
        self.running, self.wanted, self.ended = {}, set(), {}
        out.mkdir(exist_ok=True)
        self.log = out / "nodes.log"

    def start(self, number, *settings):
        self.wanted.add(number)
        host = "node-0" if self.hosts else "127.0.0.1"
        command = [
            sys.executable,
            *self.programs.get(number, self.program),
            "--run",
            "test",
            "--nodes",
            self.nodes,
            "--workers",
        ]
        command += [str(self.workers), "--index", str(number), "--host", host, "--port", str(self.port)]
        command += ["--metrics-port", str(self.metrics + number)] if self.metrics else []
        command += ["--folder", str(self.folder), "--", "pretrain", "--out", str(self.out), *settings]
        env = {**ENV, "EQUIAV_CONFIG": Path(self.config).read_text(), "EQUIAV_SUBMISSION": self.submission}
        env |= self.env.get(number, {})
        env["POD_IP"] = self.hosts.address(number) if self.hosts else "127.0.0.1"
        with self.log.open("ab") as log:
            self.running[number] = subprocess.Popen(
                self.hosts.on(number, command) if self.hosts else command, env=env, stdout=log, stderr=log
            )

    def told(self):
        return self.log.read_text() if self.log.exists() else ""

    def of(self, number):
        """The processes of a node: its server, the workers, what they started."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        found, more = [], [self.running[number].pid]
        while more:
            found += more
            more = [pid for pid, parent in parents.items() if parent in more]
        return found

    def worker(self, number):
        """A worker: what the fork server has started."""
        server = [pid for pid in self.of(number) if forks.kind(pid) == "forkserver"]
        return next(pid for pid in server if parent(pid) in server)

    def kill(self, number):
        """All of it at once, as a machine that is gone."""
        self.wanted.discard(number)
        for pid in self.of(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.running[number].wait()

    def until(self, condition, seconds=120):
        begun = time.monotonic()
        while not condition():
            for number in list(self.wanted):
                status = self.running[number].poll()
                if status is not None:
                    self.ended.setdefault(number, []).append(status)
                    self.wanted.discard(number)
                    if status and not self.fails_for_good:
                        self.start(number)
            assert time.monotonic() - begun < seconds, self.told()[-5000:]
            time.sleep(0.05)
        return time.monotonic() - begun

    fails_for_good = False  # whether a node that fails stays down

    def moved(self, ranks=None):
        """A condition: a start after those so far, of this many ranks, has done a step."""
        before = len(lines(self.out / "starts.jsonl"))

        def condition():
            after = lines(self.out / "starts.jsonl")[before:]
            if not after or ranks not in (None, after[-1]["ranks"]):
                return False
            return max(steps(self.out), default=-1) > after[-1]["step"]

        return condition

    def finish(self, seconds=120):
        self.until(lambda: not self.wanted, seconds)

    def end(self):
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
