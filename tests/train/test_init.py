"""Runs that begin with the weights of another program, or of another run."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from equiav.config import ConfigError, RunConfig, from_dict
from equiav.data.local_s3 import LocalS3
from equiav.weights import initial_weights, load_model
from tests.model.test_importers import block, conv, fill, norm
from tests.train.ranks import free_port
from tests.train.test_pretrain import ENV, Run, same_run

D, DEPTH = 64, 2


def mae():
    """For the encoders of the tiny model, had they square patches of 16: all but what reads pixels is of its sizes."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 17, D)} | conv("patch_embed.proj", 3) | norm("norm")
    for n in range(DEPTH):
        shapes |= block(f"blocks.{n}", modality_norms=False)
    return {"model": fill(shapes)}


@pytest.fixture(scope="module")
def config(run_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    settings = yaml.safe_load(run_config.read_text())
    settings["model"] |= {"depth": DEPTH, "image_patch": 16, "audio_patch": 16}
    settings["train"] |= {"steps": 6, "warmup_steps": 2}
    settings["checkpoint"] |= {"every_steps": 2}
    settings["weights"] = str(folder / "mae.pth")
    torch.save(mae(), folder / "mae.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One process, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    told = Run(config, out).end()
    return out, told


def begun(config, folder, W):
    """The weights of step 0."""
    env = {
        **ENV,
        "WORLD_SIZE": str(W),
        "LOCAL_WORLD_SIZE": str(W),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "tests.train.begins", str(config), str(folder / f"{W}.pt")]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(W)]
    assert [rank.wait(120) for rank in ranks] == [0] * W
    return torch.load(folder / f"{W}.pt")


@pytest.mark.parametrize("W", [1, 3])
def test_the_encoders_begin_as_mae_left_them(config, tmp_path, W):
    state, source = begun(config, tmp_path, W), mae()["model"]
    for side in ("audio", "image"):
        for name, x in source.items():
            if name.startswith(("blocks.", "norm.")):
                assert torch.equal(state[f"{side}.encoder.{name}"], x), name
    assert torch.equal(state["image.encoder.patch_embed.weight"], source["patch_embed.proj.weight"])
    settings = from_dict(RunConfig, yaml.safe_load(config.read_text()), "test")
    expected = initial_weights(settings.weights, settings, settings.seed).state
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], x) for name, x in expected.items())


def test_each_tensor_is_accounted_for(whole):
    out, told = whole
    assert "begins with the weights of" in told
    assert "used       28 tensors" in told
    assert "norm of the augmented view: 1 and 0 (audio.encoder.norm_aug.weight, ...)" in told
    assert "not in the checkpoint (" in told
    for path in out.glob("checkpoints/step-*/manifest.json"):
        manifest = json.loads(json.loads(path.read_text())["manifest"])
        assert manifest["init"]["from"].endswith("mae.pth")
        assert len(manifest["init"]["digest"]) == 32
    assert yaml.safe_load((out / "config.yaml").read_text())["weights"].endswith("mae.pth")


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_need_the_file(config, whole, tmp_path):
    """Three processes, then two; the file is gone, then not even named."""
    shutil.copy(config.parent / "mae.pth", tmp_path / "mae.pth")
    settings = yaml.safe_load(config.read_text()) | {"weights": str(tmp_path / "mae.pth")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    run = Run(tmp_path / "config.yaml", tmp_path / "out", 3)
    run.reach(3)
    os.kill(run.process.pid, 15)
    run.process.communicate()
    (tmp_path / "mae.pth").unlink()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | {"weights": ""}))
    Run(tmp_path / "config.yaml", tmp_path / "out", 2).end()
    same_run(tmp_path / "out", whole[0], count=6)
    told = Run(tmp_path / "config.yaml", tmp_path / "out", None, "--weights", str(config)).end(2)
    assert f"weights is {config}, was {tmp_path}/mae.pth" in told


def test_from_a_run_of_ours(config, whole, tmp_path):
    out = whole[0]
    weights = load_model(out / "model")[0].state_dict()
    settings = from_dict(RunConfig, yaml.safe_load(config.read_text()), "test")
    for source in (out, out / "model"):
        state = initial_weights(str(source), settings, 0)
        assert not state.fresh
        assert all(torch.equal(state.state[name], x) for name, x in weights.items())


def test_what_no_shape_shows(whole, tmp_path):
    """Heads, and the scale of spectrograms."""
    values = json.loads((whole[0] / "model" / "config.json").read_text())
    values["data"]["audio_mean"] = -4.0
    settings = from_dict(RunConfig, values, "test")
    assert initial_weights(str(whole[0]), settings, 0).notes == [
        "that model was trained with data.audio_mean -10.3, here it is -4"
    ]
    values["model"]["heads"] = 1
    with pytest.raises(ConfigError, match=r"weights: model\.heads is 1, expected 2, as that model has"):
        initial_weights(str(whole[0]), from_dict(RunConfig, values, "test"), 0)
    shutil.copytree(whole[0] / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected settings, found list"):
        initial_weights(str(tmp_path / "model"), settings, 0)


def test_from_a_store(config, whole, tmp_path, monkeypatch):
    (tmp_path / "bucket" / "runs" / "one").mkdir(parents=True)
    shutil.copytree(whole[0] / "model", tmp_path / "bucket" / "runs" / "one" / "model")
    shutil.copy(config.parent / "mae.pth", tmp_path / "bucket" / "runs" / "mae.pth")
    settings = from_dict(RunConfig, yaml.safe_load(config.read_text()), "test")
    with LocalS3(tmp_path / "bucket") as s3:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.options["endpoint_url"])
        shutil.copytree(s3.folder / "runs" / "one" / "model", s3.folder / "runs" / "jobs" / "checkpoints" / "model")
        for url in ("s3://runs/one", "s3://runs/one/model", "s3://runs/jobs"):  # the last as a cluster leaves it
            assert not initial_weights(url, settings, 0).fresh
        assert len(initial_weights("s3://runs/mae.pth", settings, 0).used) == 28
        with pytest.raises(ConfigError, match=r"s3://runs/two/model/config\.json does not exist; expected a model"):
            initial_weights("s3://runs/two", settings, 0)
        with pytest.raises(ConfigError, match=r"s3://runs/two\.pth does not exist"):
            initial_weights("s3://runs/two.pth", settings, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "/nowhere.pth"}, "weights: /nowhere.pth: no such file"),
        ({"weights": "{folder}"}, "no config.json there; expected a model folder"),
        ({"model.width": 128}, r"choose the model.size \(and input sizes\) that the checkpoint was trained with"),
        ({"model.depth": 3}, "model.depth=3 is deeper than its encoders"),
    ],
)
def test_what_does_not_fit_is_said_by_all(config, tmp_path, change, said):
    arguments = [word for name, value in change.items() for word in (f"--{name}", str(value).format(folder=tmp_path))]
    for W in (None, 2):
        out = tmp_path / str(W)
        text = Run(config, out, W, *arguments).end(2 if W is None else 1)
        assert re.search(said, text), text
