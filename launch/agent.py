"""torchrun's agent, as this project needs it. The only file here that imports torch."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousExitOp
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launch.ended import SUPERSEDED, TERMINATED, Ended, first_line

if TYPE_CHECKING:
    from launch.node import Node

Closed = RendezvousClosedError  # the run has finished
LOST = (RendezvousError, DistError, ConnectionError)  # what the loss of the rendezvous host looks like
QUICK, ROUNDS = 60.0, 20  # after so many rounds in a row that each failed in so many seconds, the node gives up
GRACE = 2.0  # seconds for the other workers when one is lost: they wait for it, and have nothing to save
SAVING = 600.0  # seconds for workers that finish their step and save, since a node has come


def make_agent(node: Node, asked: list[int], tell: Callable[[str], None]) -> Agent:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what there is to say is said here
    beat = max(1, node.most // 64)  # seconds; each beat writes the state of all
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint=f"{node.host}:{node.port}",
        run_id=node.run,
        min_nodes=node.least,
        max_nodes=node.most,
        local_addr=node.address,
        is_host=node.index == 0,
        read_timeout=20,  # for a host that is not there yet, before this node says so and tries again
        last_call_timeout=3,  # for more nodes, once the least are there
        keep_alive_interval=beat,
        keep_alive_max_attempt=6,
    )
    spec = WorkerSpec(
        role="worker",
        local_world_size=node.workers,
        entrypoint=worker,
        args=(node.command,),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=sys.maxsize,  # a run that goes on for weeks is restarted often
        monitor_interval=0.1,
        local_addr=node.address,
    )
    return Agent(spec, node, asked, tell)


class Agent(LocalElasticAgent):
    def __init__(self, spec: WorkerSpec, node: Node, asked: list[int], tell: Callable[[str], None]):
        super().__init__(spec, DefaultLogsSpecs(), start_method="forkserver")
        self.node, self.asked, self.tell = node, asked, tell
        self._round = 0
        self._begun = 0.0
        self._quick = 0  # rounds in a row that failed at once

    def pids(self) -> list[int]:
        """Of the workers that live."""
        processes = self._pcontext._pc.processes if self._pcontext and self._pcontext._pc else []  # pyright: ignore
        return [process.pid for process in processes if process.is_alive()]

    def signal(self, number: int) -> list[int]:
        """To all workers that live -> which."""
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    # ---- a round: who takes part

    def _rendezvous(self, worker_group: WorkerGroup) -> None:  # pyright: ignore
        self.node.record.look()
        super()._rendezvous(worker_group)  # pyright: ignore
        self._round, self._begun = self._round + 1, time.monotonic()
        ranks = [worker.global_rank for worker in worker_group.workers]
        size = worker_group.workers[0].world_size
        self.tell(
            f"round {self._round}: {worker_group.group_world_size} node(s) of {self.node.least} to {self.node.most}, "
            f"{size} worker(s); here rank(s) {', '.join(map(str, ranks))}"
        )

    def leave(self) -> None:
        """So that the others need not wait until this node counts as dead."""
        handler: Any = self._worker_group.spec.rdzv_handler
        try:
            handler._op_executor.run(_RendezvousExitOp(), time.monotonic() + 5)
            handler._stop_heartbeats()
        except Exception as error:  # of whatever kind: this node leaves all the same, and the others will notice
            self.tell(f"the others will miss this node in some seconds ({first_line(error)})")

    # ---- workers

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:  # pyright: ignore
        started = super()._start_workers(worker_group)  # pyright: ignore
        assert self._pcontext is not None
        close = self._pcontext.close
        self._pcontext.close = lambda death_sig=None, timeout=GRACE: close(death_sig, timeout)  # pyright: ignore
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore
        reap()
        result = super()._monitor_workers(worker_group)  # pyright: ignore
        if result.state == WorkerState.FAILED:
            self._failed(worker_group)
        return result

    def _failed(self, worker_group: WorkerGroup) -> None:
        """Says what the workers ended with. Raises Ended where they are not to be started again."""
        context: Any = self._pcontext
        ends = []
        for worker, process, path in zip(
            worker_group.workers, context._pc.processes, context.error_files.values(), strict=True
        ):
            text, final = error_of(path)
            ends.append((worker.global_rank, process.exitcode, text, final))
        for _, status, text, final in ends:
            if status == SUPERSEDED:
                self.leave()
                if self.node.record.replaced():
                    self.node.record.write(status, text)
                    raise Ended(status, text, final=True)
                raise Ended(status, text)
            if final:
                self.node.record.write(status, text)
                self.leave()
                raise Ended(status, text, final=True)
        if self.asked:
            self.leave()
            status = TERMINATED if signal.SIGTERM in self.asked else 130
            text = next((text for _, ended, text, _ in ends if ended in (130, 143) and text), "asked to end")
            raise Ended(status, text)
        for rank, status, text, _ in ends:
            how = f"by {signal.Signals(-status).name}" if (status or 0) < 0 else f"with status {status}"
            self.tell(f"rank {rank} ended {how}" + (f": {text}" if text else ""))
        if all(status != TERMINATED for _, status, _, _ in ends):  # another node leaves, and all have saved
            self._pause(ends[0][1])

    def _pause(self, status: int) -> None:
        """Between rounds that fail one after the other."""
        self._quick = self._quick + 1 if time.monotonic() - self._begun < QUICK else 0
        if self._quick >= ROUNDS:
            self.leave()
            text = f"{self._quick} rounds in a row have failed in less than {QUICK:.0f} s each; this node gives up"
            raise Ended(status if 0 < status < 256 else 1, text)
        if self._quick > 5:
            pause = min(60.0, 2.0 ** (self._quick - 5))
            self.tell(f"{self._quick} rounds in a row have failed at once; the next begins in {pause:.0f} s")
            time.sleep(pause)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:  # pyright: ignore
        if worker_group.state == WorkerState.HEALTHY:
            if self.asked:
                return  # they save already
            self.tell("a node has come: the workers finish their step, save, and begin again with it")
            there = len(self.signal(signal.SIGTERM))
            until = time.monotonic() + SAVING
            while (left := len(self.pids())) and time.monotonic() < until:
                if left < there:  # the first has ended, so all have saved, or one is lost
                    there, until = 0, min(until, time.monotonic() + GRACE)
                time.sleep(0.02)
        self.signal(signal.SIGKILL)
        super()._restart_workers(worker_group)  # pyright: ignore


def worker(command: list[str]) -> None:
    """In a process of its own, forked from one that has imported everything."""
    from equiav.cli import main

    if status := main(command):
        sys.exit(status)


def error_of(path: str) -> tuple[str, bool]:
    """What a worker has said of its end -> (in words, whether no restart mends it)."""
    try:
        message = json.loads(Path(path).read_text())["message"]
        return str(message["message"]), bool(message["extraInfo"].get("final"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", False  # it was killed, or has said it on its standard error alone


def reap() -> None:
    """As a container's first process, this one inherits what lost workers leave behind."""
    server = forkserver._forkserver._forkserver_pid  # pyright: ignore
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != server:
            os.waitpid(ended.si_pid, os.WNOHANG)
