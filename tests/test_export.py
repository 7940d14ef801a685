"""`equiav export`: what others run without this package says what ours says."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

import equiav
from equiav import cli
from equiav.api import Embedder
from equiav.data.synthetic import World
from equiav.model import EquiAV
from equiav.weights import save_model
from tests.forks import APART
from tests.test_api import SETTINGS, tuned  # noqa: F401

pytestmark = pytest.mark.slow

CLIPS = [World(3, 64, 3, 2.56).clip(k) for k in range(5)]
ALONE = """
import sys
import numpy as np
import torch
sys.modules["equiav"] = None
given = {name: np.load("given.npz")[name] for name in np.load("given.npz")}
folder = sys.argv[1]
found = {}
for name, inputs in (("audio", ("waveform", "lengths")), ("image", ("frames",))):
    program = torch.export.load(f"{folder}/{name}.pt2").module()
    found[name] = program(*(torch.from_numpy(given[key]) for key in inputs)).detach().numpy()
    import onnxruntime
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
    assert [one.name for one in session.get_inputs()] == list(inputs)
    (found[f"{name} onnx"],) = session.run(["embedding"], {key: given[key] for key in inputs})
np.savez("found.npz", **found)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    model = EquiAV(SETTINGS.model, SETTINGS.objective)
    model.init_weights(4)
    save_model(run / "model", model.state_dict(), SETTINGS)
    (run / "config.yaml").write_text("stream:\n  url: s3://me:secret@host/clips\n")
    (run / "eval").mkdir()
    (run / "eval" / "retrieval.md").write_text("| among 5 clips |\n")
    out = run.parent / "exported"
    assert (
        cli.main(
            ["export", "--weights", str(run), "--out", str(out), "--license", "cc-by-4.0", "--data", "Nobody's clips."]
        )
        == 0
    )
    return run, out


def test_embeddings_are_those_of_the_api_without_this_package(exported, tmp_path):
    """Sounds of other lengths among them, at other batches than it was made with."""
    run, out = exported
    model = equiav.load(run)
    assert isinstance(model, Embedder)
    waves = [clip.audio[: len(clip.audio) - 4000 * k] for k, clip in enumerate(CLIPS)]
    waveform = np.zeros((len(waves), model.length), np.float32)
    for k, wave in enumerate(waves):
        waveform[k, : min(len(wave), model.length)] = wave[: model.length] / np.float32(32768)
    frames = np.stack([clip.frames[0] for clip in CLIPS])
    np.savez(
        tmp_path / "given.npz",
        waveform=waveform,
        lengths=np.array([min(len(wave), model.length) for wave in waves]),
        frames=np.ascontiguousarray(frames.transpose(0, 3, 1, 2)),
    )
    subprocess.run([sys.executable, "-c", ALONE, str(out)], check=True, cwd=tmp_path, env={**os.environ, **APART})
    found = np.load(tmp_path / "found.npz")
    for name in ("audio", "audio onnx"):
        assert np.abs(found[name] - model.embed_audio(waves, 16000)).max() < 1e-5
    for name in ("image", "image onnx"):
        assert np.abs(found[name] - model.embed_image(list(frames))).max() < 1e-5


def test_the_folder_is_a_model_folder_with_a_card(exported):
    run, out = exported
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "model.safetensors", "README.md", "audio.pt2", "image.pt2", "audio.onnx", "image.onnx")
    }
    one, other = equiav.load(run), equiav.load(out)
    assert np.array_equal(one.embed_image(CLIPS[0].frames[0]), other.embed_image(CLIPS[0].frames[0]))
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["library_name"] == "equiav"
    for said in (
        "Nobody's clips.",
        "| among 5 clips |",
        "| `audio.onnx` | waveform (b, 41200) float32, lengths (b) int64 |",
    ):
        assert said in card
    assert "secret" not in card
    assert "s3://***@host/clips" in card


@pytest.mark.parametrize("modality", ["both", "audio", "image"])
def test_a_fine_tuned_model(tuned, tmp_path, modality):  # noqa: F811
    out = tmp_path / "out"
    assert cli.main(["export", "--weights", str(tuned(modality)), "--out", str(out), "--formats", "torch"]) == 0
    model = equiav.load(tuned(modality))
    wave = np.zeros((2, model.length), np.float32)
    for k in range(2):
        wave[k, : len(CLIPS[k].audio)] = CLIPS[k].audio / np.float32(32768)
    frames = np.stack([clip.frames[0] for clip in CLIPS[:2]])
    given = [torch.from_numpy(wave), torch.tensor([len(CLIPS[0].audio)] * 2)] if modality != "image" else []
    given += [torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())] if modality != "audio" else []
    found = torch.export.load(out / "classes.pt2").module()(*given)
    sounds = None if modality == "image" else [clip.audio for clip in CLIPS[:2]]
    pictures = None if modality == "audio" else list(frames)
    assert np.abs(found.detach().numpy() - model.probabilities(sounds, pictures, 16000)).max() < 1e-5
    assert equiav.load(out).classes == model.classes
    assert "classes apart" in (out / "README.md").read_text()


def test_mistakes(exported, tmp_path, capsys, monkeypatch):
    run, out = exported
    for typed, said in (
        ([], "weights is not set"),
        (["--weights", str(run), "--out", str(out)], "is there already, and not empty"),
        (["--weights", "nowhere", "--out", str(tmp_path / "x")], "weights is nowhere, expected a model folder"),
        (["--weights", str(run), "--formats", "tensorflow"], "formats"),
    ):
        capsys.readouterr()
        assert cli.main(["export", *typed]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    # What stands beside is nobody's to remove.
    for name in ("q.part", ".q"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    assert (
        cli.main(["export", "--weights", f"file://{run}/model", "--out", str(tmp_path / "q"), "--formats", "torch"])
        == 0
    )
    assert (tmp_path / "q.part" / "mine").is_file()
    assert (tmp_path / ".q" / "mine").is_file()
    assert "\n# model\n" in (tmp_path / "q" / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.main(["export", "--weights", str(run), "--out", str(tmp_path / "y")]) != 0
    assert "pip install 'equiav[export]'" in capsys.readouterr().err
    monkeypatch.undo()
    # What is off is said, not written.
    monkeypatch.setattr("equiav.programs.NEAR", -1.0)
    assert cli.main(["export", "--weights", str(run), "--out", str(tmp_path / "z"), "--formats", "torch"]) == 2
    assert "reloaded, it is off by" in capsys.readouterr().err
    assert not (tmp_path / "z").exists()
