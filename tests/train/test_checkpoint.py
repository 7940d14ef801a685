"""A checkpoint is whole or it is none; what is damaged is passed over, loudly, for the one before."""

import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import subprocess
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from equiav.config import Config, ConfigError, from_dict
from equiav.data.local_s3 import LocalS3
from equiav.parallel import Ranks
from equiav.tasks import Pretraining
from equiav.train import checkpoint, initial_state, owner, steps
from equiav.train.checkpoint import Checkpoints
from equiav.train.manifest import NotWhole, digest_of, sealed
from streaming.store import Denied, Missing, NoAnswer
from tests.streaming.fault_proxy import FaultProxy
from tests.train.ranks import TINY, batches

ALONE = Ranks("cpu")


def config(steps):
    train = {"batch_size": 4, "steps": steps, "warmup_steps": 0, "lr": 1e-3, "lr_start": 1e-3}
    objective = {"centroid_size": 2, "learnable_temperature": True}
    settings = {"model": {"size": "tiny", "depth": 1}, "data": TINY["data"], "objective": objective, "train": train}
    return from_dict(Config, settings, "test")


def go_on(state, stop):
    deque(
        steps(Pretraining(config(stop)), ALONE, state, itertools.islice(batches(4, 4, 0, 1, of=8), state.step, None)),
        maxlen=0,
    )


def about(state, **more):
    return {"stream": {"step": state.step if state else 0, "order": {}}, "quarantine": {}, "config": {}, **more}


def own(url, **arguments):
    """Taken over."""
    checkpoints = Checkpoints(str(url), ALONE, **arguments)
    checkpoints.take_over(initial_state(Pretraining(config(2)), ALONE))
    return checkpoints


def anything(manifest):
    """Accepts any run's."""


def numbers(state):
    """Everything that an update reads."""
    moments = {
        f"{k}.{name}": value
        for k, p in state.model.named_parameters()
        for name, value in state.optimizer.state.get(p, {}).items()
    }
    return {**state.model.state_dict(), **moments, "step": torch.tensor([state.step, state.skipped])}


def same(state, expected):
    ours = numbers(state)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(checkpoint, "AGAIN", (0, 0))
    monkeypatch.setattr(owner, "TWICE", (0, 0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2, and the state at both. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints, state, at = own(folder), initial_state(Pretraining(config(2)), ALONE), {}
    for step in (1, 2):
        go_on(state, step)
        checkpoints.save(state, about(state, told=step))
        at[step] = {name: value.clone() for name, value in numbers(state).items()}  # before it is changed again
        checkpoints.finish()
    assert checkpoints.failures == 0
    return folder, at


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def load(folder, **arguments):
    told = []
    state = initial_state(Pretraining(config(2)), ALONE)
    manifest = Checkpoints(str(folder), ALONE, warn=told.append, **arguments).load(state, anything)
    return manifest, state, told


def test_what_was_saved_is_loaded_to_the_bit(saved):
    manifest, state, told = load(saved[0])
    assert manifest["step"] == state.step == 2
    assert manifest["told"] == 2
    assert told == []
    same(state, saved[1][2])


def test_training_goes_on_as_if_nothing_had_been(saved):
    _, resumed, _ = load(saved[0])
    go_on(resumed, 4)
    whole = initial_state(Pretraining(config(4)), ALONE)
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


@pytest.mark.parametrize("file", ["part-00000-00000", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(saved, copy, file, damage):
    (newest,) = copy.glob("step-00000002-*")
    assert sorted(path.name for path in newest.iterdir()) == ["manifest.json", "part-00000-00000"]
    DAMAGE[damage](newest / file)
    manifest, state, told = load(copy)
    if (damage, file) == ("longer", "part-00000-00000"):  # what is used of it is right
        assert (manifest["step"], told) == (2, [])
        same(state, saved[1][2])
        return
    assert manifest["step"] == state.step == 1
    if (damage, file) == ("missing", "manifest.json"):  # it was never finished
        assert told == []
        return
    same(state, saved[1][1])
    (message,) = told
    assert f"checkpoint {copy}/{newest.name} is passed over" in message
    assert file in message


def test_what_none_can_use_is_kept_and_never_counts(copy):
    """Both damaged: they are set aside when the folder is taken over, and the next checkpoints stay, at whatever step."""
    for path in copy.glob("step-*/part-00000-00000"):
        DAMAGE["cut"](path)
    told = []
    checkpoints, state = (
        Checkpoints(str(copy), ALONE, keep=1, warn=told.append),
        initial_state(Pretraining(config(2)), ALONE),
    )
    assert checkpoints.load(state, anything) is None
    assert len(checkpoints.unusable()) == 2
    assert checkpoints.newest() == -1
    assert all("is passed over: " in message and "part-00000-00000" in message for message in told)
    assert len(list(copy.glob("step-*"))) == 2  # nothing is touched before the start is known to be good
    checkpoints.take_over(state)
    assert sorted(path.name[:21] for path in copy.iterdir() if path.is_dir()) == [
        f"damaged-step-{k:08d}" for k in (1, 2)
    ]
    state.step = 1
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    again = Checkpoints(str(copy), ALONE, warn=told.append)
    assert again.load(initial_state(Pretraining(config(2)), ALONE), anything)["step"] == 1
    assert len(list(copy.glob("damaged-*"))) == 2


def test_a_start_from_an_earlier_checkpoint_keeps_what_it_saves(copy):
    """Another has published a later step meanwhile: neither is removed for the other's sake."""
    checkpoints, state = Checkpoints(str(copy), ALONE, keep=3), initial_state(Pretraining(config(2)), ALONE)
    checkpoints.take_over(state)
    for state.step in (0, 1):
        checkpoints.save(state, about(state))
        assert checkpoints.finish() == ""
        assert (copy / f"step-{state.step:08d}-{checkpoints.token}" / "manifest.json").exists()
    assert [path.parent.name[5:13] for path in sorted(copy.glob("step-*/manifest.json"))] == [
        f"{step:08d}" for step in (0, 1, 1, 2)
    ]


def test_a_bit_that_flips_on_the_wire_is_no_damage(saved, s3):
    """Twice in the tensors, once in the manifest."""
    shutil.copytree(saved[0], s3.folder / "runs" / "copy")
    proxy, flips = FaultProxy(s3.port), {"manifest.json": 1, "part-00000-00000": 2}
    options = {"key": s3.key, "secret": s3.secret, **proxy.options()}
    told = []
    checkpoints = Checkpoints("s3://runs/copy", ALONE, options=options, warn=told.append)
    read = checkpoints.store.read

    def flipped(name, *arguments, **more):
        content = bytearray(read(name, *arguments, **more))
        file = name.rpartition("/")[2]
        if flips.get(file):
            flips[file] -= 1
            content[len(content) // 2] ^= 1
        return bytes(content)

    checkpoints.store.read = flipped
    state = initial_state(Pretraining(config(2)), ALONE)
    assert checkpoints.load(state, anything)["step"] == 2
    assert (told, set(flips.values())) == ([], {0})
    same(state, saved[1][2])
    proxy.close()


IN_THE_WAY = {
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link loop": lambda path: (path.unlink(), path.symlink_to(path)),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("file", ["part-00000-00000", "manifest.json"])
@pytest.mark.parametrize("what", IN_THE_WAY)
def test_something_else_in_place_of_a_file(saved, copy, file, what):
    (newest,) = copy.glob("step-00000002-*")
    IN_THE_WAY[what](newest / file)
    manifest, state, told = load(copy)
    assert manifest["step"] == 1
    same(state, saved[1][1])
    assert len(told) == 1


def test_a_file_in_place_of_a_checkpoint(saved, copy):
    (newest,) = copy.glob("step-00000002-*")
    shutil.rmtree(newest)
    newest.write_text("x")
    assert load(copy)[0]["step"] == 1


def forged(folder, change):
    """The newest checkpoint's manifest, changed and sealed as if it were right."""
    (newest,) = folder.glob("step-00000002-*")
    manifest = json.loads(json.loads((newest / "manifest.json").read_text())["manifest"])
    change(manifest)
    (newest / "manifest.json").write_bytes(sealed(manifest))
    return newest


def first_block(manifest):
    return next(iter(manifest["tensors"].values()))[2][0]


FORGED = {
    "no step": lambda m: m.pop("step"),
    "step of text": lambda m: m.update(step="2"),
    "another step than its name's": lambda m: m.update(step=1),
    "a step below zero": lambda m: m.update(step=-3),
    "no order": lambda m: m.update(stream={}),
    "samples that are none": lambda m: m.update(quarantine={"x": "checksum"}),
    "no tensors": lambda m: m.pop("tensors"),
    "tensors of nothing": lambda m: m.update(tensors={}),
    "a name that leads away": lambda m: first_block(m).__setitem__(0, "../../secret"),
    "an absolute name": lambda m: first_block(m).__setitem__(0, "/etc/passwd"),
    "a size below zero": lambda m: first_block(m).__setitem__(2, -4),
    "rows that are not there": lambda m: first_block(m).__setitem__(4, 10**12),
    "blocks that lie on each other": lambda m: max(m["tensors"].values(), key=lambda t: t[1])[2].append(None),
    "a type that runs code": lambda m: next(iter(m["tensors"].values())).__setitem__(0, "__import__('os')"),
    "another shape": lambda m: next(iter(m["tensors"].values())).__setitem__(1, [1, 1]),
    "a start that is a list": lambda m: m.update(init=[]),
    "a reason that moves the cursor": lambda m: m.update(quarantine={"3": "\x1b[2J"}),
    "a digit that is none": lambda m: m.update(quarantine={"²": "x"}),
    "fewer than no steps skipped": lambda m: m.update(skipped=-7),
    "more steps skipped than done": lambda m: m.update(skipped=3),
    "a format of text": lambda m: m.update(format="2"),
    "a step of the stream's own": lambda m: m["stream"].update(step=1),
    "a log that is no digest": lambda m: m.update(log="x"),
    "the weights' digest": lambda m: m.update(digest="0" * 32),
    "another digest of a weight": lambda m: swap_digests(m["weights"]) or m.update(digest=digest_of(m["weights"])),
    "a weight without a digest": lambda m: m["weights"].popitem() and m.update(digest=digest_of(m["weights"])),
    "a block of gigabytes": lambda m: widest(m)[2][0].__setitem__(slice(2, 5), [3 << 30, 0, widest(m)[1][0]]),
    "a tensor of more than all": lambda m: widest(m).__setitem__(1, [2**41, 2**41]),
    "an empty block": lambda m: widest(m)[2].append(["part-00000-00000", 0, 0, 0, 0, "0" * 16]),
    "a moment that is missing": lambda m: m["tensors"].pop(moment(m)),
    "all moments of a weight": lambda m: [
        m["tensors"].pop(moment(m, kind)) for kind in ("exp_avg", "exp_avg_sq", "step")
    ],
    "what another optimizer keeps": lambda m: m["tensors"].update({moment(m, "momentum"): m["tensors"].pop(moment(m))}),
    "a tensor that nothing has": lambda m: m["tensors"].update({moment(m, "third"): m["tensors"][moment(m)]}),
}


def swap_digests(weights):
    one, two = list(weights)[:2]
    weights[one], weights[two] = weights[two], weights[one]


def widest(manifest):
    return max(manifest["tensors"].values(), key=lambda tensor: math.prod(tensor[1]))


def moment(manifest, kind="exp_avg"):
    """Of the last parameter that has any."""
    last = max(name for name in manifest["tensors"] if name.startswith("exp_avg_sq/"))
    return f"{kind}/{last.removeprefix('exp_avg_sq/')}"


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_is_damage(saved, copy, what):
    (copy.parent / "secret").write_text("s")
    forged(copy, FORGED[what])
    manifest, state, told = load(copy)
    assert manifest["step"] == 1
    same(state, saved[1][1])
    assert "is passed over" in told[0]


@pytest.mark.parametrize("absolute", [False, True])
def test_no_name_leads_out_of_the_folder(copy, absolute):
    """Though what lies there is right to the last bit."""
    (newest,) = copy.glob("step-00000002-*")
    outside = copy.parent / "outside"
    (newest / "part-00000-00000").rename(outside)

    def change(manifest):
        for _, _, blocks in manifest["tensors"].values():
            for block in blocks:
                block[0] = str(outside) if absolute else "../../outside"

    forged(copy, change)
    assert load(copy)[0]["step"] == 1


class Payload:
    """Unpickling it runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled_and_no_name_is_followed(copy, tmp_path):
    """Payloads in every file of a checkpoint, and beside them the files that older programs unpickled."""
    ran = tmp_path / "ran"
    for folder in copy.glob("step-*"):
        for path in (*folder.iterdir(), folder / ".metadata"):
            path.write_bytes(pickle.dumps(Payload(ran)))
    (copy / "owner").write_bytes(pickle.dumps(Payload(ran)))
    assert load(copy)[0] is None
    assert not ran.exists()


def test_a_checkpoint_of_another_program_is_no_damage(copy):
    """It is not set aside, and the run does not begin anew: somebody has to decide."""
    forged(copy, lambda m: m.update(format=1))
    with pytest.raises(ConfigError, match="format 1, this program reads 2: use the program that wrote it"):
        load(copy)


def test_the_digest_is_of_the_weights_alone(saved, tmp_path):
    """Not of how they were cut; another weight, another place: another digest."""

    def digest(state):
        checkpoints = Checkpoints(str(tmp_path / str(state.step)), ALONE)
        checkpoints.take_over(state)
        checkpoints.save(state, about(state))
        assert checkpoints.finish() == ""
        return checkpoints.load(state, anything)["digest"]

    state = load(saved[0])[1]
    digests = [digest(state)]
    state.step = 3
    assert digest(state) == digests[0]
    weight = next(p for p in state.model.parameters() if p.dim() == 2)
    with torch.no_grad():
        weight[1, 0] += 1e-6
        state.step, weight_then = 4, weight.clone()
        digests.append(digest(state))
        weight.copy_(weight_then[[1, 0, *range(2, len(weight))]])
        state.step = 5
        digests.append(digest(state))
    assert len(set(digests)) == 3


def test_only_what_is_to_be_kept_stays(tmp_path):
    checkpoints, state = own(tmp_path, keep=2, keep_every=3), initial_state(Pretraining(config(8)), ALONE)
    (tmp_path / "step-00000001-0badc0de").mkdir()  # what a crash left
    (tmp_path / "step-00000001-0badc0de" / "part-00000-00000").write_bytes(b"half")
    for step in range(1, 9):
        state.step = step
        checkpoints.save(state, about(state))
        checkpoints.finish()
    assert sorted(path.name[:13] for path in tmp_path.glob("step-*")) == [f"step-{k:08d}" for k in (3, 6, 7, 8)]


def test_of_two_starts_of_a_run_the_first_gives_way(tmp_path):
    first, state = Checkpoints(str(tmp_path), ALONE), initial_state(Pretraining(config(2)), ALONE)
    first.take_over(state)
    first.save(state, about(state))
    assert first.finish() == ""
    second = Checkpoints(str(tmp_path), ALONE)
    state.step = 1
    first.save(state, about(state))
    assert first.finish() == ""  # until the other takes over
    second.take_over(state)
    state.step = 2
    first.save(state, about(state))
    said = rf"start {second.token} of this run, on host {platform.node()}, has taken over at .* from this one, {first.token}"
    assert re.search(said, first.finish())
    assert first.superseded
    steps = sorted(int(path.parent.name[5:13]) for path in tmp_path.glob("step-*/manifest.json"))
    assert steps == [0, 1]
    second.save(state, about(state))
    assert second.finish() == ""
    assert second.load(initial_state(Pretraining(config(2)), ALONE), anything)["step"] == 2


@pytest.mark.parametrize("file", ["part-00000-00000", "manifest.json"])
def test_what_is_missing_for_a_moment_is_not_damaged(saved, file):
    told, times = [], itertools.count()
    checkpoints = Checkpoints(str(saved[0]), ALONE, warn=told.append)
    read = checkpoints.store.read

    def missing_once(name, *arguments, **more):
        if name.endswith(file) and next(times) == 0:
            raise Missing(f"{name} does not exist")
        return read(name, *arguments, **more)

    checkpoints.store.read = missing_once
    assert checkpoints.load(initial_state(Pretraining(config(2)), ALONE), anything)["step"] == 2
    assert told == []


def test_a_name_that_is_taken_is_no_reason_to_fail(copy):
    (newest,) = copy.glob("step-00000002-*")
    DAMAGE["cut"](newest / "part-00000-00000")
    shutil.copytree(newest, copy / f"damaged-{newest.name}")
    checkpoints, state = Checkpoints(str(copy), ALONE), initial_state(Pretraining(config(2)), ALONE)
    checkpoints.load(state, anything)
    checkpoints.take_over(state)
    assert len(list(copy.glob("damaged-step-00000002-*"))) == 2


def test_a_save_is_one_though_older_ones_cannot_be_removed(copy):
    told = []
    checkpoints = own(copy, keep=1, warn=told.append)

    def denied(name):
        raise Denied(f"{name}: access is refused")

    checkpoints.store.remove = denied
    state = initial_state(Pretraining(config(2)), ALONE)
    state.step = 5
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    assert (checkpoints.saved_step, checkpoints.failures) == (5, 0)
    assert "older checkpoints could not be removed" in told[0]


@pytest.mark.parametrize("answer", [b"", b'{"start": "c169', b"\0" * 90, b"[]", Missing("does not exist")])
def test_an_owner_that_cannot_be_read_has_not_taken_over(tmp_path, answer):
    """Nor does it keep the run from saving; and a right answer ends the doubt."""
    checkpoints, state = own(tmp_path), initial_state(Pretraining(config(2)), ALONE)
    read = checkpoints.store.read

    def wrong(name, *arguments, **more):
        if name != "owner":
            return read(name, *arguments, **more)
        if isinstance(answer, Exception):
            raise answer
        return answer

    checkpoints.store.read = wrong
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    assert not checkpoints.superseded


def test_one_wrong_answer_is_no_other_start(tmp_path):
    checkpoints, state = own(tmp_path), initial_state(Pretraining(config(2)), ALONE)
    read, times = checkpoints.store.read, itertools.count()

    def once(name, *arguments, **more):
        content = read(name, *arguments, **more)
        return content.replace(checkpoints.token.encode(), b"deadbeef") if next(times) == 0 else content

    checkpoints.store.read = once
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    assert not checkpoints.superseded


def test_a_store_that_does_not_answer_is_no_mistake(s3):
    """A restart may mend it: not an error of settings, which would end the agent."""
    proxy = FaultProxy(s3.port)
    options = {"key": s3.key, "secret": s3.secret, **proxy.options()}
    checkpoints = Checkpoints("s3://runs/four", ALONE, patience=0.5, options=options)
    proxy.down = True
    with pytest.raises(NoAnswer):
        checkpoints.take_over(initial_state(Pretraining(config(2)), ALONE))
    proxy.close()


def test_the_thread_that_saves_asks_for_no_device(saved, tmp_path, monkeypatch):
    """Which device is current is known to each thread by itself: every rank would take memory on GPU 0."""
    asked = []
    for name in ("current_device", "_lazy_init", "init"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append((name, threading.current_thread().name)))
    state, checkpoints = load(saved[0])[1], own(tmp_path)
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    assert [thread for _, thread in asked if "checkpoint" in thread] == []


# ---- on object storage


@pytest.fixture
def s3(tmp_path):
    (tmp_path / "store" / "runs").mkdir(parents=True)
    with LocalS3(tmp_path / "store") as server:
        yield server


def test_on_object_storage(saved, s3):
    state = initial_state(Pretraining(config(2)), ALONE)
    load_state = Checkpoints(str(saved[0]), ALONE)
    load_state.load(state, anything)
    checkpoints = own("s3://runs/one", keep=1, options=s3.options)
    for state.step in (2, 3):
        checkpoints.save(state, about(state))
        assert checkpoints.finish() == ""
    manifest, loaded, told = load("s3://runs/one", options=s3.options)
    assert manifest["step"] == 3
    assert told == []
    same(loaded, {**saved[1][2], "step": torch.tensor([3, 0])})
    assert len(list((s3.folder / "runs" / "one").glob("step-*/*"))) == 2


def test_on_object_storage_too_what_is_damaged_is_kept_under_another_name(saved, s3):
    shutil.copytree(saved[0], s3.folder / "runs" / "copy")
    for path in (s3.folder / "runs" / "copy").glob("step-00000002-*/part-00000-00000"):
        DAMAGE["middle bit"](path)
    state = initial_state(Pretraining(config(2)), ALONE)
    checkpoints = Checkpoints("s3://runs/copy", ALONE, options=s3.options)
    assert checkpoints.load(state, anything)["step"] == 1
    checkpoints.take_over(state)
    assert checkpoints.newest() == 1
    (aside,) = (s3.folder / "runs" / "copy").glob("damaged-step-00000002-*")
    assert sorted(path.name for path in aside.iterdir()) == ["manifest.json", "part-00000-00000"]


def test_a_store_that_is_down_during_a_save_is_waited_for(s3):
    proxy = FaultProxy(s3.port)
    told = []
    options = {"key": s3.key, "secret": s3.secret, **proxy.options()}
    checkpoints = own("s3://runs/two", patience=60, options=options, warn=told.append)
    proxy.down = True
    proxy._loop.call_later(3, setattr, proxy, "down", False)
    state = initial_state(Pretraining(config(2)), ALONE)
    checkpoints.save(state, about(state))
    assert checkpoints.busy  # training goes on meanwhile
    checkpoints.finish()
    proxy.close()
    assert (checkpoints.failures, told) == (0, [])
    assert checkpoints.store.counts["retries"] > 0


def test_a_save_that_fails_is_told_and_counted_and_the_next_one_succeeds(s3):
    proxy = FaultProxy(s3.port)
    told = []
    options = {"key": s3.key, "secret": s3.secret, **proxy.options()}
    checkpoints = own("s3://runs/three", patience=2, options=options, warn=told.append)
    state = initial_state(Pretraining(config(2)), ALONE)
    proxy.down = True
    checkpoints.save(state, about(state))
    checkpoints.finish()
    assert checkpoints.failures == 1
    assert "could not be saved, the run goes on without it: rank 0: s3://runs/three" in told[0]
    proxy.down = False
    state.step = 1
    checkpoints.save(state, about(state))
    checkpoints.finish()
    assert checkpoints.failures == 1
    assert checkpoints.load(initial_state(Pretraining(config(2)), ALONE), anything)["step"] == 1
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
        Checkpoints(url, ALONE, patience=2, options=options).take_over(initial_state(Pretraining(config(2)), ALONE))


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
            ConfigError, match=rf"{disk}/x has room for 0\.\d MiB, checkpoints take .*keep=3 and one more"
        ):
            checkpoints.take_over(initial_state(Pretraining(config(2)), ALONE))
        checkpoints.save(initial_state(Pretraining(config(2)), ALONE), about(None))
        checkpoints.finish()
        assert checkpoints.failures == 1
        assert "No space left" in told[0]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- a store that lies


@pytest.mark.parametrize("where", ["weight", "exp_avg"])
def test_what_is_not_finite_is_no_checkpoint(saved, copy, where):
    """Its checksums are right: somebody's program has written it so."""
    checkpoints, state = own(copy), initial_state(Pretraining(config(2)), ALONE)
    go_on(state, 2)
    parameter = next(state.model.parameters())
    (parameter.data if where == "weight" else state.optimizer.state[parameter]["exp_avg"]).view(-1)[0] = float("nan")
    for path in copy.glob("step-00000002-*"):
        shutil.rmtree(path)
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    manifest, state, told = load(copy)
    assert manifest["step"] == 1
    same(state, saved[1][1])
    assert "is not finite" in told[0]


def test_what_cannot_be_of_this_run_is_passed_over(saved):
    def accept(manifest):
        if manifest["step"] == 2:
            raise NotWhole("it is of another world")

    state = initial_state(Pretraining(config(2)), ALONE)
    assert Checkpoints(str(saved[0]), ALONE, warn=lambda _: None).load(state, accept)["step"] == 1


class Stale:
    """Of a file that is written over, reads show for a while what was there before."""

    def __init__(self, store, name, reads):
        self.store, self.name, self.left, self.before = store, name, reads, None
        self.read, self.write = store.read, store.write
        store.read, store.write = self._read, self._write

    def _write(self, name, content):
        if name == self.name:
            with suppress(Missing):
                self.before = self.read(name)
        self.write(name, content)

    def _read(self, name, *arguments, **more):
        if name == self.name and self.before and self.left:
            self.left -= 1
            return self.before
        return self.read(name, *arguments, **more)


def test_who_owned_the_folder_before_has_not_taken_over(tmp_path, monkeypatch):
    """A store that shows for some seconds what stood there before."""
    monkeypatch.setattr(owner, "SHOWN", (0,) * 20)
    state = initial_state(Pretraining(config(2)), ALONE)
    for _ in range(2):
        checkpoints = Checkpoints(str(tmp_path), ALONE)
        Stale(checkpoints.store, "owner", 8)
        checkpoints.take_over(state)
        checkpoints.save(state, about(state))
        assert checkpoints.finish() == ""
        assert not checkpoints.superseded


@pytest.fixture
def flipping(s3, tmp_path):
    """(url, options, flip): a store that damages one bit of what is sent to it, where `flip` says so."""
    (s3.folder / "runs" / tmp_path.name).mkdir(parents=True)
    proxy = FaultProxy(s3.port)
    yield f"s3://runs/{tmp_path.name}", {"key": s3.key, "secret": s3.secret, **proxy.options()}, proxy
    proxy.close()


def test_a_save_counts_when_the_store_holds_its_bytes(flipping):
    """A gateway that flips a bit of each upload: no save counts, and none that is good goes for it."""
    url, options, proxy = flipping
    told = []
    checkpoints = Checkpoints(url, ALONE, keep=1, patience=1.5, options=options, warn=told.append)
    state = initial_state(Pretraining(config(2)), ALONE)
    checkpoints.take_over(state)
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    proxy.flips = re.compile("^PUT .*part-")
    state.step = 1
    checkpoints.save(state, about(state))
    assert "the store holds other bytes than were written" in checkpoints.finish()
    assert (checkpoints.failures, checkpoints.saved_step) == (1, 0)
    proxy.flips = None
    found = Checkpoints(url, ALONE, options=options).load(initial_state(Pretraining(config(2)), ALONE), anything)
    assert found["step"] == 0


def test_an_upload_that_is_damaged_once_is_sent_again(flipping):
    url, options, proxy = flipping
    checkpoints, state = Checkpoints(url, ALONE, options=options), initial_state(Pretraining(config(2)), ALONE)
    checkpoints.take_over(state)
    proxy.flips, proxy.flips_left = re.compile("^PUT "), 2
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    assert proxy.flips_left == 0
    assert Checkpoints(url, ALONE, options=options).load(state, anything)["step"] == 0


# ---- lines of the log


def test_lines_that_were_changed_are_not_taken(tmp_path):
    told = []
    checkpoints, state = own(tmp_path, warn=told.append), initial_state(Pretraining(config(2)), ALONE)
    state.step = 2
    checkpoints.save(state, about(state), (0, b'{"step": 0, "loss": 2.5}\n{"step": 1, "loss": 2.25}\n'))
    assert checkpoints.finish() == ""
    assert list(checkpoints.lines()) == [0, 1]
    (path,) = tmp_path.glob("lines-*")
    whole = path.read_bytes()
    for content in (whole.replace(b"2.5", b"1.5"), b"[" * 100_000 + b"}\n", b"", b"\xff" * 50):
        path.write_bytes(content)
        assert checkpoints.lines() == {}
        assert "passed over" in told.pop()
    path.write_bytes(whole)
    assert checkpoints.lines()[1] == '{"step": 1, "loss": 2.25}\n'
