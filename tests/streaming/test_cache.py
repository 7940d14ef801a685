"""Files under a hard limit that real processes share, are killed in the middle of, and fight for."""

import fcntl
import os
import subprocess
import threading

import pytest

from streaming.cache import Cache, CacheError
from streaming.processes import Child
from tests.streaming.cache_children import BLOCK, bustle, bustle_alone, content, obey

LIMIT = 16 * BLOCK


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def cache(root):
    cache = Cache(root, LIMIT)
    yield cache
    cache.close()


@pytest.fixture
def start(root):
    """A process with a cache of the same folder, and a word with it."""
    children = []

    def start(target=obey, *args, limit=LIMIT):
        children.append(Child("cache user", target, (root, limit, *args)))
        return children[-1]

    yield start
    for child in children:
        child.stop()


def ask(child, *what):
    child.send(what)
    return child.receive()


def kill(child):
    child.process.kill()  # SIGKILL
    child.process.join()


def on_disk(root):
    """Bytes under the folder, while nobody creates or evicts."""
    with (root / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
        return sum(os.stat(file).st_blocks * 512 for file in files)


def make(cache, name, blocks, rank=None):
    """A whole file that nobody uses."""
    entry = create(cache, name, blocks, rank)
    entry.write(0, content(name, blocks * BLOCK))
    cache.commit(entry)
    entry.release()


def create(cache, name, blocks, rank=None):
    return cache.create(name, blocks * BLOCK, [(0, blocks * BLOCK)], (rank or {}).get if rank else lambda _: 0)


def whole(root):
    return sorted(path.relative_to(root).as_posix() for path in root.glob("*/*") if path.suffix != ".part")


def parts(root):
    return sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.part"))


# ---- one process


def test_a_file_is_visible_when_it_is_committed_and_not_before(cache, root):
    entry = create(cache, "f/a", 2)
    entry.write(BLOCK, b"second")
    assert (cache.use("f/a"), cache.names("f"), parts(root)) == (None, [], ["f/a.part"])
    assert create(cache, "f/a", 2) is None
    entry.write(0, b"first")
    cache.commit(entry)
    assert (cache.names("f"), parts(root)) == (["a"], [])
    used = cache.use("f/a")
    assert used.path == root / "f" / "a"
    assert used.read(0) == b"first".ljust(BLOCK, b"\0") + b"second".ljust(BLOCK, b"\0")
    assert used.read(BLOCK)[:6] == b"second"
    assert create(cache, "f/a", 2) is None
    assert cache.names("none") == []


def test_the_largest_rank_is_evicted_first_and_no_more_than_needed(cache, root):
    rank = {"f/a": 1, "f/b": 3, "g/c": 2, "f/d": 0, "f/e": 9}
    for name in ("f/a", "f/b", "g/c", "f/d"):
        make(cache, name, 4)
    assert cache.used() == on_disk(root) == LIMIT
    make(cache, "f/e", 4, rank)
    assert whole(root) == ["f/a", "f/d", "f/e", "g/c"]
    make(cache, "f/b", 6, rank)  # e is not enough
    assert whole(root) == ["f/a", "f/b", "f/d"]
    make(cache, "f/e", 2, rank)  # there is room
    assert whole(root) == ["f/a", "f/b", "f/d", "f/e"]


def test_of_one_rank_the_oldest_is_evicted_first(cache, root):
    for age, name in enumerate(("f/b", "f/a", "f/d", "f/c")):
        make(cache, name, 4)
        os.utime(root / name, (1000 + age, 1000 + age))
    make(cache, "f/e", 8)
    assert whole(root) == ["f/c", "f/d", "f/e"]


def test_orphaned_parts_go_before_any_whole_file(cache, root):
    rank = {"f/a": 9.0, "f/b": 1, "f/c.part": 0, "f/d": 1}
    make(cache, "f/a", 8)
    create(cache, "f/c", 8).release()  # as if its writer had died
    make(cache, "f/b", 4, rank)
    assert (whole(root), parts(root)) == (["f/a", "f/b"], [])


def test_a_file_in_use_is_never_evicted_whatever_its_rank(cache, root):
    make(cache, "f/a", 8)
    make(cache, "f/b", 8)
    used = cache.use("f/a")
    assert create(cache, "f/c", 9, {"f/a": 9, "f/b": 1}) is None
    make(cache, "f/c", 8, {"f/a": 9, "f/b": 1})
    assert whole(root) == ["f/a", "f/c"]
    again = cache.use("f/a")
    used.release()
    assert create(cache, "f/d", 16) is None  # one of two users is left
    assert whole(root) == ["f/a"]
    again.release()
    make(cache, "f/d", 16)
    assert whole(root) == ["f/d"]


def test_the_limit_counts_what_is_being_written_too(cache, root):
    first = create(cache, "f/a", 10)
    assert create(cache, "f/b", 7) is None
    second = create(cache, "f/b", 6)
    assert on_disk(root) == cache.used() == LIMIT
    assert create(cache, "f/c", 1) is None
    assert parts(root) == ["f/a.part", "f/b.part"]
    cache.abandon(first)
    cache.commit(second)
    assert (cache.used(), cache.names("f"), parts(root)) == (6 * BLOCK, ["b"], [])


def test_more_than_the_limit_is_never_there(cache):
    assert create(cache, "f/a", 17) is None
    assert cache.used() == 0


def test_what_is_abandoned_leaves_nothing_and_may_be_written_again(cache, root):
    entry = create(cache, "f/a", 16)
    entry.write(0, b"half")
    cache.abandon(entry)
    assert (parts(root), whole(root), cache.used()) == ([], [], 0)
    make(cache, "f/a", 16)
    assert cache.use("f/a").read(0) == content("f/a", LIMIT)


def test_what_is_discarded_is_written_anew_while_others_keep_what_they_have(cache):
    make(cache, "f/a", 2)
    damaged, other = cache.use("f/a"), cache.use("f/a")
    damaged.write(0, b"damaged")
    cache.discard(damaged)
    assert (cache.names("f"), cache.use("f/a")) == ([], None)
    make(cache, "f/a", 2)
    assert other.read(0)[:7] == b"damaged"
    assert cache.use("f/a").read(0) == content("f/a", 2 * BLOCK)


def test_two_that_discard_the_same_file_leave_the_one_that_replaced_it(cache):
    make(cache, "f/a", 2)
    damaged, same = cache.use("f/a"), cache.use("f/a")
    cache.discard(damaged)
    make(cache, "f/a", 2)
    in_use = cache.use("f/a")
    cache.discard(same)
    assert in_use.path.exists()


def test_of_sparse_ranges_only_the_blocks_they_touch_are_allocated(cache, root):
    size = 1 << 30
    ranges = [(0, 100), (2 * BLOCK - 1, 2 * BLOCK + 1), (size - 10, size)]  # 1, 2 and 1 blocks
    entry = cache.create("f/a", size, ranges, lambda _: 0)
    assert cache.used() == on_disk(root) == 4 * BLOCK
    for start, stop in ranges:
        entry.write(start, content(start, stop - start))
    cache.commit(entry)
    assert on_disk(root) == 4 * BLOCK
    assert os.path.getsize(root / "f" / "a") == size
    assert entry.read(size - 10) == content(size - 10, 10)
    assert os.pread(entry.file, 2 * BLOCK, 0)[:100] == content(0, 100)
    assert os.pread(entry.file, BLOCK, BLOCK) == bytes(BLOCK - 1) + content(2 * BLOCK - 1, 2)[:1]
    assert create(cache, "f/b", 13) is None
    assert create(cache, "f/b", 12)


def test_an_empty_range_needs_nothing(cache):
    entry = cache.create("f/a", 5 * BLOCK, [(BLOCK, BLOCK), (2 * BLOCK, 2 * BLOCK + 1)], lambda _: 0)
    cache.commit(entry)
    assert cache.used() == BLOCK


def test_many_ranges_stay_within_the_limit_too(root):
    ranges = [(3 * k * BLOCK, (3 * k + 1) * BLOCK) for k in range(100)]
    cache = Cache(root, 100 * BLOCK)
    cache.create("f/a", 300 * BLOCK, ranges, lambda _: 0)
    assert on_disk(root) <= 100 * BLOCK


# ---- threads


def test_threads_of_one_process_bustle_within_the_limit(cache, root):
    errors, highest = [], 0

    def run(seed):
        try:
            bustle(cache, seed, 300, lambda _: None)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        highest = max(highest, on_disk(root))
    assert errors == []
    assert LIMIT // 2 < highest <= LIMIT
    assert create(cache, "all", 16)  # nothing is held any more


def test_what_is_used_can_be_asked_while_others_create_and_evict(cache, root):
    stop = threading.Event()

    def others():
        for k in range(1_000_000):
            if stop.is_set():
                return
            make(other, f"f/{k}", 8)

    other = Cache(root, LIMIT)
    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(2000):
            assert cache.used() <= LIMIT
    finally:
        stop.set()
        thread.join()


# ---- processes


def test_processes_that_bustle_never_exceed_the_limit(start, cache, root):
    children = [start(bustle_alone, seed, 400) for seed in range(3)]
    highest, looks = 0, 0
    running = list(children)
    while running:
        highest, looks = max(highest, on_disk(root)), looks + 1
        for child in list(running):
            while child.connection.poll():
                if counts := child.receive():  # an assertion that failed there is raised here
                    running.remove(child)
                    assert counts["created"] > 20, counts
                    assert counts["used"] > 20, counts
                    break
    assert looks > 20
    assert LIMIT * 3 // 4 < highest <= LIMIT
    assert parts(root) == []
    assert create(cache, "f/all", 16)


def test_processes_killed_anywhere_leave_nothing_that_stays(start, cache, root):
    for _ in range(2):
        children = [start(bustle_alone, seed, 1_000_000) for seed in range(2)]
        for child in children:
            for _ in range(4):
                child.receive()
        for child in children:
            kill(child)
        assert on_disk(root) <= LIMIT
    make(cache, "f/all", 16)
    assert (whole(root), parts(root)) == (["f/all"], [])


def test_of_two_processes_that_want_a_file_one_writes_and_the_other_uses_it(start, cache, root):
    one, other = start(), start()
    data = content("f/a", 2 * BLOCK)
    assert ask(one, "create", "f/a", len(data))
    assert not ask(other, "create", "f/a", len(data))
    ask(one, "write", "f/a", data)
    assert not ask(other, "use", "f/a")
    ask(one, "commit", "f/a")
    assert not ask(other, "create", "f/a", len(data))
    assert ask(other, "use", "f/a")
    assert ask(other, "read", "f/a") == data
    for child in (one, other):  # each of them keeps it there
        assert create(cache, "f/b", 16) is None
        assert whole(root) == ["f/a"]
        ask(child, "release", "f/a")
    make(cache, "f/b", 16)
    assert whole(root) == ["f/b"]


@pytest.mark.parametrize("name", ["f/a", "f/b"])
def test_what_a_killed_process_was_writing_is_reclaimed_by_who_needs_the_name_or_the_room(start, cache, root, name):
    child = start()
    assert ask(child, "create", "f/a", LIMIT)
    ask(child, "write", "f/a", b"half")
    assert create(cache, name, 16) is None
    kill(child)
    assert (parts(root), cache.use("f/a"), cache.names("f")) == (["f/a.part"], None, [])
    make(cache, name, 16)
    assert (parts(root), whole(root), on_disk(root)) == ([], [name], LIMIT)
    assert cache.use(name).read(0) == content(name, LIMIT)


def test_what_a_killed_process_was_using_may_be_evicted(start, cache, root):
    make(cache, "f/a", 16)
    child = start()
    assert ask(child, "use", "f/a")
    assert create(cache, "f/b", 1) is None
    kill(child)
    assert whole(root) == ["f/a"]
    assert create(cache, "f/b", 1)
    assert whole(root) == []


# ---- the disk


@pytest.fixture
def small_disk(tmp_path, request):
    folder, options = tmp_path / "disk", getattr(request, "param", "size=1m")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=str(tmp_path / "file" / "cache")):
        Cache(tmp_path / "file" / "cache", LIMIT)


@pytest.mark.parametrize("small_disk", ["size=1m,ro"], indirect=True)
def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(small_disk):
    with pytest.raises(CacheError, match=f"{small_disk} cannot be written"):
        Cache(small_disk, LIMIT)


def test_a_full_disk_is_an_error_that_names_the_limit_and_leaves_nothing(small_disk):
    cache = Cache(small_disk / "cache", 10 << 20)
    make(cache, "f/a", 16)
    with pytest.raises(CacheError, match=r"within its limit of 10485760 bytes.*No space left.*lower the limit"):
        create(cache, "f/b", 512)
    assert (cache.used(), parts(cache.root), whole(cache.root)) == (16 * BLOCK, [], ["f/a"])
    make(cache, "f/b", 16)


def test_what_was_claimed_can_be_written_though_the_disk_fills_meanwhile(small_disk):
    cache = Cache(small_disk / "cache", 10 << 20)
    entry = create(cache, "f/a", 100)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "junk").write_bytes(bytes(1 << 20))
    entry.write(0, content("f/a", 100 * BLOCK))
    cache.commit(entry)
    assert entry.read(0) == content("f/a", 100 * BLOCK)


@pytest.mark.parametrize("small_disk", ["size=1m,nr_inodes=2", "size=1m,nr_inodes=3"], indirect=True)
def test_a_disk_without_room_for_names_is_the_same_error(small_disk):
    cache = Cache(small_disk, LIMIT)
    with pytest.raises(CacheError):
        make(cache, "f/a", 1)
