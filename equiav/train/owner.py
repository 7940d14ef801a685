"""Whose a folder of checkpoints is: of two starts that both believe to be the run, the one that began last goes on.

Each start writes its token to the file `owner`, and ends when it reads there of one that began after it. A store may show for
some seconds what stood there before: the tokens that were there before our own are known, and prove nothing.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from typing import Any

from equiav.config import ConfigError
from equiav.ending import Superseded
from equiav.parallel import Ranks
from equiav.train.manifest import NAME, NotWhole
from streaming import Store, StoreError
from streaming.outside import Malformed, entry, parse, rows, table, text
from streaming.store import Missing, NoAnswer, TooLarge

OWNER, LARGEST = "owner", 1 << 16  # bytes
LOOK = 5.0  # seconds between two looks at it
TWICE = (1.0, 5.0)  # seconds, after which what speaks against this start is read again
SHOWN = (0.2, 1.0, 5.0, 10.0, 15.0)  # seconds between the looks of each rank for what rank 0 has written
KNOWN = 256  # earlier starts that are remembered


class Owner:
    def __init__(self, store: Store, ranks: Ranks, token: str):
        self.store, self.ranks, self.token = store, ranks, token
        self.superseded = ""  # by whom; known to rank 0 within some seconds, of a store that answers
        self._before: set[str] = set()  # starts that were there before this one; known to rank 0
        self._content = b""  # what this start has written
        self._closed = threading.Event()

    def close(self) -> None:
        self._closed.set()

    def take_over(self) -> None:
        """On all ranks. Finds out, before the first step, whether all see what one of them writes."""
        problem: Exception | None = None
        try:
            self._content = self.ranks.first(self._write)
            self.ranks.first(self.check)
            self._see()
        except (StoreError, Superseded, NotWhole) as error:
            problem = error
        problems = self.ranks.objects(problem)
        for passing in problems:
            if isinstance(passing, NoAnswer) or (isinstance(passing, Superseded) and passing is problems[0]):
                raise passing
        for rank, p in enumerate(problems):
            if p is not None:
                who = "" if isinstance(p, StoreError) else f"rank {rank} does not see what rank 0 wrote there: "
                raise ConfigError(
                    f"checkpoints cannot be kept at {self.store.url}: {who}{p}. It has to be a folder that all processes "
                    "read and write (checkpoint.url)"
                )
        if self.ranks.rank == 0:
            threading.Thread(target=self._look, daemon=True, name="owner").start()

    def check(self) -> None:
        """On rank 0. Another start has taken over only if the store says so twice. A file that cannot be read, or that somebody
        removed, says nothing."""
        seen = ""
        for pause in (*TWICE, None):
            found = self._read()
            start = found["start"] if found else ""
            if start == self.token:
                return
            if start and start == seen and start not in self._before:
                self.superseded = (
                    f"{self.store.url}: start {start} of this run, on host {found['host']}, has taken over at "
                    f"{found['time']} from this one, {self.token}; this one ends and saves nothing"
                )
                raise Superseded(self.superseded)
            seen = start
            if pause is not None:
                time.sleep(pause)

    def _write(self) -> bytes:
        """On rank 0."""
        known = [found[2] for name in self.store.list() if (found := NAME.fullmatch(name))]
        if there := self._read():
            known = [*known, *there["before"], there["start"]]
        self._before = set(known) - {self.token}
        owner: dict[str, Any] = {"start": self.token, "host": platform.node()}
        owner["time"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        owner["submission"] = os.environ.get("EQUIAV_SUBMISSION", "")  # the job that this start is of (launch/ended.py)
        owner["before"] = list(dict.fromkeys(known))[-KNOWN:]
        content = json.dumps(owner).encode()
        self.store.write(OWNER, content)
        return content

    def _read(self) -> dict[str, Any]:
        """Empty where nothing can be read."""
        try:
            found = table(parse(self.store.read(OWNER, most=LARGEST)), OWNER)
            told = {name: text(entry(found, name), name) for name in ("start", "host", "time")}
            before = [text(start, "before") for start in rows(found.get("before", []), "before")]
        except (Malformed, Missing, TooLarge):
            return {}
        return {**told, "before": before}

    def _see(self) -> None:
        for pause in (*SHOWN, None):
            try:
                if self.store.read(OWNER, most=LARGEST) == self._content:
                    return
                problem: Exception = NotWhole(f"{OWNER} has another content")
            except (Missing, TooLarge) as error:
                problem = error
            if pause is None:
                raise problem
            time.sleep(pause)

    def _look(self) -> None:
        """A start that was cut off and comes back must not train on until its next save."""
        while not self.superseded and not self._closed.wait(LOOK):
            try:
                self.check()
            except Superseded:
                pass  # the loop asks for it at its next step
            except StoreError:
                continue  # a save will tell
