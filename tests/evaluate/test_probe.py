"""What is told from frozen features: scikit-learn's numbers, and a command that looks at each clip once."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from equiav import cli
from equiav.evaluate.probe import STRENGTHS, choose_strength, fit_linear, nearest
from streaming import Dataset, Store
from tests.train.test_finetune import dataset


def some(n, D=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(classes, size=n)
    x = rng.normal(size=(n, D)).astype(np.float32)
    x[:, 0] += 1.5 * kind
    return x, np.eye(classes, dtype=bool)[kind], kind


@pytest.mark.parametrize("strength", [1e-2, 1.0])
def test_the_linear_classifier_is_scikit_learns(strength):
    x, right, kind = some(300)
    scaled = (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=5000).fit(
        scaled.astype(np.float64), kind
    )
    ours = fit_linear(x, right, strength, one=True)
    assert np.abs(ours.scores(x, True) - theirs.predict_proba(scaled)).max() < 1e-4
    several = fit_linear(x, right, strength, one=False)
    alone = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=5000).fit(scaled, kind == 1)
    assert np.abs(several.scores(x, False)[:, 1] - alone.predict_proba(scaled)[:, 1]).max() < 1e-4


def test_the_nearest_are_scikit_learns():
    x, right, kind = some(200)
    asked, _, _ = some(50, seed=1)
    theirs = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x, kind)
    assert np.abs(nearest(x, right, asked, 7) - theirs.predict_proba(asked)).max() < 1e-6
    assert nearest(x[:3], right[:3], asked, 20).shape == (50, 3)


def test_the_strength_is_chosen_on_what_is_held_out():
    x, right, _ = some(400, D=300)  # more directions than clips: a weak one learns them by heart
    strength, tried = choose_strength(x, right, 0.3, True, seed=0)
    assert strength > STRENGTHS[0]
    assert tried[f"{strength:g}"] == max(tried.values())
    assert len(tried) == len(STRENGTHS)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("probe") / "clips", 30, 1, lambda k, clip: ["few", "many"][k % 2])


def probe(clips, out, *more):
    typed = [
        "--config",
        "smoke",
        "--model.depth",
        "1",
        "--stream.url",
        clips,
        "--out",
        out,
        "--features",
        out.parent / "f",
    ]
    status = cli.main(["probe", *(str(word) for word in (*typed, *more))])
    return status, json.loads((out / "results.json").read_text()) if not status else None


def test_the_command(clips, tmp_path, capsys):
    status, said = probe(clips, tmp_path / "one", "--probe.test_on", "fold 1")
    assert status == 0
    assert (said["model"], said["learned from"], said["of"]) == ("random", 20, 10)
    for how in ("linear", "nearest"):
        assert 0 <= said[how]["accuracy"] <= 1
        assert said[how]["clips"] == 10
    assert "looks at 30 clips" in capsys.readouterr().out
    status, other = probe(clips, tmp_path / "two", "--probe.test_on", "fold 2")  # of the same clips
    told = capsys.readouterr().out
    assert "features of 30 clips" in told
    assert "looks at" not in told
    assert other["linear"] != said["linear"]
    kept = next((tmp_path / "f").glob("*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-100])  # a disk that was full
    assert probe(clips, tmp_path / "three", "--probe.test_on", "fold 1") == (0, said)
    assert probe(clips, tmp_path / "four", "--probe.test_on", "fold 1", "--probe.modality", "audio")[1] != said
    capsys.readouterr()
    assert probe(clips, tmp_path / "five")[0] == 2
    assert "probe.test_on is not set, nor is probe.test_url" in capsys.readouterr().err


def test_where_nothing_held_out_has_a_label_a_middle_strength_is_taken():
    x, right, _ = some(20)
    assert choose_strength(x, np.zeros_like(right), 0.3, False, 0) == (1e-2, {f"{s:g}": None for s in STRENGTHS})


def test_the_same_dataset_by_another_name_is_the_same(clips, tmp_path):
    plain = probe(clips, tmp_path / "one", "--probe.test_on", "fold 1")[1]
    for k, name in enumerate((f"{clips}/", f"file://{clips}")):
        other = probe(clips, tmp_path / str(k), "--probe.test_on", "fold 1", "--probe.test_url", name)[1]
        assert other["learned from"] == 20
        assert other["linear"] == plain["linear"]


def test_a_test_of_what_was_learned_from_is_said(clips, tmp_path, capsys):
    assert probe(clips, tmp_path / "one", "--probe.test_url", clips)[0] == 0
    assert "all 30 test clips are also training clips" in capsys.readouterr().out


def test_features_that_lack_some_clips_are_not_kept(clips, tmp_path, capsys):
    shard = sorted(clips.glob("*.tar"))[0]
    shard.rename(tmp_path / "away")
    try:
        typed = ["--probe.test_on", "fold 1", "--stream.patience", "1"]
        fewer = probe(clips, tmp_path / "one", *typed)[1]
    finally:
        (tmp_path / "away").rename(shard)
    assert "of 4 of 30 clips nothing could be used" in capsys.readouterr().out
    assert fewer["learned from"] + fewer["linear"]["clips"] == 26
    whole = probe(clips, tmp_path / "two", *typed)[1]
    assert whole["learned from"] + whole["linear"]["clips"] == 30


def test_features_are_those_of_the_clip(clips, tmp_path):
    """Computed here clip by clip, with no loader and no batch."""
    import torch

    from equiav.augment.logmel import normalised_spectrogram
    from equiav.augment.transforms import original_image
    from equiav.config import ProbeConfig, load
    from equiav.data.clips import decode_frame, encode_frame
    from equiav.data.synthetic import World
    from equiav.model.classifier import Classifier

    assert probe(clips, tmp_path / "out", "--probe.test_on", "fold 1")[0] == 0
    config = load(ProbeConfig, "probe", ["--config", "smoke", "--model.depth", "1"])[0]
    model = Classifier(config.model, 1)
    model.init_weights(0)
    values = load_file(next((tmp_path / "f").glob("*.safetensors")))["values"]
    world, opened = World(1, 64, 3, 2.56), Dataset(Store(str(clips)))
    from equiav.data.labels import keys_of

    for k, key in list(enumerate(keys_of(opened)))[:6]:
        clip = world.clip(int(key.partition("-")[2]))
        wave = torch.from_numpy(clip.audio)[None]
        sound = normalised_spectrogram(wave, torch.tensor([wave.shape[1]]), config.model, config.data)
        frame = decode_frame(encode_frame(clip.frames[1], 90), "k").copy()
        picture = original_image(torch.from_numpy(frame).permute(2, 0, 1)[None], config.model.image_size)
        with torch.no_grad():
            assert np.abs(model.pooled(sound, picture)[0].numpy() - values[k]).max() < 1e-4
