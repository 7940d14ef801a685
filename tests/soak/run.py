"""One start of the command, and whether it had a reason to end. For `tests.soak`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from equiav.data.local_s3 import LocalS3
from tests.soak.watch import MARK, Process, marked

ROOT = Path(__file__).parent.parent.parent
KILLS = {"kill worker", "kill decoder", "kill fetcher", "kill all", "kill agent"}
WAY = {"down", "fault", "lie"}  # of the way to the store
KEPT = WAY | {"upload", "stale", "late"}


class Excuse(NamedTuple):
    text: str  # what is said
    causes: set[str]
    seconds: float  # the cause was there at most so long ago


# Why a start may end by itself. A stall has an excuse only while somebody is stopped: waiting for a store is none.
EXCUSES = (
    Excuse(r"was killed by|ended with exit code", KILLS, 30),
    Excuse(r"no answer for", WAY, 10),  # and the patience
    Excuse(r"the run has stalled", {"stop"}, 5),
    Excuse(r"could not be saved|is not saved|last save", KEPT | {"full"}, 30),
    Excuse(r"cannot be kept|\bowner\b", {"upload"}, 30),
    Excuse(r"(?i)(no space|room|full).*/disk-|/disk-.*(no space|room|full)", {"full"}, 10),  # which one, too
    Excuse(r"has taken over", {"twin"}, 60),
)
# A worker of torchrun's that loses another says so in words of its own.
LOST = Excuse("", KILLS | {"stop"}, 30)


def excused(run: Launch, status: int, said: str, slow: float, within: bool = False) -> bool:
    """within: torchrun has started its workers again."""
    if within and (status < 0 or status == 145) and _recent(run, KILLS | {"stop"}, 30 * slow):
        return True
    patience = run.settings["stream"]["patience"]
    for excuse in (*EXCUSES, *((LOST,) if within and "stalled" not in said else ())):
        seconds = slow * excuse.seconds + (patience if excuse.causes is WAY or excuse.causes >= KEPT else 0)
        if re.search(excuse.text, said) and _recent(run, excuse.causes, seconds):
            return True
    return False


def _recent(run: Launch, causes: set[str], seconds: float) -> bool:
    return any(time.monotonic() - run.done_to[cause] < seconds for cause in causes & run.done_to.keys())


def environment(s3: LocalS3) -> dict[str, str]:
    """Of all that is started here."""
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "AWS_ACCESS_KEY_ID": s3.key,
        "AWS_SECRET_ACCESS_KEY": s3.secret, "AWS_ENDPOINT_URL": s3.options["endpoint_url"],
    }  # fmt: skip


class Launch:
    """One start of the command, under torchrun or not."""

    def __init__(
        self, folder: Path, number: str, ranks: int, command: str, settings: dict[str, Any], env: dict[str, str]
    ):
        self.number, self.ranks, self.settings = number, ranks, settings
        self.mark, self.log = f"{MARK}/{folder.name}/{number};", folder / f"start-{number}.log"
        self.done_to: dict[str, float] = {}  # what was done to it, and when at last
        self.failed = 0  # workers that `restarts` has told of
        config = folder / f"start-{number}.yaml"
        config.write_text(yaml.safe_dump(settings))
        program = [sys.executable, "-m"]
        if ranks:
            program += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--max-restarts=50"]
            program += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m"]
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [*program, "equiav", command, "--config", str(config)],
            cwd=ROOT,
            env={**env, name: value},
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __str__(self) -> str:
        return f"start {self.number} ({f'torchrun {self.ranks}' if self.ranks else 'alone'})"

    def all(self) -> list[Process]:
        return marked(self.mark)

    def workers(self) -> list[Process]:
        if not self.ranks:
            return [process for process in self.all() if process.pid == self.process.pid]
        return [process for process in self.all() if process.parent == self.process.pid and process.rank is not None]

    def children(self, kind: str, worker: Process) -> list[Process]:
        """The first that a loader starts is its fetcher, the others decode."""
        own = [process for process in self.all() if process.parent == worker.pid and "spawn_main" in process.command]
        return {"fetcher": own[:1], "decoder": own[1:], "child": own}[kind]

    def kill(self) -> None:
        while found := self.all():
            for process in found:
                process.signal(signal.SIGKILL)
            self.process.poll()
            time.sleep(0.05)

    def said(self) -> list[str]:
        return re.findall(r"equiav (?:pretrain|finetune): (.*)", self.log.read_text(errors="replace"))

    def restarts(self) -> list[tuple[int, str]]:
        """Workers that torchrun has seen fail since the last call: each one's status, and what was said before."""
        parts = re.split(r"failed \(exitcode: (-?\d+)\)", self.log.read_text(errors="replace"))
        found = [(int(status), without_metrics(said)) for said, status in zip(parts[::2], parts[1::2], strict=False)]
        new, self.failed = found[self.failed :], len(found)
        return new


def without_metrics(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line and not line.startswith("{"))


def tail(path: Path, count: int = 12) -> str:
    """Of a log; no lines of metrics."""
    found = without_metrics(path.read_text(errors="replace")).splitlines()
    return "\n        ".join(["", *found[-count:]])
