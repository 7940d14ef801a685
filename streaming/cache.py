"""Shards on local disk, under a hard limit, shared by all processes of a node that name the same folder.

The folder is the whole state. A file being written is `NAME.part`, with all its blocks allocated before the first byte is
fetched and an exclusive lock on it; a file in use has a shared lock. Locks end with their process, so after a crash a part
without a lock is nobody's, and a whole file without a lock may be evicted. What is used is what the file system says.

Two jobs that share a folder must not wait for each other's room. So each process registers what its whole job may hold, in a file
`.job-PID-NUMBER` with a lock on it, and a job that would not fit beside those which run does not begin.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

BLOCK = 4096
DYING = 10.0  # seconds that processes of a job which is ending may take
Ranges = Sequence[tuple[int, int]]  # first byte and one after the last, ascending, apart


class CacheError(OSError):
    """The cache cannot hold what a run needs; the message names the setting."""


class CacheMisfit(CacheError):  # noqa: N818
    """What the settings ask of a cache folder suits no machine."""


class CacheGone(CacheError):  # noqa: N818
    """The folder is no longer there."""


def gone(root: Path) -> CacheGone:
    return CacheGone(f"the cache folder {root} was removed while the run used it; start the run again")


class Claim(NamedTuple):
    """What the job of this process may hold, as others see it, until it is given back or the process ends."""

    path: Path
    file: int
    bytes: int


RELEASING = threading.Lock()


class Entry:
    """A file of the cache, locked: nobody evicts it until it is released."""

    def __init__(self, path: Path, file: int):
        self.path, self.file = path, file

    def write(self, offset: int, content: bytes) -> None:
        os.pwrite(self.file, content, offset)

    def read(self, start: int) -> bytes:
        """From there to the end."""
        return os.pread(self.file, max(0, os.fstat(self.file).st_size - start), start)

    def release(self) -> None:
        with RELEASING:  # closed twice, it would be the file of somebody else who was given its number
            file, self.file = self.file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:  # of a fetcher that was closed on its way, in a process that lives on
        self.release()


class Cache:
    def __init__(self, root: Path, limit: int):
        self.root, self.limit = root, limit
        self._threads = threading.Lock()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CacheError(f"the cache folder {root} cannot be written: {error}") from None

    def close(self) -> None:
        os.close(self._lock_file)

    def names(self, folder: str) -> list[str]:
        """Whole files of a folder."""
        try:
            return [name for name in os.listdir(self.root / folder) if not name.endswith(".part")]
        except FileNotFoundError:
            return []

    def claim(self, job: str, wishes: Sequence[int]) -> Claim:
        """Registers the first of `wishes`, in bytes, for which there is room beside other jobs."""
        deadline = time.monotonic() + DYING
        while True:
            with self._locked():
                jobs = self._jobs()
                own = max((size for size, _ in jobs.pop(job, [])), default=0)
                others = sum(max(size for size, _ in registered) for registered in jobs.values())
                for size in wishes:
                    if size <= own or others + size <= self.limit:
                        return self._register(job, size)
            if time.monotonic() > deadline:
                who = "; ".join(
                    f"{max(size for size, _ in registered)} bytes by process {', '.join(str(pid) for _, pid in registered)}"
                    for registered in jobs.values()
                )
                raise CacheError(
                    f"the cache folder {self.root} is used by other jobs that may hold {who}. This one needs {wishes[-1]} "
                    f"beside that, and cache_bytes is {self.limit}. Raise it, name another folder, or wait until they have "
                    "ended"
                )
            time.sleep(0.1)

    def give_back(self, claim: Claim) -> None:
        with contextlib.suppress(CacheGone), self._locked():  # a folder that is gone says nothing to others
            claim.path.unlink()
        os.close(claim.file)

    def _jobs(self) -> dict[str, list[tuple[int, int]]]:
        """job -> bytes and process, of each of its registrations."""
        jobs: dict[str, list[tuple[int, int]]] = {}
        for path in self.root.glob(".job-*"):
            if not self._remove(path):
                line = json.loads(path.read_bytes())
                jobs.setdefault(line["job"], []).append((line["bytes"], line["pid"]))
        return jobs

    def _register(self, job: str, size: int) -> Claim:
        for number in itertools.count():
            path = self.root / f".job-{os.getpid()}-{number}"
            with contextlib.suppress(FileExistsError):
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                fcntl.flock(file, fcntl.LOCK_EX)
                os.write(file, json.dumps({"job": job, "pid": os.getpid(), "bytes": size}).encode())
                return Claim(path, file, size)
        raise AssertionError("not reached")

    def used(self) -> int:
        """Bytes on disk."""
        with self._locked():
            return self._used()

    def _used(self) -> int:
        return sum(status.st_blocks * 512 for _, status in self._files())

    def use(self, name: str) -> Entry | None:
        """A whole file, if it is there."""
        path = self.root / name
        with self._locked():
            if not path.exists():
                return None
            file = os.open(path, os.O_RDWR)
            fcntl.flock(file, fcntl.LOCK_SH)
            return Entry(path, file)

    def create(self, name: str, size: int, ranges: Ranges, evict_first: Callable[[str], float]) -> Entry | None:
        """A new file with room for `ranges` of its `size` bytes, to be written and committed.

        None: another process is writing it, or there is no room as long as others use what is there.
        """
        path = self.root / name
        part = Path(f"{path}.part")
        with self._locked():
            if path.exists() or (part.exists() and not self._remove(part)):
                return None
            if not self._make_room(_on_disk(ranges), evict_first):
                return None
            file = None
            try:
                part.parent.mkdir(exist_ok=True)
                file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                fcntl.flock(file, fcntl.LOCK_EX)
                os.ftruncate(file, size)
                for start, stop in ranges:
                    if stop > start:
                        os.posix_fallocate(file, start, stop - start)
                # A file in many pieces takes blocks for the list of them, too; how many only the file system knows.
                if not self._make_room(0, evict_first):
                    os.unlink(part)
                    os.close(file)
                    return None
            except FileNotFoundError:
                raise
            except OSError as error:
                if file is not None:
                    os.unlink(part)
                    os.close(file)
                raise CacheError(
                    f"the cache folder {self.root} has no room within its limit of {self.limit} bytes: {error}; "
                    "free space on that disk or lower the limit"
                ) from None
            return Entry(path, file)

    def commit(self, entry: Entry) -> None:
        """The entry is written: others may use it."""
        with self._locked():
            os.rename(f"{entry.path}.part", entry.path)
            fcntl.flock(entry.file, fcntl.LOCK_SH)

    def abandon(self, entry: Entry) -> None:
        """The entry will not be finished."""
        with self._locked():
            os.unlink(f"{entry.path}.part")
            entry.release()

    def discard(self, entry: Entry) -> None:
        """A whole file that turned out damaged. Others who have it open keep what they have."""
        with self._locked():
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(entry.path.stat(), os.fstat(entry.file)):  # and not a new one in its place
                    entry.path.unlink()
            entry.release()

    def _make_room(self, needed: int, evict_first: Callable[[str], float]) -> bool:
        files = list(self._files())
        used = sum(status.st_blocks * 512 for _, status in files)
        if used + needed <= self.limit:
            return True
        files = [(path, status) for path, status in files if not path.name.startswith(".")]
        files.sort(
            key=lambda item: (
                item[0].suffix != ".part",
                -evict_first(str(item[0].relative_to(self.root))),
                item[1].st_mtime,
            )
        )
        for path, status in files:
            if used + needed <= self.limit:
                break
            if self._remove(path):
                used -= status.st_blocks * 512
        return used + needed <= self.limit

    def _remove(self, path: Path) -> bool:
        """Unless a process has it locked."""
        file = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in (self.root, *(entry.path for entry in os.scandir(self.root) if entry.is_dir())):
            for entry in os.scandir(folder):
                if entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Against other processes, and against other threads of this one."""
        with self._threads:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            try:
                # If the folder was recreated, our lock protects nothing.
                if not os.path.samestat(os.fstat(self._lock_file), os.stat(self.root / ".lock")):
                    raise gone(self.root)
                yield
            except FileNotFoundError:
                raise gone(self.root) from None
            finally:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)


def _on_disk(ranges: Ranges) -> int:
    """Bytes of the blocks that ranges touch, at most."""
    return sum((-(-stop // BLOCK) - start // BLOCK) * BLOCK for start, stop in ranges)
