"""What a run gets over: damaged samples, stores that fail, a log that is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from equiav.config import DataConfig
from equiav.data.local_s3 import LocalS3
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from equiav.train.log import Log
from streaming import Store
from streaming.pack import pack
from tests.streaming.fault_proxy import FaultProxy
from tests.train.test_pretrain import ENV, Run, lines, same_run, steps, whole  # noqa: F401  # a fixture


def saved(out):
    return sorted(int(path.parent.name[5:13]) for path in Path(out).glob("checkpoints/step-*/manifest.json"))


# ---- damaged samples


class Spoiled(EncodeSynthetic):
    """Of every fifth clip, two of three frames are no JPEG; of one, all."""

    def __call__(self, k):
        members = super().__call__(k)
        for frame in (0, 2) if k % 5 == 0 else (0, 1, 2) if k == 7 else ():
            members[f"{frame}.jpg"] = b"\xff\xd8" + bytes(100)
        return members


@pytest.fixture(scope="module")
def spoiled_config(run_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoiled")
    encode = Spoiled(World(1, 64, 3, 2.56), Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    pack([(f"clip-{k}", k) for k in range(26)], encode, Store(str(folder / "clips")), processes=0, part_items=4)
    settings = yaml.safe_load(run_config.read_text())
    settings["stream"] |= {"url": str(folder / "clips"), "max_bad": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


@pytest.mark.slow
def test_a_sample_that_is_bad_in_part_is_bad_for_everyone_alike(spoiled_config, tmp_path):
    """Whoever met it first, and however often it is saved: the same losses, weights and quarantine."""
    one, two = tmp_path / "one", tmp_path / "two"
    Run(spoiled_config, one, None, "--checkpoint.every_steps", "1000", "--stream.ahead", "0").end()
    run = Run(spoiled_config, two, 2, "--checkpoint.every_steps", "3", "--stream.ahead", "3")
    run.reach(10)
    os.kill(run.workers()[1], signal.SIGKILL)
    run.end()
    same_run(two, one)
    assert (one / "quarantine.jsonl").read_bytes() == (two / "quarantine.jsonl").read_bytes()
    rows = steps(one)
    bad = [sum(rows[k]["bad"] for k in range(4 * epoch, 4 * epoch + 4)) for epoch in range(6)]
    assert len(set(bad)) > 1  # what is bad in part is so in some epochs
    assert 1 < len(lines(one / "quarantine.jsonl")) <= 7
    assert all(rows[k]["clips"] + rows[k]["bad"] == (2 if k % 4 == 3 else 8) for k in rows)


@pytest.mark.slow
def test_too_much_bad_data_ends_the_run_at_the_same_step_for_all(spoiled_config, tmp_path):
    ends = {}
    for W in (None, 2):
        out = tmp_path / str(W)
        text = Run(spoiled_config, out, W, "--stream.max_bad", "0.1").end(1)
        assert "of 26 samples cannot be used" in text
        assert "max_bad=0.1" in text
        ends[W] = list(steps(out).values())
        assert len(lines(out / "starts.jsonl")) == 1
    assert ends[None] == ends[2]
    out = tmp_path / "None"
    Run(spoiled_config, out, None, "--stream.max_bad", "0.5").end()  # it may be changed on the way


# ---- stores that fail


@pytest.fixture
def s3(tmp_path):
    (tmp_path / "store" / "runs").mkdir(parents=True)
    with LocalS3(tmp_path / "store") as server:
        yield server


@pytest.fixture
def proxy(s3):
    proxy = FaultProxy(s3.port)
    yield proxy
    proxy.close()


def at(s3, proxy):
    keys = {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret}
    return {**keys, "AWS_ENDPOINT_URL": proxy.options()["endpoint_url"]}


@pytest.mark.slow
def test_a_save_that_is_never_answered_is_given_up_and_the_next_succeeds(run_config, s3, proxy, tmp_path):
    place = ["--checkpoint.url", "s3://runs/one", "--checkpoint.patience", "2", "--checkpoint.overdue_seconds", "3"]
    run = Run(run_config, tmp_path / "out", 2, *place, "--train.steps", "400", env=at(s3, proxy))
    run.reach(2)
    proxy.only, proxy.shares = re.compile(r"PUT .*part-"), {"stall": 1.0}
    deadline = time.monotonic() + 60
    while not any(row["unsaved_seconds"] > 3 for row in lines(run.out / "timing.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    proxy.shares = {}
    failed = lines(run.out / "timing.jsonl")[-1]
    while lines(run.out / "timing.jsonl")[-1]["saved_step"] <= failed["step"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert lines(run.out / "timing.jsonl")[-1]["failed_saves"] >= 1
    run.process.terminate()
    text = run.end(1)
    assert "NO SAVE HAS SUCCEEDED for" in text
    assert "a checkpoint could not be saved, the run goes on without it: rank" in text


def test_a_run_that_cannot_save_ends_if_it_is_told_to(run_config, s3, proxy, tmp_path):
    place = ["--checkpoint.url", "s3://runs/one", "--checkpoint.patience", "1", "--checkpoint.overdue_seconds", "3"]
    place += ["--checkpoint.overdue", "end", "--train.steps", "4000"]
    run = Run(run_config, tmp_path / "out", None, *place, env=at(s3, proxy))
    run.reach(2)
    proxy.only, proxy.shares = re.compile("PUT .*step-"), {"503": 1.0}
    text = run.end(146)
    assert "NO SAVE HAS SUCCEEDED for" in text
    assert "checkpoint.overdue_seconds=3" in text


# ---- a log that no kill can harm


@pytest.mark.slow
def test_no_line_is_lost_and_none_comes_twice_whatever_is_killed(run_config, whole, tmp_path):  # noqa: F811
    """Killed right after each of its saves, and while it begins."""
    for step in (4, 8, 12, 16):
        run = Run(run_config, tmp_path)
        deadline = time.monotonic() + 60
        while step not in saved(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        run.process.kill()
        run.process.communicate()
    before = (tmp_path / "metrics.jsonl").stat().st_size
    for delay in (1.5, 2.0, 2.5, 3.0):  # some while the log is begun again
        run = Run(run_config, tmp_path)
        time.sleep(delay)
        run.process.kill()
        run.process.communicate()
        kept = lines(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in kept] == list(range(len(kept)))
        assert len(kept) >= min(16, before)
    Run(run_config, tmp_path).end()
    same_run(tmp_path, whole)


def test_where_the_next_start_has_another_disk_the_log_is_whole_all_the_same(run_config, whole, tmp_path):  # noqa: F811
    """Its lines are beside the checkpoints, too."""
    place = ["--checkpoint.url", str(tmp_path / "kept")]
    run = Run(run_config, tmp_path / "one", None, *place)
    run.reach(9)
    run.process.kill()
    run.process.communicate()
    Run(run_config, tmp_path / "two", None, *place).end()
    assert (tmp_path / "two" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_log_of_which_lines_are_nowhere_is_gone_on_with_and_told(run_config, tmp_path):
    Run(run_config, tmp_path, None, "--train.steps", "8", "--train.warmup_steps", "2").end()
    log = tmp_path / "metrics.jsonl"
    kept = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*kept[:2], "{no json}\n", *kept[3:]]))
    for path in tmp_path.glob("checkpoints/lines-*"):
        path.unlink()
    text = Run(run_config, tmp_path, None, "--train.steps", "8", "--train.warmup_steps", "2").end()
    assert "6 of the 8 lines before this step are neither in" in text
    assert log.read_text() == "".join(kept[:2])


LOG = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("log", "equiav/train/log.py")  # without torch, which takes seconds
log = importlib.util.module_from_spec(spec)
spec.loader.exec_module(log)
while True:
    log.Log(Path(sys.argv[1]), 20000).close()
    print(flush=True)
"""


def test_a_log_is_whole_at_every_moment_at_which_it_is_begun_again(tmp_path):
    line = "".join(json.dumps({"step": k, "loss": 1.5, "filling": "x" * 100}) + "\n" for k in range(20000))
    for name in ("metrics.jsonl", "timing.jsonl"):
        (tmp_path / name).write_text(line)
    for k in range(0, 20, 3):
        process = subprocess.Popen([sys.executable, "-c", LOG, str(tmp_path)], stdout=subprocess.PIPE, env=ENV)
        process.stdout.readline()
        time.sleep(0.013 * k)
        process.kill()
        process.communicate()
        assert (tmp_path / "metrics.jsonl").read_text() == line


def test_what_an_earlier_start_still_writes_does_not_come_between(tmp_path):
    first = Log(tmp_path, 0)
    for step in range(5):
        first.write(step, {"loss": 0.5}, {})
    second = Log(tmp_path, 3)
    first.write(5, {"loss": 0.5}, {})
    second.write(3, {"loss": 0.25}, {})
    assert [(row["step"], row["loss"]) for row in lines(tmp_path / "metrics.jsonl")] == [
        (0, 0.5),
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]


def log_of(folder, losses):
    folder.mkdir()
    log = Log(folder, 0)
    for step, loss in enumerate(losses):
        log.write(step, {"loss": loss}, {"seconds": 1})
    log.close()
    return log.digest(), (folder / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.parametrize("where", ["here", "there", "both", "nowhere"])
def test_lines_that_somebody_changed_are_healed_or_told(tmp_path, where):
    """By the digest of all lines, which the checkpoint has; those beside the checkpoints may be right, or these."""
    losses = [2.5, float("nan"), 2.25, 2.0]
    digest, lines = log_of(tmp_path / "one", losses)
    changed = [line.replace("2.25", "2.24") for line in lines]
    if where in ("here", "both"):
        (tmp_path / "one" / "metrics.jsonl").write_text("".join(changed))
    there = dict(enumerate(changed if where in ("there", "both") else lines))
    log = Log(tmp_path / "one", 4, elsewhere=lambda: there, digest=digest)
    assert (log.others, log.missing) == (where == "both", 0)
    assert (log.digest() == digest) is (where != "both")
    log.write(4, {"loss": 1.0}, {})
    log.close()
    kept = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert kept[:4] == (changed if where == "both" else lines)
    if where != "both":
        again, _ = log_of(tmp_path / "two", [*losses, 1.0])
        assert log.digest() == again
    else:
        assert log.digest() == ""  # what comes after lines that are not known is not vouched for


def test_a_folder_that_cannot_be_made_is_one_clear_line(run_config, tmp_path):
    (tmp_path / "file").write_text("")
    text = Run(run_config, tmp_path / "file" / "out").end(2)
    assert f"out: {tmp_path}/file/out cannot be made" in text


# ---- what is said before the first step


@pytest.mark.slow
def test_a_run_says_what_to_expect(run_config, tmp_path):
    text = Run(run_config, tmp_path / "one", None).end()
    assert "26 clips, 4 step(s) an epoch, 6.0 epochs; guessing has a loss of 7.50" in text  # ln 8 + 2 ln 15
    assert f"it is saved every 4 steps; look with `equiav top {tmp_path / 'one'}`" in text
    few = ["--train.steps", "1000", "--train.warmup_steps", "1"]
    run = Run(run_config, tmp_path / "two", None, "--train.batch_size", "256", *few)
    run.reach(1)
    run.process.send_signal(signal.SIGTERM)
    text = run.end(143)
    assert "spectrograms have mean" not in text
    assert "train.batch_size is 256, the dataset has 26 clips: the rest of each step is empty" in text
    assert "train.steps is 1,000: each clip will be seen 1,000 times. The paper's 20 epochs would be 20 steps" in text
    other = [
        "--data.audio_mean",
        "-4.346",
        "--data.audio_std",
        "4.332",
        "--train.steps",
        "2",
        "--train.warmup_steps",
        "1",
    ]
    text = Run(run_config, tmp_path / "three", None, *other).end()
    assert "data.audio_mean is -4.346 and data.audio_std 4.332: `equiav stats` says what fits the dataset" in text
