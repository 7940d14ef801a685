"""How a run ends, begins again, or is refused: signals, second starts, errors, spares."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.test_pretrain import Run, lines, same_run, steps, whole  # noqa: F401  # a fixture


def saved(out):
    return sorted(int(path.parent.name[5:13]) for path in Path(out).glob("checkpoints/step-*/manifest.json"))


# ---- asked to end

ENDINGS = {
    "SIGTERM to torchrun": (2, lambda run: os.kill(run.process.pid, signal.SIGTERM), 1),
    "SIGTERM to the group": (None, lambda run: os.killpg(run.process.pid, signal.SIGTERM), 143),
    "Ctrl-C": (None, lambda run: os.killpg(run.process.pid, signal.SIGINT), 130),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_who_is_asked_to_end_saves_first(run_config, whole, tmp_path, how):  # noqa: F811
    """No save is due: were the loader's processes gone, so would be the steps."""
    W, ask, status = ENDINGS[how]
    run = Run(run_config, tmp_path, W, "--checkpoint.every_steps", "1000", "--stream.workers", "1")
    run.reach(6)
    ask(run)
    text = run.end(status)
    last = max(steps(tmp_path))
    assert saved(tmp_path) == [last + 1]
    assert f"step {last + 1} is saved at {tmp_path}/checkpoints" in text
    assert "finishes the step, saves, and ends" in text
    Run(run_config, tmp_path).end()
    same_run(tmp_path, whole)
    assert [row["step"] for row in lines(tmp_path / "starts.jsonl")] == [0, last + 1]


@pytest.mark.slow
def test_data_that_comes_slowly_is_not_waited_for_before_the_save(run_config, tmp_path):
    """Three batches of 6 seconds each are being decoded when it is asked to end."""
    arguments = ["--checkpoint.every_steps", "1000", "--stream.ahead", "3"]
    run = Run(run_config, tmp_path, None, *arguments, module="tests.train.slow_clips")
    run.reach(1)
    run.process.terminate()
    text = run.end(143)
    last = max(steps(tmp_path))
    assert saved(tmp_path) == [last + 1]
    assert "the others" not in text


def test_a_disk_that_hangs_holds_up_no_end(run_config, tmp_path):
    overdue = ["--checkpoint.overdue_seconds", "2", "--checkpoint.overdue", "end", "--train.steps", "4000"]
    text = Run(run_config, tmp_path, None, *overdue, module="tests.train.hung_disk").end(146)
    assert "NO SAVE HAS SUCCEEDED for" in text


def test_a_second_interrupt_ends_at_once(run_config, tmp_path):
    """Though the last save hangs."""
    run = Run(run_config, tmp_path, None, "--checkpoint.every_steps", "1000", module="tests.train.hung_disk")
    run.reach(3)
    for _ in range(2):
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(2)
    assert "Ctrl-C again ends without it" in run.end(130)


# ---- started twice


@pytest.mark.slow
def test_a_start_that_is_refused_does_not_disturb_the_live_run(run_config, whole, tmp_path):  # noqa: F811
    run = Run(run_config, tmp_path)
    run.reach(5)
    for arguments, said in (
        (("--seed", "1"), "of a run with other settings: seed is 1, was 0"),
        (("--model.width", "32"), "model.width is 32, was 64"),
        (("--model.depth", "2"), "model.depth is 2, was 1"),
        (("--resume", "never"), "resume is never, and"),
    ):
        os.kill(run.process.pid, signal.SIGSTOP)  # it has to be there still when the other looks
        refused = Run(run_config, tmp_path, None, *arguments).end(2)
        os.kill(run.process.pid, signal.SIGCONT)
        assert said in refused
        assert "Traceback" not in refused
    run.end()
    same_run(tmp_path, whole)
    assert len(lines(tmp_path / "starts.jsonl")) == 1


# ---- checkpoints that cannot be used


@pytest.mark.slow
def test_a_run_whose_checkpoints_cannot_be_used_does_not_begin_anew_by_itself(run_config, whole, tmp_path):  # noqa: F811
    run = Run(run_config, tmp_path)
    run.reach(9)
    run.process.kill()
    run.process.communicate()
    for part in tmp_path.glob("checkpoints/step-*/part-*"):
        os.truncate(part, 100)
    text = Run(run_config, tmp_path).end(2)
    assert "holds checkpoints of which none can be used" in text
    assert "--resume anyway" in text
    assert max(steps(tmp_path)) >= 9  # nothing was touched
    run = Run(run_config, tmp_path, None, "--resume", "anyway", "--checkpoint.keep", "1")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("checkpoints/damaged-*")) or not saved(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.process.kill()
    run.process.communicate()
    kept = saved(tmp_path)
    assert kept
    assert set(kept) <= {4, 8, 12}  # of the later steps that are damaged, none is in the way
    Run(run_config, tmp_path).end()
    same_run(tmp_path, whole)
    assert [row["step"] for row in lines(tmp_path / "starts.jsonl")] == [0, 0, max(kept)]


# ---- errors that no restart mends

FINAL = {
    "not finite": (["--train.lr", "1e30", "--train.lr_start", "1e30"], "not finite, as in 10 steps in a row"),
    "a setting": (["--objective.schedule", "two_stage", "--train.micro_batch", "0"], "train.micro_batch is 0"),
    "no dataset": (["--stream.url", "/nowhere"], "/nowhere holds no dataset"),
}


@pytest.mark.parametrize("what", FINAL)
def test_an_error_that_no_restart_mends_ends_torchrun(run_config, tmp_path, what):
    arguments, said = FINAL[what]
    text = Run(run_config, tmp_path, 2, *arguments).end(1)
    assert said in text
    assert "worker group" not in text  # torchrun's word when it restarts one
    assert len(lines(tmp_path / "starts.jsonl")) <= 1
    assert text.count(said) <= 2  # once a rank
    if what == "not finite":
        found = json.loads((tmp_path / "not_finite.json").read_text())
        assert len(found) == 10
        assert all(len(ids) in (8, 2) for ids in found.values())


# ---- more processes than can share the work


@pytest.mark.slow
def test_processes_beyond_the_micro_batches_wait_as_spares(run_config, whole, tmp_path):  # noqa: F811
    """Four micro-batches, five processes; one is lost."""
    run = Run(run_config, tmp_path, 5)
    run.reach(6)
    os.kill(run.workers()[2], signal.SIGKILL)
    text = run.end()
    same_run(tmp_path, whole)
    starts = lines(tmp_path / "starts.jsonl")
    assert [row["ranks"] for row in starts] == [4, 4]
    assert starts[1]["step"] > 0
    assert "process 4 is a spare" in text
    assert "4 process(es) and 1 spare(s)" in text


@pytest.mark.slow
def test_processes_beyond_whole_groups_that_share_a_model_wait_too(run_config, whole, tmp_path):  # noqa: F811
    Run(run_config, tmp_path, 3, "--train.shard", "2").end()
    same_run(tmp_path, whole)
    (start,) = lines(tmp_path / "starts.jsonl")
    assert (start["ranks"], start["shard"]) == (2, 2)


@pytest.mark.slow
def test_a_spare_ends_with_a_run_that_cannot_go_on(run_config, tmp_path):
    Run(run_config, tmp_path, 5, "--train.lr", "1e30", "--train.lr_start", "1e30").end(1)
    assert len(lines(tmp_path / "starts.jsonl")) == 1


@pytest.mark.slow
def test_a_spare_ends_as_the_run_does_that_is_asked_to_end(run_config, tmp_path):
    """It is no stall, and nothing of C++ is printed."""
    run = Run(run_config, tmp_path, 5, "--checkpoint.every_steps", "1000")
    run.reach(6)
    os.kill(run.process.pid, signal.SIGTERM)
    text = run.end(1)
    assert "is saved at" in text
    assert "stalled" not in text
    assert "is gone" not in text
    assert "C++" not in text
    assert "TCPStore" not in text


# ---- what nothing moves any more, before the first step


def test_a_checkpoint_that_does_not_come_is_a_stall(run_config, tmp_path):
    eight = ["--train.steps", "8", "--train.warmup_steps", "2"]
    Run(run_config, tmp_path, None, *eight).end()
    patience = ["--checkpoint.patience", "1", "--stream.patience", "1", "--stall_seconds", "1"]
    hangs = {"module": "tests.train.hung_disk", "env": {"HANGS": "read"}}
    text = Run(run_config, tmp_path, None, *eight, *patience, **hangs).end(145)
    assert "step 0, begins" in text


# ---- disks that are full


def test_a_full_disk_is_named(run_config, tmp_path):
    """By the file that could not be written; the node leaves, another may go on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        kept = ["--checkpoint.url", str(tmp_path / "kept"), "--train.steps", "4000"]
        text = Run(run_config, disk, None, *kept).end(2)
        assert re.search(rf"out: {disk}\S* cannot be written \(No space left on device\); free the disk", text)
        assert list((tmp_path / "kept").glob("step-*/manifest.json"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---- folders that hold something else


def test_a_log_is_not_begun_over_that_of_another_run(run_config, tmp_path):
    eight = ["--train.steps", "8", "--train.warmup_steps", "2"]
    Run(run_config, tmp_path, None, *eight).end()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    elsewhere = ["--checkpoint.url", str(tmp_path / "other")]
    text = Run(run_config, tmp_path, None, *eight, *elsewhere).end(2)
    assert f"out: {tmp_path} holds a finished run with checkpoints at {tmp_path}/checkpoints" in text
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_lines_that_were_changed_are_healed_or_told(run_config, whole, tmp_path):  # noqa: F811
    """A digit of the loss, on the disk, beside the checkpoints, in both."""
    run = Run(run_config, tmp_path / "one")
    run.reach(13)
    run.process.kill()
    run.process.communicate()
    expected = (whole / "metrics.jsonl").read_bytes()
    for k, places in enumerate((["metrics.jsonl"], ["checkpoints/lines-*"], ["metrics.jsonl", "checkpoints/lines-*"])):
        out = tmp_path / f"changed{k}"
        shutil.copytree(tmp_path / "one", out)
        for place in places:
            for path in out.glob(place):
                path.write_text(re.sub(r'("loss": \d+\.\d)', r"\g<1>7", path.read_text()))
        text = Run(run_config, out, None, "--checkpoint.url", str(out / "checkpoints")).end()
        if k < 2:
            assert (out / "metrics.jsonl").read_bytes() == expected
        assert ("are not those that were saved" in text) is (k == 2)
        assert ("passed over" in text) is (k == 2)
