"""`make soak HOURS=1`: round after round, a run that is attacked must be the run that nothing happened to.

A round is computed from (seed, round): a dataset with damage in it, a config, and a schedule of starts (processes, workers) and
events (what is killed, stopped, damaged or taken away, and after which delay). The run without events, in one process, is the
reference. What real time makes of a schedule may differ from one time to the next; that the runs are equal may not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.numpy
import yaml

from equiav.config import DataConfig
from equiav.data.local_s3 import LocalS3
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from streaming import Store
from streaming.pack import pack
from tests.streaming.fault_proxy import FaultProxy

ROOT = Path(__file__).parent.parent
EVENTS_UNTIL, LIMIT = 180, 360  # seconds of an attack: no event after the first, a failure after the second
REFERENCE_LIMIT = 300
LONGEST_END = 120  # seconds from a signal that asks for the end to the end
LEFT_BEHIND = 20  # seconds after the end of a start, in which all its processes are to be gone
STALL = 20
CONFIRMED = 14.2  # seconds over which the fetcher asks again for what is wrong, at a patience of ten minutes or more
EVENTS = {
    "kill worker": 3,
    "kill decoder": 1,
    "kill fetcher": 1,
    "kill all": 2,
    "kill agent": 1,
    "term": 3,
    "term all": 1,
    "int all": 1,
    "stop worker": 1.5,
    "stop child": 0.5,
    "stop for good": 0.5,
    "down": 2,
    "fault clips": 2,
    "fault runs": 2,
    "lie": 1,
    "lie to start": 1,
    "clear cache": 1,
    "damage checkpoint": 1.5,
    "intruder": 1,
    "twin": 1,
}
# Why a start may end by itself, and what must have been done to it for that.
EXCUSES = (
    (r"was killed by|ended with exit code", {"kill decoder", "kill fetcher"}),
    (r"no answer for", {"down", "fault clips", "fault runs"}),
    (r"the run has stalled", {"stop worker", "stop child", "stop for good", "down", "fault clips", "fault runs"}),
)
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


class TimeUp(Exception):  # noqa: N818
    """The attacked run did not finish."""


# ---- what a round is ----------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    kind: str
    moving: bool  # first waits until a step is done
    delay: float  # seconds since the event before, or since that step
    draws: str  # seed of what else there is to choose


class Start(NamedTuple):
    ranks: int  # 0: without torchrun
    settings: dict[str, Any]


@dataclass
class Plan:
    clips: int
    frames: int
    part_items: int
    settings: dict[str, Any]  # of both runs
    reference: dict[str, Any]
    starts: list[Start]
    events: list[Event]
    tight: bool  # cache

    def __str__(self) -> str:
        start, stream, train = self.starts[0].settings, self.settings["stream"], self.settings["train"]
        c = start["checkpoint"]
        return (
            f"{self.clips} clips of {self.frames} frames, {self.part_items} a shard, window {stream['window']}, lanes "
            f"{stream['lanes']}, {train['steps']} steps of {train['batch_size']} in {train['micro_batch']}s, save every "
            f"{c['every_steps']} steps or {c['every_seconds']} s, keep {c['keep']}, patience "
            f"{start['stream']['patience']} and {c['patience']}{', tight cache' if self.tight else ''}"
        )


def planned(seed: int, number: int) -> Plan:
    draw = random.Random(f"{seed}/{number}")
    batch, micro = draw.randrange(5, 24), draw.randrange(1, 4)
    steps = max(20, min(160, round(draw.uniform(300, 600) / math.ceil(batch / micro))))
    settings = {
        "seed": draw.randrange(1 << 40),
        "model": {"size": "tiny", "depth": 1},
        "data": {"audio_mean": -10.3, "audio_std": 3.9},
        "objective": {"centroid_size": draw.randrange(1, 5)},
        "stream": {"window": draw.randrange(1, 6), "lanes": draw.randrange(1, 6), "max_bad": 0.8},
        "train": {
            "batch_size": batch,
            "micro_batch": micro,
            "steps": steps,
            "warmup_steps": 4,
            "lr": 1e-3,
            "lr_start": 1e-6,
        },
        "log_samples": True,
        "stall_seconds": STALL,
    }
    patience, every = draw.choice([20, 30, 60, 120]), draw.choice([1, 2, 3, 5, 8, 13, steps + 7])
    checkpoint = {
        "every_steps": every,
        "every_seconds": draw.choice([0, 0, 0, 2, 5]),
        "keep": draw.randrange(1, 4),
        "patience": draw.choice([20, 30, 60]),
    }
    starts = []
    for _ in range(40):
        stream = {"workers": draw.choice([0, 1, 1, 2]), "ahead": draw.randrange(4), "patience": patience}
        train = {"recompute": draw.random() < 0.25, "shard": draw.choice([0, 0, 0, 1])}
        start = {"stream": stream, "train": train, "checkpoint": checkpoint}
        starts.append(Start(draw.choice([0, 1, 2, 2, 3, 3]), start))
    events = []
    for k in range(draw.randrange(4, 10)):
        kind, moving = draw.choices(list(EVENTS), list(EVENTS.values()))[0], draw.random() < 0.6
        events.append(Event(kind, moving, draw.uniform(0, 4 if moving else 12), f"{seed}/{number}/{k}"))
    return Plan(
        clips=draw.randrange(37, 141),
        frames=draw.randrange(2, 6),
        part_items=draw.randrange(3, 12),
        settings=settings,
        reference={
            "stream": {"workers": draw.randrange(2), "ahead": draw.randrange(1, 4), "patience": 20},
            "checkpoint": {"every_steps": draw.choice([7, steps + 7])},
        },
        starts=starts,
        events=events,
        tight=draw.random() < 0.4,
    )


class Clips:
    """Synthetic clips, some members of which are garbage before they are packed."""

    def __init__(self, seed: int, frames: int, garbage: dict[int, list[str]]):
        shape = Shape(frames, 64, 90, "wav", 30.0, False, DataConfig())
        self.encode, self.seed, self.garbage = EncodeSynthetic(World(seed, 64, frames, 2.56), shape), seed, garbage

    def __call__(self, index: int) -> dict[str, bytes]:
        members = self.encode(index)
        for name in self.garbage.get(index, ()):
            draw = random.Random(f"{self.seed}/{index}/{name}")
            kinds = (b"", draw.randbytes(999), members[name][: draw.randrange(2, 300)])
            members[name] = draw.choice(kinds)
        return members


def make_dataset(plan: Plan, folder: Path) -> None:
    """Packed, and then damaged: of some clips every frame, of more of them some frames, of few the sound; sometimes a shard."""
    draw = random.Random(plan.settings["seed"])
    before: dict[int, list[str]] = {}  # garbage when packed
    after: dict[str, None] = {}  # members that are overwritten in the tar
    for index in range(plan.clips):
        frames = [f"{k}.jpg" for k in range(plan.frames)]
        u = draw.random()
        if u < 0.04:
            damaged = frames
        elif u < 0.26:
            damaged = draw.sample(frames, draw.randrange(1, plan.frames))
        elif u < 0.29:
            damaged = ["wav"]
        else:
            continue
        for name in damaged:
            if draw.random() < 0.5:
                before.setdefault(index, []).append(name)
            else:
                after[f"clip-{index}.{name}"] = None
    items = [(f"clip-{k}", k) for k in range(plan.clips)]
    encode = Clips(plan.settings["seed"] % 1000, plan.frames, before)
    pack(items, encode, Store(str(folder)), processes=0, part_items=plan.part_items)
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            places = [(info.offset_data, info.size) for info in tar if info.name in after]
        with path.open("r+b") as file:
            for offset, size in places:
                file.seek(offset + draw.randrange(size))
                file.write(draw.randbytes(1 + draw.randrange(offset + size - file.tell())))
    shards = sorted(folder.glob("*.tar"))
    if len(shards) > 5 and draw.random() < 0.4:
        shard, how = draw.choice(shards), draw.choice(("cut", "missing", "offsets"))
        if how == "cut":
            os.truncate(shard, int(shard.stat().st_size * draw.uniform(0.1, 0.9)))
        elif how == "missing":
            shard.unlink()
        else:
            os.truncate(f"{shard}.offsets", 33)


def tight_cache(plan: Plan, folder: Path) -> int:
    """The least that a cache needs for up to three ranks, where it can be told so simply; else more than enough."""
    M, G, p = plan.settings["stream"]["window"], *(plan.settings["train"][n] for n in ("batch_size", "micro_batch"))
    if not plan.tight or (M - 1) * plan.part_items < G:
        return 1 << 30
    largest = max(path.stat().st_size for path in folder.glob("*.tar")) + (1 << 16)
    return max(int(W * 2 * (math.ceil(M * (1 / W + p / G)) + 1) * largest * 1.03) for W in (1, 2, 3))


# ---- processes ----------------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    pid: int
    parent: int
    began: int
    rank: int | None
    command: str

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def marked(mark: str) -> list[Process]:
    """Every process that was started with this in its environment, and those that they started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ = (path / "environ").read_bytes().split(b"\0")
            if not any(mark.encode() in value for value in environ):
                continue
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended
        rank = next((int(value[5:]) for value in environ if value.startswith(b"RANK=")), None)
        found.append(Process(int(path.name), int(stat[1]), int(stat[19]), rank, command))
    return sorted(found, key=lambda process: (process.began, process.pid))


class Launch:
    """One start of the command, under torchrun or not."""

    def __init__(self, folder: Path, number: str, ranks: int, settings: dict[str, Any], env: dict[str, str]):
        self.number, self.ranks = number, ranks
        self.mark, self.log = f"{MARK}/{folder.name}/{number};", folder / f"start-{number}.log"
        self.done_to: set[str] = set()
        config = folder / f"start-{number}.yaml"
        config.write_text(yaml.safe_dump(settings))
        program = [sys.executable, "-m"]
        if ranks:
            program += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--max-restarts=50"]
            program += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m"]
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [*program, "equiav", "pretrain", "--config", str(config)],
            cwd=ROOT,
            env={**os.environ, **env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), name: value},
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __str__(self) -> str:
        return f"start {self.number} ({f'torchrun {self.ranks}' if self.ranks else 'alone'})"

    def all(self) -> list[Process]:
        return marked(self.mark)

    def workers(self) -> list[Process]:
        if not self.ranks:
            return [process for process in self.all() if process.pid == self.process.pid]
        return [process for process in self.all() if process.parent == self.process.pid and process.rank is not None]

    def children(self, kind: str, worker: Process) -> list[Process]:
        """The first that a loader starts is its fetcher, the others decode."""
        own = [process for process in self.all() if process.parent == worker.pid and "spawn_main" in process.command]
        return {"fetcher": own[:1], "decoder": own[1:], "child": own}[kind]

    def kill(self) -> None:
        while found := self.all():
            for process in found:
                process.signal(signal.SIGKILL)
            self.process.poll()
            time.sleep(0.05)

    def said(self) -> list[str]:
        text = self.log.read_text(errors="replace")
        return re.findall(r"equiav pretrain: (.*)", text)


# ---- a round ------------------------------------------------------------------------------------------------------------


class Round:
    def __init__(self, seed: int, number: int, folder: Path):
        self.plan, self.folder = planned(seed, number), folder
        self.happened: list[str] = []
        self.failures: list[str] = []
        self.saved: list[tuple[int, int]] = []  # starts so far, and the step that the last of them said it had saved
        self.damaged: set[str] = set()  # checkpoints
        self.finished, self.launches, self.starts = False, 0, 0
        self.begun, self.fault_ends = time.monotonic(), 0.0
        self.run: Launch | None = None

    def play(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        clips, self.kept = self.folder / "store" / "clips" / "set", self.folder / "store" / "runs" / "one"
        clips.parent.mkdir(parents=True)
        self.kept.parent.mkdir(parents=True)
        make_dataset(self.plan, clips)
        self.cache_bytes = tight_cache(self.plan, clips)
        self.out = self.folder / "attacked"
        with LocalS3(self.folder / "store") as s3:
            self.healthy = {
                "AWS_ACCESS_KEY_ID": s3.key,
                "AWS_SECRET_ACCESS_KEY": s3.secret,
                "AWS_ENDPOINT_URL": s3.options["endpoint_url"],
            }
            self.proxy = FaultProxy(s3.port, seed=self.plan.settings["seed"])
            self.env = {**self.healthy, "AWS_ENDPOINT_URL": self.proxy.options()["endpoint_url"]}
            try:
                if self.make_reference():
                    self.begun = time.monotonic()
                    self.attack()
                    self.compare()
            except TimeUp as error:
                self.failures.append(str(error))
            except Exception:  # a file that should be there, or cannot be read: found by what looks at it
                self.failures.append(traceback.format_exc())
            finally:
                for process in marked(f"{MARK}/{self.folder.name}/"):
                    process.signal(signal.SIGKILL)
                self.proxy.close()

    def settings(self, *parts: dict[str, Any], out: Path, cache: str) -> dict[str, Any]:
        """Of a start: sections of the parts are joined."""
        joined: dict[str, Any] = {"out": str(out)}
        own = {"stream": {"url": "s3://clips/set", "cache": str(self.folder / cache)}}
        for part in (self.plan.settings, own, *parts):
            for name, value in part.items():
                joined[name] = {**joined.get(name, {}), **value} if isinstance(value, dict) else value
        return joined

    def make_reference(self) -> bool:
        settings = self.settings(self.plan.reference, out=self.folder / "reference", cache="reference-cache")
        reference = Launch(self.folder, "reference", 0, settings, self.healthy)
        deadline = time.monotonic() + REFERENCE_LIMIT
        while (status := reference.process.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        reference.kill()
        if status != 0:
            self.failures.append(f"the reference ended with {status}: {tail(reference.log)}")
        return status == 0

    # ---- the attack

    def attack(self) -> None:
        self.launch()
        for event in self.plan.events:
            if time.monotonic() - self.begun > EVENTS_UNTIL:
                break
            if event.moving and not self.go_on(60, self.moves):
                break
            if not self.go_on(event.delay):
                break
            draw = random.Random(event.draws)
            at, number = time.monotonic() - self.begun, len(self.happened)
            self.happened.append(event.kind)
            self.run.done_to.add(event.kind)  # type: ignore[union-attr]
            more = getattr(self, "do_" + event.kind.split()[0])(event.kind, draw)
            self.happened[number] = f"{event.kind}{f' ({more})' if more else ''} at {at:.0f}"
            if self.finished:
                break
        self.go_on(math.inf)

    def launch(self) -> None:
        """With the settings of the next start of the plan."""
        start = self.plan.starts[self.launches % len(self.plan.starts)]
        whole = [path.parent.name for path in self.kept.glob("step-*/manifest.json")]
        own = {
            "stream": {"cache_bytes": self.cache_bytes},
            "checkpoint": {"url": "s3://runs/one"},
            # Where none is left but those that were damaged here, only this goes on, as the error would say.
            "resume": "anyway" if self.damaged and not set(whole) - self.damaged else "auto",
        }
        self.launches += 1
        self.starts = len(lines(self.out / "starts.jsonl"))
        settings = self.settings(start.settings, own, out=self.out, cache="cache")
        self.run = Launch(self.folder, f"{self.launches:02d}", start.ranks, settings, self.env)
        if self.fault_ends:
            self.run.done_to.add("down")  # or what else the store still does

    def tick(self) -> None:
        """To be called all the time: faults end, and so does the time of the round."""
        now = time.monotonic()
        if self.fault_ends and now > self.fault_ends:
            self.fault_ends, self.proxy.down, self.proxy.shares = 0.0, False, {}
        if now - self.begun > LIMIT:
            raise TimeUp(f"did not finish within {LIMIT} s; {self.run}: {tail(self.run.log)}")  # type: ignore[union-attr]
        time.sleep(0.05)

    def rest(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """-> whether that came true."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                return False
            self.tick()
        return True

    def go_on(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Rests; a start that ends is judged, and started again. -> whether there still is something to attack."""
        assert self.run
        end = time.monotonic() + seconds
        while not self.finished and time.monotonic() < end and not until():
            self.tick()
            if self.run.process.poll() is not None:
                self.judge(self.run)
                self.ended(self.run)
                if not self.finished:
                    self.launch()
        return not self.finished

    def moves(self) -> bool:
        """A step is done since the last start."""
        starts, last = lines(self.out / "starts.jsonl"), lines(self.out / "metrics.jsonl")[-1:]
        return len(starts) > self.starts and bool(last) and last[0]["step"] >= starts[-1]["step"]

    def judge(self, run: Launch) -> None:
        """It has ended, and nobody asked it to."""
        status, said = run.process.returncode, (run.said() or ["nothing"])[-1]
        if status == 0 or any(re.search(text, said) and run.done_to & causes for text, causes in EXCUSES):
            return
        self.failures.append(f"{run} ended by itself with {status}: {said} [{tail(run.log, 3)}]")

    def ended(self, run: Launch) -> None:
        """All of it is to be gone soon."""
        if run.process.returncode == 0:
            self.finished = True
        if not self.rest(LEFT_BEHIND, lambda: not run.all()):
            left = [f"{process.pid} of rank {process.rank}: {process.command[:80]}" for process in run.all()]
            self.failures.append(f"{run} has left behind: {left}")
        run.kill()
        if saved := re.findall(r"step (\d+) is saved at", " ".join(run.said())):
            self.saved.append((len(lines(self.out / "starts.jsonl")), int(saved[-1])))

    def end(self, how: str) -> None:
        """Ends the start under way."""
        run = self.run
        assert run
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[how.split()[0]]
        if how.endswith("all"):
            for process in run.all():
                process.signal(number)
        elif run.process.poll() is None:
            run.process.send_signal(number)
        if not self.rest(LONGEST_END, lambda: run.process.poll() is not None):
            self.failures.append(f"{run} has not ended {LONGEST_END} s after {how}: {tail(run.log)}")
            run.kill()
        self.ended(run)

    def again(self, how: str) -> None:
        self.end(how)
        if not self.finished:
            self.launch()

    # ---- events, by the first word of their kind

    def do_kill(self, kind: str, draw: random.Random) -> str:
        what = kind.split()[1]
        if what in ("all", "agent"):
            self.again("kill all" if what == "all" else "kill")
            return ""
        victim = self.victim(what, draw)
        if victim is None:
            return "none there"
        victim.signal(signal.SIGKILL)
        if victim.pid == self.run.process.pid:  # type: ignore[union-attr]
            self.again("kill")
        return f"rank {victim.rank or 0}"

    def victim(self, what: str, draw: random.Random) -> Process | None:
        assert self.run
        workers = self.run.workers()
        if not workers:
            return None
        worker = draw.choice(workers)
        found = [worker] if what == "worker" else self.run.children(what, worker)
        return draw.choice(found) if found else None

    def do_term(self, kind: str, draw: random.Random) -> str:
        self.again(kind)
        return ""

    do_int = do_term

    def do_stop(self, kind: str, draw: random.Random) -> str:
        victim = self.victim("child" if kind == "stop child" else "worker", draw)
        if victim is None:
            return "none there"
        alone = len(self.run.workers()) == 1  # type: ignore[union-attr]
        seconds = draw.uniform(1, 12)
        if (
            kind == "stop for good"
        ):  # until the others have noticed, and torchrun has waited for 30 s; nobody notices one alone
            seconds = STALL + 8 if alone else 100
        victim.signal(signal.SIGSTOP)
        there = Path(f"/proc/{victim.pid}/stat")
        self.go_on(seconds, lambda: not there.exists() or ") Z " in there.read_text())
        victim.signal(signal.SIGCONT)
        return f"rank {victim.rank or 0}, {seconds:.0f} s"

    def do_down(self, kind: str, draw: random.Random) -> str:
        seconds = draw.choice([draw.uniform(1, 6), draw.uniform(6, 30)])
        self.proxy.down = True
        self.fault_ends = time.monotonic() + seconds
        return f"{seconds:.0f} s"

    def do_fault(self, kind: str, draw: random.Random) -> str:
        bucket = kind.split()[1]
        fault = draw.choice(("flip", "flip", "short", "truncate", "503", "reset", "404", "slow", "stall"))
        share, seconds = draw.choice([0.1, 0.5, 1.0]), draw.uniform(1, 10)
        patience = self.plan.starts[0].settings["stream"]["patience"]
        if fault in ("flip", "short", "404") and bucket == "clips" and share > 0.1:
            # What is wrong for longer than it is asked for again is wrong: it would be a bad sample.
            seconds = min(seconds, CONFIRMED * min(1, patience / 600) / 2)
        if fault in ("404", "stall"):
            share = 0.1
        # 1 kB/s: of a shard that would be the whole round
        self.proxy.only = re.compile(f" /{bucket}.*(offsets|index|owner)$" if fault == "slow" else f" /{bucket}")
        self.proxy.down, self.proxy.shares = False, {fault: share}
        self.fault_ends = time.monotonic() + seconds
        return f"{fault} {share:.0%} for {seconds:.1f} s"

    def do_lie(self, kind: str, draw: random.Random) -> str:
        """Once or twice, what is small and decides much is not what it is."""
        lies = [draw.choice(("flip", "short", "truncate", "404")) for _ in range(draw.randrange(1, 3))]
        if kind == "lie to start":
            self.end("term")
        self.proxy.only = re.compile(r"^GET .*(index|owner|manifest\.json)(\?|$)")
        self.proxy.next = list(lies)
        if kind == "lie to start" and not self.finished:
            self.launch()
        return ", ".join(lies)

    def do_clear(self, kind: str, draw: random.Random) -> str:
        self.end(draw.choice(("term", "kill all")))
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        if not self.finished:
            self.launch()
        return ""

    def do_damage(self, kind: str, draw: random.Random) -> str:
        """The newest checkpoint, on the disk of the server."""
        self.end(draw.choice(("term", "kill all")))
        if self.finished:
            return ""
        told = "none there"
        whole = sorted(path.parent for path in self.kept.glob("step-*/manifest.json"))
        whole = [path for path in whole if path.name not in self.damaged]
        if whole:
            path = draw.choice(sorted(whole[-1].iterdir()))
            content = bytearray(path.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content if draw.random() < 0.7 else content[: draw.randrange(len(content))])
            self.damaged.add(whole[-1].name)
            told = f"{path.parent.name}/{path.name}"
        self.launch()
        return told

    def do_intruder(self, kind: str, draw: random.Random) -> str:
        """Another run, by mistake in the same place: refused, and nothing happens to the one that is there."""
        if not any(path.parent.name not in self.damaged for path in self.kept.glob("step-*/manifest.json")):
            return "no checkpoint that would refuse it"
        other = {"seed": self.plan.settings["seed"] + 1, "checkpoint": {"url": "s3://runs/one"}}
        settings = self.settings(self.plan.starts[0].settings, other, out=self.out, cache="cache")
        intruder = Launch(self.folder, f"{self.launches:02d}-intruder", 0, settings, self.healthy)
        self.go_on(90, lambda: intruder.process.poll() is not None)
        if not self.rest(60, lambda: intruder.process.poll() is not None) or intruder.process.returncode != 2:
            self.failures.append(f"the intruder ended with {intruder.process.poll()}: {tail(intruder.log)}")
        intruder.kill()
        return ""

    def do_twin(self, kind: str, draw: random.Random) -> str:
        """The same run, started twice: the older one ends by itself."""
        old = self.run
        assert old
        self.launch()
        if not self.rest(LONGEST_END, lambda: old.process.poll() is not None):
            self.failures.append(f"{old} goes on although {self.run} was started: {tail(old.log)}")
            old.kill()
        self.rest(LEFT_BEHIND, lambda: not old.all())
        if left := old.all():
            self.failures.append(f"{old} has left behind, after {self.run} took over: {left}")
            old.kill()
        return ""

    # ---- at the end

    def compare(self) -> None:
        reference, out = self.folder / "reference", self.out
        ours, theirs = (list(lines(folder / "metrics.jsonl")) for folder in (out, reference))
        steps = list(range(self.plan.settings["train"]["steps"]))
        for name, rows in (("attacked", ours), ("reference", theirs)):
            if [row["step"] for row in rows] != steps:
                self.failures.append(f"metrics of the {name}: steps are missing, twice or in disorder")
        if (out / "metrics.jsonl").read_bytes() != (reference / "metrics.jsonl").read_bytes():
            different = [row["step"] for row, other in zip(ours, theirs, strict=False) if row != other]
            self.failures.append(f"metrics differ, from step {different[:1]} on")
        weights, expected = (safetensors.numpy.load_file(f / "model" / "model.safetensors") for f in (out, reference))
        names = [
            name
            for name in sorted(weights.keys() | expected.keys())
            if name not in weights or name not in expected or weights[name].tobytes() != expected[name].tobytes()
        ]
        if names:
            self.failures.append(f"weights differ: {len(names)} tensors, {names[0]} the first")
        bad, expected_bad = (
            {(row["sample"], row["reason"]) for row in lines(folder / "quarantine.jsonl")}
            for folder in (out, reference)
        )
        if bad != expected_bad:
            self.failures.append(f"quarantined: {sorted(bad ^ expected_bad)} in one of them only")
        if (ids := samples(out)) != (expected_ids := samples(reference)):
            different = [step for step in steps if ids.get(step) != expected_ids.get(step)]
            self.failures.append(f"samples of steps {different[:9]} differ")
        environ = {**os.environ, **self.healthy, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        program = [sys.executable, "-m", "equiav", "diff", str(reference), str(out)]
        diff = subprocess.run(program, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
        if diff.returncode:
            self.failures.append(f"equiav diff ends with {diff.returncode}: {(diff.stdout + diff.stderr)[-500:]}")
        starts = lines(out / "starts.jsonl")
        told_otherwise = any(re.search("fault runs|lie|damage|twin", event) for event in self.happened)
        for count, step in self.saved:
            if count < len(starts) and starts[count]["step"] < step and not told_otherwise:
                self.failures.append(f"step {step} was said to be saved, start {count} went on at {starts[count]}")


def lines(path: Path) -> list[Any]:
    """Whole ones: the last may be under way."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line.endswith(("}", "]"))]


def samples(out: Path) -> dict[int, list[int]]:
    """Step -> the ids of its samples, in the order of the ranks, in the start that ran it last."""
    order = {row["token"]: number for number, row in enumerate(lines(out / "starts.jsonl"))}
    found: dict[int, dict[int, list[int]]] = {}
    for path in sorted(out.glob("samples-*.jsonl"), key=lambda path: int(path.stem.split("-")[1])):
        for token, step, ids in lines(path):  # a start that was killed before it was listed has no place: the first
            found.setdefault(step, {}).setdefault(order.get(token, -1), []).extend(ids)
    return {step: of_starts[max(of_starts)] for step, of_starts in found.items()}


def tail(path: Path, count: int = 12) -> str:
    """Of a log; no lines of metrics."""
    found = [line for line in path.read_text(errors="replace").splitlines() if line and not line.startswith("{")]
    return "\n        ".join(["", *found[-count:]])


# ---- rounds -------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0, help="no round begins after these")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--round", type=int, help="this one alone")
    parser.add_argument("--keep", action="store_true", help="the folders of rounds that were equal, too")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak", help="of what failed rounds leave")
    options = parser.parse_args()
    print(f"soak: seed {options.seed}, {options.hours:g} hours", flush=True)
    # Whatever ends this process: the guard sees its pipe end, and kills all that is marked.
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, MARK], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun, rounds, events, failed = time.monotonic(), 0, 0, 0
    try:
        while options.round is not None or time.monotonic() - begun < 3600 * options.hours:
            number = rounds if options.round is None else options.round
            since, folder = time.monotonic(), (options.folder / f"{options.seed}-{number}").resolve()
            play = Round(options.seed, number, folder)
            play.play()
            rounds, events, failed = rounds + 1, events + len(play.happened), failed + bool(play.failures)
            what = f"round {number}: {play.plan}; {', '.join(play.happened)}; {play.launches} launches"
            print(f"{what}; {time.monotonic() - since:.0f} s: {'FAILED' if play.failures else 'equal'}", flush=True)
            for failure in play.failures:
                print(f"    {failure}", flush=True)
            if play.failures:
                print(f"    all of it is in {folder}", flush=True)
            elif not options.keep:
                shutil.rmtree(folder)
            if options.round is not None:
                break
    except KeyboardInterrupt:
        print("soak: interrupted", flush=True)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # the guard has begun, and is quick
            signal.signal(number, signal.SIG_IGN)
        guard.stdin.close()  # type: ignore[union-attr]
        guard.wait()
    print(f"{rounds} rounds, {events} events, {failed} failures; repeat with --seed {options.seed}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
