"""Brings what windows need from the store to local files, ahead of time, in a process of its own: downloads do not compete
with the training loop for its interpreter.

Messages in: ("want", key, pieces, ranking), ("release", key), ("repair", key, shard name, member, path).
Messages out: ("ready", key, {shard number: Files or Unusable}), ("repaired", key, Unusable or None),
("stats", counts); or an exception that ends the run.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_hexdigest

from streaming.cache import Cache, Entry
from streaming.dataset import Shard
from streaming.processes import portable
from streaming.shards import Member, Offsets
from streaming.store import Missing, Short, Store

REQUEST = 8 << 20  # bytes asked for at once: large enough for throughput, small enough to retry
GAP = 4096  # neighbouring samples are read as one: between them lie only the tar's headers


@dataclass(frozen=True)
class FetchSettings:
    url: str
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


class Unusable(NamedTuple):
    reason: str
    detail: str


def run_fetcher(connection: Connection, settings: FetchSettings) -> None:
    fetcher = Fetcher(connection, settings)
    try:
        fetcher.serve()
    finally:
        fetcher.close()


class Fetcher:
    def __init__(self, connection: Connection, settings: FetchSettings):
        self.connection, self.settings = connection, settings
        self.store = Store(settings.url, settings.patience, settings.options)
        self.cache = Cache(settings.cache, settings.limit) if settings.cache else None
        self.counts: Counter[str] = Counter()  # hits, misses
        self._sending = threading.Lock()
        self._holding = threading.Lock()
        self._held: dict[Any, list[Entry]] = {}
        self._unwanted: set[Any] = set()
        self._stopped = threading.Event()
        self._windows = ThreadPoolExecutor(1, "window")  # windows claim their space one after the other
        self._finishing = ThreadPoolExecutor(2, "finish")
        self._offset_requests = ThreadPoolExecutor(4, "offsets")  # they do not wait behind the shards
        self._requests = ThreadPoolExecutor(settings.requests, "request")

    def serve(self) -> None:
        last: Counter[str] = Counter()
        while True:
            if self.connection.poll(1.0):
                kind, *rest = self.connection.recv()
                if kind == "want":
                    self._windows.submit(self._guarded, self._want, *rest)
                elif kind == "release":
                    self._release(*rest)
                elif kind == "repair":
                    self._requests.submit(self._guarded, self._repair, *rest)
            stats = Counter({**self.store.counts, **self.counts})
            if stats != last:
                last = stats
                self.send("stats", stats)

    def close(self) -> None:
        self._stopped.set()
        for pool in (self._windows, self._finishing, self._offset_requests, self._requests):
            pool.shutdown(wait=False, cancel_futures=True)

    def send(self, *message: Any) -> None:
        with self._sending:
            self.connection.send(message)

    def _guarded(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except (BrokenPipeError, ConnectionError):
            self._stopped.set()
        except Exception as error:
            with self._sending:
                self.connection.send(portable(error))

    # ---- windows

    def _want(self, key: Any, pieces: list[Piece], ranking: dict[str, float]) -> None:
        """Claims room for the pieces and asks for their bytes. Meanwhile the next window may do the same."""
        ready: dict[int, Files | Unusable] = {}
        entries: dict[int, Entry] = {}
        requests: dict[int, list[Future[Missing | None]]] = {}  # of the entries that are being written
        absent = []
        for piece in pieces:
            if entry := self._cached(piece):
                entries[piece.number] = entry
                self.counts["hits"] += 1
            else:
                absent.append(piece)
        for piece, content in zip(absent, self._offset_requests.map(self._offsets, absent), strict=True):
            if isinstance(content, Unusable):
                ready[piece.number] = content
            elif self.cache is None:
                ready[piece.number] = self._in_place(piece.shard)
            else:
                ranges = _ranges(piece, Offsets(content))
                behind = (piece.shard.bytes, piece.shard.bytes + len(content))
                entry, new = self._claim(piece, [*ranges, behind], ranking)
                entries[piece.number] = entry
                if new:
                    self.counts["misses"] += 1
                    entry.write(piece.shard.bytes, content)
                    get = partial(self._get, piece.shard.name, entry)
                    requests[piece.number] = [self._requests.submit(get, *r) for r in _requests(ranges)]
        places = {piece.number: _files(entries[piece.number], piece) for piece in pieces if piece.number in entries}
        self._finishing.submit(self._guarded, self._finish, key, {**ready, **places}, entries, requests)

    def _finish(
        self,
        key: Any,
        ready: dict[int, Files | Unusable],
        entries: dict[int, Entry],
        requests: dict[int, list[Future[Missing | None]]],
    ) -> None:
        """When every byte is there: says that the window is ready."""
        for number, futures in requests.items():
            missing = [failure for future in futures if (failure := future.result())]
            if missing:
                self.cache.abandon(entries.pop(number))  # type: ignore[union-attr]
                ready[number] = Unusable("shard missing", str(missing[0]))
            else:
                self.cache.commit(entries[number])  # type: ignore[union-attr]
        with self._holding:
            if key in self._unwanted:  # released before it was ready
                self._unwanted.remove(key)
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

    def _offsets(self, piece: Piece) -> bytes | Unusable:
        name = piece.shard.offsets_name
        for _ in range(2):  # a transfer may be damaged; twice is the object itself
            try:
                content = self.store.read(name)
            except Missing as error:
                return Unusable("offsets missing", str(error))
            if xxh3_64_hexdigest(content) == piece.shard.offsets:
                return content
        return Unusable("offsets damaged", f"{name} has not the checksum {piece.shard.offsets} that the index says")

    def _in_place(self, shard: Shard) -> Files | Unusable:
        path = self.store.path(shard.name)
        if not self.store.exists(shard.name):
            return Unusable("shard missing", f"{path} does not exist")
        return Files(path, self.store.path(shard.offsets_name), 0)

    def _get(self, name: str, entry: Entry, start: int, stop: int) -> Missing | None:
        try:
            entry.write(start, self.store.read(name, start, stop))
        except Missing as error:
            return error
        except Short as error:  # what lacks stays a hole, which no checksum matches
            if error.size > start:
                return self._get(name, entry, start, error.size)
        return None

    def _repair(self, key: Any, name: str, member: Member, path: str) -> None:
        """Reads a member again from the store itself. Right there: into the local file. Wrong there too: it is unusable."""
        try:
            content = self.store.read(name, member.offset, member.offset + member.length)
        except Short as error:
            self.send("repaired", key, Unusable("shard truncated", str(error)))
            return
        except Missing as error:
            self.send("repaired", key, Unusable("shard missing", str(error)))
            return
        if xxh3_64_hexdigest(content) != member.checksum:
            detail = f"bytes {member.offset} to {member.offset + member.length} of {name} have not the checksum {member.checksum}"
            self.send("repaired", key, Unusable("checksum", detail))
            return
        if self.cache:
            with Path(path).open("r+b") as file:
                file.seek(member.offset)
                file.write(content)
        self.send("repaired", key, None)


def _name(piece: Piece) -> str:
    """Of the file in the cache: the shard's number, and what part of it."""
    part = "" if piece.places is None else f".{xxh3_64_hexdigest(piece.places.tobytes())}"
    return f"{piece.number:08d}{part}.tar"


def _files(entry: Entry, piece: Piece) -> Files:
    return Files(str(entry.path), str(entry.path), piece.shard.bytes)


def _ranges(piece: Piece, offsets: Offsets) -> list[tuple[int, int]]:
    """Of the tar, what is needed: from the first byte to the last of each run of samples that lie side by side."""
    if piece.places is None:
        return [(0, piece.shard.bytes)]
    ranges: list[tuple[int, int]] = []
    last = None
    for place in piece.places.tolist():
        start, stop = offsets[place].span
        if last == place - 1 and 0 <= start - ranges[-1][1] <= GAP:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
        last = place
    return ranges


def _requests(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, stop in ranges:
        for begin in range(start, stop, REQUEST):
            yield begin, min(begin + REQUEST, stop)
