"""The order of samples: computed from (fingerprint, seed, epoch, step), never stored. docs/streaming.md says it in words.

position   0 <= P < N, place in the epoch's delivery; step = P // G, slot = P % G
storage    0 <= s < N, place in the epoch's permuted shards laid end to end; N counts copies, where a selection makes some
window     M consecutive shards of that; a window's positions and its storage are the same range of numbers
lane       neighbouring slots; within a window each owns a contiguous part of the storage
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

GOLDEN, MIX_1, MIX_2, WORD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1
SHARDS, LANE, COPIES = 1, 2, 3  # what a permutation is of
COPY = 1 << 40  # added to a sample's id for each further time that it comes in an epoch: its draws are others then
FINE = 1 << 20  # of a copy


class Slots(NamedTuple):
    """Samples of some neighbouring slots of a step. Slots beyond the end of the epoch are absent."""

    shards: np.ndarray  # (b,) int64, numbers in the index
    places: np.ndarray  # (b,) int64, in the shard
    turns: np.ndarray  # (b,) int64, how often the sample came before in this epoch's storage
    windows: tuple[int, int]  # first and last window that they come from


def sample_of(ids: np.ndarray) -> np.ndarray:
    """Strips the copy number from ids; -1 stays -1."""
    return np.where(ids < 0, ids, ids & (COPY - 1))


def share(total: int, part: int, parts: int, unit: int = 1) -> tuple[int, int]:
    """First and one after the last of `part`'s contiguous share of whole units; shares differ by at most one."""
    units = -(-total // unit)
    return units * part // parts * unit, min(units * (part + 1) // parts * unit, total)


@dataclass(frozen=True)
class Order:
    """What the order depends on, beside the epoch."""

    fingerprint: str
    seed: int
    batch: int  # G, samples in a step over all ranks
    lanes: int = 8  # L
    window: int = 16  # M, shards

    def __post_init__(self) -> None:
        for name in ("batch", "lanes", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")

    def key(self, *parts: int) -> int:
        """64 bits of (fingerprint, seed, parts)."""
        key = int(self.fingerprint[:16], 16)
        for part in (self.seed, *parts):
            key = _mix_int(key + GOLDEN ^ (part & WORD))
        return key


class Selection:
    """How often each sample comes in an epoch: not at all, once, or as often as a weight says."""

    def __init__(self, often: np.ndarray):
        """often (samples,), 0 or more: the mean over the epochs. Their sum, rounded, is the length of every epoch."""
        self.often = np.asarray(often, np.float64)
        self.samples = round(float(np.cumsum(self.often)[-1]))  # in one order on every machine
        if self.samples < 1:
            raise ValueError("a selection of no sample")

    def copies(self, key: int, sizes: np.ndarray) -> np.ndarray:
        """-> (samples,) int64. Systematic sampling within each shard: a sample comes as often as its mean says, rounded up or
        down; a shard, too, so that windows have one size in every epoch; and so many in all, exactly."""
        shards = np.repeat(np.arange(len(sizes)), sizes)
        turn, place = permutation(key, len(shards)), permutation(_mix_int(key), len(sizes))
        turn = turn[np.argsort(place[shards[turn]], kind="stable")]  # shard after shard, both in an order of the epoch
        turn = turn[self.often[turn] > 0]
        ends = np.cumsum(self.often[turn])  # one after the other, so that every machine rounds alike
        ends = np.round(ends * (self.samples / ends[-1]) * FINE).astype(np.int64)
        ends = (ends + _mix_int(key) % FINE) // FINE
        copies = np.zeros(len(shards), np.int64)
        copies[turn] = np.diff(ends, prepend=0)
        return copies


class Epoch:
    """The order of one epoch. 12 bytes a shard; with a selection, 16 bytes a sample, too."""

    def __init__(self, order: Order, sizes: np.ndarray, epoch: int, selection: Selection | None = None):
        self.order, self.epoch = order, epoch
        self.permuted = permutation(order.key(epoch, SHARDS), len(sizes)).astype(np.int32)
        self._starts = self._copies = None
        if selection:
            self._starts = np.cumsum(sizes, dtype=np.int64) - sizes  # of shards, in samples
            self._copies = np.concatenate([[0], np.cumsum(selection.copies(order.key(epoch, COPIES), sizes))])
            sizes = np.diff(self._copies[np.append(self._starts, len(self._copies) - 1)])
        self._ends = np.cumsum(sizes[self.permuted], dtype=np.int64)
        self.samples = int(self._ends[-1])
        self.steps = -(-self.samples // order.batch)
        self.windows = -(-len(sizes) // order.window)
        self._lane = lru_cache(maxsize=4 * order.lanes)(self._lane_order)

    def slots(self, step: int, first: int, stop: int) -> Slots:
        """The samples of slots `first` to `stop` of a step, in order."""
        G = self.order.batch
        P = np.arange(step * G + first, min(step * G + stop, self.samples))
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step}: the epoch has {self.steps}")
        storage = np.empty_like(P)
        if not len(P):
            return Slots(storage, storage, storage, (self.windows, -1))
        windows = self.window_of(int(P[0])), self.window_of(int(P[-1]))
        lane = ((P % G + 1) * self.order.lanes - 1) // G
        for w in range(windows[0], windows[1] + 1):
            begin, end = self.bounds(w)
            inside = (begin <= P) & (end > P)
            for number in np.unique(lane[inside]).tolist():
                mine = inside & (lane == number)
                a, b = self._lane_slots(number)
                turn = self._dealt(P[mine], a, b) - self._dealt(
                    begin, a, b
                )  # which of the lane's positions in this window
                storage[mine] = begin + self._dealt_below(begin, end, a) + self._lane(w, number)[turn]
        return Slots(*self._find(storage), windows)

    def needs(self, window: int, first: int, stop: int) -> dict[int, np.ndarray]:
        """What slots `first` to `stop` take from a window: shard -> places in it, ascending, each once. Shards come in storage
        order."""
        G, L = self.order.batch, self.order.lanes
        begin, end = self.bounds(window)
        parts = []
        for number in range(first * L // G if first else 0, L):
            a, b = self._lane_slots(number)
            if b <= first or a == b:
                continue
            if a >= stop:
                break
            base = begin + self._dealt_below(begin, end, a)
            if first <= a and b <= stop:  # the whole lane
                parts.append(np.arange(base, begin + self._dealt_below(begin, end, b)))
                continue
            P = np.arange(begin, end)
            P = P[(a <= P % G) & (b > P % G)]
            parts.append(np.sort(base + self._lane(window, number)[(first <= P % G) & (stop > P % G)]))
        storage = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
        shards, places, _ = self._find(storage)
        if self._copies is not None:  # the first copy may be another process's
            new = np.append(True, (np.diff(shards) != 0) | (np.diff(places) != 0))[: len(shards)]
            shards, places = shards[new], places[new]
        edges = np.flatnonzero(np.diff(shards)) + 1
        return {int(s[0]): p for s, p in zip(np.split(shards, edges), np.split(places, edges), strict=True) if len(s)}

    def next_use(self, shards: np.ndarray, window: int) -> np.ndarray:
        """In how many windows from `window` each shard comes, 0 is now; -1: not any more in this epoch."""
        where = np.empty(len(self.permuted), np.int32)
        where[self.permuted] = np.arange(len(self.permuted), dtype=np.int32)
        ahead = where[shards] // self.order.window - window
        return np.where(ahead < 0, -1, ahead)

    def window_of(self, position: int) -> int:
        return int(np.searchsorted(self._ends, position, side="right")) // self.order.window

    def bounds(self, window: int) -> tuple[int, int]:
        """First and one after the last position (and storage) of a window."""
        M = self.order.window
        begin = int(self._ends[window * M - 1]) if window else 0
        return begin, int(self._ends[min((window + 1) * M, len(self._ends)) - 1])

    def _find(self, storage: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> shards, places, turns."""
        p = np.searchsorted(self._ends, storage, side="right")
        begins = np.where(p > 0, self._ends[p - 1], 0)
        shards, places = self.permuted[p].astype(np.int64), storage - begins
        if self._copies is None or self._starts is None:
            return shards, places, np.zeros_like(places)
        first = self._starts[shards]
        of_all = self._copies[first] + places  # counted over the copies of the whole dataset
        samples = np.searchsorted(self._copies, of_all, side="right") - 1
        return shards, samples - first, of_all - self._copies[samples]

    def _lane_slots(self, lane: int) -> tuple[int, int]:
        return share(self.order.batch, lane, self.order.lanes)

    def _dealt(self, position, a: int, b: int):
        """How many positions below `position` have a slot in a <= slot < b."""
        whole, rest = position // self.order.batch, position % self.order.batch
        return whole * (b - a) + np.clip(rest, a, b) - a

    def _dealt_below(self, begin: int, end: int, slot: int) -> int:
        """How many positions of begin to end have a slot below `slot`: where that slot's lane begins in the window's storage."""
        return int(self._dealt(end, 0, slot) - self._dealt(begin, 0, slot))

    def _lane_order(self, window: int, lane: int) -> np.ndarray:
        begin, end = self.bounds(window)
        a, b = self._lane_slots(lane)
        count = self._dealt_below(begin, end, b) - self._dealt_below(begin, end, a)
        return permutation(self.order.key(self.epoch, LANE, window, lane), count)


def permutation(key: int, count: int) -> np.ndarray:
    """A pseudo-random permutation of range(count), int64. Keys in the high bits, numbers in the low, one sort in place."""
    if count == 0:
        return np.empty(0, np.int64)
    low = np.uint64((1 << max(1, (count - 1).bit_length())) - 1)
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64)
        x += np.uint64(1)
        x *= np.uint64(GOLDEN)
        x += np.uint64(key)
        for shift, factor in ((30, MIX_1), (27, MIX_2)):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(factor)
        x ^= x >> np.uint64(31)
    x &= ~low
    x |= np.arange(count, dtype=np.uint64)
    x.sort()
    x &= low
    return x.view(np.int64)


def _mix_int(x: int) -> int:
    x &= WORD
    x = ((x ^ (x >> 30)) * MIX_1) & WORD
    x = ((x ^ (x >> 27)) * MIX_2) & WORD
    return x ^ (x >> 31)
