"""Pure arithmetic: the order of samples, for every number of ranks, lanes, windows, and any shard sizes."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from streaming import Epoch, Order, Selection
from streaming.order import COPY, permutation, sample_of, share
from tests.forks import APART

FINGERPRINT = "5f" * 32


def random_epoch(rng, epoch=None):
    sizes = rng.integers(1, 30, rng.integers(1, 25)).astype(np.int32)
    order = Order(FINGERPRINT, 5, int(rng.integers(1, 40)), int(rng.integers(1, 12)), int(rng.integers(1, 9)))
    return Epoch(order, sizes, int(rng.integers(0, 5)) if epoch is None else epoch), sizes


def pairs(slots):
    return list(zip(slots.shards.tolist(), slots.places.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(50))
def test_every_sample_once_and_only_the_last_step_is_short(seed):
    epoch, sizes = random_epoch(np.random.default_rng(seed))
    G, N = epoch.order.batch, int(sizes.sum())
    steps = [pairs(epoch.slots(k, 0, G)) for k in range(epoch.steps)]
    assert [len(s) for s in steps[:-1]] == [G] * (epoch.steps - 1)
    assert len(steps[-1]) == N - G * (epoch.steps - 1) > 0
    everything = [pair for step in steps for pair in step]
    assert sorted(everything) == [(s, p) for s, size in enumerate(sizes) for p in range(size)]


@pytest.mark.parametrize("seed", range(50))
def test_ranks_take_contiguous_parts_of_the_same_steps(seed):
    rng = np.random.default_rng(seed)
    epoch, _ = random_epoch(rng)
    G = epoch.order.batch
    for W in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64):
        parts = [share(G, r, W) for r in range(W)]
        assert {b - a for a, b in parts} <= {G // W, G // W + 1}
        for k in range(epoch.steps):
            assert [pair for a, b in parts for pair in pairs(epoch.slots(k, a, b))] == pairs(epoch.slots(k, 0, G))


@pytest.mark.parametrize(("G", "unit"), [(64, 8), (61, 8), (7, 2), (5, 8), (256, 32)])
def test_units_stay_together(G, unit):
    for W in range(1, 10):
        parts = [share(G, r, W, unit) for r in range(W)]
        assert [k for a, b in parts for k in range(a, b)] == list(range(G))
        assert all(a % unit == 0 for a, b in parts if a < b)
        counts = [-(-(b - a) // unit) for a, b in parts]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("seed", range(50))
def test_needs_are_what_the_slots_take(seed):
    rng = np.random.default_rng(seed)
    epoch, _ = random_epoch(rng)
    W = int(rng.integers(1, 12))
    for r in range(W):
        first, stop = share(epoch.order.batch, r, W)
        needed = [
            (s, p)
            for w in range(epoch.windows)
            for s, places in epoch.needs(w, first, stop).items()
            for p in places.tolist()
        ]
        taken = [pair for k in range(epoch.steps) for pair in pairs(epoch.slots(k, first, stop))]
        assert sorted(needed) == sorted(taken)
        for k in range(epoch.steps):
            slots = epoch.slots(k, first, stop)
            within = [epoch.needs(w, first, stop) for w in range(slots.windows[0], slots.windows[1] + 1)]
            assert all(any(p in need.get(s, []) for need in within) for s, p in pairs(slots))


def selected(rng, epoch):
    """An epoch with a selection, and the selection."""
    sizes = rng.integers(1, 30, rng.integers(1, 25)).astype(np.int32)
    often = rng.random(sizes.sum()) ** 4 * 3 * (rng.random(sizes.sum()) < 0.7)
    often[rng.integers(len(often))] = 1.5
    order = Order(FINGERPRINT, 5, int(rng.integers(1, 40)), int(rng.integers(1, 12)), int(rng.integers(1, 9)))
    return Epoch(order, sizes, epoch, Selection(often)), sizes, often


@pytest.mark.parametrize("seed", range(50))
def test_a_selection_gives_each_sample_as_often_as_it_says_rounded_up_or_down(seed):
    epoch, sizes, often = selected(np.random.default_rng(seed), seed % 3)
    steps = [epoch.slots(k, 0, epoch.order.batch) for k in range(epoch.steps)]
    starts = np.cumsum(sizes) - sizes
    came = np.concatenate([starts[s.shards] + s.places for s in steps])
    turns = np.concatenate([s.turns for s in steps])
    assert len(came) == epoch.samples == round(often.sum())
    copies = np.bincount(came, minlength=len(often))
    scaled = often * (epoch.samples / often.sum())
    assert (np.floor(scaled - 1e-4) <= copies).all()
    assert (copies <= np.ceil(scaled + 1e-4)).all()
    assert not copies[often == 0].any()
    assert sorted(zip(came, turns, strict=True)) == [(k, t) for k, n in enumerate(copies) for t in range(n)]
    of_shards = np.add.reduceat(copies, starts) - np.add.reduceat(scaled, starts)
    assert np.abs(of_shards).max() < 1 + 1e-4


def test_a_selection_is_what_it_says_in_the_mean_and_other_samples_in_other_epochs():
    rng = np.random.default_rng(0)
    sizes = np.full(10, 8, np.int32)
    often = rng.random(80) * 1.5
    selection, order = Selection(often), Order(FINGERPRINT, 5, 16)
    mean, first = np.zeros(80), []
    for e in range(400):
        epoch = Epoch(order, sizes, e, selection)
        steps = [epoch.slots(k, 0, 16) for k in range(epoch.steps)]
        came = np.concatenate([s.shards * 8 + s.places for s in steps])
        mean += np.bincount(came, minlength=80) / 400
        first.append(tuple(sorted(came.tolist())))
    assert np.abs(mean - often * (selection.samples / often.sum())).max() < 0.12
    assert len(set(first)) > 390


@pytest.mark.parametrize("seed", range(30))
def test_ranks_share_what_is_selected_and_need_what_they_take(seed):
    rng = np.random.default_rng(seed)
    epoch, _, _ = selected(rng, 1)
    G, W = epoch.order.batch, int(rng.integers(1, 9))
    everything = [
        tuple(zip(*map(np.ndarray.tolist, epoch.slots(k, 0, G)[:3]), strict=True)) for k in range(epoch.steps)
    ]
    shared = [
        [
            one
            for r in range(W)
            for one in zip(*map(np.ndarray.tolist, epoch.slots(k, *share(G, r, W))[:3]), strict=True)
        ]
        for k in range(epoch.steps)
    ]
    assert [list(step) for step in everything] == shared
    for r in range(W):
        first, stop = share(G, r, W)
        for k in range(epoch.steps):
            slots = epoch.slots(k, first, stop)
            within = [epoch.needs(w, first, stop) for w in range(slots.windows[0], slots.windows[1] + 1)]
            assert all(any(p in need.get(s, []) for need in within) for s, p in pairs(slots))
            assert all((np.diff(places) > 0).all() for need in within for places in need.values())


def test_any_two_shards_can_come_together():
    """Of one-sample shards half of the epochs' samples: not always the same half."""
    order, selection = Order(FINGERPRINT, 5, 8), Selection(np.full(40, 0.5))
    epochs = [Epoch(order, np.ones(40, np.int32), e, selection) for e in range(200)]
    came = [frozenset(np.concatenate([e.slots(k, 0, 8).shards for k in range(e.steps)]).tolist()) for e in epochs]
    assert len(set(came)) == 200
    together = sum(np.outer(row, row) for row in ([[k in c for k in range(40)] for c in came]))
    assert together.min() > 20  # of 200; a quarter is to be expected


def test_one_of_each_is_no_selection():
    sizes = np.array([3, 1, 4, 1, 5], np.int32)
    order = Order(FINGERPRINT, 1, 4, 2, 2)
    plain, chosen = Epoch(order, sizes, 3), Epoch(order, sizes, 3, Selection(np.ones(14)))
    for k in range(plain.steps):
        assert pairs(plain.slots(k, 0, 4)) == pairs(chosen.slots(k, 0, 4))
    with pytest.raises(ValueError, match="no sample"):
        Selection(np.zeros(14))


def test_ids_tell_copies_apart_and_samples_together():
    assert sample_of(np.array([-1, 7, 7 + COPY, 7 + 5 * COPY])).tolist() == [-1, 7, 7, 7]


@pytest.mark.parametrize("W", [1, 2, 4, 8])
def test_while_ranks_read_whole_lanes_they_share_at_most_the_shards_at_their_edges(W):
    epoch = Epoch(Order(FINGERPRINT, 0, 64, lanes=8, window=8), np.full(40, 100, np.int32), 0)
    for w in range(epoch.windows):
        needs = [epoch.needs(w, *share(64, r, W)) for r in range(W)]
        assert sum(len(need) for need in needs) <= 8 + W - 1
        assert all(
            np.array_equal(p, np.arange(p[0], p[-1] + 1)) for need in needs for p in need.values()
        )  # runs, not scattered samples


def test_order_depends_on_each_of_its_inputs_and_on_nothing_else():
    sizes = np.full(20, 10, np.int32)

    def order(fingerprint=FINGERPRINT, seed=1, epoch=0, **arguments):
        e = Epoch(Order(fingerprint, seed, 16, **arguments), sizes, epoch)
        return [pair for k in range(e.steps) for pair in pairs(e.slots(k, 0, 16))]

    one = order()
    assert order() == one
    for other in (order("60" * 32), order(seed=2), order(epoch=1), order(lanes=4), order(window=4)):
        assert other != one
        assert sorted(other) == sorted(one)


def test_order_is_the_same_in_another_process():
    program = (
        "import numpy as np; from streaming import Epoch, Order; "
        "e = Epoch(Order('5f' * 32, 3, 7), np.arange(1, 30), 2); "
        "print([[x.tolist() for x in e.slots(k, 0, 7)[:2]] for k in range(e.steps)])"
    )
    here = Epoch(Order(FINGERPRINT, 3, 7), np.arange(1, 30), 2)
    mine = [[x.tolist() for x in here.slots(k, 0, 7)[:2]] for k in range(here.steps)]
    assert subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.strip() == str(mine)


GOLDEN = [
    [(1, 2), (1, 3), (3, 0), (3, 2), (3, 1)],
    [(1, 0), (1, 1), (3, 4), (3, 3), (0, 2)],
    [(0, 1), (0, 0), (2, 1), (2, 0)],
]


def test_the_order_of_a_fixed_case_never_changes():
    """Runs in progress depend on it: a change here is a change of every run's result."""
    epoch = Epoch(Order(FINGERPRINT, 3, 5, lanes=2, window=2), np.array([3, 4, 2, 5], np.int32), 1)
    assert [pairs(epoch.slots(k, 0, 5)) for k in range(epoch.steps)] == GOLDEN


def test_ten_thousand_kills_and_resizes_lose_nothing_and_repeat_nothing():
    """A run is killed at random and goes on from its last checkpoint, with another number of ranks."""
    rng = random.Random(0)
    kills = 0
    while kills < 10_000:
        epoch, sizes = random_epoch(np.random.default_rng(rng.randrange(2**32)))
        G, done, kept = epoch.order.batch, 0, []
        while done < epoch.steps:
            W = rng.choice([1, 1, 2, 3, 4, 5, 6, 7, 8, 9, rng.choice([16, 64])])
            ran = rng.randint(1, 3)
            for k in range(done, min(done + ran, epoch.steps)):
                kept.append([pair for r in range(W) for pair in pairs(epoch.slots(k, *share(G, r, W)))])
            killed_before = rng.randint(0, ran)  # steps since the checkpoint are lost and done again
            kept = kept[: done + killed_before]
            done, kills = len(kept), kills + 1
        assert sorted(pair for step in kept for pair in step) == [
            (s, p) for s, size in enumerate(sizes) for p in range(size)
        ]


def test_permutations_are_permutations_and_look_random():
    for count in (0, 1, 2, 3, 255, 256, 257, 1000):
        assert sorted(permutation(count, count).tolist()) == list(range(count))
    first = np.array([permutation(key, 16)[0] for key in range(4000)])
    assert np.abs(np.bincount(first, minlength=16) - 250).max() < 5 * 250**0.5
    x = permutation(1, 100_000)
    assert abs(np.corrcoef(x, np.arange(len(x)))[0, 1]) < 0.02
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.02


def test_next_use_counts_windows():
    epoch = Epoch(Order(FINGERPRINT, 0, 8, window=3), np.full(12, 10, np.int32), 0)
    uses = epoch.next_use(np.arange(12), 2)
    for w in range(4):
        for shard in epoch.needs(w, 0, 8):
            assert uses[shard] == (w - 2 if w >= 2 else -1)


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("lanes", 0), ("window", -1)])
def test_impossible_orders_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Order(**{"fingerprint": FINGERPRINT, "seed": 0, "batch": 1, name: value})


def test_steps_outside_the_epoch_are_refused():
    epoch = Epoch(Order(FINGERPRINT, 0, 8), np.full(2, 8, np.int32), 0)
    with pytest.raises(IndexError, match="has 2"):
        epoch.slots(2, 0, 8)


def test_a_billion_samples():
    """Planned in little memory (the benchmark says in how much time). Two million shards, as large as the default makes them."""
    program = """if True:
        import numpy as np
        from tests.memory import peak
        from streaming import Epoch, Order
        from streaming.order import share
        sizes = np.full(2_000_000, 500, np.int32)
        before = peak()
        epoch = Epoch(Order("5f" * 32, 0, 65536, lanes=256, window=2048), sizes, 3)
        slots = epoch.slots(epoch.steps - 1, *share(65536, 0, 256))
        assert len(slots.shards) == 256 and epoch.samples == 10**9
        print((peak() - before) / 2**20)
    """
    grown = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **APART}, capture_output=True, text=True, check=True
    ).stdout
    assert 0 < float(grown) < 64
