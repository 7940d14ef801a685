"""Whether a node can do its part: it reaches the stores, meets the other nodes, and has their time. One that cannot would end
each round that it takes part in; so it stays outside, looks again, and the others train.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping

from launch.ended import QUESTION, Ended, Record, first_line

INDEX = "index"  # of a dataset, as in streaming.dataset
MEET = 3.0  # seconds for another node to answer
CLOCK = 1.0  # seconds that two clocks may be apart: who has not told for six that it lives counts as lost
LOOK = 15.0  # seconds between two looks at the stores, while the workers run
CUT_OFF = 45.0  # seconds of stores that do not answer, after which a node leaves a round in which others reach them


class Stores:
    """Of the checkpoints and of the data, as this node reaches them: workers have the patience to wait for both, for minutes."""

    def __init__(self, record: Record, data: str):
        self.record, self.data = record, data
        self.silent_since = 0.0  # 0: they answer
        self._end = threading.Event()

    def trouble(self) -> str:
        """What does not answer, empty if all do. What they refuse is no trouble that may pass: the workers say it."""
        from streaming import Store, StoreError
        from streaming.store import NoAnswer

        try:
            self.record.greet()
            if self.data:
                Store(self.data, QUESTION).exists(INDEX)
        except NoAnswer as error:
            return first_line(error)
        except StoreError:
            pass
        return ""

    def watch(self) -> None:
        """From now on, every LOOK seconds."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._end.wait(LOOK):
            begun = time.monotonic()
            self.silent_since = (self.silent_since or begun) if self.trouble() else 0.0

    def end(self) -> None:
        self._end.set()

    def silent(self) -> float:
        """For so many seconds."""
        return time.monotonic() - since if (since := self.silent_since) else 0.0


class Greeter:
    """Answers the other nodes: what the time is here, and whether they can be reached from here.

    Who connects gets the time and sends its own port. It is answered `1` if a connection to there, at the address that it
    comes from, can be made, else `0`."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), family=family(), dualstack_ipv6=family() == socket.AF_INET6)
        self.port = self._socket.getsockname()[1]
        self._few = threading.Semaphore(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                one, address = self._socket.accept()
                if self._few.acquire(blocking=False):
                    threading.Thread(target=self._answer, args=(one, address[0]), daemon=True).start()
                else:
                    one.close()

    def _answer(self, one: socket.socket, address: str) -> None:
        try:
            with one, contextlib.suppress(OSError, ValueError):
                one.settimeout(2 * MEET)
                one.sendall(f"{time.time():.3f}\n".encode())
                if port := int(one.recv(8)):
                    one.sendall(b"1" if reaches(address, port) else b"0")
        finally:
            self._few.release()

    def close(self) -> None:
        self._socket.close()


def family() -> socket.AddressFamily:
    return socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET


def reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), MEET).close()
        return True
    except OSError:
        return False


def ahead(address: str, port: int) -> float | None:
    """Seconds that the clock there is ahead of the one here; None: it cannot be asked."""
    try:
        with socket.create_connection((address, port), MEET) as there:
            asked = time.time()
            told = float(there.recv(32))
            there.sendall(b"0\n")
            return told - (asked + time.time()) / 2
    except (OSError, ValueError):
        return None


def meets(address: str, port: int, own: int) -> bool:
    """Whether each of two nodes reaches the other."""
    try:
        with socket.create_connection((address, port), MEET) as there:
            there.settimeout(3 * MEET)
            there.recv(32)
            there.sendall(f"{own}\n".encode())
            return there.recv(1) == b"1"
    except OSError:
        return False


def meet_all(others: Mapping[int, tuple[str, int]], own: int) -> set[int]:
    """others: by index, where they answer -> the indices of those that this node does not meet."""
    missed = set[int]()

    def meet(index: int) -> None:
        if not meets(*others[index], own):
            missed.add(index)

    asked = [threading.Thread(target=meet, args=(index,), daemon=True) for index in others]
    for one in asked:
        one.start()
    for one in asked:
        one.join()
    return missed


def stands_back(index: int, missed: Mapping[int, set[int]], present: set[int]) -> set[int]:
    """Of two that do not meet, the one stays outside that misses more of the others, else the later one -> those before which
    this node stands back. missed: by index, whom each has not met; present: who takes part, or wants to."""
    missing: dict[int, set[int]] = {}
    for one, others in missed.items():
        for other in others:
            missing.setdefault(one, set()).add(other)
            missing.setdefault(other, set()).add(one)
    rank = {one: (len(missing[one] & (present | {index})), one) for one in missing}
    return {other for other in missing.get(index, set()) & present if rank[other] < rank[index]}


def stay_outside(
    trouble: Callable[[], str], leave: Callable[[], None], tell: Callable[[str], None], pause: float, most: float
) -> bool:
    """Returns when there is no trouble; leaves as long as there is -> whether there was any. Ends the node after `most`
    seconds: in its place, the cluster may start one on another machine."""
    said, until = "", time.monotonic() + most
    while what := trouble():
        if not said:
            leave()
        if what != said:
            tell(f"stays outside, and the others go on without it: {what}")
            said = what
        if time.monotonic() > until:
            raise Ended(1, f"for {most / 60:.0f} minutes, this node could not take part: {what}")
        time.sleep(pause)
    if said:
        tell("takes part again")
    return bool(said)
