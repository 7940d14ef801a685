"""torchrun's agent, as this project needs it. The only file here that imports torch."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousExitOp
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launch.ended import SUPERSEDED, TERMINATED, Ended, first_line, name_of
from launch.ready import CLOCK, CUT_OFF, LOOK, Greeter, Stores, ahead, meet_all, stands_back, stay_outside
from monitoring import metrics

if TYPE_CHECKING:
    from launch.node import Node
    from monitoring.board import Board

Closed = RendezvousClosedError  # the run has finished
LOST = (RendezvousError, DistError, ConnectionError)  # what the loss of the rendezvous host looks like
QUICK, ROUNDS = 60.0, 20  # after so many rounds in a row that each failed in so many seconds, the node gives up
NO_PROGRESS = 10  # rounds in a row that failed with no newer step saved, after which the run is over
JOIN = 600  # seconds for the least nodes to come together, before this one says so and begins anew
BEATS = 6  # that a node may miss before it counts as lost
GRACE = 2.0  # seconds for the other workers when one is lost: they wait for it, and have nothing to save
FAILING = 30.0  # seconds for workers whose peers are gone to notice it, or to finish a save that all are through with
AWAY, LOOK_AGAIN = 1800.0, 2.0  # seconds that a node may stay outside; between two looks at why
MEETING, NOT = 30.0, 1 << 20  # seconds for all of a round to look whether they meet; what counts as: they do not
MET = 32  # other nodes that one looks whether it meets; of more, so many
SAVING = 600.0  # seconds for workers that finish their step and save, since a node has come


def make_agent(node: Node, asked: list[int], board: Board, tell: Callable[[str], None]) -> Agent:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what there is to say is said here
    beat = max(1, node.most // 64)  # seconds; each beat writes the state of all
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint=f"{node.host}:{node.port}",
        run_id=f"{node.run}-{crc32(node.record.folder.encode()):08x}",  # two of one name do not meet
        min_nodes=node.least,
        max_nodes=node.most,
        local_addr=node.address,
        is_host=node.index == 0,
        read_timeout=20,  # for a host that is not there yet, before this node says so and tries again
        join_timeout=JOIN,
        last_call_timeout=3,  # for more nodes, once the least are there
        keep_alive_interval=beat,
        keep_alive_max_attempt=BEATS,
    )
    handler = get_rendezvous_handler(rendezvous)
    limit_silence(node.port)
    spec = WorkerSpec(
        role="worker",
        local_world_size=node.workers or max(1, torch.cuda.device_count()),
        entrypoint=worker,
        args=(node.command,),
        rdzv_handler=handler,
        max_restarts=sys.maxsize,  # a run that goes on for weeks is restarted often
        monitor_interval=0.1,
        local_addr=node.address,
    )
    return Agent(spec, node, asked, board, tell)


class Agent(LocalElasticAgent):
    def __init__(self, spec: WorkerSpec, node: Node, asked: list[int], board: Board, tell: Callable[[str], None]):
        super().__init__(spec, DefaultLogsSpecs(), start_method="forkserver", exit_barrier_timeout=30)
        self.node, self.asked, self.board, self.tell = node, asked, board, tell
        if node.index == 0:
            board.set(metrics.WORLD_TARGET, node.most * spec.local_world_size)
        self.rendezvous: Any = spec.rdzv_handler
        self._ask_waiting = self.rendezvous.num_nodes_waiting
        self.rendezvous.num_nodes_waiting = self._changes
        self._heard: dict[Any, float] = {}  # participant -> when it had last said that it lives
        self._lost = False  # a node of this round, without a word
        self._round = 0
        self._begun = 0.0
        self._quick = 0  # rounds in a row that failed at once
        self._saved, self._fruitless = -1, 0  # newest step that is saved; rounds that failed since it is
        self.stores = Stores(node.record, node.data)
        self.stores.watch()
        self._silent: bool | None = None  # what the others were told of them
        self._asked_others = 0.0  # when it last looked whether they answer others
        self.greeter = Greeter()
        here = f"{node.address} {self.greeter.port} {self.rendezvous._this_node}"
        self._put(f"node/{node.index}", here)
        self._new = True  # it has not trained with the others yet
        self._doubt = False  # whether the last of them ended with what may pass

    def abandon(self) -> None:
        """Its rendezvous is lost."""
        self.signal(signal.SIGKILL)
        self.rendezvous._stop_heartbeats()
        self.close()

    def close(self) -> None:
        self.stores.end()
        self.greeter.close()

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
        asked = time.monotonic()
        self._come_together(worker_group)
        self._heard = {}
        self._round, self._begun = self._round + 1, time.monotonic()
        self.board.add(metrics.ROUNDS, 1)
        self.board.add(metrics.JOINING, self._begun - asked)
        ranks = [worker.global_rank for worker in worker_group.workers]
        size = worker_group.workers[0].world_size
        self.tell(
            f"round {self._round}: {worker_group.group_world_size} node(s) of {self.node.least} to {self.node.most}, "
            f"{size} worker(s); here rank(s) {', '.join(map(str, ranks))}"
        )

    def _come_together(self, worker_group: WorkerGroup) -> None:
        """With others who can do their part, and never with fewer than the least: a clock that was set may end the wait."""
        while True:
            if self._round:
                self.leave()  # the others do not wait while this node looks
            if stay_outside(self._trouble, self.leave, self.tell, LOOK_AGAIN, AWAY):
                self._new = True
            self.node.record.look()
            super()._rendezvous(worker_group)  # pyright: ignore
            size = worker_group.group_world_size or 0
            if size < self.node.least:
                self.tell(f"{size} node(s) came together, expected {self.node.least}; waits for more")
            elif self._all_meet(size):
                self._new = False
                return
            self.leave()
            time.sleep(LOOK_AGAIN)

    def _all_meet(self, size: int) -> bool:
        """Whether none of this round has to stand back: those that began at once have not seen each other before. size: nodes."""
        store = self.rendezvous._store
        key = f"{self.rendezvous._settings.run_id}/meet/{self.rendezvous._state_holder.state.round}"
        count = store.add(key, NOT if self._unmet() else 1)
        until = time.monotonic() + MEETING
        while count < size and time.monotonic() < until:
            time.sleep(0.05)
            count = store.add(key, 0)
        self._new = self._new or count >= NOT
        return count == size

    def _trouble(self) -> str:
        """Why this node cannot do its part, or nothing."""
        if what := self.stores.trouble():
            return what
        self._tell_silent(False)
        if self.rendezvous.is_closed():
            raise Closed("the run has finished")
        if self.node.index and (first := self._get("node/0")):
            address, port, _ = first.split(" ", 2)
            apart = ahead(address, int(port))
            if apart is not None and abs(apart) > CLOCK:
                late = f"{abs(apart):.1f} s {'behind' if apart > 0 else 'ahead of'}"
                return (
                    f"its clock is {late} that of node 0 at {address}, expected {CLOCK:.0f} s at most: set both (NTP)"
                )
        return self._unmet() if self._new else ""

    def _unmet(self) -> str:
        """Before whom it stands back. A round that goes on without it comes first."""
        own, others = self.node.index, self._others()
        state = self.rendezvous._state_holder.state
        missed = meet_all(others, self.greeter.port)
        self._put(f"missed/{own}", " ".join(map(str, sorted(missed))))
        told = {index: {int(one) for one in self._get(f"missed/{index}").split()} for index in others}
        before = stands_back(own, {**told, own: missed}, set(others))
        if state.complete and self.rendezvous._this_node not in state.participants:
            before = missed
        if not before:
            return ""
        them = ", ".join(f"node {index} at {others[index][0]}" for index in sorted(before))
        return f"it and {them} do not reach each other; is the network between them whole, on all ports?"

    def _others(self) -> dict[int, tuple[str, int]]:
        """Some of those that take part or want to: by index, where they answer."""
        holder, own, most = self.rendezvous._state_holder, self.node.index, self.node.most
        holder.sync()
        present = {str(node) for node in (*holder.state.participants, *holder.state.wait_list)}
        some = {(own + step * max(1, most // MET)) % most for step in range(1, min(most, MET + 1))} - {own}
        found = {index: self._get(f"node/{index}").split(" ", 2) for index in some}
        return {index: (one[0], int(one[1])) for index, one in found.items() if one[0] and one[2] in present}

    def _put(self, key: str, text: str) -> None:
        """For the other nodes, at the rendezvous."""
        self.rendezvous._store.set(f"{self.rendezvous._settings.run_id}/{key}", text)

    def _get(self, key: str) -> str:
        """Empty where nobody has put anything."""
        store, key = self.rendezvous._store, f"{self.rendezvous._settings.run_id}/{key}"
        return store.get(key).decode() if store.check([key]) else ""

    def _tell_silent(self, silent: bool) -> None:
        if silent != self._silent:
            self._put(f"silent/{self.node.index}", "yes" if silent else "no")
            self._silent = silent

    def _cut_off(self) -> bool:
        """Whether the stores have not answered this node for a while, answer others, and these can go on without it."""
        seconds = self.stores.silent()
        self._tell_silent(seconds > 0)
        spare = len(self.rendezvous._state_holder.state.participants) > self.node.least
        if seconds < CUT_OFF or not spare or time.monotonic() < self._asked_others + LOOK:
            return False
        self._asked_others = time.monotonic()
        return any(self._get(f"silent/{index}") == "no" for index in self._others())

    def _changes(self) -> int:
        """Whether the round has to end: nodes wait, or are lost. torchrun looks for the former alone, and a machine that is gone
        closes no connection: the workers would wait for it until they count as stalled, or, while they begin, without end."""
        waiting = self._ask_waiting()
        state = self.rendezvous._state_holder.state
        gone = self._heard.keys() - state.participants.keys()
        limit = time.time() - self.rendezvous._settings.keep_alive_interval.total_seconds() * BEATS / 2
        self._lost = state.complete and any(self._heard[node] < limit for node in gone)  # another that is gone has left
        heard = state.last_heartbeats
        self._heard = {node: heard[node].timestamp() for node in state.participants if node in heard}
        # Where all seats are taken, who waits is one node too many: an index that was cut off, replaced, and is back.
        return int(self._lost or (waiting > 0 and len(state.participants) < self.node.most))

    def leave(self) -> None:
        """So that the others need not wait until this node counts as dead."""
        try:
            self.rendezvous._op_executor.run(_RendezvousExitOp(), time.monotonic() + 5)
            self.rendezvous._stop_heartbeats()
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
        if self.pids() and self._cut_off():
            self.tell(
                f"the stores have not answered this node for {CUT_OFF:.0f} s, and answer others: it leaves the round"
            )
            self.signal(signal.SIGKILL)
        result = super()._monitor_workers(worker_group)  # pyright: ignore
        if result.state == WorkerState.FAILED:
            self._failed(worker_group, next(iter(result.failures.values())).local_rank)
        return result

    def _failed(self, worker_group: WorkerGroup, first: int) -> None:
        """Says what the workers ended with. Raises Ended where they are not to be started again. first: of them, the one that
        ended by itself, by its local rank."""
        context: Any = self._pcontext
        statuses = [process.exitcode for process in context._pc.processes]
        words = [error_of(path) for path in context.error_files.values()]
        quick = time.monotonic() - self._begun < QUICK
        for status, (text, remedy) in zip(statuses, words, strict=True):
            final = remedy == "never" or (remedy == "doubt" and quick and self._doubt)
            if status == SUPERSEDED or final or remedy == "elsewhere":
                self.leave()
                final = final and (status != SUPERSEDED or self.node.record.replaced())
                raise Ended(status, text, final and self.node.record.write(status, text))
        self._doubt = any(remedy == "doubt" for _, remedy in words)
        status, text = statuses[first], words[first][0]
        if self.asked:
            self.leave()
            raise Ended(TERMINATED if signal.SIGTERM in self.asked else 130, text or "asked to end")
        rank = worker_group.workers[first].global_rank
        how = f"by {name_of(-status)}" if status < 0 else f"with status {status}"
        self.board.add(metrics.LOST, 1, how.partition(" ")[2])
        self.tell(f"rank {rank} ended {how}" + (f": {text}" if text else ""))
        if status != TERMINATED:  # by which another node leaves, and all have saved
            self._require_progress(status, f"rank {rank} ended {how}" + (f": {text}" if text else ""))
            self._pause(status, quick)

    def _require_progress(self, status: int, what: str) -> None:
        """What fails in the same place each time would do so for ever, and so does what fails more often than it is saved."""
        saved = self.node.record.saved()
        if saved is None:
            return  # the store does not say
        if saved > self._saved:
            self._saved, self._fruitless = saved, 0
        self._fruitless += 1
        self.board.set(metrics.NO_PROGRESS, self._fruitless)
        if self._fruitless < 2:
            return
        text = f"{self._fruitless} rounds in a row have failed, and no step is saved beyond {saved}"
        self.tell(text)
        if self._fruitless >= NO_PROGRESS:
            text = f"{text}; the last: {what}. Mend the cause, or save more often (checkpoint.every_steps)"
            self.leave()
            raise Ended(status if 0 < status < 256 else 1, text, self.node.record.write(status, text))

    def _pause(self, status: int, quick: bool) -> None:
        """Between rounds that fail one after the other."""
        self._quick = self._quick + 1 if quick else 0
        if self._quick >= ROUNDS:
            self.leave()
            text = f"{self._quick} rounds in a row have failed in less than {QUICK:.0f} s each; this node gives up"
            raise Ended(status if 0 < status < 256 else 1, text)
        if self._quick > 5:
            pause = min(60.0, 2.0 ** (self._quick - 5))
            self.tell(f"{self._quick} rounds in a row have failed at once; the next begins in {pause:.0f} s")
            time.sleep(pause)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:  # pyright: ignore
        if worker_group.state == WorkerState.HEALTHY and not self._lost:
            if self.asked:
                return  # they save already
            self.tell("a node has come: the workers finish their step, save, and begin again with it")
            self.signal(signal.SIGTERM)
            until = time.monotonic() + SAVING
            while self.pids() and time.monotonic() < until and not self._lost:
                time.sleep(0.02)
                self._changes()
                if len(self._heard) < (
                    worker_group.group_world_size or 0
                ):  # its workers have failed: ours wait for them
                    until = min(until, time.monotonic() + FAILING)
        if self._lost:
            self.tell("a node is lost: its workers are waited for no longer")
        self.signal(signal.SIGKILL)
        if self.asked:
            self.leave()
            raise Ended(TERMINATED, "asked to end, while a node was lost; the last save counts")
        super()._restart_workers(worker_group)  # pyright: ignore


def limit_silence(port: int) -> None:
    """The store's client waits for an answer as long as its connection lives, and that of a machine which is gone lives for a
    quarter of an hour. Here it ends after seconds."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername()[1] == port:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in ((socket.TCP_KEEPIDLE, 3), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 5)):
                    one.setsockopt(socket.IPPROTO_TCP, option, value)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 8000)


def worker(command: list[str]) -> None:
    """In a process of its own, forked from one that has imported everything."""
    from equiav.cli import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the server passes over it
    if status := main(command):
        sys.exit(status)


def error_of(path: str) -> tuple[str, str]:
    """What a worker has said of its end -> (in words, what to do about it: as in equiav.train.run)."""
    try:
        message = json.loads(Path(path).read_text())["message"]
        return str(message["message"]), str(message["extraInfo"].get("remedy", "again"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", "again"  # it was killed, or has said it on its standard error alone


def reap() -> None:
    """As a container's first process, this one inherits what lost workers leave behind."""
    server = forkserver._forkserver._forkserver_pid  # pyright: ignore
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != server:
            os.waitpid(ended.si_pid, os.WNOHANG)
