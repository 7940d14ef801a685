"""Batches, in their order: tasks go out to decoding processes, decoded samples come back in shared memory."""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from xxhash import xxh3_64_hexdigest

from streaming.cache import Cache, CacheError, CacheMisfit, Claim, gone
from streaming.dataset import Dataset, DatasetError
from streaming.fetch import FetchSettings, Files, Piece, Unusable, run_fetcher
from streaming.order import COPY, Epoch, Order, Selection, sample_of, share
from streaming.processes import Child, Inbox, stop
from streaming.quarantine import Bad, BadSample, decode
from streaming.shards import Member, Offsets, Sample, ShardError, offsets_limit

KNOWN_SHARDS = 128  # whose offsets a decoding process keeps, a few hundred kB each
TASK = 16  # rows at most
LOADERS = itertools.count()  # of this process


Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]


class Decoder(Protocol):
    """What the user of this package brings. It is pickled into the decoding processes."""

    fields: dict[str, tuple[tuple[int, ...], str]]
    """What a sample becomes: name -> shape and dtype."""

    def members(self, names: Sequence[str], draw: float) -> Sequence[str]:
        """Which members to read, of those that the sample has. Raises BadSample where one lacks."""
        ...

    def decode(self, key: str, members: dict[str, bytes], out: dict[str, np.ndarray]) -> None:
        """Fills `out`. Raises BadSample."""
        ...


class Batch(NamedTuple):
    """A rank's share of a step."""

    epoch: int
    step: int  # in the epoch
    samples: (
        np.ndarray
    )  # (b,) int64 ids, plus COPY for each time that it came before; -1: the epoch has ended before this slot
    valid: np.ndarray  # (b,) bool; false: it could not be used, or there is no sample
    bad: list[Bad]  # what could not be used and why, in the order of the rows
    fields: dict[str, np.ndarray]  # (b, ...) each; zero where not valid


class Stats(NamedTuple):
    """Since the loader began."""

    fetch: Counter[str]  # requests, retries, hedged, bytes, hits, misses
    decode_seconds: list[float]  # by process
    decoded: list[int]  # samples, by process
    wait_seconds: float  # in which the consumer waited
    queue_depth: int  # batches that are ready now


class Task(NamedTuple):
    """Some rows of a batch, for one decoding process."""

    step: int
    buffer: int
    rows: list[tuple[int, Files, int, float]]  # row, file, place in the shard, draw


class Result(NamedTuple):
    step: int
    rows: int
    bad: list[tuple[int, str, str, str]]  # row, key, reason, detail
    damaged: list[tuple[int, str, Member]]  # row, key, the member whose local bytes are not what they should be
    seconds: float


@dataclass
class _Step:
    """A step in flight."""

    samples: np.ndarray  # (b,) int64
    valid: np.ndarray  # (b,) bool
    windows: tuple[int, int]
    buffer: int
    rows: dict[int, tuple[int, int, float]] = field(default_factory=dict)  # row -> shard number, place, draw
    left: int = 0  # rows not finished
    bad: dict[int, Bad] = field(default_factory=dict)  # by row
    repaired: set[tuple[int, Member]] = field(default_factory=set)  # row, member


@dataclass
class _Window:
    """A window that is held, or asked for."""

    asked: int  # the fetcher's name of it: a window that is released and wanted again is another
    files: dict[int, Files | Unusable] | None = None  # None: not ready


def no_draw(epoch: int, samples: np.ndarray) -> np.ndarray:
    return np.zeros(len(samples))


class Loader:
    """The samples of one rank. Iterate `batches(epoch, step)`; close it, or use it as a context."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        decoder: Decoder,
        *,
        rank: int = 0,
        ranks: int = 1,
        unit: int = 1,
        workers: int = 4,
        ahead: int = 2,
        selection: Selection | None = None,
        cache: Path | None = None,
        cache_bytes: int = 64 << 30,
        sharers: int = 1,
        draw: Callable[[int, np.ndarray], np.ndarray] = no_draw,
        empty: Empty = np.empty,
    ):
        """unit: rows of a batch that stay on one rank together. workers: decoding processes; 0: everything in threads of this
        one. ahead: batches prepared beyond the one being used. selection: how often each sample comes; None: once. cache: folder
        for shards of a remote store, `cache_bytes` of it shared by the loaders of `sharers` ranks. draw: a number for each sample
        of an epoch, handed to the decoder. empty: makes the arrays of a batch."""
        if order.fingerprint != dataset.fingerprint:
            raise ValueError(
                f"the order is of dataset {order.fingerprint[:16]}, this one is {dataset.fingerprint[:16]}"
            )
        self.dataset, self.order, self.decoder, self.draw, self.empty = dataset, order, decoder, draw, empty
        self.selection, self.first, self.stop = selection, *share(order.batch, rank, ranks, unit)
        self._epoch = Epoch(order, dataset.sizes, 0, selection)
        self._folder, self._hold = dataset.fingerprint[:16], 3  # windows at a time
        if dataset.store.local:
            cache = None
        elif cache is None:
            raise CacheMisfit(f"{dataset.store.url} is not local, and no cache folder is set for its shards")
        self._cache = Cache(cache, cache_bytes) if cache else None
        self._claim: Claim | None = None
        if self._cache:
            self._check_room(self._cache, sharers)
        self._known = {0: self._epoch}
        self._windows: dict[tuple[int, int], _Window] = {}  # (epoch, window) -> what is asked for, in that order
        self._asked = 0
        self._flight: OrderedDict[int, _Step] = OrderedDict()
        self._pending: tuple[int, _Step] | None = None
        self._free = list(range(ahead + 1))
        self._wait_seconds, self._closed = 0.0, False
        self._fetch_stats: Counter[str] = Counter()
        self._buffers = _Buffers(decoder.fields, self.stop - self.first, ahead + 1)
        settings = FetchSettings(
            dataset.store.address, self._folder, cache, cache_bytes, dataset.store.patience, dataset.store.options
        )
        self._fetcher = Child("the fetching process", run_fetcher, (settings,), threads=not workers)
        self._workers = [
            Child(f"decoding process {k}", run_worker, (decoder, self._buffers), threads=not workers)
            for k in range(max(1, workers))
        ]
        self._busy = [0] * len(self._workers)
        self._seconds, self._decoded = [0.0] * len(self._workers), [0] * len(self._workers)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        stop([*self._workers, self._fetcher])
        if self._cache and self._claim:
            self._cache.give_back(self._claim)
            self._claim = None

    @property
    def steps_per_epoch(self) -> int:
        return self._epoch.steps

    @property
    def samples_per_epoch(self) -> int:
        return self._epoch.samples

    @property
    def samples(self) -> int:
        """That come at all."""
        return int(np.count_nonzero(self.selection.often)) if self.selection else self.dataset.samples

    def batches(self, start: int = 0) -> Generator[Batch]:
        """From step `start`, counted over all epochs, without end."""
        self._next, self._pending = start, None
        try:
            while True:
                begun = time.perf_counter()
                while not self._flight or next(iter(self._flight.values())).left:
                    if not self._schedule():
                        self._receive()
                self._wait_seconds += time.perf_counter() - begun
                yield self._deliver()
        except GeneratorExit:
            self._drain()
            raise

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint needs so that `batches` goes on from step `step`: under a kilobyte."""
        return {"step": step, "order": asdict(self.order)}

    def restore(self, state: dict[str, Any]) -> int:
        """-> the step to go on from. In another order than the one of the run there is no such step."""
        now = asdict(self.order)
        changed = [
            f"{name} is {now.get(name)}, was {was}" for name, was in state["order"].items() if now.get(name) != was
        ]
        if changed:
            raise DatasetError(
                f"{self.dataset.store.url}: a run cannot go on at step {state['step']} of another order of samples: "
                f"{'; '.join(changed)}. Set them back (fingerprint: the dataset it began with), or begin a new run"
            )
        return state["step"]

    def stats(self) -> Stats:
        ready = sum(not step.left for step in self._flight.values())
        return Stats(self._fetch_stats, list(self._seconds), list(self._decoded), self._wait_seconds, ready)

    # ---- scheduling

    def _schedule(self) -> bool:
        """Moves on what can be moved on without waiting; false where nothing can."""
        moved = False
        while self._free:
            if self._pending is None:
                self._pending = self._plan(self._next)
            number, step = self._pending
            windows = [(number // self.steps_per_epoch, w) for w in range(step.windows[0], step.windows[1] + 1)]
            for key in windows:
                self._want(key)
            if any(self._windows[key].files is None for key in windows):
                break
            self._dispatch(number, step)
            self._pending, self._next, moved = None, self._next + 1, True
        while self._windows and len(self._windows) < self._hold:  # those after, while this one is used
            epoch, w = next(reversed(self._windows))
            self._want((epoch, w + 1) if w + 1 < self._epochs(epoch).windows else (epoch + 1, 0))
        return moved

    def _plan(self, number: int) -> tuple[int, _Step]:
        e, k = divmod(number, self.steps_per_epoch)
        slots = self._epochs(e).slots(k, self.first, self.stop)
        b = self.stop - self.first
        samples = np.full(b, -1, np.int64)
        samples[: len(slots.shards)] = self.dataset.starts[slots.shards] + slots.places + COPY * slots.turns
        step = _Step(samples, samples >= 0, slots.windows, -1)
        draws = self.draw(e, samples[: len(slots.shards)])
        step.rows = dict(enumerate(zip(slots.shards.tolist(), slots.places.tolist(), draws.tolist(), strict=True)))
        return number, step

    def _dispatch(self, number: int, step: _Step) -> None:
        step.buffer = self._free.pop()
        self._flight[number] = step
        epoch, rows = number // self.steps_per_epoch, []
        for row, (shard, place, draw) in step.rows.items():
            files = self._files(epoch, step, shard)
            if isinstance(files, Unusable):
                self._set_aside(step, row, "", files.reason, files.detail)
            else:
                rows.append((row, files, place, draw))
        step.left = len(rows)
        size = max(1, min(TASK, -(-len(rows) // (2 * len(self._workers)))))
        for begin in range(0, len(rows), size):
            self._hand_out(Task(number, step.buffer, rows[begin : begin + size]))

    def _hand_out(self, task: Task) -> None:
        worker = min(range(len(self._workers)), key=lambda k: self._busy[k])
        self._busy[worker] += len(task.rows)
        self._workers[worker].send(task)

    def _want(self, key: tuple[int, int]) -> None:
        if key in self._windows:
            return
        self._asked += 1
        self._windows[key] = _Window(self._asked)
        pieces = []
        for number, places in self._epochs(key[0]).needs(key[1], self.first, self.stop).items():
            shard = self.dataset[number]
            # Another epoch of a selection wants others: whole shards are found in the cache again.
            most = len(places) == shard.samples or (self.selection and 2 * len(places) >= shard.samples)
            pieces.append(Piece(number, shard, None if most else places))
        self._fetcher.send(("want", self._asked, pieces, self._ranking(key)))

    def _ranking(self, now: tuple[int, int]) -> dict[str, float]:
        """The whole shards in the cache -> in how many windows they are next used: what is least useful is evicted first."""
        if self._cache is None:
            return {}
        names = [name for name in self._cache.names(self._folder) if name.count(".") == 1]
        epoch, window = now
        numbers = np.array([int(name[:8]) for name in names], np.int64)
        uses = self._epochs(epoch).next_use(numbers, window).astype(np.float64)
        over = uses < 0
        if over.any():
            uses[over] = self._epochs(epoch).windows - window + self._epochs(epoch + 1).next_use(numbers[over], 0)
        return {f"{self._folder}/{name}": use for name, use in zip(names, uses.tolist(), strict=True)}

    def _epochs(self, epoch: int) -> Epoch:
        if epoch not in self._known:
            self._known[epoch] = Epoch(self.order, self.dataset.sizes, epoch, self.selection)
            if len(self._known) > 3:
                del self._known[next(iter(self._known))]
        return self._known[epoch]

    # ---- what comes back

    def _receive(self) -> None:
        """Waits for one message at least, and takes what is there."""
        children = {child.connection: k for k, child in enumerate((*self._workers, self._fetcher))}
        for connection in wait(list(children)):
            k = children[connection]  # type: ignore[index]
            if k < len(self._workers):
                self._finished(k, self._workers[k].receive())
                continue
            kind, *rest = self._fetcher.receive()
            if kind == "ready":
                for window in self._windows.values():
                    if window.asked == rest[0]:
                        window.files = rest[1]
            elif kind == "repaired":
                self._repaired(*rest)
            else:
                self._fetch_stats = rest[0]

    def _finished(self, worker: int, result: Result) -> None:
        self._seconds[worker] += result.seconds
        self._decoded[worker] += result.rows - len(result.bad) - len(result.damaged)
        self._busy[worker] -= result.rows
        step = self._flight[result.step]
        step.left -= result.rows - len(result.damaged)
        for row, key, reason, detail in result.bad:
            self._set_aside(step, row, key, reason, detail)
        for row, key, member in result.damaged:
            shard = self.dataset[step.rows[row][0]]
            files = self._files(result.step // self.steps_per_epoch, step, step.rows[row][0])
            if (row, member) in step.repaired:  # no property of the sample, which another machine could use
                raise CacheError(
                    f"{files[0]}: bytes {member.offset} to {member.offset + member.length} are right in the store, and wrong "
                    "here even after they were written anew; this disk cannot be relied on"
                )
            step.repaired.add((row, member))
            self._fetcher.send(("repair", (result.step, row, key), shard.name, member, files[0]))

    def _repaired(self, key: tuple[int, int, str], unusable: Unusable | None) -> None:
        number, row, name = key
        step = self._flight[number]
        if unusable is None:
            shard, place, draw = step.rows[row]
            files = self._files(number // self.steps_per_epoch, step, shard)
            self._hand_out(Task(number, step.buffer, [(row, files, place, draw)]))  # type: ignore[list-item]
        else:
            step.left -= 1
            self._set_aside(step, row, name, unusable.reason, unusable.detail)

    def _set_aside(self, step: _Step, row: int, key: str, reason: str, detail: str) -> None:
        shard, place, _ = step.rows[row]
        step.valid[row] = False
        where = self.dataset.place(shard, place) + (f" ({key})" if key else "")
        step.bad[row] = Bad(int(sample_of(step.samples[row])), reason, where, detail)

    def _deliver(self) -> Batch:
        number, step = self._flight.popitem(last=False)
        fields = self._buffers.copy(step.buffer, step.valid, self.empty)
        self._free.append(step.buffer)
        if self._flight:
            oldest, windows = next((n, s.windows) for n, s in self._flight.items())
        else:
            self._pending = self._pending or self._plan(self._next)
            oldest, windows = self._pending[0], self._pending[1].windows
        self._release((oldest // self.steps_per_epoch, windows[0]))
        epoch, k = divmod(number, self.steps_per_epoch)
        return Batch(epoch, k, step.samples, step.valid, [step.bad[row] for row in sorted(step.bad)], fields)

    def _release(self, before: tuple[float, float]) -> None:
        for key in [key for key in self._windows if key < before]:
            self._fetcher.send(("release", self._windows.pop(key).asked))

    def _drain(self) -> None:
        """The consumer has left: what is under way ends, and nothing is held."""
        if self._closed:
            return
        while any(step.left for step in self._flight.values()):
            self._receive()
        self._free += [step.buffer for step in self._flight.values()]
        self._flight.clear()
        self._release((np.inf, np.inf))

    def _files(self, epoch: int, step: _Step, shard: int) -> Files | Unusable:
        return next(
            ready[shard]
            for w in range(step.windows[0], step.windows[1] + 1)
            if shard in (ready := self._windows[epoch, w].files or {})
        )

    def _check_room(self, cache: Cache, sharers: int) -> None:
        """Two windows must fit, of each rank on the node, or ranks could wait for each other's room for ever. Where three do,
        the store is never idle between them. Other jobs may use the same folder."""
        edges = np.array([self._epoch.bounds(w)[0] for w in range(self._epoch.windows)])
        held = max(2, int(np.bincount(edges // self.order.batch).max()) + 1)  # by a step that spans small windows
        # Shards that the ranks' parts of a window touch, and what of a shard is fetched:
        shards = sharers * (-(-self.order.window * (self.stop - self.first) // self.order.batch) + 1)
        beside = 1 << 16  # of a shard: blocks that are not full
        largest = self.dataset.largest
        if self.selection:
            sizes = self.dataset.sizes
            of_shards = np.bincount(np.repeat(np.arange(len(sizes)), sizes), self.selection.often, len(sizes))
            low, high = max(0.0, of_shards.min() - 1), of_shards.max() + 1  # in every epoch within one of its mean
            least = np.sort(np.maximum(of_shards - 1, 0))[: self.order.window].sum()
            held = max(2, min(self._epoch.windows, 2 + int((self.order.batch - 2) // max(1, least))))
            part = (self.stop - self.first) / self.order.batch
            even = int(np.ceil(self.order.window * part * high / low)) + 1 if low else self.order.window
            shards = min(sharers * even, self.order.window + sharers)  # beyond: two have a shard in common
            wanted = float(((of_shards + 1) / sizes).max())
            largest = min(largest, int(2 * wanted * largest)) if wanted < 0.5 else largest  # clips differ in size
        whole = self.dataset.bytes + len(self.dataset) * beside

        def room(windows: int) -> int:
            needed = min(windows * shards * (largest + beside), sharers * windows * whole)
            return needed + needed // 50  # offsets files

        if cache.limit < room(held):
            raise CacheMisfit(
                f"cache_bytes is {cache.limit}, expected {room(held)} or more: room for {held} windows of "
                f"{self.order.window} shards of up to {largest} bytes, for {sharers} rank(s) on this "
                "node. Raise it, or lower the window, or pack smaller shards"
            )
        # Ranks that share are the children of one process. Containers may share a folder, too, and number theirs alike.
        space = os.stat("/proc/self/ns/pid").st_ino
        job = f"{space}-{os.getppid()}" if sharers > 1 else f"{space}-{os.getpid()}-{next(LOADERS)}"
        self._claim = cache.claim(job, [room(held + 1), room(held)])
        self._hold = held + 1 if self._claim.bytes == room(held + 1) else held


class _Buffers:
    """Places for `count` batches in memory that processes share and that has no name: it is gone when they are."""

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], str]], rows: int, count: int):
        self.fields, self.rows, self.count = fields, rows, count
        self._fd = os.memfd_create("batches")
        os.ftruncate(self._fd, max(1, count * self._size))
        self._map = mmap.mmap(self._fd, 0)

    def __del__(self) -> None:  # the memory goes with its last descriptor
        if hasattr(self, "_fd"):
            os.close(self._fd)

    @property
    def _size(self) -> int:
        return sum(self._bytes(shape, dtype) for shape, dtype in self.fields.values())

    def _bytes(self, shape: tuple[int, ...], dtype: str) -> int:
        return -(-self.rows * int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64  # aligned

    def __getstate__(self) -> dict[str, Any]:
        return {"fields": self.fields, "rows": self.rows, "count": self.count, "fd": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields, self.rows, self.count = state["fields"], state["rows"], state["count"]
        self._fd = state["fd"].detach()
        self._map = mmap.mmap(self._fd, 0)

    def views(self, buffer: int) -> dict[str, np.ndarray]:
        """name -> (rows, ...)"""
        offset, views = buffer * self._size, {}
        for name, (shape, dtype) in self.fields.items():
            views[name] = np.ndarray((self.rows, *shape), dtype, self._map, offset)
            offset += self._bytes(shape, dtype)
        return views

    def copy(self, buffer: int, valid: np.ndarray, empty: Empty) -> dict[str, np.ndarray]:
        """The batch's own arrays: the buffer is written again while the batch is used."""
        fields = {}
        for name, view in self.views(buffer).items():
            fields[name] = empty(view.shape, view.dtype)
            np.copyto(fields[name], view)
        if not valid.all():
            for values in fields.values():
                values[~valid] = 0
        return fields


# ---- in a decoding process ----------------------------------------------------------------------------------------------


def run_worker(connection: Connection, decoder: Decoder, buffers: _Buffers) -> None:
    inbox, known = Inbox(connection), OrderedDict[Files, Offsets]()
    views = [buffers.views(k) for k in range(buffers.count)]
    while True:
        task: Task = inbox.receive()
        begun = time.perf_counter()
        bad, damaged = [], []
        for row, files, place, draw in task.rows:
            out = {name: view[row, ...] for name, view in views[task.buffer].items()}
            key = ""
            try:
                sample = _offsets(files, known)[place]
                key = sample.key
                found = _decode(decoder, files, sample, draw, out)
            except ShardError as error:
                bad.append((row, key, "offsets", str(error)))
            except BadSample as error:
                bad.append((row, key, error.reason, error.detail))
            else:
                if found is not None:
                    damaged.append((row, key, found))
        connection.send(Result(task.step, len(task.rows), bad, damaged, time.perf_counter() - begun))


def _offsets(files: Files, known: OrderedDict[Files, Offsets]) -> Offsets:
    if files not in known:
        with open(_open(files.offsets, files), "rb") as file:
            file.seek(files.offsets_start)
            there = max(0, os.fstat(file.fileno()).st_size - files.offsets_start)
            content = file.read(min(there, offsets_limit(files.size)))
            known[files] = Offsets(content, f"the offsets file of {files.tar}", files.size)
        if len(known) > KNOWN_SHARDS:
            known.popitem(last=False)
    known.move_to_end(files)
    return known[files]


def _open(path: str, files: Files) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        if files.cache:
            raise gone(Path(files.cache)) from None
        raise


def _decode(decoder: Decoder, files: Files, sample: Sample, draw: float, out: dict[str, np.ndarray]) -> Member | None:
    """Fills `out`; or returns the member whose bytes on the local disk are not the ones that were packed."""
    contents = {}
    file = _open(files.tar, files)
    try:
        for name in decoder.members(list(sample.members), draw):
            member = sample.members[name]
            contents[name] = os.pread(file, member.length, member.offset)
            if len(contents[name]) != member.length or xxh3_64_hexdigest(contents[name]) != member.checksum:
                return member
    finally:
        os.close(file)
    decode(decoder, sample.key, contents, out)
    return None
