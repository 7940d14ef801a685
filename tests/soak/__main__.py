"""`make soak HOURS=1`: round after round, a run that is attacked must be the run that nothing happened to.

A round is computed from (seed, round): a dataset with damage in it, a config, and a schedule of starts (processes, workers) and
events (what is killed, stopped, damaged, filled or taken away, and after which delay). The run without events, in one process,
is the reference. What real time makes of a schedule may differ from one time to the next; that the runs are equal may not.

plan.py draws a round, round.py plays it, events.py is what is done to the run, compare.py is its end;
data.py makes datasets and damage, store.py is the store that lies, run.py starts the command and says whether it
had a reason to end, watch.py looks at processes and disks.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.soak.events import AttackedRound
from tests.soak.run import ROOT
from tests.soak.watch import GUARD, MARK, TEMPORARY, make_private, private_temporary

# ---- rounds -------------------------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0, help="no round begins after these")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--round", type=int, help="this one alone")
    parser.add_argument("--only", default="", help="events whose names begin so, with commas between: upload,stale")
    parser.add_argument(
        "--slow", type=float, default=1.0, help="limits of time are so many times as long: a busy machine"
    )
    parser.add_argument("--keep", action="store_true", help="the folders of rounds that were equal, too")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak", help="of what failed rounds leave")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if any(options.folder.is_relative_to(place) for place in TEMPORARY):
        parser.error(f"--folder is {options.folder}, expected none in {' or '.join(TEMPORARY)}: these are watched")
    return options


def play(options: argparse.Namespace, number: int) -> AttackedRound:
    """A round, and what there is to say of it."""
    since, folder = time.monotonic(), options.folder / f"{options.seed}-{number}"
    round_ = AttackedRound(
        options.seed, number, folder, [kind for kind in options.only.split(",") if kind], options.slow
    )
    round_.play()
    what = f"round {number}: {round_.plan}; {', '.join(round_.happened)}; {round_.launches} launches; {round_.watch}"
    print(f"{what}; {time.monotonic() - since:.0f} s: {'FAILED' if round_.failures else 'equal'}", flush=True)
    for failure in round_.failures:
        print(f"    {failure}", flush=True)
    if round_.failures:
        again = f".venv/bin/python -m tests.soak --seed {options.seed} --round {number}"
        again += f" --only {shlex.quote(options.only)}" if options.only else ""
        again += f" --slow {options.slow:g}" if options.slow != 1 else ""
        print(f"    seed {options.seed}, round {number}; again: {again}; all of it is in {folder}", flush=True)
    elif not options.keep:
        shutil.rmtree(folder)
    return round_


def main() -> int:
    options = parsed()
    if make_private():
        private_temporary()
    else:
        print("soak: without root and unshare no disk is filled, and /tmp and /dev/shm are not watched", flush=True)
    print(f"soak: seed {options.seed}, {options.hours:g} hours", flush=True)
    # Whatever ends this process: the guard sees its pipe end, and kills all that is marked.
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, MARK], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections that are open when a proxy ends
    begun, rounds, events, failed = time.monotonic(), 0, 0, 0
    try:
        while options.round is not None or time.monotonic() - begun < 3600 * options.hours:
            done = play(options, rounds if options.round is None else options.round)
            rounds, events, failed = rounds + 1, events + len(done.happened), failed + bool(done.failures)
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
