"""Notices that the run no longer moves, names the rank that holds it up, writes down where every rank stands, and ends the
process, so that a launcher starts it again from the checkpoint instead of waiting for a collective to time out."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from equiav.ending import Stalled, Terminated
from equiav.parallel import Ranks

PHASES: tuple[str, ...] = (
    "begins",
    "saves",
    "waits for data",
    "computes",
    "waits for others",
)  # in the order of a step
WITH_PATIENCE = PHASES[:3]  # a store may be what is waited for
WAITING = ("torch/distributed/", "torch/cuda/streams.py")  # code in which the main thread waits for other ranks
COMPILING = 3600.0  # seconds that a first step may take that compiles
LAST_WORDS = 3.0  # seconds in which a process that ends may still write, and the others notice


class Beat(NamedTuple):
    """What a rank says of itself every second."""

    step: int
    phase: str
    seconds: float  # since it came there
    number: int  # one that stays the same is of a process that no longer runs


class Watch:
    """Every rank says where it is, rank 0 judges, and every rank hears the verdict: some requests a rank and second, however
    many ranks there are. What rank 0 says no more, the others notice by themselves."""

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        seconds: float,
        patience: float,
        tell: Callable[[str], None],
        compiles: bool = False,
    ):
        """seconds: without a step, after which the run has stalled; patience: that a store is waited for beside those. compiles:
        the first step does, which takes minutes."""
        self.ranks, self.folder, self.seconds, self.patience, self.tell = ranks, folder, seconds, patience, tell
        self.asked: Callable[[], int] = lambda: 0
        """The status with which this process shall end; 0: it shall not."""
        self._asked_since, self._begins = 0.0, True  # until the first step of this start is done
        self._first = max(patience, COMPILING) if compiles else patience
        self._at, self._longest = (0, PHASES[0], time.monotonic()), 0.0
        self._came, self._spent = time.monotonic(), dict.fromkeys(PHASES, 0.0)
        self._ended = threading.Event()
        self._verdict = ""  # of rank 0
        self._told: dict[int, tuple[Beat, float]] = {}  # with its verdict: what it has heard of all
        self._heard: dict[int, tuple[Beat, float]] = {}  # of a rank, and since when it has not changed
        if seconds:
            self._pause = min(1.0, seconds / 4)
            self._silence = os.fdopen(os.memfd_create("stacks"), "w")
            self._set_alarm()
            for rank in range(ranks.size) if ranks.rank == 0 else (0, ranks.rank):
                self._hear(rank, Beat(0, PHASES[0], 0.0, 0))
            for target, name in ((self._watch, "watch"), (self._exchange, "beats")):
                threading.Thread(target=target, daemon=True, name=name).start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begun(self) -> None:
        """The first step of this start is done."""
        self._begins = False

    def at(self, step: int, phase: str) -> None:
        """The run moves."""
        now = time.monotonic()
        if self._begins and phase == "computes":
            phase = PHASES[0]
        self._spent[self._at[1]] += now - self._came
        self._came = now
        if self._at[1] not in WITH_PATIENCE:
            self._longest = max(self._longest, now - self._at[2])
        self._at = (step, phase, now)

    def spent(self) -> dict[str, float]:
        """Seconds by phase, since this was last asked."""
        spent, self._spent = self._spent, dict.fromkeys(PHASES, 0.0)
        return spent

    def moved(self) -> None:
        """So does the store that it waits for. While it computes, an upload beside it says nothing of it."""
        if self._at[1] in WITH_PATIENCE:
            self._at = (*self._at[:2], time.monotonic())

    def end(self) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        number = 0
        while not self._ended.wait(self._pause):
            self._set_alarm()
            number += 1
            step, phase, since = self._at
            if self._left_alone(phase, since):
                self._leave(
                    self.asked(), "asked to end, and the others no longer answer: ends without the step under way"
                )
            phase = PHASES[-1] if self._waits() else phase
            self._hear(self.ranks.rank, Beat(step, phase, time.monotonic() - since, number))
            if problem := self._problem():
                self._leave(Stalled.status, f"the run has stalled: {problem}", problem)

    def _set_alarm(self) -> None:
        """Should no thread get to run Python any more, the process ends all the same, without a word, with 1."""
        seconds = 2 * self.seconds + self.patience + LAST_WORDS
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._silence)

    def _exchange(self) -> None:
        """Beats to rank 0, its verdict from there, in a thread of its own: the store of a host that is cut off answers never."""
        own, store = self.ranks.rank, self.ranks.store
        others = [f"beat/{rank}" for rank in range(1, self.ranks.size)]
        if store is not None and own == 0:
            for key in others:  # of a rank that never speaks there is a beat, too
                store.set(key, json.dumps(Beat(0, PHASES[0], 0.0, 0)))
        while store is not None and not self._ended.wait(self._pause):
            try:
                if own:
                    store.set(f"beat/{own}", json.dumps(self._heard[own][0]))
                    if store.check(["verdict"]):
                        beat, self._verdict, told = json.loads(store.get("verdict"))
                        self._told = {rank: (Beat(*of_rank), seconds) for rank, of_rank, seconds in told}
                        self._hear(0, Beat(*beat))
                    continue
                if others:
                    for rank, beat in enumerate(store.multi_get(others), 1):
                        self._hear(rank, Beat(*json.loads(beat)))
                verdict = self._problem()
                told = [(rank, *heard) for rank, heard in sorted(self._beats().items())] if verdict else []
                store.set("verdict", json.dumps([self._heard[0][0], verdict, told]))
            except RuntimeError:
                pass  # rank 0, which keeps the store, is gone: nobody's beat changes any more

    def _hear(self, rank: int, beat: Beat) -> None:
        if rank not in self._heard or self._heard[rank][0].number != beat.number:
            self._heard[rank] = (beat, time.monotonic())

    def _beats(self) -> dict[int, tuple[Beat, float]]:
        """The last beat of those that this rank hears of, and for how long it has been the last."""
        now = time.monotonic()
        return {rank: (beat, now - since) for rank, (beat, since) in dict(self._heard).items()}

    def _left_alone(self, phase: str, since: float) -> bool:
        """Asked to end, in a step that takes far too long: a launcher ends those whose peers are gone, and waits for them."""
        now = time.monotonic()
        if not self.asked():
            self._asked_since = now
        alone = self.ranks.size == 1
        return not alone and phase not in WITH_PATIENCE and now - max(since, self._asked_since) > 5 + 2 * self._longest

    def _waits(self) -> bool:
        """Whether the main thread waits for other ranks: in a collective, or, on a GPU, for what is queued there."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            if any(code in frame.f_code.co_filename for code in WAITING):
                return True
            frame = frame.f_back
        return False

    def _problem(self) -> str:
        """What holds the run up, where something does."""
        beats = self._beats()
        silent = [rank for rank, (_, seconds) in beats.items() if seconds > self.seconds]
        if silent:
            return f"rank(s) {silent} no longer say anything: killed, stopped, or cut off"
        if self.ranks.rank:
            return self._verdict
        phases = {beat.phase for beat, _ in beats.values()}
        patience = self._first if PHASES[0] in phases else self.patience if phases & {*WITH_PATIENCE} else 0.0
        if min(beat.seconds for beat, _ in beats.values()) <= self.seconds + patience:
            return ""
        behind = min((beat.step, PHASES.index(beat.phase)) for beat, _ in beats.values())
        slowest = [rank for rank, (beat, _) in beats.items() if (beat.step, PHASES.index(beat.phase)) == behind]
        beat = beats[slowest[0]][0]
        if len(slowest) == self.ranks.size > 1:
            return f"no rank has moved for {beat.seconds:.0f} s, all at step {beat.step}, {beat.phase}"
        return f"rank(s) {slowest} have not moved for {beat.seconds:.0f} s: step {beat.step}, {beat.phase}"

    def _leave(self, status: int, message: str, problem: str = "") -> None:
        """Ends the process. A disk that is full or hangs, or a terminal that nobody reads, may be why: neither is waited for."""
        path = self.folder / f"rank-{self.ranks.rank}.txt"
        if problem:
            message = f"{message}. Where this rank stands: {path}"
            threading.Thread(target=self._write, args=(path, problem), daemon=True).start()
        threading.Thread(target=self.tell, args=(message,), daemon=True).start()
        time.sleep(LAST_WORDS)
        os._exit(status or Terminated.status)

    def _write(self, path: Path, problem: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {problem}\n")
            for rank, (beat, seconds) in sorted((self._told or self._beats()).items()):
                where = f"step {beat.step}, {beat.phase} for {beat.seconds:.0f} s, heard {seconds:.0f} s ago"
                file.write(f"rank {rank}: {where}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if (flights := self.ranks.flights()) is not None:
            path.with_suffix(".nccl").write_bytes(flights)
