"""`equiav diff`: the promise, held by a user."""

import json
import shutil

import pytest

from equiav import cli
from equiav.train.manifest import digest_of, sealed
from tests.train.test_pretrain import Run


@pytest.fixture(scope="module")
def two(run_config, tmp_path_factory):
    """Of one process, and of two that keep other checkpoints."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    Run(run_config, one, None, "--train.steps", "6", "--train.warmup_steps", "2").end()
    Run(run_config, two, 2, "--train.steps", "6", "--train.warmup_steps", "2", "--checkpoint.every_steps", "2").end()
    return one, two


def diff(capsys, *runs):
    status = cli.main(["diff", *map(str, runs)])
    told = capsys.readouterr()
    return status, told.out + told.err


def test_equal_runs(capsys, two):
    status, told = diff(capsys, *two)
    assert status == 0, told
    assert "metrics: 6 steps are equal, of 6 and 6" in told
    assert "weights of step 4: " in told
    assert "weights of step 6: " in told
    assert "setting checkpoint.every_steps: 4 and 2: without effect" in told
    assert told.endswith("the runs are equal, as far as both go: 6 step(s), weights of 2 checkpoint(s)\n")
    status, told = diff(capsys, two[0] / "checkpoints", two[1] / "checkpoints")
    assert status == 0, told


def test_the_first_number_that_differs(capsys, two, tmp_path):
    other = shutil.copytree(two[1], tmp_path / "other")
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    changed = json.loads(lines[3])
    changed["similarity_audio"] += 1e-15
    (other / "metrics.jsonl").write_text("".join([*lines[:3], json.dumps(changed) + "\n", *lines[4:]]))
    status, told = diff(capsys, two[0], other)
    assert status == 1
    assert "metrics: 3 steps are equal" in told
    assert "the runs differ: step 3, similarity_audio: 0." in told


def test_the_first_weights_that_differ(capsys, two, tmp_path):
    other = shutil.copytree(two[1], tmp_path / "other")
    (path,) = other.glob("checkpoints/step-00000004-*/manifest.json")
    manifest = json.loads(json.loads(path.read_text())["manifest"])
    name = list(manifest["weights"])[7]
    manifest["weights"][name] = "0" * 16
    manifest["digest"] = digest_of(manifest["weights"])
    path.write_bytes(sealed(manifest))
    status, told = diff(capsys, two[0], other)
    assert status == 1
    assert f"the runs differ: weights of step 4: 1 of {len(manifest['weights'])} tensors, {name} the first" in told


def test_the_setting_that_differs(capsys, two, run_config, tmp_path):
    Run(run_config, tmp_path, None, "--train.steps", "6", "--train.warmup_steps", "2", "--seed", "1").end()
    status, told = diff(capsys, two[0], tmp_path)
    assert status == 1
    assert "setting seed: 0 and 1\n" in told
    assert "step 0, loss: " in told


def test_what_is_cut_absent_or_of_another_release(capsys, two, tmp_path):
    other = shutil.copytree(two[1], tmp_path / "other")
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    settings = (other / "config.yaml").read_text()
    (path,) = other.glob("checkpoints/step-00000006-*/manifest.json")
    manifest = json.loads(json.loads(path.read_text())["manifest"])
    del manifest["config"]["train"]["clip"], manifest["config"]["resume"]
    path.write_bytes(sealed(manifest))
    status, told = diff(capsys, two[0], other)
    assert status == 0, told
    assert "metrics: 4 steps are equal, of 6 and 4" in told
    shutil.rmtree(other / "checkpoints")
    (other / "config.yaml").write_text("")
    status, told = diff(capsys, two[0], other)
    assert status == 2
    (other / "config.yaml").write_text(settings)
    (other / "metrics.jsonl").unlink()
    status, told = diff(capsys, two[0], other)
    assert status == 2
    assert "nothing to compare" in told


def test_what_is_no_run(capsys, two, tmp_path):
    status, told = diff(capsys, two[0], tmp_path)
    assert status == 2
    assert f"{tmp_path}: neither a run's folder (config.yaml) nor one of checkpoints" in told
    assert cli.main(["diff", str(tmp_path)]) == 2
