"""Packing: the same bytes however it is done and however often it is killed, and a named reason for whatever is left out."""

import io
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import webdataset

from streaming import ChildDied, Dataset, DatasetError, Store
from streaming.dataset import verify_shard
from streaming.pack import pack
from tests.streaming import pack_children, toys
from tests.streaming.fault_proxy import FaultProxy

COUNT = 60
ITEMS = [(f"clips/s{k:03d}", k) for k in range(COUNT)]
KEPT = {key: pack_children.members(k) for key, k in ITEMS if k % 10 != 7}
PARTS = {"part_items": 10, "max_shard_bytes": 24 << 10}


def packed(folder, items=ITEMS, encode=pack_children.encode, processes=0, **arguments):
    return pack(items, encode, Store(str(folder)), processes=processes, **{**PARTS, **arguments})


def files(folder):
    """Everything below a folder: name -> content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def tars(folder):
    return sorted(Path(folder).glob("*.tar"))


def listed(tar):
    with tarfile.open(tar) as file:
        return [(member.name, member.size) for member in file]


def read_plainly(paths):
    """key -> members, by webdataset alone."""
    samples = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False)
    return {s["__key__"]: {name: data for name, data in s.items() if name[0] != "_"} for s in samples}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What packing without any trouble gives. Not to be changed."""
    folder = tmp_path_factory.mktemp("pack") / "whole"
    packed(folder)
    return folder


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


# ---- what comes out


def test_shards_are_plain_webdataset_and_every_member_is_as_it_was(whole):
    assert len(tars(whole)) > 6
    assert read_plainly(tars(whole)) == KEPT
    in_order = [name.split(".")[0] for path in tars(whole) for name, _ in listed(path)]
    assert list(dict.fromkeys(in_order)) == list(KEPT)


def test_the_index_says_what_the_shards_are(whole):
    dataset = Dataset(Store(str(whole)))
    assert [shard.name for shard in dataset] == [path.name for path in tars(whole)]
    assert dataset.samples == len(KEPT)
    assert dataset.bytes == sum(path.stat().st_size for path in tars(whole))
    assert [verify_shard(dataset.store, shard) for shard in dataset] == [[]] * len(dataset)
    assert sorted(files(whole)) == sorted(
        [
            "index",
            "packed.json",
            "rejected.jsonl",
            *(p.name for p in tars(whole)),
            *(f"{p.name}.offsets" for p in tars(whole)),
        ]
    )


@pytest.mark.parametrize("processes", [1, 3])
def test_the_number_of_processes_leaves_no_trace(whole, tmp_path, processes):
    packed(tmp_path, processes=processes)
    assert files(tmp_path) == files(whole)
    assert Dataset(Store(str(tmp_path))).fingerprint == Dataset(Store(str(whole))).fingerprint


def tar_size(names_and_sizes):
    """Of a tar with these members, blocks of 512, as tarfile makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, size in names_and_sizes:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    return len(buffer.getvalue())


@pytest.mark.parametrize("limit", [20_480, 24 << 10, 50_000, 61_440])
def test_shards_are_not_larger_than_asked(tmp_path, limit):
    packed(tmp_path, max_shard_bytes=limit)
    assert read_plainly(tars(tmp_path)) == KEPT
    assert max(path.stat().st_size for path in tars(tmp_path)) <= limit


def test_a_shard_ends_only_where_the_next_sample_does_not_fit(tmp_path):
    limit = 40 << 10
    packed(tmp_path, part_items=COUNT, max_shard_bytes=limit)
    shards = [listed(path) for path in tars(tmp_path)]
    assert len(shards) > 2
    for this, following in itertools.pairwise(shards):
        first = [(name, size) for name, size in following if name.split(".")[0] == following[0][0].split(".")[0]]
        assert tar_size(this + first) > limit - 10240  # tarfile rounds up to this


def test_a_sample_larger_than_a_shard_has_one_to_itself(tmp_path):
    packed(tmp_path, max_shard_bytes=1024)
    assert [len(read_plainly([path])) for path in tars(tmp_path)] == [1] * len(KEPT)


def test_rejections_are_listed_and_counted(whole, tmp_path):
    reports = []
    done = packed(tmp_path, report=reports.append)
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert lines == [{"key": key, "reason": "seven", "detail": f"{k} ends in 7"} for key, k in ITEMS if k % 10 == 7]
    assert done.rejected == Counter(seven=6)
    assert (done.items, done.shards) == (COUNT, len(tars(tmp_path)))
    assert done.bytes == sum(path.stat().st_size for path in tars(tmp_path))
    assert [r.items for r in reports] == sorted(r.items for r in reports)
    assert reports[-1] == done


# ---- killed


def test_killed_at_any_moment_and_started_again_it_is_the_same_dataset(whole, tmp_path):
    """Before and after every file that comes into its place; what was finished is not written again."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["webdataset"])
    items, arguments = ITEMS[:30], {"part_items": 10, "max_shard_bytes": 24 << 10}
    packed(tmp_path / "whole", items, **arguments)
    expected = files(tmp_path / "whole")
    places = len(expected) + 1 + 3  # beside the files that stay: the plan, a record for each part
    finished = []
    for count, after in [(k, after) for k in range(1, places + 1) for after in (False, True)][:-1]:
        folder = tmp_path / f"{count}-{after}"
        child = processes.Process(
            target=pack_children.pack_until, args=(str(folder), items, pack_children.encode, count, after, arguments)
        )
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert not (folder / "index").exists()
        with pytest.raises(DatasetError, match="holds no dataset"):
            Dataset(Store(str(folder)))
        before = {path: path.stat() for path in tars(folder)}
        parts = [path.stem for path in (folder / "packing").glob("*.json") if path.stem != "plan"]
        packed(folder, items, **arguments)
        for path, stat in before.items():
            if path.name[:6] in parts:
                assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
        assert files(folder) == expected
        finished.append(len(parts))
    assert set(finished) == {0, 1, 2, 3}
    assert finished == sorted(finished)


def test_killed_after_the_index_it_only_has_to_clear_up(tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["webdataset"])
    items = ITEMS[:10]
    packed(tmp_path / "whole", items, max_shard_bytes=1 << 20)
    child = processes.Process(
        target=pack_children.pack_until,
        args=(str(tmp_path / "cut"), items, pack_children.encode, 7, True, {**PARTS, "max_shard_bytes": 1 << 20}),
    )
    child.start()
    child.join(60)
    assert (tmp_path / "cut" / "index").exists()
    assert (tmp_path / "cut" / "packing").exists()
    packed(tmp_path / "cut", items, max_shard_bytes=1 << 20)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def children_of(pid):
    """Processes whose parent this is, as the kernel says."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks the kernel of Linux")
def test_no_child_outlives_a_parent_that_is_killed(whole, tmp_path):
    folder = tmp_path / "cut"
    context = multiprocessing.get_context("spawn")
    parent = context.Process(
        target=pack_children.pack_in, args=(str(folder), ITEMS, pack_children.encode_slowly, 2), kwargs=PARTS
    )
    parent.start()
    records = folder / "packing"
    wait_until(lambda: sum(path.stem.isdigit() for path in records.glob("*.json")) >= 2)
    children = children_of(parent.pid)
    assert len(children) >= 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(60)
    wait_until(lambda: not any(alive(pid) for pid in children))
    assert not (folder / "index").exists()
    finished = {path.stem for path in records.glob("*.json")}
    before = {path: path.stat().st_mtime_ns for path in tars(folder) if path.name[:6] in finished}
    assert before
    packed(folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(folder) == files(whole)


# ---- items that harm


def test_from_the_keyboard_it_ends_though_its_processes_are_busy(tmp_path):
    """Ctrl-C goes to the whole group. Without an end of its own, the first item takes an hour."""
    program = (
        "from streaming import Store; from streaming.pack import pack; from tests.streaming import pack_children\n"
        "if __name__ == '__main__':\n"
        f"    pack([(str(k), k) for k in range(8)], pack_children.encode_slowly, Store({str(tmp_path / 'out')!r}),\n"
        "         processes=2, part_items=1, report=lambda progress: print(progress.items, flush=True))\n"
    )
    (tmp_path / "run.py").write_text(program)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        while parent.stdout.readline() != "7\n":  # the others are done: one process sleeps
            assert parent.poll() is None
        os.killpg(parent.pid, signal.SIGINT)
        _, errors = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert "KeyboardInterrupt" in errors.splitlines()[-1]


def test_items_that_kill_or_hold_up_their_process_are_rejected_and_nothing_else_is(tmp_path):
    done = packed(tmp_path, encode=pack_children.Dangerous(), processes=2, timeout=2.0)
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    fatal = {line["key"]: line for line in lines if line["reason"] != "seven"}
    assert {key: line["reason"] for key, line in fatal.items()} == {
        "clips/s005": "kills the decoder",
        "clips/s008": "kills the decoder",
        "clips/s023": "takes too long",
    }
    assert "SIGKILL" in fatal["clips/s005"]["detail"]
    assert "exit code 3" in fatal["clips/s008"]["detail"]
    assert fatal["clips/s023"]["detail"] == "more than 2 s"
    assert done.rejected == {"seven": 6, "kills the decoder": 2, "takes too long": 1}
    assert read_plainly(tars(tmp_path)) == {key: value for key, value in KEPT.items() if key not in fatal}


def test_an_item_is_not_blamed_for_the_time_that_writing_takes(tmp_path):
    """The first shard that a process opens costs it an import of seconds."""
    assert packed(tmp_path, [("s00000", 0)], toys.encode, processes=1, timeout=0.3).rejected == {}


@pytest.mark.parametrize("processes", [0, 1])
def test_a_mistake_of_the_encoder_is_raised_as_it_is(whole, tmp_path, processes):
    with pytest.raises(KeyError, match="a mistake in the program") as error:
        packed(tmp_path, encode=pack_children.encode_with_a_mistake, processes=processes)
    assert "encode_with_a_mistake" in "".join(error.value.__notes__)
    assert not (tmp_path / "index").exists()
    packed(tmp_path)
    assert files(tmp_path) == files(whole)


def test_shards_of_a_killed_attempt_do_not_stay(whole, tmp_path):
    with pytest.raises(KeyError):
        packed(tmp_path, encode=pack_children.encode_with_a_late_mistake)
    for name in ("000003-07.tar", "000003-07.tar.offsets", "000001-00.tar.1a2b3c4d.part", "mine.txt"):
        (tmp_path / name).write_text("of an attempt that was killed before its record")
    packed(tmp_path)
    (tmp_path / "mine.txt").unlink()
    assert files(tmp_path) == files(whole)


def test_what_is_another_file_now_is_packed_again_and_nothing_else_is(tmp_path):
    """Rejected before, mended now, and the other way round; a shard that is not needed any more is gone."""
    before, now = ["as it was"] * COUNT, ["as it was"] * COUNT
    for k in (3, 7):
        now[k] = "mended"
    with pytest.raises(KeyError):
        packed(tmp_path / "begun", encode=pack_children.encode_with_a_late_mistake, stamps=before)
    kept = {path: path.stat().st_mtime_ns for path in tars(tmp_path / "begun") if path.name.startswith("000001")}
    assert kept
    assert len(tars(tmp_path / "begun")) > len(kept)
    packed(tmp_path / "begun", encode=pack_children.encode_mended, stamps=now)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    packed(tmp_path / "anew", encode=pack_children.encode_mended, stamps=now)
    assert files(tmp_path / "begun") == files(tmp_path / "anew")
    with pytest.raises(DatasetError, match="of files that have changed since"):
        packed(tmp_path / "begun", stamps=before)


# ---- what is refused


@pytest.mark.parametrize(
    "other",
    [
        {"items": ITEMS[:-1]},
        {"items": [*ITEMS[:-1], ("clips/other", 59)]},
        {"items": [*ITEMS[:-1], ("clips/s059", 58)]},
        {"part_items": 11},
        {"max_shard_bytes": 25 << 10},
        {"settings": "quality 80"},
    ],
)
def test_other_items_or_settings_than_it_was_begun_with_are_refused(whole, tmp_path, other):
    with pytest.raises(KeyError):
        packed(tmp_path, encode=pack_children.encode_with_a_mistake)
    before = files(tmp_path)
    with pytest.raises(DatasetError, match=r"was begun with 60 items or settings other than these .*remove the folder"):
        packed(tmp_path, **other)
    assert files(tmp_path) == before
    packed(tmp_path)
    assert files(tmp_path) == files(whole)


def test_a_dataset_is_not_packed_over(whole):
    before = files(whole)
    packed(whole)  # it is finished
    assert files(whole) == before
    with pytest.raises(
        DatasetError,
        match=f"{whole} already holds a dataset, of other items or settings, or of files that have changed since; remove it",
    ):
        packed(whole, settings="quality 80")
    assert files(whole) == before


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "nothing to pack"),
        ([("a", 1), ("b", 2), ("a", 3)], r"1 key\(s\) come twice: 'a' for 1 and for 3\. Give each"),
        ([("a", 1), ("a.b", 2)], r"key 'a\.b' cannot name a sample"),
        ([("folder.x/a", 1), ("folder/.a", 2)], r"key 'folder/\.a' cannot name a sample"),
        ([("", 1)], "key '' cannot name a sample"),
        ([("folder/", 1)], "key 'folder/' cannot name a sample"),
    ],
)
def test_items_that_cannot_be_packed_are_named_before_anything_is_written(tmp_path, items, message):
    with pytest.raises(DatasetError, match=message):
        packed(tmp_path, items)
    assert files(tmp_path) == {}


def test_keys_may_have_folders_with_dots_long_names_and_any_script(tmp_path):
    items = [("a.b/c.d/clip", 1), ("x" * 150, 2), ("ключ/鍵 1", 3), ("y/" * 130 + "z", 4)]
    packed(tmp_path, items)
    assert read_plainly(tars(tmp_path)) == {key: pack_children.members(k) for key, k in items}
    dataset = Dataset(Store(str(tmp_path)))
    assert verify_shard(dataset.store, dataset[0]) == []


def test_nothing_but_rejections_is_an_error_that_says_where_the_reasons_are(tmp_path):
    for _ in range(2):
        with pytest.raises(
            DatasetError,
            match=r"all of 60 items were rejected, such as clips/s000: no good: 0; rejected\.jsonl there says why",
        ):
            packed(tmp_path, encode=pack_children.encode_or_refuse)
        assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == COUNT
        assert not (tmp_path / "index").exists()


def test_a_part_of_nothing_but_rejections_leaves_no_shard(tmp_path):
    packed(tmp_path, part_items=1, max_shard_bytes=1 << 20)
    assert len(tars(tmp_path)) == len(KEPT)
    assert read_plainly(tars(tmp_path)) == KEPT


# ---- elsewhere


@pytest.mark.slow
def test_a_store_that_often_fails_gets_the_same_bytes(whole, s3, tmp_path):
    (s3.folder / "packed").mkdir()
    proxy = FaultProxy(s3.port)
    proxy.shares = {"503": 0.4, "reset": 0.1}
    store = Store("s3://packed/it", patience=60, options=proxy.options())
    pack(ITEMS, pack_children.encode, store, processes=0, **PARTS)
    assert sum(request.answer != "whole" for request in proxy.log) > 10
    proxy.close()
    store = Store("s3://packed/it", options=s3.options)
    assert {name: store.read(name) for name in store.list()} == files(whole)
    dataset = Dataset(store)
    assert [verify_shard(store, shard) for shard in dataset] == [[]] * len(dataset)


def test_a_process_that_dies_between_its_items_is_an_error(tmp_path):
    """Not the fault of any item: nothing is rejected for it."""
    with pytest.raises(ChildDied, match=r"packing process 0 ended outside any item: .* ended with exit code 7"):
        packed(tmp_path, encode=Deadly(), processes=1)
    assert not (tmp_path / "rejected.jsonl").exists()


class Deadly:
    """Ends the process into which it is brought."""

    def __reduce__(self):
        return os._exit, (7,)


def test_shards_that_others_have_made_are_not_written_over(tmp_path):
    for name in ("000000-00.tar", "mine.tar"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("precious")
        with pytest.raises(DatasetError, match=f"holds files that this call did not write, such as {name}"):
            pack(ITEMS[:3], toys.encode, Store(str(folder)), processes=0)
        assert (folder / name).read_text() == "precious"
        assert os.listdir(folder) == [name]
