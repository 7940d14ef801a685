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

PHASES = ("saves", "waits for data", "computes", "waits for others")  # in the order of a step
WITH_PATIENCE = PHASES[:2]  # a store may be what is waited for


class Beat(NamedTuple):
    """What a rank says of itself every second."""

    step: int
    phase: str
    seconds: float  # since it came there
    number: int  # one that stays the same is of a process that no longer runs


class Watch:
    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        seconds: float,
        patience: float,
        asked: Callable[[], bool],
        tell: Callable[[str], None],
    ):
        """seconds: without a step, after which the run has stalled; patience: that a store is waited for beside those; asked:
        whether this process shall end."""
        self.ranks, self.folder, self.seconds, self.patience, self.tell = ranks, folder, seconds, patience, tell
        self.asked, self._asked_since = asked, 0.0
        self._at, self._longest = (0, PHASES[0], time.monotonic()), 0.0
        self._ended = threading.Event()
        self._heard: dict[int, tuple[Beat, float]] = {}  # of each rank, and since when it has not changed
        if seconds:
            self._pause = min(1.0, seconds / 4)
            for rank in range(ranks.size):
                self._hear(rank, Beat(0, PHASES[0], 0.0, 0))
            for target, name in ((self._watch, "watch"), (self._exchange, "beats")):
                threading.Thread(target=target, daemon=True, name=name).start()

    def at(self, step: int, phase: str) -> None:
        """The run moves."""
        now = time.monotonic()
        if self._at[1] not in WITH_PATIENCE:
            self._longest = max(self._longest, now - self._at[2])
        self._at = (step, phase, now)

    def end(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        number = 0
        while not self._ended.wait(self._pause):
            number += 1
            step, phase, since = self._at
            if self._left_alone(phase, since):
                self.tell("asked to end by SIGTERM, and the others no longer answer: ends without the step under way")
                os._exit(Terminated.status)
            phase = PHASES[-1] if self._in_collective() else phase
            self._hear(self.ranks.rank, Beat(step, phase, time.monotonic() - since, number))
            if problem := self._problem(self._beats()):
                self._end(problem)

    def _exchange(self) -> None:
        """Beats to the others and from them, in a thread of its own: the store of a host that is cut off answers never."""
        own, store = self.ranks.rank, self.ranks.store
        while store is not None and not self._ended.wait(self._pause):
            try:
                store.set(f"beat/{own}", json.dumps(self._heard[own][0]))
                for rank in set(range(self.ranks.size)) - {own}:
                    if store.check([f"beat/{rank}"]):
                        self._hear(rank, Beat(*json.loads(store.get(f"beat/{rank}"))))
            except RuntimeError:
                pass  # rank 0, which keeps the store, is gone: nobody's beat changes any more

    def _hear(self, rank: int, beat: Beat) -> None:
        if rank not in self._heard or self._heard[rank][0].number != beat.number:
            self._heard[rank] = (beat, time.monotonic())

    def _beats(self) -> dict[int, tuple[Beat, float]]:
        """Everyone's last beat, and for how long it has been the last."""
        now = time.monotonic()
        return {rank: (beat, now - since) for rank, (beat, since) in dict(self._heard).items()}

    def _left_alone(self, phase: str, since: float) -> bool:
        """Asked to end, in a step that takes far too long: a launcher ends those whose peers are gone, and waits for them."""
        now = time.monotonic()
        if not self.asked():
            self._asked_since = now
        return phase not in WITH_PATIENCE and now - max(since, self._asked_since) > 5 + 2 * self._longest

    def _in_collective(self) -> bool:
        """Whether the main thread is in one."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            if "torch/distributed/" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False

    def _problem(self, beats: dict[int, tuple[Beat, float]]) -> str:
        """What holds the run up, where something does."""
        silent = [rank for rank, (_, seconds) in beats.items() if seconds > self.seconds]
        if silent:
            return f"rank(s) {silent} no longer say anything: killed, stopped, or cut off"
        patience = self.patience if any(beat.phase in WITH_PATIENCE for beat, _ in beats.values()) else 0.0
        if min(beat.seconds for beat, _ in beats.values()) <= self.seconds + patience:
            return ""
        behind = min((beat.step, PHASES.index(beat.phase)) for beat, _ in beats.values())
        slowest = [rank for rank, (beat, _) in beats.items() if (beat.step, PHASES.index(beat.phase)) == behind]
        beat = beats[slowest[0]][0]
        return f"rank(s) {slowest} have not moved for {beat.seconds:.0f} s: step {beat.step}, {beat.phase}"

    def _end(self, problem: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.ranks.rank}.txt"
        with path.open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {problem}\n")
            for rank, (beat, seconds) in sorted(self._beats().items()):
                file.write(
                    f"rank {rank}: step {beat.step}, {beat.phase} for {beat.seconds:.0f} s, heard {seconds:.0f} s ago\n"
                )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if (flights := self.ranks.flights()) is not None:
            path.with_suffix(".nccl").write_bytes(flights)
        self.tell(f"the run has stalled: {problem}. Where this rank stands: {path}")
        time.sleep(2)  # the others notice, too
        os._exit(Stalled.status)
