"""The stream as its users see it: the same batches whatever happens, every sample once, nothing wrong delivered."""

import gc
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_hexdigest

from streaming import (
    Bad,
    BadSample,
    CacheError,
    CacheGone,
    ChildDied,
    Dataset,
    DatasetError,
    Epoch,
    Loader,
    Order,
    Selection,
    Store,
)
from streaming import loader as loader_module
from streaming.dataset import encode_index
from streaming.fetch import Fetcher, FetchSettings, Files
from streaming.order import COPY, sample_of, share
from streaming.shards import Offsets
from tests.streaming.fault_proxy import FaultProxy
from tests.streaming.toys import FRAMES, ToyDecoder, content, make_dataset, open_loader, take, toy_draw

EPOCH = 13  # steps of 8 in 103 samples


def ids(batches):
    return [batch.samples.tolist() for batch in batches]


def global_steps(url, W, count, start=0, **arguments):
    """The steps of all ranks, put together."""
    parts = []
    for rank in range(W):
        with open_loader(url, rank=rank, ranks=W, **arguments) as loader:
            parts.append(take(loader, count, start))
    for rows in zip(*parts, strict=True):
        assert len({(b.epoch, b.step) for b in rows}) == 1
    return [
        {
            "samples": np.concatenate([b.samples for b in rows]).tolist(),
            "frames": np.concatenate([b.fields["frame"] for b in rows]).tolist(),
            "numbers": np.concatenate([b.fields["number"] for b in rows]).tolist(),
            "valid": np.concatenate([b.valid for b in rows]).tolist(),
        }
        for rows in zip(*parts, strict=True)
    ]


@pytest.fixture(scope="module")
def reference(local):
    return global_steps(local, 1, 2 * EPOCH)


def test_every_sample_of_an_epoch_comes_once_and_is_itself(local):
    with open_loader(local) as loader:
        assert loader.steps_per_epoch == EPOCH
        for epoch in (0, 1):
            batches = take(loader, EPOCH, start=epoch * EPOCH)
            assert [(b.epoch, b.step) for b in batches] == [(epoch, k) for k in range(EPOCH)]
            seen = [int(s) for b in batches for s in b.samples[b.valid]]
            assert sorted(seen) == list(range(103))
            for b in batches:
                draws = toy_draw(epoch, b.samples)
                for row in np.flatnonzero(b.valid):
                    assert b.fields["number"][row] == b.samples[row]
                    assert b.fields["frame"][row] == int(draws[row] * FRAMES)
                    expected = content(f"s{b.samples[row]:05d}", b.fields["frame"][row])
                    assert bytes(b.fields["bytes"][row]) == expected
            last = batches[-1]
            assert last.valid.tolist() == [True] * 7 + [False]
            assert last.samples[-1] == -1
            assert not last.fields["bytes"][-1].any()


@pytest.mark.parametrize("W", [2, 3, 4, 5, 6, 7, 8, 9, 16, 64])
def test_any_number_of_ranks_delivers_the_same_steps(local, reference, W):
    assert global_steps(local, W, EPOCH + 2) == reference[: EPOCH + 2]


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_any_number_of_processes_delivers_the_same_steps(local, reference, workers):
    assert global_steps(local, 1, EPOCH, workers=workers) == reference[:EPOCH]


def test_a_remote_dataset_delivers_the_same_steps(remote, reference, tmp_path):
    url, options = remote
    assert global_steps(url, 1, EPOCH + 2, cache=tmp_path / "a", options=options) == reference[: EPOCH + 2]
    assert global_steps(url, 3, EPOCH + 2, cache=tmp_path / "b", options=options) == reference[: EPOCH + 2]
    assert global_steps(url, 2, EPOCH, cache=tmp_path / "c", options=options, workers=2) == reference[:EPOCH]


@pytest.mark.parametrize("start", [1, 5, 12, 13, 20])
def test_resuming_is_arithmetic(local, reference, start):
    assert global_steps(local, 2, 5, start=start) == reference[start : start + 5]


def test_a_loader_can_be_iterated_again(local, reference):
    with open_loader(local) as loader:
        for start in (3, 0, 7):
            assert ids(take(loader, 3, start)) == [step["samples"] for step in reference[start : start + 3]]


def test_batches_stay_as_they_are_while_others_are_made(local):
    with open_loader(local) as loader:
        batches = loader.batches()
        first = next(batches)
        before = first.fields["bytes"].copy()
        for _ in range(8):
            next(batches)
        assert (first.fields["bytes"] == before).all()


# ---- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("W", [1, 2, 3, 4, 8])
def test_each_byte_is_fetched_at_most_once_an_epoch_by_the_whole_job(remote, s3, tmp_path, W):
    """Every rank with a disk of its own; ranks cut shards, and W = 3 and 8 cut lanes."""
    url, options = remote
    dataset = Dataset(Store(url, options=options), tmp_path)
    epoch = Epoch(Order(dataset.fingerprint, 1, 8, lanes=2, window=2), dataset.sizes, 0)
    proxy = FaultProxy(s3.port)
    needed = hedged = 0
    for rank in range(W):
        slots = share(8, rank, W)
        needed += sum(len(places) for w in range(epoch.windows) for places in epoch.needs(w, *slots).values())
        # So far that the last window is fetched, and not yet the first of the next epoch:
        steps = sum(0 <= epoch.slots(k, *slots).windows[1] < epoch.windows - 1 for k in range(epoch.steps))
        steps -= not epoch.needs(epoch.windows - 1, *slots)
        with open_loader(url, tmp_path / str(rank), options=proxy.options(), rank=rank, ranks=W, ahead=0) as loader:
            loader._hold = 2
            batches = loader.batches()
            for _ in range(steps):
                next(batches)
            last = loader._windows.get((0, epoch.windows - 1))
            while last and last.files is None:
                loader._receive()
            assert (1, 0) not in loader._windows
            hedged += loader.stats().fetch["hedged"]  # asked for again where a busy machine was slow
            batches.close()
    proxy.close()
    reads = {}
    for request in proxy.log:
        if request.method == "GET" and request.path.endswith(".tar"):
            reads.setdefault(request.path, []).append((request.start, request.stop))
    assert needed == 103
    assert len(reads) == 11
    twice = sum(len(ranges) - len(set(ranges)) for ranges in reads.values())
    assert twice <= hedged
    for ranges in reads.values():
        assert all(later[0] >= earlier[1] for earlier, later in pairwise(sorted(set(ranges))))


def test_a_second_epoch_comes_from_the_cache(remote, tmp_path):
    url, options = remote
    with open_loader(url, tmp_path, options=options) as loader:
        take(loader, 3 * EPOCH)
        time.sleep(1.2)
        take(loader, 1)
        stats = loader.stats()
    assert stats.fetch["misses"] == 11
    assert stats.fetch["hits"] >= 22
    assert stats.fetch["requests"] == 22  # a shard and its offsets, each once
    assert sum(stats.decoded) >= 3 * 103
    assert stats.wait_seconds > 0


def test_a_cache_of_two_windows_is_enough_and_never_exceeded(remote, tmp_path):
    url, options = remote
    with pytest.raises(CacheError, match=r"cache_bytes is 1000, expected (\d+) or more") as error:
        open_loader(url, tmp_path, options=options, cache_bytes=1000)
    needed = int(re.search(r"expected (\d+)", str(error.value))[1])
    limit = min(needed, 8 * 72_000)  # shards of 61 kB, windows of two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "_check_room", lambda *_: None)
        loader = open_loader(url, tmp_path, options=options, cache_bytes=limit)
    with loader:
        batches = loader.batches()
        seen = []
        for _ in range(3 * EPOCH):
            seen += next(batches).samples.tolist()
            used = sum(p.stat().st_blocks * 512 for p in tmp_path.rglob("*") if p.is_file())
            assert used <= limit
    assert sorted(s for s in seen if s >= 0) == sorted([*range(103)] * 3)


# ---- what can go wrong --------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(local, tmp_path):
    """A copy of the dataset, to be damaged: (folder, offsets of a shard)."""
    folder = tmp_path / "damaged"
    shutil.copytree(local, folder)
    return folder


def offsets_of(folder, shard):
    return Offsets((folder / f"{shard}.offsets").read_bytes(), shard, (folder / shard).stat().st_size)


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def serve(s3, folder, bucket):
    """-> the URL of a copy of the folder on S3, once the server sees it: it looks at its disk every tenth of a second."""
    shutil.copytree(folder, s3.folder / bucket / "toys")
    time.sleep(0.3)
    return f"s3://{bucket}/toys"


def run_epoch(url, **arguments):
    """sample -> why it could not be used, in epoch 0."""
    with open_loader(str(url), **arguments) as loader:
        batches = take(loader, EPOCH)
    for b in batches:
        assert not b.fields["bytes"][~b.valid].any()
        assert [one.sample for one in b.bad] == [s for s in b.samples[~b.valid].tolist() if s >= 0]
    bad = {one.sample: one for b in batches for one in b.bad}
    delivered = [int(s) for b in batches for s in b.samples[b.valid]]
    assert sorted([*delivered, *bad]) == list(range(103))  # delivered + bad = total, always
    return bad


def reasons(bad):
    return {sample: one.reason for sample, one in bad.items()}


def test_a_flipped_bit_is_bad_and_only_its_sample(damaged):
    for extension in ("0.bin", "1.bin", "2.bin"):
        flip(damaged / "000003-00.tar", offsets_of(damaged, "000003-00.tar")[4].members[extension].offset + 100)
    (bad,) = run_epoch(damaged).values()
    assert (bad.sample, bad.reason) == (34, "checksum")
    assert bad.where == f"{damaged}/000003-00.tar, sample 4 (s00034)"
    assert "000003-00.tar have not the checksum" in bad.detail


def test_a_fetcher_that_was_closed_says_nothing_more(damaged):
    """Its threads may still be at work, and the number of its connection be that of another file."""
    ours, theirs = multiprocessing.Pipe()
    fetcher = Fetcher(theirs, FetchSettings(str(damaged), "folder", None, 0, 5.0))
    fetcher.send("stats", 1)
    sending = threading.Thread(target=lambda: [fetcher.send("stats", k) for k in range(100)])
    sending.start()
    fetcher.close()
    read, write = os.pipe()
    os.dup2(write, theirs.fileno())  # whoever comes next
    sending.join()
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    fetcher._guarded(lambda: 1 / 0)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    assert ours.recv() == ("stats", 1)


def verdicts(url, W, count, start=0, **arguments):
    """Of all ranks: (epoch, step, sample) -> what is bad about it, or None; and the number of rows that are valid."""
    found, valid = {}, 0
    for rank in range(W):
        with open_loader(url, rank=rank, ranks=W, **{"patience": 1, **arguments}) as loader:
            for b in take(loader, count, start):
                bad = {one.sample: one for one in b.bad}
                found |= {(b.epoch, b.step, s): bad.get(s) for s in b.samples.tolist() if s >= 0}
                assert [s for s in b.samples[~b.valid].tolist() if s >= 0] == [one.sample for one in b.bad]
                valid += int(b.valid.sum())
    return found, valid


@pytest.mark.slow
def test_whether_a_sample_can_be_used_depends_on_its_bytes_and_its_draw_alone(damaged, s3, tmp_path):
    """Of ten samples in a row, five have one or two damaged frames of three: in one epoch they can be used and in another not."""
    for sample in range(0, 103, 2):
        offsets = offsets_of(damaged, f"{sample // 10:06d}-00.tar")[sample % 10]
        for frame in {sample % 3, sample // 10 % 3}:
            flip(damaged / f"{sample // 10:06d}-00.tar", offsets.members[f"{frame}.bin"].offset + 9)
    whole, valid = verdicts(str(damaged), 1, 3 * EPOCH)
    unusable = {key for key, bad in whole.items() if bad}
    by_epoch = [{s for e, _, s in unusable if e == epoch} for epoch in range(3)]
    for epoch, bad in enumerate(by_epoch):
        frames = (toy_draw(epoch, np.arange(103)) * FRAMES).astype(int)
        assert bad == {s for s in range(0, 103, 2) if frames[s] in (s % 3, s // 10 % 3)}
    assert by_epoch[0] - by_epoch[1]
    assert by_epoch[1] - by_epoch[0]
    assert valid + len(unusable) == 3 * 103
    for W, ahead in ((1, 0), (2, 3), (3, 1)):
        assert verdicts(str(damaged), W, 3 * EPOCH, ahead=ahead) == (whole, valid)
    for start in range(1, 2 * EPOCH, 5):
        count = EPOCH + 2
        steps = {divmod(k, EPOCH) for k in range(start, start + count)}
        after, _ = verdicts(str(damaged), 2, count, start)
        assert after == {key: bad for key, bad in whole.items() if key[:2] in steps}
    url = serve(s3, damaged, "partly")
    for W in (1, 3):
        arguments = {"options": s3.options, "cache": tmp_path / f"cache{W}", "patience": 5}
        remote, _ = verdicts(url, W, 2 * EPOCH, **arguments)
        assert {key: (bad and bad.reason) for key, bad in remote.items()} == {
            key: (bad and bad.reason) for key, bad in whole.items() if key[0] < 2
        }


def test_a_bit_in_a_member_that_is_not_used_does_no_harm(damaged):
    """Epoch 0 reads one of the three frames."""
    frame = int(toy_draw(0, np.array([34]))[0] * FRAMES)
    other = (frame + 1) % FRAMES
    flip(damaged / "000003-00.tar", offsets_of(damaged, "000003-00.tar")[4].members[f"{other}.bin"].offset)
    assert run_epoch(damaged) == {}


def test_of_a_truncated_shard_the_whole_samples_are_delivered(damaged):
    offsets = offsets_of(damaged, "000005-00.tar")
    os.truncate(damaged / "000005-00.tar", offsets[7].members["json"].offset + 3)
    assert reasons(run_epoch(damaged)) == dict.fromkeys([57, 58, 59], "shard truncated")


def test_the_same_from_a_store(damaged, s3, tmp_path):
    offsets = offsets_of(damaged, "000005-00.tar")
    os.truncate(damaged / "000005-00.tar", offsets[7].members["json"].offset + 3)
    (damaged / "000001-00.tar").unlink()
    flip(damaged / "000003-00.tar", offsets_of(damaged, "000003-00.tar")[4].members["json"].offset)
    flip(damaged / "000008-00.tar.offsets", 30)
    url = serve(s3, damaged, "damaged")
    expected = (
        dict.fromkeys(range(10, 20), "shard missing")
        | dict.fromkeys([57, 58, 59], "shard truncated")
        | {34: "checksum"}
        | dict.fromkeys(range(80, 90), "offsets damaged")
    )
    arguments = {"options": s3.options, "cache": tmp_path / "cache", "patience": 5}
    assert reasons(run_epoch(url, **arguments)) == expected
    assert reasons(run_epoch(url, workers=2, **arguments)) == expected
    for rank in range(3):  # and the same samples, whoever meets them
        with open_loader(url, rank=rank, ranks=3, **arguments) as loader:
            batches = take(loader, EPOCH)
            bad = {int(s) for b in batches for s in b.samples[~b.valid] if s >= 0}
            assert bad == set(expected) & {int(s) for b in batches for s in b.samples}


def test_a_missing_shard_and_missing_offsets_are_bad(damaged):
    (damaged / "000001-00.tar").unlink()
    (damaged / "000002-00.tar.offsets").unlink()
    expected = dict.fromkeys(range(10, 20), "shard missing") | dict.fromkeys(range(20, 30), "offsets missing")
    assert reasons(run_epoch(damaged)) == expected


def test_what_the_decoder_refuses_is_bad(local):
    class Picky(ToyDecoder):
        def decode(self, key, members, out):
            if key == "s00034":
                raise BadSample("picky", "not this one")
            super().decode(key, members, out)

    dataset = Dataset(Store(local))
    with Loader(dataset, Order(dataset.fingerprint, 1, 8), Picky(), workers=0) as loader:
        bad = [one for batch in take(loader, EPOCH) for one in batch.bad]
    assert bad == [Bad(34, "picky", f"{local}/000003-00.tar, sample 4 (s00034)", "not this one")]


def test_what_is_whole_again_is_used_again(damaged):
    place = offsets_of(damaged, "000003-00.tar")[4].members["json"].offset
    flip(damaged / "000003-00.tar", place)
    assert reasons(run_epoch(damaged)) == {34: "checksum"}
    flip(damaged / "000003-00.tar", place)
    assert run_epoch(damaged) == {}


def test_damage_on_the_local_disk_is_repaired_from_the_store(remote, tmp_path):
    url, options = remote
    with open_loader(url, tmp_path, options=options) as loader:
        take(loader, EPOCH)
    for path in tmp_path.rglob("0*.tar"):
        for position in range(600, path.stat().st_size - 6000, 1000):  # the tar, not the offsets behind it
            flip(path, position)
    with open_loader(url, tmp_path, options=options) as loader:
        batches = take(loader, EPOCH)
        assert not any(b.bad for b in batches)
    assert sorted(int(s) for b in batches for s in b.samples[b.valid]) == list(range(103))


def test_each_damaged_member_of_a_sample_is_repaired_and_a_disk_that_damages_them_again_ends_the_run(
    remote, local, tmp_path, monkeypatch
):
    url, options = remote
    with open_loader(url, tmp_path, options=options) as loader:
        take(loader, EPOCH)
    members = offsets_of(Path(local), "000003-00.tar")[4].members
    (file,) = tmp_path.rglob("00000003.tar")
    for name in members:
        flip(file, members[name].offset)
    with open_loader(url, tmp_path, options=options) as loader:
        assert not any(b.bad for b in take(loader, EPOCH))
    send = Fetcher.send

    def damage_again(self, *message):
        if message[0] == "repaired":
            flip(file, members["json"].offset)
        send(self, *message)

    flip(file, members["json"].offset)
    monkeypatch.setattr(Fetcher, "send", damage_again)
    with (
        open_loader(url, tmp_path, options=options) as loader,
        pytest.raises(CacheError, match=f"{file}: bytes .* are right in the store, and wrong here.*this disk"),
    ):
        take(loader, EPOCH)


def test_a_torn_file_in_the_cache_is_fetched_again(remote, tmp_path):
    """As a crash of the machine leaves one: there, but not what was written."""
    url, options = remote
    with open_loader(url, tmp_path, options=options) as loader:
        take(loader, EPOCH)
    files = sorted(tmp_path.rglob("0*.tar"))
    os.truncate(files[0], 5000)
    files[1].write_bytes(bytes(files[1].stat().st_size))
    with open_loader(url, tmp_path, options=options) as loader:
        batches = take(loader, EPOCH)
    assert sorted(int(s) for b in batches for s in b.samples[b.valid]) == list(range(103))


# ---- the store ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [{"503": 0.05}, {"503": 0.2, "reset": 0.1, "truncate": 0.1}], ids=str)
def test_a_store_that_fails_now_and_then_changes_nothing(remote, s3, reference, tmp_path, shares):
    proxy = FaultProxy(s3.port)
    proxy.shares = shares
    try:
        with open_loader(remote[0], tmp_path, options=proxy.options()) as loader:
            steps = ids(take(loader, EPOCH))
    finally:
        proxy.close()
    assert steps == [step["samples"] for step in reference[:EPOCH]]
    assert any(request.answer != "whole" for request in proxy.log) or shares == {"503": 0.05}


SHARD, OFFSETS = r"GET .*/000003-00\.tar$", r"GET .*/000003-00\.tar\.offsets$"


@pytest.mark.parametrize(
    ("of", "faults"),
    [
        *itertools.product([SHARD, OFFSETS], [["404"], ["404", "404"], ["flip", "flip"], ["short"]]),
        (r" .*/000003-00\.tar$", ["short", "short"]),  # HEAD says the same
    ],
)
def test_a_fault_that_passes_is_no_property_of_a_sample(remote, s3, tmp_path, of, faults):
    proxy = FaultProxy(s3.port)
    try:
        proxy.next, proxy.only = list(faults), re.compile(of)
        assert run_epoch(remote[0], cache=tmp_path, options=proxy.options()) == {}
        assert [request.answer for request in proxy.log if request.answer != "whole"] == faults
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("of", "fault", "reason"),
    [
        (SHARD, "404", "shard missing"),
        (SHARD, "flip", "checksum"),
        (OFFSETS, "404", "offsets missing"),
        (OFFSETS, "flip", "offsets damaged"),
        (OFFSETS, "short", "offsets damaged"),
    ],
)
def test_a_fault_that_stays_is_one_and_is_not_asked_about_for_ever(remote, s3, tmp_path, of, fault, reason):
    proxy = FaultProxy(s3.port)
    try:
        proxy.shares, proxy.only = {fault: 1.0}, re.compile(of)
        with open_loader(remote[0], tmp_path, options=proxy.options()) as loader:
            first, asked = take(loader, EPOCH), len(proxy.log)
            again = take(loader, EPOCH)  # the same uses, so that the same members are damaged
            assert len(proxy.log) - asked <= 11  # shards of the next epoch
    finally:
        proxy.close()
    bad = {one.sample: one.reason for batch in first for one in batch.bad}
    assert set(bad.values()) == {reason}
    assert sorted(bad) == list(range(30, 40))
    assert [one for batch in again for one in batch.bad] == [one for batch in first for one in batch.bad]


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_store_that_is_down_is_waited_for(remote, s3, reference, tmp_path, seconds):
    proxy = FaultProxy(s3.port)
    try:
        with open_loader(remote[0], tmp_path, options=proxy.options(), patience=120) as loader:
            batches = loader.batches()
            steps = [next(batches) for _ in range(2)]
            proxy.down = True
            proxy._loop.call_later(seconds, setattr, proxy, "down", False)
            steps += [next(batches) for _ in range(EPOCH - 2)]
            batches.close()
            time.sleep(1.1)
            take(loader, 1)
            assert loader.stats().fetch["retries"] > 0
    finally:
        proxy.close()
    assert ids(steps) == [step["samples"] for step in reference[:EPOCH]]


def test_a_store_that_stays_down_ends_the_run_with_its_name(remote, s3, tmp_path):
    proxy = FaultProxy(s3.port)
    try:
        with open_loader(remote[0], tmp_path, options=proxy.options(), patience=6) as loader:
            proxy.down = True
            with pytest.raises(OSError, match=r"s3://clips/toys/.*no answer for .* s"):
                take(loader, EPOCH)
    finally:
        proxy.close()


# ---- at the start -------------------------------------------------------------------------------------------------------


def test_another_dataset_than_the_orders_is_refused(local, tmp_path):
    make_dataset(str(tmp_path / "other"), 20)
    order = Order(Dataset(Store(local)).fingerprint, 0, 8)
    with pytest.raises(ValueError, match="the order is of dataset"):
        Loader(Dataset(Store(str(tmp_path / "other"))), order, ToyDecoder(), workers=0)


def test_the_state_of_the_stream_is_small_and_another_order_does_not_take_it(local, tmp_path):
    with open_loader(local) as loader:
        state = json.loads(json.dumps(loader.state(10**9)))
    assert len(json.dumps(state)) < 1000
    with open_loader(local) as loader:
        assert loader.restore(state) == 10**9
    make_dataset(str(tmp_path / "other"), 102)
    with (
        open_loader(str(tmp_path / "other")) as loader,
        pytest.raises(DatasetError, match=rf"{tmp_path}/other.*step 1000000000 .*fingerprint is \w+, was \w+\. Set"),
    ):
        loader.restore(state)
    for name, value in (("batch", 9), ("seed", 2), ("lanes", 3), ("window", 3)):
        with (
            open_loader(local, **{name: value}) as loader,
            pytest.raises(DatasetError, match=f"{name} is {value}, was"),
        ):
            loader.restore(state)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("no index", lambda path: path.unlink(), "holds no dataset.*equiav pack"),
        ("empty", lambda path: path.write_bytes(b""), "is empty"),
        ("cut", lambda path: os.truncate(path, path.stat().st_size - 10), "is damaged"),
        ("bit", lambda path: flip(path, path.stat().st_size - 30), "is damaged"),
        ("text", lambda path: path.write_text("hello\n"), "is not an index of shards"),
        (
            "future",
            lambda path: path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 9')),
            "has format 9",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and " " not in x[:3] else "",
)
def test_a_dataset_without_a_whole_index_is_refused(damaged, name, damage, message):
    damage(damaged / "index")
    with pytest.raises(DatasetError, match=message):
        Dataset(Store(str(damaged)))


def test_a_remote_dataset_needs_a_cache(remote):
    url, options = remote
    with pytest.raises(CacheError, match="no cache folder"):
        open_loader(url, None, options=options)


# ---- processes ----------------------------------------------------------------------------------------------------------


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=,comm=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "spawn" in line]


def test_a_decoding_process_that_is_killed_is_named(local):
    with open_loader(local, workers=2) as loader:
        batches = loader.batches()
        next(batches)
        os.kill(loader._workers[1].process.pid, signal.SIGKILL)
        with pytest.raises(ChildDied, match=r"decoding process 1 was killed by SIGKILL \(out of memory\?\)"):
            list(islice(batches, EPOCH))


class Broken(ToyDecoder):
    def decode(self, key, members, out):
        raise KeyError("a mistake in the decoder")


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_decoder_raises_is_said_of_the_sample(local, workers):
    """Bytes from a store find errors that nobody has thought of."""
    dataset = Dataset(Store(local))
    with Loader(dataset, Order(dataset.fingerprint, 1, 8), Broken(), workers=workers) as loader:
        batch = next(loader.batches())
    assert not batch.valid.any()
    assert {bad.reason for bad in batch.bad} == {"decoder failed"}
    assert all(bad.detail.endswith("KeyError: 'a mistake in the decoder'") for bad in batch.bad)


RUN = """
import json, sys
from pathlib import Path
from streaming import Loader
from tests.streaming.toys import open_loader

def main():
    url, cache, log, options, rank, ranks, start, workers, limit = json.loads(sys.argv[1])
    with open_loader(url, Path(cache), options=options, rank=rank, ranks=ranks, workers=workers, sharers=ranks,
                     cache_bytes=limit) as loader:
        with open(log, "a", buffering=1) as file:
            for step, batch in enumerate(loader.batches(start), start):
                file.write(json.dumps([step, rank, batch.samples.tolist(), batch.fields["number"].tolist()]) + "\\n")

if __name__ == "__main__":
    main()
"""


EPOCHS = (
    RUN[: RUN.index("        with open(log")].replace(
        "def main():", "Loader._check_room = lambda *_: None\n\ndef main():"
    )
    + """
        for batch in loader.batches(start):
            if batch.step == 0:
                Path(log).write_text(str(batch.epoch))

if __name__ == "__main__":
    main()
"""
)


def start_rank(script, url, cache, log, options, rank, ranks, start, workers, limit=1 << 30):
    argument = json.dumps([url, str(cache), str(log), options, rank, ranks, start, workers, limit])
    return subprocess.Popen([sys.executable, str(script), argument], env={**os.environ, "PYTHONPATH": str(Path.cwd())})


def test_nothing_is_left_behind_by_a_killed_rank(remote, tmp_path):
    """No process, no name in shared memory, no lock; what it was writing is reclaimed by the next."""
    url, options = remote
    (tmp_path / "run.py").write_text(RUN)
    process = start_rank(tmp_path / "run.py", url, tmp_path / "cache", tmp_path / "log", options, 0, 1, 0, 2)
    while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    below = children(process.pid)
    assert len(below) == 3  # two that decode, one that fetches
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in (process.pid, *below))
    shared = set(re.findall(r"/dev/shm/\S+", maps))  # theirs alone: other tests run beside this one
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in below):
        assert time.monotonic() < deadline, "children outlive their parent"
        time.sleep(0.05)
    assert not [name for name in shared if os.path.exists(name)]
    with open_loader(url, tmp_path / "cache", options=options) as loader:
        take(loader, EPOCH)
    assert not list((tmp_path / "cache").rglob("*.part"))


SIGNALLED = (
    RUN.replace("import json, sys\n", "import json, os, signal, sys\n")
    .replace(
        "def main():\n",
        "def main():\n"
        "    for number in (signal.SIGTERM, signal.SIGINT):\n"
        "        signal.signal(number, lambda number, frame: os.write(1, b'%d\\n' % number))\n"
        "    print('ready', flush=True)\n",
    )
    .replace("buffering=1) as file:\n", "buffering=1) as file:\n            print('begun', flush=True)\n")
)


def test_signals_to_the_whole_group_are_the_parents_alone(local, reference, tmp_path):
    """At random moments, from before the first child is started on; the same batches come, and SIGKILL still ends all."""
    (tmp_path / "run.py").write_text(SIGNALLED)
    argument = json.dumps([local, str(tmp_path / "cache"), str(tmp_path / "log"), None, 0, 1, 0, 2, 1 << 30])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), argument],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rng, sent, told = random.Random(0), Counter(), []
    try:
        assert parent.stdout.readline() == "ready\n"
        reader = threading.Thread(target=lambda: told.extend(parent.stdout), daemon=True)
        reader.start()
        lines, deadline = 0, time.monotonic() + 120
        while "begun\n" not in told or lines < 2 * EPOCH or sum(sent.values()) < 50:
            assert parent.poll() is None
            assert time.monotonic() < deadline
            number = rng.choice([signal.SIGTERM, signal.SIGINT])
            os.killpg(parent.pid, number)
            sent[number] += 1
            time.sleep(rng.random() * 0.05)
            lines = (tmp_path / "log").read_text().count("\n") if (tmp_path / "log").exists() else 0
        assert f"{signal.SIGTERM:d}\n" in told
        assert f"{signal.SIGINT:d}\n" in told
        below = children(parent.pid)
        assert len(below) == 3
    finally:
        parent.kill()
        parent.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in below):
        assert time.monotonic() < deadline, "children outlive their parent"
        time.sleep(0.05)
    steps = [json.loads(line) for line in (tmp_path / "log").read_text().split("\n")[: 2 * EPOCH]]
    assert [step[2] for step in steps] == [step["samples"] for step in reference]
    assert [step[3] for step in steps] == [step["numbers"] for step in reference]


# ---- two jobs, one cache folder


def least(url, options, cache, **arguments):
    """Bytes of the smallest cache that a job takes."""
    with pytest.raises(CacheError) as error:
        open_loader(url, cache, options=options, cache_bytes=1000, **arguments)
    return int(re.search(r"expected (\d+)", str(error.value))[1])


@pytest.fixture
def other_job(remote, tmp_path):
    """(start, lines): begins a job on the folder `cache`, and what it has delivered."""
    url, options = remote
    (tmp_path / "run.py").write_text(RUN)
    processes = []

    def start(limit):
        log = tmp_path / f"log{len(processes)}"
        process = start_rank(tmp_path / "run.py", url, tmp_path / "cache", log, options, 0, 1, 0, 2, limit)
        processes.append(process)

        def lines(count):
            """Waits for so many."""
            deadline = time.monotonic() + 60
            while not log.exists() or log.read_text().count("\n") < count:
                assert process.poll() is None
                assert time.monotonic() < deadline, "it does not go on"
                time.sleep(0.05)
            return [json.loads(line) for line in log.read_text().split("\n")[:-1]]

        return process, lines

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_job_for_which_another_leaves_no_room_does_not_begin(remote, reference, tmp_path, other_job, monkeypatch):
    url, options = remote
    limit = least(url, options, tmp_path / "cache")
    process, lines = other_job(limit)
    done = len(lines(5))
    with monkeypatch.context() as patch:
        patch.setattr("streaming.cache.DYING", 0.5)
        said = rf"{tmp_path}/cache is used by other jobs .* {limit} bytes by process {process.pid}\. This one needs {limit} "
        with pytest.raises(
            CacheError, match=said + rf".*cache_bytes is {limit}\. Raise it, name another folder, or wait"
        ):
            open_loader(url, tmp_path / "cache", options=options, cache_bytes=limit)
    after = lines(done + 2 * EPOCH)
    assert [line[2] for line in after[: 2 * EPOCH]] == [step["samples"] for step in reference]
    threading.Timer(1.0, process.kill).start()  # while the other already asks
    with open_loader(url, tmp_path / "cache", options=options, cache_bytes=limit) as loader:
        assert ids(take(loader, EPOCH)) == [step["samples"] for step in reference[:EPOCH]]
        (registered,) = (tmp_path / "cache").glob(".job-*")
        assert json.loads(registered.read_text())["bytes"] == limit
    assert not list((tmp_path / "cache").glob(".job-*"))
    with open_loader(url, tmp_path / "cache", options=options, cache_bytes=limit):
        pass  # the last one has given its room back


def test_two_jobs_for_which_there_is_room_both_go_on(remote, reference, tmp_path, other_job):
    url, options = remote
    needed = least(url, options, tmp_path / "cache")
    limit = needed * 5 // 2 + 2  # three windows of one, two of the other
    first = other_job(limit)[1]
    first(1)
    second = other_job(limit)[1]
    second(1)
    registered = [json.loads(path.read_text())["bytes"] for path in (tmp_path / "cache").glob(".job-*")]
    assert sorted(registered) == [needed, pytest.approx(1.5 * needed, abs=2)]
    for lines in (first, second):
        assert [line[2] for line in lines(2 * EPOCH)[: 2 * EPOCH]] == [step["samples"] for step in reference]


def test_the_ranks_of_a_job_are_counted_once(remote, tmp_path):
    url, options = remote
    limit = least(url, options, tmp_path, ranks=2, sharers=2)
    arguments = {"options": options, "cache_bytes": limit, "ranks": 2, "sharers": 2}
    with (
        open_loader(url, tmp_path, rank=0, **arguments) as one,
        open_loader(url, tmp_path, rank=1, **arguments) as other,
    ):
        assert len(list(tmp_path.glob(".job-*"))) == 2
        for _ in range(2):
            take(one, EPOCH)
            take(other, EPOCH)


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made anew"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_folder_that_is_removed_is_one_clear_error(remote, tmp_path, workers, again):
    url, options = remote
    limit = least(url, options, tmp_path / "cache")
    with open_loader(url, tmp_path / "cache", options=options, cache_bytes=limit, workers=workers) as loader:
        batches = loader.batches()
        next(batches)
        while (tmp_path / "cache").exists():  # a file may be written into a folder while it is emptied
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        if again:
            open_loader(url, tmp_path / "cache", options=options, cache_bytes=limit).close()
        with pytest.raises(
            CacheGone, match=f"^the cache folder {tmp_path}/cache was removed while the run used it; start"
        ):
            list(islice(batches, 2 * EPOCH))


# Few of the first shards, none of some, several of each of others: windows and shards of all sizes.
OFTEN = np.where(np.arange(103) < 30, 0.13, np.where(np.arange(103) < 60, 0.0, np.arange(103) % 5 * 0.9))


def test_a_selection_is_the_same_from_a_store_for_any_number_of_ranks_in_little_room(local, remote, tmp_path):
    url, options = remote
    selection = Selection(OFTEN)
    steps = 3 * -(-selection.samples // 8)
    reference = global_steps(local, 1, steps, selection=selection)
    for W in (1, 2, 3):
        least_room = least(url, options, tmp_path / "cache", selection=selection)
        got = global_steps(
            url, W, steps, cache=tmp_path / f"{W}", options=options, selection=selection, cache_bytes=least_room
        )
        assert got == reference
    came = np.concatenate([step["samples"] for step in reference])
    came = came[came >= 0]
    numbers = np.concatenate([step["numbers"] for step in reference])
    assert (sample_of(came) == numbers[np.concatenate([s["samples"] for s in reference]) >= 0]).all()
    assert not set(sample_of(came).tolist()) & set(np.flatnonzero(OFTEN == 0).tolist())
    assert (came >= COPY).any()


def test_a_file_that_was_removed_before_it_is_opened_or_mended_is_the_same_error(remote, tmp_path):
    url, options = remote
    with open_loader(url, tmp_path, options=options) as loader:
        take(loader, EPOCH)
        file = next(tmp_path.rglob("00000003.tar"))
        files = Files(str(file), str(file), loader.dataset[3].bytes, str(tmp_path), loader.dataset[3].bytes)
        sample = loader_module._offsets(files, OrderedDict())[4]
        file.unlink()
        for use in (
            lambda: loader_module._offsets(files, OrderedDict()),
            lambda: loader_module._decode(ToyDecoder(), files, sample, 0.0, {}),
        ):
            with pytest.raises(CacheGone, match=str(tmp_path)):
                use()
        loader._fetcher.send(("repair", (0, 0, ""), "000003-00.tar", sample.members["json"], str(file)))
        with pytest.raises(CacheGone, match=str(tmp_path)):
            [loader._receive() for _ in range(9)]  # statistics come, too


@pytest.mark.slow
def test_two_hundred_kills_and_resizes_lose_nothing_and_repeat_nothing(remote, s3, reference, tmp_path):
    """Ranks are processes; every few steps all of them are killed, mid-download or not, and another number goes on from the last
    step that all had finished. The store fails now and then meanwhile."""
    url, _ = remote
    (tmp_path / "run.py").write_text(RUN)
    proxy = FaultProxy(s3.port)
    proxy.shares = {"503": 0.03, "reset": 0.01}
    rng = random.Random(0)
    done: dict[int, list[int]] = {}
    kills = 0
    while kills < 200:
        W, start = rng.choice([1, 2, 3]), len(done)
        log = tmp_path / f"log{kills}"
        ranks = [
            start_rank(tmp_path / "run.py", url, tmp_path / "cache", f"{log}.{r}", proxy.options(), r, W, start, 0)
            for r in range(W)
        ]
        wanted = start + rng.randint(0, 3)
        deadline = time.monotonic() + 120

        def finished(r, log=log):
            path = Path(f"{log}.{r}")
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            return [json.loads(line) for line in lines]

        while wanted > start and min(len(finished(r)) for r in range(W)) < wanted - start:
            assert time.monotonic() < deadline
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5 if wanted == start else 0)
        for rank in ranks:
            rank.kill()
            rank.wait()
        kills += W
        rows = [finished(r) for r in range(W)]
        for k in range(min(map(len, rows))):
            assert len({row[k][0] for row in rows}) == 1
            done[rows[0][k][0]] = [sample for row in rows for sample in row[k][2]]
    proxy.close()
    epochs = len(done) // EPOCH
    assert epochs >= 2
    assert [done[k] for k in range(2 * EPOCH)] == [step["samples"] for step in reference]
    for e in range(epochs):
        seen = [s for k in range(e * EPOCH, (e + 1) * EPOCH) for s in done[k] if s >= 0]
        assert sorted(seen) == list(range(103))


@pytest.mark.slow
def test_memory_stays_flat_over_fifty_epochs(remote, tmp_path):
    """Of the rank's process, of those that decode, of the one that fetches: between the 10th epoch and the 60th."""
    url, options = remote
    (tmp_path / "run.py").write_text(EPOCHS)
    log = tmp_path / "log"
    limit = 450_000  # the cache holds half of the dataset, so that fetching and evicting go on
    process = start_rank(tmp_path / "run.py", url, tmp_path / "cache", log, options, 0, 1, 0, 2, limit)
    sizes = {}
    deadline = time.monotonic() + 300
    while len(sizes) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        epoch = int(log.read_text() or 0) if log.exists() else 0
        for at in (10, 60):
            if epoch >= at and at not in sizes:
                sizes[at] = [resident(pid) for pid in (process.pid, *children(process.pid))]
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(sizes[10]) == len(sizes[60]) == 4
    for before, after in zip(sizes[10], sizes[60], strict=True):
        assert after < 1.01 * before


def resident(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_tasks_may_be_under_way(local, workers):
    """More than fit into a pipe, in both directions: nobody waits for one who waits."""
    dataset = Dataset(Store(local))
    with Loader(dataset, Order(dataset.fingerprint, 1, 4096), Broken(), workers=workers, ahead=40) as loader:
        for batch in islice(loader.batches(), 45):
            assert len(batch.bad) == 103


OFFSETS = [
    [0, {"json": [0, 1, "0" * 16]}],
    ["k", {"json": [2**40, 1, "0" * 16]}],
    ["k", {"json": [0, 1.5, "0" * 16]}],
    "[" * 9000,
]


@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize("change", [*range(len(OFFSETS)), "fewer"])
def test_offsets_that_an_index_vouches_for_cost_their_samples_alone(s3, local, tmp_path, change, kind):
    """Their checksum is right: whoever wrote them has indexed them so. The same samples are bad at any number of ranks."""
    folder = s3.folder / "clips" / tmp_path.name if kind == "s3" else tmp_path / "forged"
    shutil.copytree(local, folder)
    dataset = Dataset(Store(str(folder)))
    shards = list(dataset)
    path = folder / shards[2].offsets_name
    lines = path.read_bytes().splitlines(keepends=True)
    if change == "fewer":
        lines = lines[:-1]
    else:
        wrong = OFFSETS[change]
        lines[-1] = (wrong if isinstance(wrong, str) else json.dumps(wrong)).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    shards[2] = shards[2]._replace(offsets=xxh3_64_hexdigest(path.read_bytes()))
    (folder / "index").write_bytes(encode_index(shards))
    place = int(dataset.starts[2]) + shards[2].samples - 1
    found = []
    for ranks in (1, 3):
        for rank in range(ranks):
            url, options = (f"s3://clips/{tmp_path.name}", s3.options) if kind == "s3" else (str(folder), None)
            cache = tmp_path / f"cache{ranks}{rank}"
            with open_loader(url, cache, options=options, rank=rank, ranks=ranks, workers=0) as loader:
                found += [
                    (ranks, bad.sample, bad.reason) for batch in islice(loader.batches(), EPOCH) for bad in batch.bad
                ]
    assert found == [(1, place, "offsets"), (3, place, "offsets")]


def test_a_loader_that_is_closed_leaves_no_descriptor_and_no_memory(local):
    def batches():
        """inode of each that is open"""
        gc.collect()
        found = set()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if "memfd:batches" in os.readlink(f"/proc/self/fd/{fd}"):
                    found.add(os.stat(f"/proc/self/fd/{fd}").st_ino)
        return found

    before = batches()
    with open_loader(local) as loader:
        take(loader, 2, 0)
        own = batches() - before
    assert len(own) == 1
    del loader
    deadline = time.monotonic() + 60
    while batches() & own:  # its threads end when they see that it is closed
        assert time.monotonic() < deadline
        time.sleep(0.05)
