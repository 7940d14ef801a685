"""A checkpoint is whole or it is none; what is damaged is passed over, loudly, for the one before."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from equiav.config import Config, ConfigError, from_dict
from equiav.data.local_s3 import LocalS3
from equiav.ending import Superseded
from equiav.parallel import Ranks
from equiav.train import begin, train
from equiav.train.checkpoint import Checkpoints
from tests.streaming.fault_proxy import FaultProxy
from tests.train.ranks import TINY, batches

ALONE = Ranks("cpu")


def config(steps):
    train = {"batch_size": 4, "steps": steps, "warmup_steps": 0, "lr": 1e-3, "lr_start": 1e-3}
    objective = {"centroid_size": 2, "learnable_temperature": True}
    settings = {"model": {"size": "tiny", "depth": 1}, "data": TINY["data"], "objective": objective, "train": train}
    return from_dict(Config, settings, "test")


def go_on(state, steps):
    train(config(steps), ALONE, state, itertools.islice(batches(4, 4, 0, 1, of=8), state.step, None))


def numbers(state):
    """Everything that an update reads."""
    moments = {
        f"{k}.{name}": value
        for k, values in state.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return {**state.model.state_dict(), **moments, "step": torch.tensor([state.step, state.skipped])}


def same(state, expected):
    ours = numbers(state)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2, and the state at both. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints, state, at = Checkpoints(str(folder), ALONE), begin(config(2), ALONE), {}
    for step in (1, 2):
        go_on(state, step)
        checkpoints.save(state, {"about": step})
        at[step] = {name: value.clone() for name, value in numbers(state).items()}  # before it is changed again
    checkpoints.wait()
    assert checkpoints.failures == 0
    return folder, at


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def load(folder, **arguments):
    told = []
    state = begin(config(2), ALONE)
    manifest = Checkpoints(str(folder), ALONE, warn=told.append, **arguments).load(state)
    return manifest, state, told


def test_what_was_saved_is_loaded_to_the_bit(saved):
    manifest, state, told = load(saved[0])
    assert manifest["step"] == state.step == 2
    assert manifest["about"] == 2
    assert told == []
    same(state, saved[1][2])


def test_training_goes_on_as_if_nothing_had_been(saved):
    _, resumed, _ = load(saved[0])
    go_on(resumed, 4)
    whole = begin(config(4), ALONE)
    go_on(whole, 4)
    same(resumed, numbers(whole))


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    manifest, state, told = load(tmp_path)
    assert (manifest, state.step, told) == (None, 0, [])


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, path.stat().st_size // 2),
    "last bit": lambda path: flip(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(saved, copy, file, damage):
    (newest,) = copy.glob("step-00000002-*")
    assert sorted(path.name for path in newest.iterdir()) == [".metadata", "__0_0.distcp", "manifest.json"]
    DAMAGE[damage](newest / file)
    manifest, state, told = load(copy)
    assert manifest["step"] == state.step == 1
    same(state, saved[1][1])
    (message,) = told
    assert f"checkpoint {copy}/{newest.name} is passed over" in message
    assert file in message


def test_where_all_are_damaged_the_run_begins_anew_and_says_so(copy):
    for path in copy.glob("step-*/__0_0.distcp"):
        DAMAGE["cut"](path)
    manifest, state, told = load(copy)
    assert manifest is None
    assert state.step == 0
    assert len(told) == 2


def test_only_what_is_to_be_kept_stays(tmp_path):
    checkpoints, state = Checkpoints(str(tmp_path), ALONE, keep=2, keep_every=3), begin(config(8), ALONE)
    (tmp_path / "step-00000001-0badc0de").mkdir()  # what a crash left
    (tmp_path / "step-00000001-0badc0de" / "__0_0.distcp").write_bytes(b"half")
    for step in range(1, 9):
        state.step = step
        checkpoints.save(state, {})
    checkpoints.wait()
    assert sorted(path.name[:13] for path in tmp_path.glob("step-*")) == [f"step-{k:08d}" for k in (3, 6, 7, 8)]


def test_of_two_starts_of_a_run_the_first_gives_way(tmp_path):
    first, state = Checkpoints(str(tmp_path), ALONE), begin(config(2), ALONE)
    first.save(state, {})
    first.wait()
    second = Checkpoints(str(tmp_path), ALONE)
    state.step = 1
    first.save(state, {})
    with pytest.raises(
        Superseded, match=f"start {second.token} of this run has taken over from this one, {first.token}"
    ):
        first.wait()
    assert [path.parent.name[:13] for path in tmp_path.glob("step-*/manifest.json")] == ["step-00000000"]
    second.save(state, {})
    second.wait()
    assert second.load(begin(config(2), ALONE))["step"] == 1


# ---- on object storage


@pytest.fixture
def s3(tmp_path):
    (tmp_path / "store" / "runs").mkdir(parents=True)
    with LocalS3(tmp_path / "store") as server:
        yield server


def test_on_object_storage(saved, s3):
    state = begin(config(2), ALONE)
    load_state = Checkpoints(str(saved[0]), ALONE)
    load_state.load(state)
    checkpoints = Checkpoints("s3://runs/one", ALONE, keep=1, options=s3.options)
    checkpoints.save(state, {})
    state.step = 3
    checkpoints.save(state, {})
    checkpoints.wait()
    assert checkpoints.failures == 0
    manifest, loaded, told = load("s3://runs/one", options=s3.options)
    assert manifest["step"] == 3
    assert told == []
    same(loaded, {**saved[1][2], "step": torch.tensor([3, 0])})
    assert len(list((s3.folder / "runs" / "one").glob("step-*/*"))) == 3


def test_a_store_that_is_down_during_a_save_is_waited_for(s3):
    proxy = FaultProxy(s3.port)
    told = []
    options = {"key": s3.key, "secret": s3.secret, **proxy.options()}
    checkpoints = Checkpoints("s3://runs/two", ALONE, patience=60, options=options, warn=told.append)
    proxy.down = True
    proxy._loop.call_later(3, setattr, proxy, "down", False)
    state = begin(config(2), ALONE)
    checkpoints.save(state, {})
    assert checkpoints.saving  # training goes on meanwhile
    checkpoints.wait()
    proxy.close()
    assert (checkpoints.failures, told) == (0, [])
    assert checkpoints.store.counts["retries"] > 0


def test_a_save_that_fails_is_told_and_counted_and_the_next_one_succeeds(s3):
    proxy = FaultProxy(s3.port)
    told = []
    options = {"key": s3.key, "secret": s3.secret, **proxy.options()}
    checkpoints = Checkpoints("s3://runs/three", ALONE, patience=0.5, options=options, warn=told.append)
    state = begin(config(2), ALONE)
    proxy.down = True
    checkpoints.save(state, {})
    checkpoints.wait()
    assert checkpoints.failures == 1
    assert "could not be saved, the run goes on without it: s3://runs/three" in told[0]
    proxy.down = False
    state.step = 1
    checkpoints.save(state, {})
    checkpoints.wait()
    assert checkpoints.failures == 1
    assert checkpoints.load(begin(config(2), ALONE))["step"] == 1
    proxy.close()


@pytest.mark.parametrize("what", ["no bucket", "wrong secret", "no permission", "a file in the way"])
def test_a_place_that_cannot_be_written_is_found_at_the_start(s3, tmp_path, what):
    url, options = "s3://runs/x", s3.options
    if what == "no bucket":
        url = "s3://none/x"
    elif what == "wrong secret":
        options = {**options, "secret": "w" * 40}
    elif what == "no permission":
        url, options = "/proc/checkpoints", {}
    else:
        (tmp_path / "file").write_text("")
        url, options = str(tmp_path / "file" / "x"), {}
    with pytest.raises(ConfigError, match=rf"checkpoints cannot be kept at {url}: .*checkpoint\.url"):
        Checkpoints(url, ALONE, patience=2, options=options)


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_found_at_the_start_and_later_costs_the_save_but_not_the_run(tmp_path):
    disk = Path(tmp_path / "disk")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        told = []
        checkpoints = Checkpoints(str(disk / "x"), ALONE, patience=1, warn=told.append)
        with pytest.raises(
            ConfigError, match=rf"{disk}/x has room for 0\.\d MiB, a checkpoint takes .* there \(checkpoint\.url\)"
        ):
            checkpoints.require_room(begin(config(2), ALONE))
        checkpoints.save(begin(config(2), ALONE), {})
        checkpoints.wait()
        assert checkpoints.failures == 1
        assert "No space left" in told[0]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
