"""`equiav pretrain` as users run it: one curve, whatever is killed and however many processes go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from equiav.data.local_s3 import LocalS3
from tests import forks
from tests.streaming.fault_proxy import FaultProxy

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}


class Run:
    """One start of `equiav pretrain`, or another command, under torchrun where W is given."""

    def __init__(self, config, out, W=None, *arguments, module="equiav", env=None, command="pretrain"):
        program = [sys.executable, "-m"]
        if W:
            program += [
                "torch.distributed.run",
                "--nproc-per-node",
                str(W),
                "--max-restarts",
                "3",
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                "127.0.0.1:0",
                "-m",
            ]
        self.out = Path(out)
        program += [module, command, "--config", str(config), "--out", str(out), *arguments]
        self.process = subprocess.Popen(
            program,
            env={**ENV, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a group, to be sent signals as a terminal or a container does
        )

    def reach(self, step):
        """Waits until a step is in the log."""
        deadline = time.monotonic() + 120
        while step not in steps(self.out):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def workers(self):
        """rank -> process"""
        return workers([self.process.pid])

    def end(self, status=0):
        text = self.process.communicate(timeout=120)[0]
        assert self.process.returncode == status, text
        return text


def workers(agents):
    """rank -> process, of all that these processes have started"""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent in agents and (rank := forks.rank(path.name)) is not None:
            found[rank] = int(path.name)
    return found


def lines(path):
    """Whole ones."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line.endswith(("}", "]"))]


def steps(out):
    return {row["step"]: row for row in lines(out / "metrics.jsonl")}


def samples(out):
    """step -> its ids, of all ranks, in the start that ran it last."""
    order = {row["token"]: number for number, row in enumerate(lines(out / "starts.jsonl"))}
    ids = {}
    for path in sorted(out.glob("samples-*.jsonl")):
        for token, step, own in lines(path):
            ids.setdefault(step, {}).setdefault(order[token], []).extend(own)
    return {step: of_start[max(of_start)] for step, of_start in ids.items()}


@pytest.fixture(scope="module")
def whole(run_config, tmp_path_factory):
    """The run that nothing happens to, in one process."""
    out = tmp_path_factory.mktemp("whole")
    Run(run_config, out).end()
    return out


def same_run(out, whole, count=24):
    """To the last bit."""
    ours, theirs = steps(out), steps(whole)
    assert list(ours) == list(theirs) == list(range(count))
    for step, row in theirs.items():
        assert ours[step] == row, step
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    same_weights(out, whole)
    assert samples(out) == samples(whole)


def same_weights(out, whole):
    weights, expected = (safetensors.torch.load_file(folder / "model" / "model.safetensors") for folder in (out, whole))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_every_clip_comes_once_an_epoch(whole):
    ids = samples(whole)
    assert [len(ids[k]) for k in range(24)] == [8, 8, 8, 2] * 6
    for epoch in range(6):
        assert sorted(i for k in range(4) for i in ids[4 * epoch + k]) == list(range(26))
    assert steps(whole)[3]["clips"] == 2


def test_the_same_command_says_that_the_run_is_finished(run_config, whole):
    before = (whole / "model" / "model.safetensors").stat().st_mtime_ns
    assert "is finished at step 24 of 24" in Run(run_config, whole).end()
    assert (whole / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_rank_that_stops_is_named_and_the_run_goes_on(run_config, whole, tmp_path):
    run = Run(run_config, tmp_path, 2, "--stall_seconds", "3")
    run.reach(5)
    stopped = run.workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not (tmp_path / "stalls" / "rank-0.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(stopped, signal.SIGKILL)  # torchrun would, after its 30 seconds
    text = run.end()
    same_run(tmp_path, whole)
    assert "the run has stalled: rank(s) [1] no longer say anything: killed, stopped, or cut off" in text
    told = (tmp_path / "stalls" / "rank-0.txt").read_text()
    assert "rank 0: step" in told
    assert "waits for others" in told
    assert "in forward_backward" in told


@pytest.mark.slow
def test_a_rank_that_does_not_move_is_named(run_config, whole, tmp_path):
    Run(run_config, tmp_path, 2, "--stall_seconds", "4", module="tests.train.sleeper").end()
    same_run(tmp_path, whole)
    for rank in (0, 1):
        told = (tmp_path / "stalls" / f"rank-{rank}.txt").read_text()
        assert "rank(s) [1] have not moved for" in told
        assert "rank 0: step 5, waits for others" in told
        assert "rank 1: step 5, computes" in told
        assert ("in sleeps" in told) == (rank == 1)


@pytest.mark.slow
def test_who_is_asked_to_end_does_not_wait_for_those_that_are_gone(run_config, whole, tmp_path):
    """torchrun would wait for 30 seconds, then kill it."""
    run = Run(run_config, tmp_path, 2, "--stall_seconds", "500")
    run.reach(5)
    waits, stopped = run.workers()[0], run.workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(2)
    os.kill(waits, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{waits}/stat").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(stopped, signal.SIGKILL)
    assert "the others no longer answer" in run.end()
    same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_store_that_is_down_holds_up_nobody(run_config, whole, tmp_path):
    (tmp_path / "store" / "runs").mkdir(parents=True)
    with LocalS3(tmp_path / "store") as s3:
        proxy = FaultProxy(s3.port)
        env = {
            "AWS_ACCESS_KEY_ID": s3.key,
            "AWS_SECRET_ACCESS_KEY": s3.secret,
            "AWS_ENDPOINT_URL": proxy.options()["endpoint_url"],
        }
        run = Run(run_config, tmp_path / "out", 2, "--checkpoint.url", "s3://runs/one", env=env)
        run.reach(6)
        proxy.down = True
        run.reach(20)  # past several saves that were due
        proxy.down = False
        run.end()
        proxy.close()
        rows = lines(run.out / "timing.jsonl")
        assert max(row["saved_step"] for row in rows if row["step"] <= 20) <= 8
        assert rows[20]["failed_saves"] == 0
        assert list((tmp_path / "store" / "runs" / "one").glob("step-00000024-*/manifest.json"))
    same_run(run.out, whole)


def test_killed_and_resized_it_is_the_same_run(run_config, whole, tmp_path):
    run = Run(run_config, tmp_path, 3)
    run.reach(6)
    begun = time.monotonic()
    os.kill(run.workers()[1], signal.SIGKILL)  # torchrun starts all three again
    while len(starts := lines(tmp_path / "starts.jsonl")) < 2 or starts[1]["step"] not in steps(tmp_path):
        time.sleep(0.02)
    print(f"from a worker's SIGKILL to the next step: {time.monotonic() - begun:.1f} s")
    run.reach(10)
    run.process.terminate()  # as Kubernetes ends a pod: the step is finished and saved
    run.process.communicate(timeout=120)
    done = max(steps(tmp_path))
    saved = sorted(int(path.name[5:13]) for path in (tmp_path / "checkpoints").glob("step-*/"))
    assert saved[-1] >= done
    run = Run(run_config, tmp_path, 2)
    run.reach(done + 5)
    workers = run.workers().values()
    for pid in (run.process.pid, *workers):  # a node, with its agent
        os.kill(pid, signal.SIGKILL)
    run.process.communicate()
    Run(run_config, tmp_path).end()
    same_run(tmp_path, whole)
    starts = [(row["ranks"], row["step"]) for row in lines(tmp_path / "starts.jsonl")]
    assert [ranks for ranks, _ in starts] == [3, 3, 2, 1]
    assert starts[0][1] == 0
    assert starts[1][1] in (4, 8)
