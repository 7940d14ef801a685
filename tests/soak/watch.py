"""Processes, and what they hold: memory, open files, threads. For `tests.soak`."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MARK = f"EQUIAV_SOAK={secrets.token_hex(8)}"
GUARD = """
import os, signal, sys, time
sys.stdin.read()
for _ in range(30):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if sys.argv[1].encode() in open(f"/proc/{pid}/environ", "rb").read():
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.1)
"""
TEMPORARY = ("/tmp", "/dev/shm")
PRIVATE = "EQUIAV_SOAK_PRIVATE"  # set where mounts, /tmp and /dev/shm are this program's own
MOST = {"memory": 1500 << 20, "files": 300, "threads": 80}  # of a process, whatever it does: all models are tiny
GROWTH = {"memory": 100 << 20, "files": 15, "threads": 6}  # while it does the same all the time
WARM = 20  # seconds of a process's life before it does that
ENOUGH = 20  # looks at it, a second apart
ZOMBIE = 15  # seconds


class Process(NamedTuple):
    pid: int
    parent: int
    began: int  # ticks since the machine began
    rank: int | None
    command: str
    memory: int  # bytes, resident
    threads: int

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def seconds(self) -> float:
        with open("/proc/uptime") as file:
            return float(file.read().split()[0]) - self.began / os.sysconf("SC_CLK_TCK")

    @property
    def files(self) -> int:
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return 0


def marked(mark: str) -> list[Process]:
    """Every process that was started with this in its environment, and those that they started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ = (path / "environ").read_bytes().split(b"\0")
            if not any(mark.encode() in value for value in environ):
                continue
            stat = _stat(path)
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended
        rank = next((int(value[5:]) for value in environ if value.startswith(b"RANK=")), None)
        memory = int(stat[21]) * resource.getpagesize()
        found.append(Process(int(path.name), int(stat[1]), int(stat[19]), rank, command, memory, int(stat[17])))
    return sorted(found, key=lambda process: (process.began, process.pid))


def _stat(path: Path) -> list[str]:
    return (path / "stat").read_text().rpartition(")")[2].split()


def zombies(parents: Iterable[int]) -> set[int]:
    """Children of these that have ended, and that they have not looked at. Their environment is gone: nothing marks them."""
    own, found = set(parents), set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = _stat(path)
            if stat[0] == "Z" and int(stat[1]) in own:
                found.add(int(path.name))
    return found


@dataclass
class Track:
    what: str
    looks: list[tuple[int, int, int]] = field(default_factory=list)  # memory, files, threads; while it does the same
    most: tuple[int, int, int] = (0, 0, 0)


class Watch:
    """Looks at all processes of a round once a second."""

    def __init__(self, slow: float):
        self.slow, self.last = slow, 0.0
        self.tracks: dict[tuple[int, int], Track] = {}
        self.ended: dict[int, float] = {}  # zombies, and since when
        self.failures: dict[str, str] = {}

    def due(self) -> bool:
        return time.monotonic() - self.last > 1.0

    def look(self, processes: list[Process], steady: bool, stopped: bool) -> None:
        """steady: their run has done a step. stopped: one of them is, on purpose, and does not look at its children."""
        self.last = time.monotonic()
        for process in processes:
            track = self.tracks.setdefault((process.pid, process.began), Track(process.command[-60:].strip()))
            numbers = process.memory, process.files, process.threads
            track.most = tuple(map(max, track.most, numbers))  # type: ignore[assignment]
            if steady and process.seconds > WARM * self.slow:
                track.looks.append(numbers)
        there = set() if stopped else zombies(process.pid for process in processes)
        self.ended = {pid: self.ended.get(pid, self.last) for pid in there}
        for pid, since in self.ended.items():
            if self.last - since > ZOMBIE * self.slow:
                self.failures[f"zombie {pid}"] = f"process {pid} has ended, and nobody has looked for {ZOMBIE} s"

    def verdict(self) -> list[str]:
        """What is wrong."""
        found = list(self.failures.values())
        for (pid, _), track in self.tracks.items():
            for k, name in enumerate(MOST):
                if track.most[k] > MOST[name]:
                    found.append(
                        f"{name} of process {pid} ({track.what}): {track.most[k]:,}, expected {MOST[name]:,} at most"
                    )
                if (grown := _grown([look[k] for look in track.looks])) > GROWTH[name]:
                    found.append(f"{name} of process {pid} ({track.what}) grew by {grown:,} in {len(track.looks)} s")
        return found

    def __str__(self) -> str:
        if not self.tracks:
            return "nothing seen"
        memory, files, threads = (max(track.most[k] for track in self.tracks.values()) for k in range(3))
        return f"a process held at most {memory >> 20} MB, {files} files, {threads} threads"


def _grown(values: list[int]) -> int:
    """By how much the least of the second half is above the least of the first."""
    half = len(values) // 2
    return min(values[half:]) - min(values[:half]) if len(values) >= ENOUGH else 0


# ---- disks of this program alone ----------------------------------------------------------------------------------------


def make_private() -> bool:
    """Goes on as the same process with mounts, /tmp and /dev/shm of its own, where the user may do so."""
    if os.environ.get(PRIVATE) or os.geteuid() or not shutil.which("unshare"):
        return bool(os.environ.get(PRIVATE))
    os.environ[PRIVATE] = "1"
    program = [sys.executable, "-m", "tests.soak", *sys.argv[1:]]
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *program])


def private_temporary() -> None:
    for place in TEMPORARY:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)


def mount(folder: Path, size: int) -> None:
    """A disk of so many bytes, where that may be made; else a folder."""
    folder.mkdir(parents=True)
    if os.environ.get(PRIVATE):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)


def unmount(folder: Path) -> None:
    """What is on the disk is in the folder afterwards."""
    if not os.path.ismount(folder):
        return
    copy = folder.with_name(f"{folder.name}-copy")
    shutil.copytree(folder, copy, symlinks=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()
    copy.rename(folder)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all the room of a disk but so many bytes."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    if leave:
        os.truncate(ballast, max(0, ballast.stat().st_size - leave))
    return ballast


def left_in(*places: str) -> list[str]:
    """Temporary files of this program's processes: nothing else writes where these are private. torch has folders of its own."""
    found = [path for place in places for path in Path(place).iterdir()] if os.environ.get(PRIVATE) else []
    return [str(path) for path in found if not path.name.startswith(("torchelastic_", "torchinductor_"))]


def clean(*places: str) -> None:
    for path in [path for place in places for path in Path(place).iterdir()] if os.environ.get(PRIVATE) else []:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
