"""What is done to a run. For `tests.soak`."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from tests.soak.compare import lines
from tests.soak.data import another_digit, mutated, mutated_json, sealed_index
from tests.soak.plan import STALL
from tests.soak.round import LEFT_BEHIND, LONGEST_END, Round
from tests.soak.run import Launch, tail
from tests.soak.watch import PRIVATE, Process, fill

CONFIRMED = 14.2  # seconds over which the fetcher asks again for what is wrong, at a patience of ten minutes or more


class AttackedRound(Round):
    """A method for the first word of each kind of event. -> what there is to say of it."""

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
        if kind == "stop for good":
            # until the others have noticed, and torchrun has waited for 30 s; nobody notices one alone
            seconds = STALL * self.slow + 8 if alone else 100 * self.slow
        victim.signal(signal.SIGSTOP)
        self.stopped, there = victim, Path(f"/proc/{victim.pid}/stat")
        self.go_on(seconds, lambda: not there.exists() or ") Z " in there.read_text())
        victim.signal(signal.SIGCONT)
        self.stopped = None
        return f"rank {victim.rank or 0}, {seconds:.0f} s"

    def do_down(self, kind: str, draw: random.Random) -> str:
        seconds = draw.choice([draw.uniform(1, 6), draw.uniform(6, 30)])
        self.proxy.down = True
        self.fault("down", seconds)
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
        self.proxy.down, self.proxy.shares, self.proxy.next = False, {fault: share}, []
        self.fault("fault", seconds)
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

    def do_upload(self, kind: str, draw: random.Random) -> str:
        """For some time, of what is saved some or all is damaged in one bit, or is thrown away."""
        share, seconds, how = draw.choice((0.05, 0.3, 1.0)), draw.uniform(3, 25), draw.choice(("bit", "lost", "both"))
        what = draw.choice(("", "", "", "/part", "manifest", "lines", "owner"))
        self.liar.uploads = re.compile(f"^runs/one/.*{what}")
        self.liar.bit = share if how == "bit" else share / 2 if how == "both" else 0.0
        self.liar.lost = share - self.liar.bit
        self.uncertain = True
        self.fault("upload", seconds)
        if draw.random() < 0.3:  # the last save is the one that counts
            self.go_on(draw.uniform(0, 4))
            self.again(draw.choice(("term", "kill all")))
        return f"{how} {share:.0%} of {what or 'all'} for {seconds:.1f} s"

    def do_stale(self, kind: str, draw: random.Random) -> str:
        """What is overwritten or removed is read as it was, for some seconds."""
        seconds = draw.uniform(0.5, 5)
        self.liar.stale = seconds
        self.fault("stale", draw.uniform(10, 30))
        if kind == "stale to start":
            self.again(draw.choice(("term", "kill all")))
        return f"{seconds:.1f} s"

    def do_late(self, kind: str, draw: random.Random) -> str:
        seconds = draw.uniform(1, 10)
        self.liar.late = seconds
        self.fault("late", draw.uniform(10, 30))
        if kind == "late to start":
            self.again(draw.choice(("term", "kill all")))
        return f"{seconds:.1f} s"

    def do_clear(self, kind: str, draw: random.Random) -> str:
        go_on = self.end_somehow(draw)
        shutil.rmtree(self.folder / "disk-cache" / "cache", ignore_errors=True)
        if go_on:
            self.launch()
        return ""

    def do_move(self, kind: str, draw: random.Random) -> str:
        """The run goes on at another machine: its `out` is empty there, or as it was some time ago."""
        if not self.end_somehow(draw):
            return ""
        older = sorted((self.folder / "older").iterdir())[:-1]
        copy = draw.choice(older) if older and draw.random() < 0.5 else None
        self.empty_out(copy)
        self.launch()
        return f"as after start {copy.name}" if copy else "empty"

    def empty_out(self, copy: Path | None = None) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if copy:
            shutil.copytree(copy, self.out)

    def do_digit(self, kind: str, draw: random.Random) -> str:
        """Between two starts one digit of what the log says is another."""
        if not self.end_somehow(draw):
            return ""
        told = "no line there"
        files = sorted(self.out.glob("metrics.jsonl") if kind == "digit metrics" else self.kept.glob("lines-*.jsonl"))
        step = max([int(path.name.split("-")[1]) for path in self.whole()], default=0)
        found = [
            (path, line)
            for path in files
            for line in path.read_text(errors="replace").splitlines()
            if _early(line, step)
        ]
        if found:
            told = self.change_digit(*draw.choice(found), draw)
        if kind == "digit lines" and draw.random() < 0.8:
            self.empty_out()
            told += ", out is empty"
        self.launch()
        return told

    def change_digit(self, path: Path, old: str, draw: random.Random) -> str:
        start = 0 if draw.random() < 0.2 else old.index(",")  # the step's own digits, too
        new = old[:start] + another_digit(old[start:], draw)
        path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
        step = json.loads(old)["step"]
        self.lied.add(step)
        k = next(k for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return f"{path.name}, step {step}: {old[max(0, k - 12) : k + 6]} -> {new[max(0, k - 12) : k + 6]}"

    def do_damage(self, kind: str, draw: random.Random) -> str:
        if kind == "damage cache":
            return self.damage_cache(draw)
        if not self.end_somehow(draw):
            return ""
        if kind in ("damage index", "damage labels"):
            return self.damage_small(self.clips / kind.split()[1], draw)
        told = "none there"
        if whole := self.whole():
            files = [*whole[-1].iterdir(), *whole[-1].iterdir(), self.kept / "owner", *self.kept.glob("lines-*")]
            told = self.mutate_kept(draw.choice(sorted(files)), whole[-1], draw)
        self.launch()
        return told

    def mutate_kept(self, path: Path, newest: Path, draw: random.Random) -> str:
        path.write_bytes(mutated(path.read_bytes(), draw))
        if path.parent == newest:
            self.damaged.add(newest.name)
            steps = [0] if self.uncertain else [0, *(int(path.name.split("-")[1]) for path in self.whole())]
            self.claimed = min(self.claimed, max(steps))
        if path.name.startswith("lines-"):
            self.lied |= set(range(*map(int, re.findall(r"\d+", path.name)[:2])))
        return str(path.relative_to(self.kept))

    def damage_small(self, path: Path, draw: random.Random) -> str:
        """A start meets a dataset's index or labels that are mutated: it is refused in a line, and mending them mends it."""
        if not path.exists():
            self.launch()
            return "none there"
        old = path.read_bytes()
        new, what = mutated(old, draw), "mutated"
        if path.name == "index" and self.whole() and draw.random() < 0.4:
            new, what = sealed_index(old.partition(b"\n")[2].replace(*draw.choice(digits(old))), old), "sealed"
        path.write_bytes(new)
        ended = self.probe(f"{self.launches:02d}-{path.name}", self.kept_settings(), self.healthy)
        path.write_bytes(old)
        self.launch()
        return f"{what}, {ended}"

    def kept_settings(self, url: str = "s3://runs/one", out: Path | None = None) -> dict[str, Any]:
        """Of a start beside the run's own: where it is, or at a copy."""
        start = {**self.plan.starts[0].settings, "checkpoint": {"url": url, "every_steps": 5}}
        return self.settings(start, out=out or self.out, cache="probe-cache")

    def probe(self, name: str, settings: dict[str, Any], env: dict[str, str]) -> str:
        """A start on what is damaged, with nothing else under way: it does a step, or ends with a line that says why."""
        run = Launch(self.folder, name, 0, self.plan.command, settings, env)
        metrics = Path(settings["out"]) / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        moved = lambda: metrics.exists() and metrics.stat().st_mtime_ns > before and bool(lines(metrics))  # noqa: E731
        done = self.rest(90 * self.slow, lambda: run.process.poll() is not None or moved())
        status, text = run.process.poll(), run.log.read_text(errors="replace")
        run.kill()
        if not done:
            self.failures.append(f"{name} neither did a step nor ended: {tail(run.log)}")
        elif status not in (None, 0, 1, 2) or "Traceback" in text or (status and not run.said()):
            self.failures.append(f"{name} ended with {status}: {tail(run.log)}")
        return "it did a step" if status is None else f"it ended with {status}: {(run.said() or [''])[-1][:160]}"

    def damage_cache(self, draw: random.Random) -> str:
        """Of a shard that lies on this machine's disk, while it is in use."""
        found = sorted((self.folder / "disk-cache" / "cache").rglob("*.tar"))
        if not found:
            return "none there"
        path = draw.choice(found)
        try:
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.write(mutated(content, draw)[: len(content)].ljust(len(content), b"\0"))
        except OSError as error:  # it was thrown out
            return str(error)
        return path.name

    def do_probe(self, kind: str, draw: random.Random) -> str:
        """A copy of the run, of which a manifest is mutated and sealed anew, and perhaps other files: no matter what it does,
        it neither hangs nor falls."""
        if not self.end_somehow(draw):
            return ""
        told = "none there"
        if whole := self.whole():
            url, out = self.runs / "probe", self.folder / "probe-out"
            shutil.copytree(self.kept, url)
            shutil.copytree(sorted((self.folder / "older").iterdir())[-1], out)
            told = self.mutate_sealed(url / whole[-1].name / "manifest.json", draw)
            others = [path for path in (*url.glob("[ol]*"), *out.glob("*")) if path.is_file()]
            for path in draw.sample(sorted(others), draw.choice((0, 0, 1, 2))):
                path.write_bytes(mutated(path.read_bytes(), draw))
                told += f", {path.name}"
            ended = self.probe(f"{self.launches:02d}-probe", self.kept_settings("s3://runs/probe", out), self.healthy)
            told = f"{told}; {ended}"
            shutil.rmtree(url)
            shutil.rmtree(out)
        self.launch()
        return told

    def mutate_sealed(self, path: Path, draw: random.Random) -> str:
        sealed = json.loads(path.read_text())
        if set(sealed) != {"checksum", "manifest"} or sealed["checksum"] != xxh3_64_hexdigest(
            sealed["manifest"].encode()
        ):
            raise RuntimeError("a manifest is sealed otherwise than this program knows: mend `mutate_sealed`")
        old = json.loads(sealed["manifest"])
        new = mutated_json(old, draw)
        text = json.dumps(new)
        path.write_text(json.dumps({"checksum": xxh3_64_hexdigest(text.encode()), "manifest": text}))
        names = (
            [name for name in old if name not in new or new[name] != old[name]] if isinstance(new, dict) else ["all"]
        )
        return f"{', '.join(names)} of a manifest"

    def do_full(self, kind: str, draw: random.Random) -> str:
        """A disk has no room for some seconds, but perhaps a little."""
        if not os.environ.get(PRIVATE):
            return "no disk of its own: it takes root"
        what, leave = kind.split()[1], draw.choice((0, 0, 700, 30_000))
        start = draw.random() < 0.5
        if start and not self.end_somehow(draw):
            return ""
        if what == "cache":
            leave = draw.choice((0, 5000, 200_000))
            if start:
                shutil.rmtree(self.folder / "disk-cache" / "cache", ignore_errors=True)
        ballast = fill(self.folder / f"disk-{what}", leave)
        if start:
            self.launch()
        seconds = draw.uniform(5, 20)
        self.go_on_full(seconds)
        ballast.unlink()
        return f"{leave} bytes left, {seconds:.0f} s{', at the start' if start else ''}"

    def go_on_full(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.finished and time.monotonic() < end:
            self.did("full")
            self.go_on(0.3)

    def do_intruder(self, kind: str, draw: random.Random) -> str:
        """Another run, by mistake in the same place: refused, and nothing happens to the one that is there."""
        if not self.whole():
            return "no checkpoint that would refuse it"
        settings = {**self.kept_settings(), "seed": self.plan.settings["seed"] + 1}
        intruder = Launch(self.folder, f"{self.launches:02d}-intruder", 0, self.plan.command, settings, self.healthy)
        self.go_on(90 * self.slow, lambda: intruder.process.poll() is not None)
        if (
            not self.rest(60 * self.slow, lambda: intruder.process.poll() is not None)
            or intruder.process.returncode != 2
        ):
            self.failures.append(f"the intruder ended with {intruder.process.poll()}: {tail(intruder.log)}")
        intruder.kill()
        return ""

    def do_twin(self, kind: str, draw: random.Random) -> str:
        """The same run, started twice: the older one ends by itself."""
        old = self.run
        assert old
        self.launch()
        if not self.rest(LONGEST_END * self.slow, lambda: old.process.poll() is not None):
            self.failures.append(f"{old} goes on although {self.run} was started: {tail(old.log)}")
            old.kill()
        self.rest(LEFT_BEHIND * self.slow, lambda: not old.all())
        if left := old.all():
            self.failures.append(f"{old} has left behind, after {self.run} took over: {left}")
            old.kill()
        self.claimed = 0
        return ""


def _early(line: str, step: int) -> bool:
    """A line of a log, of a step before that."""
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return False
    return type(found) is int and found < step and "," in line


def digits(index: bytes) -> list[tuple[bytes, bytes]]:
    """Checksums of an index, each with another one."""
    found = re.findall(rb"\b[0-9a-f]{16}\b", index.partition(b"\n")[2])
    return [(old, old[:-1] + (b"0" if old[-1:] != b"0" else b"1")) for old in found]
