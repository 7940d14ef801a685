"""Brings what windows need from the store to local files, ahead of time, in a process of its own: downloads do not compete
with the training loop for its interpreter.

Messages in: ("want", key, pieces, ranking), ("release", key), ("repair", key, shard name, member, path).
Messages out: ("ready", key, {shard number: Files or Unusable}), ("repaired", key, Unusable or None),
("stats", counts); or an exception that ends the run.

What a store answers may be wrong once: a 404 of a server that is starting, bytes that were damaged on the way. Only what is wrong
again and again, read anew after each pause, is taken for a fact about the data; facts are remembered.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_hexdigest

from streaming.cache import Cache, Entry, gone
from streaming.dataset import Shard
from streaming.processes import Inbox, portable
from streaming.shards import Member, Offsets, ShardError, offsets_limit
from streaming.store import Missing, Short, Store, TooLarge

REQUEST = 8 << 20  # bytes asked for at once: large enough for throughput, small enough to retry
AGAIN = (0.2, 1.0, 3.0, 10.0)  # seconds between the attempts at what is wrong, with a patience of ten minutes or more
GAP = 4096  # neighbouring samples are read as one: between them lie only the tar's headers


@dataclass(frozen=True)
class FetchSettings:
    address: str  # of the store, with its password
    folder: str  # in the cache, of this dataset
    cache: Path | None  # None: the store is a local folder and is read in place
    limit: int
    patience: float
    options: dict[str, Any] = field(default_factory=dict)
    requests: int = 16  # at the same time


class Piece(NamedTuple):
    """What is needed of a shard."""

    number: int
    shard: Shard
    places: np.ndarray | None  # None: all of it


class Files(NamedTuple):
    """Where a shard lies on local disk. In the cache its offsets file follows the tar in one file, which may have holes."""

    tar: str
    offsets: str
    offsets_start: int
    cache: str  # its folder; empty: the store is a local folder and is read in place
    size: int  # bytes of the tar


class Unusable(NamedTuple):
    reason: str
    detail: str
    end: int | None = None  # of a shard that is truncated: what lies before it may be right


class _Asked(NamedTuple):
    call: Callable[[], Any]  # -> Unusable, or what was asked for
    answer: Future[Any]  # of the first attempt


def run_fetcher(connection: Connection, settings: FetchSettings) -> None:
    fetcher = Fetcher(connection, settings)
    try:
        fetcher.serve()
    finally:
        fetcher.close()


class Fetcher:
    def __init__(self, connection: Connection, settings: FetchSettings):
        self.connection, self.settings = connection, settings
        self.store = Store(settings.address, settings.patience, settings.options)
        self.cache = Cache(settings.cache, settings.limit) if settings.cache else None
        self.counts: Counter[str] = Counter()  # hits, misses
        self._sending = threading.Lock()
        self._holding = threading.Lock()
        self._held: dict[Any, list[Entry]] = {}
        self._unwanted: set[Any] = set()
        self._pauses = [pause * min(1.0, settings.patience / 600) for pause in AGAIN]
        self._wrong: dict[Any, Unusable] = {}  # by the shard's name, or by that and a member
        self._ends: dict[str, int] = {}  # of truncated shards
        self._stopped = threading.Event()
        self._windows = ThreadPoolExecutor(1, "window")  # windows claim their space one after the other
        self._finishing = ThreadPoolExecutor(2, "finish")
        self._offset_requests = ThreadPoolExecutor(4, "offsets")  # they do not wait behind the shards
        self._requests = ThreadPoolExecutor(settings.requests, "request")
        self._again = ThreadPoolExecutor(32, "again")  # they mostly sleep

    def serve(self) -> None:
        last: Counter[str] = Counter()
        inbox = Inbox(self.connection)
        while True:
            with suppress(queue.Empty):
                kind, *rest = inbox.receive(1.0)
                if kind == "want":
                    self._windows.submit(self._guarded, self._want, *rest)
                elif kind == "release":
                    self._release(*rest)
                elif kind == "repair":
                    self._again.submit(self._guarded, self._repair, *rest)
            stats = Counter({**self.store.counts, **self.counts})
            if stats != last:
                last = stats
                self.send("stats", stats)

    def close(self) -> None:
        """Silences the threads, which may run on for a while: the connection is closed next, and a file that is opened then may
        reuse its descriptor. A late message would be written into that file."""
        with self._sending:
            self._stopped.set()
        for pool in (self._windows, self._finishing, self._offset_requests, self._requests, self._again):
            pool.shutdown(wait=False, cancel_futures=True)
        with self._holding:  # as threads of a process that lives on, they would keep others from their room
            for entry in [entry for entries in self._held.values() for entry in entries]:
                entry.release()
            self._held.clear()

    def send(self, *message: Any) -> None:
        self._send(message)

    def _send(self, message: Any) -> None:
        with self._sending:
            if not self._stopped.is_set():
                self.connection.send(message)

    def _guarded(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except (BrokenPipeError, ConnectionError):
            self._stopped.set()
        except Exception as error:
            self._send(portable(error))

    # ---- windows

    def _want(self, key: Any, pieces: list[Piece], ranking: dict[str, float]) -> None:
        """Claims room for the pieces and asks for their bytes. Meanwhile the next window may do the same."""
        ready: dict[int, Files | Unusable] = {}
        entries: dict[int, Entry] = {}
        asked: dict[int, list[_Asked]] = {}  # of the entries that are being written
        absent = []
        for piece in pieces:
            if entry := self._cached(piece):
                entries[piece.number] = entry
                self.counts["hits"] += 1
            elif piece.shard.name in self._wrong:
                ready[piece.number] = self._wrong[piece.shard.name]
            else:
                absent.append(piece)
        first = [self._ask(self._offset_requests, self._offsets, piece.shard) for piece in absent]
        for piece, content in zip(absent, self._settled(first), strict=True):
            if isinstance(content, Unusable):
                ready[piece.number] = self._wrong[piece.shard.name] = content
            elif self.cache is None:
                tar, offsets = self.store.path(piece.shard.name), self.store.path(piece.shard.offsets_name)
                ready[piece.number] = Files(tar, offsets, 0, "", piece.shard.bytes)
            else:
                ranges = _ranges(piece, Offsets(content, piece.shard.offsets_name, piece.shard.bytes))
                behind = (piece.shard.bytes, piece.shard.bytes + len(content))
                entry, new = self._claim(piece, [*ranges, behind], ranking)
                entries[piece.number] = entry
                if new:
                    self.counts["misses"] += 1
                    entry.write(piece.shard.bytes, content)
                    asked[piece.number] = [
                        self._ask(self._requests, self._get, piece.shard.name, entry, *r) for r in _requests(ranges)
                    ]
        places = {
            piece.number: self._files(entries[piece.number], piece) for piece in pieces if piece.number in entries
        }
        names = {piece.number: piece.shard.name for piece in pieces}
        self._finishing.submit(self._guarded, self._finish, key, {**ready, **places}, entries, asked, names)

    def _finish(
        self,
        key: Any,
        ready: dict[int, Files | Unusable],
        entries: dict[int, Entry],
        asked: dict[int, list[_Asked]],
        names: dict[int, str],
    ) -> None:
        """When every byte is there: says that the window is ready."""
        answers = iter(self._settled([one for ones in asked.values() for one in ones]))
        for number, ones in asked.items():
            for wrong in [answer for answer in islice(answers, len(ones)) if answer]:
                if wrong.end is None:
                    ready[number] = self._wrong[names[number]] = wrong
                else:  # what lacks stays a hole, which no checksum matches
                    self._ends[names[number]] = wrong.end
            if isinstance(ready[number], Unusable):
                self.cache.abandon(entries.pop(number))  # type: ignore[union-attr]
            else:
                self.cache.commit(entries[number])  # type: ignore[union-attr]
        with self._holding:
            if key in self._unwanted or self._stopped.is_set():  # released before it was ready
                self._unwanted.discard(key)
                for entry in entries.values():
                    entry.release()
            else:
                self._held[key] = list(entries.values())
        self.send("ready", key, ready)

    def _release(self, key: Any) -> None:
        with self._holding:
            if key in self._held:
                for entry in self._held.pop(key):
                    entry.release()
            else:
                self._unwanted.add(key)

    def _files(self, entry: Entry, piece: Piece) -> Files:
        shard = piece.shard
        return Files(str(entry.path), str(entry.path), shard.bytes, str(self.settings.cache), shard.bytes)

    def _cached(self, piece: Piece) -> Entry | None:
        """The whole shard, or exactly this part of it, from the cache; what a crash of the machine left torn is removed."""
        for name in (_name(piece._replace(places=None)), _name(piece)):
            entry = self.cache.use(f"{self.settings.folder}/{name}") if self.cache else None
            if entry:
                if xxh3_64_hexdigest(entry.read(piece.shard.bytes)) == piece.shard.offsets:
                    return entry
                self.cache.discard(entry)  # type: ignore[union-attr]
        return None

    def _claim(self, piece: Piece, ranges: list[tuple[int, int]], ranking: dict[str, float]) -> tuple[Entry, bool]:
        """An entry to write; or one that another process has written meanwhile. Waits for room."""
        assert self.cache
        while True:
            name = f"{self.settings.folder}/{_name(piece)}"
            # What is not ranked is of another dataset, or of a part that no rank here wants again.
            if entry := self.cache.create(name, ranges[-1][1], ranges, lambda path: ranking.get(path, np.inf)):
                return entry, True
            if entry := self._cached(piece):
                return entry, False
            if self._stopped.wait(0.05):
                raise ConnectionError("stopped while waiting for room in the cache")

    def _ask(self, pool: ThreadPoolExecutor, call: Callable[..., Any], *args: Any) -> _Asked:
        return _Asked(partial(call, *args), pool.submit(call, *args))

    def _settled(self, asked: list[_Asked]) -> list[Any]:
        """Waits for the answers and retries the faulty ones."""
        answers = [one.answer.result() for one in asked]
        wrong = [k for k, answer in enumerate(answers) if isinstance(answer, Unusable)]
        for k, answer in zip(wrong, self._again.map(self._confirmed, [asked[k].call for k in wrong]), strict=True):
            answers[k] = answer
        return answers

    def _confirmed(self, call: Callable[[], Any]) -> Any:
        """The first answer that is right; or the last of several."""
        answer = None
        for pause in self._pauses:
            if self._stopped.wait(pause):
                raise ConnectionError("stopped while confirming what is wrong in the store")
            if not isinstance(answer := call(), Unusable):
                break
        return answer

    def _offsets(self, shard: Shard) -> bytes | Unusable:
        name = shard.offsets_name
        try:
            content = self.store.read(name, most=offsets_limit(shard.bytes))
        except Missing as error:
            return Unusable("offsets missing", str(error))
        except TooLarge as error:
            return Unusable("offsets damaged", str(error))
        if xxh3_64_hexdigest(content) != shard.offsets:
            return Unusable("offsets damaged", f"{name} has not the checksum {shard.offsets} that the index says")
        if self.cache is None and not self.store.exists(shard.name):
            return Unusable("shard missing", f"{self.store.path(shard.name)} does not exist")
        return content

    def _get(self, name: str, entry: Entry, start: int, stop: int) -> Unusable | None:
        try:
            entry.write(start, self.store.read(name, start, stop))
        except Missing as error:
            return Unusable("shard missing", str(error))
        except Short as error:
            if error.size > start:
                self._get(name, entry, start, error.size)
            return self._truncated(name, error.size, stop)
        return None

    def _truncated(self, name: str, end: int, stop: int) -> Unusable:
        return Unusable("shard truncated", f"{self.store.url}/{name} ends at byte {end}, expected {stop} or more", end)

    def _repair(self, key: Any, name: str, member: Member, path: str) -> None:
        """Reads a corrupt member again and repairs the local copy -> whether it is right now."""
        stop = member.offset + member.length
        if (name, member) not in self._wrong:
            if self._ends.get(name, stop) < stop:
                answer = self._truncated(name, self._ends[name], stop)
            elif answer := self._mend(name, member, path):
                answer = self._confirmed(partial(self._mend, name, member, path))
            if answer:
                self._wrong[name, member] = answer
                if answer.end is not None:
                    self._ends[name] = answer.end
        self.send("repaired", key, self._wrong.get((name, member)))

    def _mend(self, name: str, member: Member, path: str) -> Unusable | None:
        stop = member.offset + member.length
        try:
            content = self.store.read(name, member.offset, stop)
        except Short as error:
            return self._truncated(name, error.size, stop)
        except Missing as error:
            return Unusable("shard missing", str(error))
        if xxh3_64_hexdigest(content) != member.checksum:
            detail = f"bytes {member.offset} to {stop} of {name} have not the checksum {member.checksum}"
            return Unusable("checksum", detail)
        if self.cache:
            try:
                with Path(path).open("r+b") as file:
                    file.seek(member.offset)
                    file.write(content)
            except FileNotFoundError:
                raise gone(self.cache.root) from None
        return None


def _name(piece: Piece) -> str:
    """Of the file in the cache: the shard's number, and what part of it."""
    part = "" if piece.places is None else f".{xxh3_64_hexdigest(piece.places.tobytes())}"
    return f"{piece.number:08d}{part}.tar"


def _ranges(piece: Piece, offsets: Offsets) -> list[tuple[int, int]]:
    """Of the tar, what is needed: from the first byte to the last of each run of samples that lie side by side."""
    if piece.places is None:
        return [(0, piece.shard.bytes)]
    ranges: list[tuple[int, int]] = []
    last = None
    for place in piece.places.tolist():
        try:
            start, stop = offsets[place].span
        except ShardError:  # whoever decodes it finds that, too
            continue
        if last == place - 1 and 0 <= start - ranges[-1][1] <= GAP:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
        last = place
    if sum(stop - start for start, stop in ranges) > piece.shard.bytes:  # samples that claim the same bytes
        return [(0, piece.shard.bytes)]
    return ranges


def _requests(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, stop in ranges:
        for begin in range(start, stop, REQUEST):
            yield begin, min(begin + REQUEST, stop)
