"""The watch ends what no longer moves, whatever the disk and the terminal do, and asks little of the store for it."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from torch.distributed import HashStore

from equiav.train.watch import Beat, Watch
from tests.train.test_pretrain import ENV

STALLED = """
import ctypes, sys, threading, time
from pathlib import Path
from equiav.parallel import Ranks
from equiav.train.watch import Watch

def tell(message):
    print(message, flush=True)
    time.sleep(1000)  # a terminal that nobody reads

watch = Watch(Ranks("cpu"), Path(sys.argv[1]), 1.0, 0.0, tell)
watch.begun()
watch.at(3, "computes")
if sys.argv[2] == "holds the interpreter":
    ctypes.PyDLL(None).sleep(1000)
time.sleep(1000)
"""

DISKS = {
    "fine": (lambda folder: None, 145),
    "a file in the way": (lambda folder: folder.write_text(""), 145),
    "no place for the file": (lambda folder: (folder / "rank-0.txt").mkdir(parents=True), 145),
    "a disk that hangs": (lambda folder: (folder.mkdir(), os.mkfifo(folder / "rank-0.txt")), 145),
    "holds the interpreter": (lambda folder: None, 1),
}


@pytest.mark.parametrize("disk", DISKS)
def test_ending_cannot_be_prevented(tmp_path, disk):
    prepare, status = DISKS[disk]
    prepare(tmp_path / "stalls")
    done = subprocess.run(
        [sys.executable, "-c", STALLED, str(tmp_path / "stalls"), disk],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    if status == 145:
        assert "the run has stalled: rank(s) [0] have not moved for" in done.stdout
    if disk == "fine":
        assert "step 3, computes" in (tmp_path / "stalls" / "rank-0.txt").read_text()


class Others:
    """Of a group's ranks, as far as the watch asks."""

    def __init__(self, rank, size, store):
        self.rank, self.size, self.store = rank, size, store


class Counting:
    """A store that counts what is asked of it."""

    def __init__(self):
        self.store, self.counts, self.lock = HashStore(), Counter(), threading.Lock()

    def __getattr__(self, name):
        def ask(*arguments):
            with self.lock:
                self.counts[name] += 1
            return getattr(self.store, name)(*arguments)

        return ask


def test_beats_are_few_and_everyone_hears_the_verdict(tmp_path, monkeypatch):
    """60 ranks, each with a watch that runs; rank 41 says nothing."""
    size, store, ended = 60, Counting(), {}
    monkeypatch.setattr(Watch, "_leave", lambda self, status, message, problem="": ended.setdefault(self, message))
    watches = [Watch(Others(rank, size, store), tmp_path, 8.0, 0.0, print) for rank in range(size)]
    try:
        assert watches[0]._pause == 1.0
        for watch in watches:
            watch.begun()
        watches[41].end()
        time.sleep(1)
        store.counts.clear()
        begun = time.monotonic()
        for k in range(20):
            for watch in watches:
                watch.at(k, "computes")
            time.sleep(0.2)
        seconds = time.monotonic() - begun
        assert sum(store.counts.values()) < 3.5 * size * (seconds + 1)  # and not the square of the ranks
        deadline = time.monotonic() + 60
        while len(ended) < size - 1:
            assert time.monotonic() < deadline, len(ended)
            for watch in watches:
                watch.at(20, "computes")
            time.sleep(0.1)
    finally:
        for watch in watches:
            watch.end()
    assert all("rank(s) [41] no longer say anything" in message for message in ended.values())
    told = watches[7]._told
    assert sorted(told) == list(range(size))


def test_rank_0_that_is_silent_is_noticed_by_the_others(tmp_path, monkeypatch):
    store, ended = HashStore(), {}
    monkeypatch.setattr(Watch, "_leave", lambda self, status, message, problem="": ended.setdefault(self, message))
    watches = [Watch(Others(rank, 3, store), tmp_path, 2.0, 0.0, print) for rank in range(3)]
    try:
        for watch in watches:
            watch.begun()
        watches[0].end()
        deadline = time.monotonic() + 30
        while len(ended) < 2:
            assert time.monotonic() < deadline
            for watch in watches:
                watch.at(20, "computes")
            time.sleep(0.1)
    finally:
        for watch in watches:
            watch.end()
    assert all("rank(s) [0] no longer say anything" in message for message in ended.values())


def test_who_waits_for_the_device_waits_for_others(tmp_path):
    """On a GPU, the host waits for what is queued, and that for other ranks: code of torch's own file, with a stand-in for
    the wait."""
    watch = Watch(Others(0, 1, None), tmp_path, 0.0, 0.0, print)
    seen = []
    path = torch.cuda.streams.__file__
    assert path.endswith("torch/cuda/streams.py")
    code = compile("def synchronize(wait):\n    wait()\n", path, "exec")
    stand_in = {}
    exec(code, stand_in)
    stand_in["synchronize"](lambda: seen.append(watch._waits()))
    assert seen == [True]
    assert not watch._waits()


def test_the_rank_that_is_behind_is_named(tmp_path):
    watch = Watch(Others(0, 4, HashStore()), tmp_path, 0.0, 0.0, print)
    watch.seconds = 5.0

    def heard(*beats):
        for rank, (step, phase, seconds) in enumerate(beats):
            watch._hear(rank, Beat(step, phase, seconds, number=time.monotonic_ns()))
        return watch._problem()

    waits = (7, "waits for others", 6.0)
    assert heard(waits, waits, (7, "computes", 6.0), waits) == "rank(s) [2] have not moved for 6 s: step 7, computes"
    assert heard(waits, waits, (7, "computes", 1.0), waits) == ""
    assert "rank(s) [1] have not moved" in heard(waits, (6, "waits for others", 6.0), waits, waits)
    watch.patience = 100.0
    assert heard(waits, waits, (7, "waits for data", 6.0), waits) == ""
    assert "rank(s) [2] have not moved" in heard(waits, waits, (7, "computes", 6.0), waits)
    assert json.loads(json.dumps(Beat(1, "computes", 0.5, 2))) == [1, "computes", 0.5, 2]


def test_a_first_step_may_take_longer_where_it_compiles(tmp_path):
    for compiles, allowed in ((False, 5.0), (True, 3600.0)):
        watch = Watch(Others(0, 1, None), tmp_path, 0.0, 5.0, print, compiles)
        watch.seconds = 1.0
        for seconds, stalled in ((allowed, False), (allowed + 2, True)):
            watch.at(0, "computes")
            watch._hear(0, Beat(0, watch._at[1], seconds, number=time.monotonic_ns()))
            assert bool(watch._problem()) is stalled, (compiles, seconds)
        watch.begun()
        watch.at(1, "computes")
        watch._hear(0, Beat(1, watch._at[1], 2.0, number=time.monotonic_ns()))
        assert watch._problem()


def test_an_upload_beside_a_hang_says_nothing_of_it(tmp_path):
    watch = Watch(Others(0, 1, None), tmp_path, 0.0, 100.0, print)
    watch.begun()
    for phase, moves in (("computes", False), ("saves", True), ("waits for data", True)):
        watch.at(5, phase)
        since = watch._at[2]
        time.sleep(0.01)
        watch.moved()
        assert (watch._at[2] > since) is moves, phase
