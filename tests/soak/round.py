"""A round of `tests.soak`: what is made before it, how a run is started, watched, judged and ended."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from equiav.data.local_s3 import LocalS3
from tests.soak.compare import compare, copy_of_log, lines
from tests.soak.data import damage_dataset, make_dataset, samples_of_shards, write_label_files
from tests.soak.plan import planned
from tests.soak.run import ROOT, Launch, environment, excused, tail
from tests.soak.store import LyingStore
from tests.soak.watch import MARK, TEMPORARY, Process, Watch, clean, left_in, marked, mount, unmount
from tests.streaming.fault_proxy import FaultProxy

EVENTS_UNTIL, LIMIT = 180, 400  # seconds of an attack: no event after the first, a failure after the second
REFERENCE_LIMIT = 300
LONGEST_END = 120  # seconds from a signal that asks for the end to the end
LEFT_BEHIND = 20  # seconds after the end of a start, in which all its processes are to be gone
DISKS = {"out": 64 << 20, "cache": 256 << 20}
ROOMY = 200 << 20  # bytes for the cache, where it is not tight


class TimeUp(Exception):  # noqa: N818
    """The attacked run did not finish."""


class Round:
    """What is done to the run is in events.py."""

    def __init__(self, seed: int, number: int, folder: Path, kinds: list[str], slow: float):
        self.plan, self.folder, self.slow = planned(seed, number, kinds, slow), folder, slow
        self.clips, self.runs = folder / "store" / "clips" / "set", folder / "store" / "runs"
        self.kept, self.out = self.runs / "one", folder / "disk-out" / "attacked"
        self.happened: list[str] = []
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.watch = Watch(slow)
        self.faults: dict[str, float] = {}  # what the store does wrong now, and until when
        self.damaged: set[str] = set()  # checkpoints
        self.uncertain = False  # what is kept may be damaged without anybody's knowing which
        self.anyway = False  # the next start may begin at step 0 although there are checkpoints
        self.lied: set[int] = set()  # steps of lines that were changed
        self.claimed = 0  # step of the last checkpoint that the run has said it has
        self.finished, self.launches, self.starts, self.ends = False, 0, 0, 0
        self.begun = self.launched = self.store_ill = 0.0
        self.stopped: Process | None = None
        self.ending = False
        self.run: Launch | None = None

    def play(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.runs.mkdir(parents=True)
        clean(*TEMPORARY)
        for name, size in DISKS.items():
            mount(self.folder / f"disk-{name}", size)
        with LocalS3(self.folder / "store") as s3:
            seed = self.plan.settings["seed"]
            self.healthy = environment(s3)
            self.liar = LyingStore(s3.port, self.folder / "store", seed)
            self.liar.uploads = re.compile("^runs/one/")
            self.proxy = FaultProxy(self.liar.port, seed=seed)
            self.env = {**self.healthy, "AWS_ENDPOINT_URL": self.proxy.options()["endpoint_url"]}
            try:
                self.play_inside()
            except TimeUp as error:
                self.failures.append(str(error))
            except Exception:  # a file that should be there, or cannot be read: found by what looks at it
                self.failures.append(traceback.format_exc())
            finally:
                self.clear_up()

    def play_inside(self) -> None:
        self.prepare()
        if not self.make_reference():
            return
        before = contents(self.clips)
        self.begun = time.monotonic()
        self.attack()
        self.failures += compare(self)
        self.failures += self.watch.verdict()
        if contents(self.clips) != before:
            self.failures.append("the dataset is another than before")
        if left := left_in(*TEMPORARY):
            self.failures.append(f"temporary files are left: {left[:9]}")

    def clear_up(self) -> None:
        for process in marked(f"{MARK}/{self.folder.name}/"):
            process.signal(signal.SIGKILL)
        time.sleep(0.5)  # their connections end
        self.proxy.close()
        self.liar.close()
        (self.folder / "lies.log").write_text("\n".join([*self.notes, *self.liar.told, ""]))
        for name in DISKS:
            unmount(self.folder / f"disk-{name}")

    # ---- before

    def prepare(self) -> None:
        """The dataset, its labels, its damage, and the weights to begin with."""
        make_dataset(self.plan, self.clips)
        self.cache_bytes = self.tight_cache()
        if self.plan.command == "finetune":
            files = write_label_files(self.plan, self.folder)
            self.command("label", "s3://clips/set", *map(str, files))
        before = json.loads(first_line(self.clips / "index"))["fingerprint"]
        self.notes += damage_dataset(self.plan, self.clips)
        labels, now = self.clips / "labels", json.loads(first_line(self.clips / "index"))["fingerprint"]
        if labels.exists():  # they name the index that they are of
            labels.write_bytes(labels.read_bytes().replace(before.encode(), now.encode()))
        if self.plan.init:
            self.make_init()

    def command(self, *program: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "equiav", *program], cwd=ROOT, env=self.healthy, capture_output=True, text=True,
            timeout=180 * self.slow,
        )  # fmt: skip
        if program[0] != "diff" and done.returncode:
            raise RuntimeError(f"equiav {' '.join(program)} ended with {done.returncode}: {done.stderr[-800:]}")
        return done

    def make_init(self) -> None:
        """A pretraining run of two steps leaves them."""
        out = self.folder / "begin"
        own = {"checkpoint": {"every_steps": 7}, "stream": {"workers": 0, "patience": 20}}
        settings = self.settings(own, out=out, cache="reference-cache")
        settings["train"] = {**settings["train"], "steps": 2, "warmup_steps": 0}
        settings["objective"]["schedule"] = "joint"
        for name in ("tune", "weights"):
            settings.pop(name, None)
        self.finish("begin", settings, "pretrain")
        if self.plan.init == "s3":
            shutil.copytree(out / "model", self.runs / "begin")

    def tight_cache(self) -> int:
        """The least that a cache needs for up to four ranks, where it can be told so simply; else more than enough."""
        train, M = self.plan.settings["train"], self.plan.settings["stream"]["window"]
        G, p = train["batch_size"], train["micro_batch"]
        if not self.plan.tight or (M - 1) * min(samples_of_shards(self.clips)) < G:
            return ROOMY
        largest = max(path.stat().st_size for path in self.clips.glob("*.tar")) + (1 << 16)
        need = max(int(W * 2 * (math.ceil(M * (1 / W + p / G)) + 1) * largest * 1.03) for W in (1, 2, 3, 4))
        return min(ROOMY, need)

    def settings(self, *parts: dict[str, Any], out: Path, cache: str) -> dict[str, Any]:
        """Of a start: sections of the parts are joined."""
        joined: dict[str, Any] = {"out": str(out)}
        own: dict[str, Any] = {"stream": {"url": "s3://clips/set", "cache": str(self.folder / cache)}}
        if self.plan.init:
            own["weights"] = "s3://runs/begin" if self.plan.init == "s3" else str(self.folder / "begin")
        for part in (self.plan.settings, own, *parts):
            for name, value in part.items():
                joined[name] = {**joined.get(name, {}), **value} if isinstance(value, dict) else value
        return joined

    def finish(self, name: str, settings: dict[str, Any], command: str) -> bool:
        """A start that nothing happens to."""
        run = Launch(self.folder, name, 0, command, settings, self.healthy)
        deadline = time.monotonic() + REFERENCE_LIMIT * self.slow
        while (status := run.process.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        run.kill()
        if status != 0:
            self.failures.append(f"the {name} ended with {status}: {tail(run.log)}")
        return status == 0

    def make_reference(self) -> bool:
        own = {"checkpoint": {"url": "s3://runs/reference"}}
        settings = self.settings(self.plan.reference, own, out=self.folder / "reference", cache="reference-cache")
        return not self.failures and self.finish("reference", settings, self.plan.command)

    # ---- the attack

    def attack(self) -> None:
        self.launch()
        for event in self.plan.events:
            if time.monotonic() - self.begun > EVENTS_UNTIL * self.slow:
                break
            if event.moving and not self.go_on(60 * self.slow, self.moves):
                break
            if not self.go_on(event.delay):
                break
            draw = random.Random(event.draws)
            at, number = time.monotonic() - self.begun, len(self.happened)
            self.happened.append(event.kind)
            self.did(event.kind)
            more = getattr(self, "do_" + event.kind.split()[0])(event.kind, draw)
            self.happened[number] = f"{event.kind}{f' ({more})' if more else ''} at {at:.0f}"
            if self.finished:
                break
        self.go_on(math.inf)

    def did(self, kind: str) -> None:
        self.run.done_to[kind] = time.monotonic()  # type: ignore[union-attr]

    def launch(self) -> None:
        """With the settings of the next start of the plan."""
        start = self.plan.starts[self.launches % len(self.plan.starts)]
        whole = {path.parent.name for path in self.kept.glob("step-*/manifest.json")}
        lost = bool(self.damaged) and not whole - self.damaged
        own = {
            "stream": {"cache_bytes": self.cache_bytes},
            "checkpoint": {"url": "s3://runs/one"},
            # Where none is left but those that were damaged here, only this goes on, as the error would say.
            "resume": "anyway" if lost or self.anyway else "auto",
        }
        self.launches, self.anyway, self.launched = self.launches + 1, False, time.monotonic()
        self.starts = len(lines(self.out / "starts.jsonl"))
        settings = self.settings(start.settings, own, out=self.out, cache="disk-cache/cache")
        self.run = Launch(self.folder, f"{self.launches:02d}", start.ranks, self.plan.command, settings, self.env)

    def fault(self, kind: str, seconds: float) -> None:
        self.faults[kind] = time.monotonic() + seconds

    def cease(self, kind: str) -> None:
        del self.faults[kind]
        if kind == "down":
            self.proxy.down = False
        elif kind == "fault":
            self.proxy.shares = {}
        else:
            self.liar.honest(*{"upload": ("bit", "lost")}.get(kind, (kind,)))

    def tick(self) -> None:
        """To be called all the time: faults end, all is looked at, and the time of the round ends."""
        now, run = time.monotonic(), self.run
        assert run
        for kind in [kind for kind, until in self.faults.items() if now > until]:
            self.cease(kind)
        for kind in (*self.faults, *(["lie"] if self.proxy.next else [])):
            run.done_to[kind] = now
            self.store_ill = now if kind != "upload" else self.store_ill  # that one hides nothing that is there
        if self.stopped:
            run.done_to["stop"] = now
        if self.watch.due():
            self.look()
        if now - self.begun > LIMIT * self.slow:
            raise TimeUp(f"did not finish within {LIMIT * self.slow:.0f} s; {run}: {tail(run.log)}")
        time.sleep(0.05)

    def look(self) -> None:
        assert self.run
        steady = bool(self.launched) and self.moves()
        self.watch.look(marked(f"{MARK}/{self.folder.name}/"), steady, self.stopped is not None)
        self.check_claim()
        for status, said in self.run.restarts():
            if not self.ending and not excused(self.run, status, said, self.slow, within=True):
                self.failures.append(f"{self.run}: a worker ended by itself with {status}: {said[-600:]}")
            if not self.ending and "Traceback (most recent call last)" in said:
                self.failures.append(f"{self.run}: a worker shows a traceback: {said[-900:]}")

    def check_claim(self) -> None:
        """What was said to be saved is there for the next start."""
        starts = lines(self.out / "starts.jsonl")
        if not self.claimed or len(starts) <= self.starts:
            return
        if starts[self.starts]["step"] < self.claimed and self.store_ill < self.launched:
            self.failures.append(
                f"step {self.claimed} was said to be saved, {self.run} went on at {starts[self.starts]}"
            )
        self.claimed = 0

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
        return len(starts) > self.starts and bool(last) and last[0].get("step", -1) >= starts[-1]["step"]

    def judge(self, run: Launch) -> None:
        """It has ended, and nobody asked it to."""
        status, said = run.process.returncode, "\n".join(run.said()[-4:])
        if "none can be used" in said and (self.damaged or self.uncertain):
            self.anyway = True
            if self.claimed:
                self.failures.append(f"step {self.claimed} was said to be saved, and cannot be used: {said[-400:]}")
            self.claimed = 0
        elif status and not excused(run, status, said, self.slow):
            self.failures.append(f"{run} ended by itself with {status}: {said[-600:]} [{tail(run.log, 3)}]")

    def ended(self, run: Launch) -> None:
        """All of it is to be gone soon."""
        if run.process.returncode == 0:
            self.finished = True
        if not self.rest(LEFT_BEHIND * self.slow, lambda: not run.all()):
            left = [f"{process.pid} of rank {process.rank}: {process.command[:80]}" for process in run.all()]
            self.failures.append(f"{run} has left behind: {left}")
        run.kill()
        self.look()
        if not run.ranks and "Traceback (most recent call last)" in run.log.read_text(errors="replace"):
            self.failures.append(f"{run} shows a traceback: {tail(run.log, 9)}")
        self.ends += 1
        copy_of_log(self.out, self.folder / "older" / f"{self.ends:02d}")
        self.claimed = max(self.claimed, self.claim(run))
        self.starts = len(lines(self.out / "starts.jsonl"))

    def claim(self, run: Launch) -> int:
        """The step of which this start has said that it is saved."""
        if len(lines(self.out / "starts.jsonl")) <= self.starts:
            return 0
        said = [int(step) for step in re.findall(r"step (\d+) is saved at", "\n".join(run.said()))]
        told = [row.get("saved_step") or 0 for row in lines(self.out / "timing.jsonl")[-1:]]
        return max([0, *said, *told])

    def end(self, how: str) -> None:
        """Ends the start under way."""
        run = self.run
        assert run
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[how.split()[0]]
        self.ending = True
        if how.endswith("all"):
            for process in run.all():
                process.signal(number)
        elif run.process.poll() is None:
            run.process.send_signal(number)
        if not self.rest(LONGEST_END * self.slow, lambda: run.process.poll() is not None):
            self.failures.append(f"{run} has not ended {LONGEST_END * self.slow:.0f} s after {how}: {tail(run.log)}")
            run.kill()
        self.ended(run)
        self.ending = False

    def again(self, how: str) -> None:
        self.end(how)
        if not self.finished:
            self.launch()

    def end_somehow(self, draw: random.Random) -> bool:
        """-> whether there is something to go on with."""
        self.end(draw.choice(("term", "kill all")))
        return not self.finished

    def whole(self) -> list[Path]:
        """Checkpoints that nobody here has damaged, the newest last."""
        found = sorted(path.parent for path in self.kept.glob("step-*/manifest.json"))
        return [path for path in found if path.name not in self.damaged]


def first_line(path: Path) -> bytes:
    return path.read_bytes().partition(b"\n")[0]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: xxh3_64_hexdigest(path.read_bytes()) for path in folder.iterdir() if path.is_file()}
