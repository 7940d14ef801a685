"""`equiav eval`: plain computations on the same clips, the same at every number of processes."""

import base64
import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from equiav import cli
from equiav.augment import Clips, augment_spectrogram, make_views, original_image, sampled_vectors
from equiav.augment.draws import Purpose
from equiav.config import Config, DataConfig, from_dict
from equiav.data.clips import decode_frame
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import Rules, World
from equiav.evaluate import attention, centroid, localize
from equiav.evaluate.retrieval import Pairs, embed_pairs, zero_shot_retrieval
from equiav.evaluate.sides import SEED, draws, sides
from equiav.evaluate.similarity import columns, similarities
from equiav.model import EquiAV
from equiav.weights import save_model
from streaming import DatasetError, Store
from streaming.pack import pack

CONFIG = from_dict(
    Config, {"model": {"size": "tiny", "depth": 1}, "data": {"audio_mean": -10.3, "audio_std": 3.9}}, "test"
)
COUNT = 37
WORLD = World(4, 64, 3, 2.56)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    encode = EncodeSynthetic(WORLD, Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    pack([(f"a/clip-{k}", k) for k in range(COUNT)], encode, Store(str(root / "clips")), processes=0, part_items=10)
    model = EquiAV(CONFIG.model, CONFIG.objective)
    model.init_weights(5)
    save_model(root / "run" / "model", model.state_dict(), CONFIG)
    return root


def clips(numbers):
    encode = EncodeSynthetic(WORLD, Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    frames = [decode_frame(encode(k)["1.jpg"], str(k)).copy() for k in numbers]
    waveform = torch.from_numpy(np.stack([WORLD.clip(k).audio for k in numbers]))
    pictures = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return Pairs(pictures, waveform, torch.full((len(numbers),), waveform.shape[1]))


def model_of(place):
    from equiav.weights import load_model

    return load_model(place / "run" / "model")[0]


def evaluate(place, out, *more, W=1):
    typed = [
        "eval",
        "--weights",
        str(place / "run"),
        "--stream.url",
        str(place / "clips"),
        "--stream.workers",
        "0",
        "--out",
        str(out),
    ]
    typed += [str(word) for word in more]
    if W == 1:
        assert cli.main(typed) == 0
    else:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(W),
            "-m",
            "equiav",
        ]
        subprocess.run([*command, *typed], check=True)
    (found,) = out.glob("*.json")
    return json.loads(found.read_text()), next(out.glob("*.md")).read_text()


def test_retrieval_is_that_of_the_whole_matrix(place, tmp_path):
    said, table = evaluate(place, tmp_path / "one", "retrieval", "--batch", "8", "--benchmark", "AudioSet")
    expected = zero_shot_retrieval(model_of(place), CONFIG, clips(range(COUNT)))
    assert (said["clips"], said["of"]) == (COUNT, COUNT)
    for name, (mean, half) in expected.items():
        assert said[name]["mean"] == pytest.approx(mean)
        assert said[name]["half spread"] == pytest.approx(half)
    assert "| EquiAV, the paper (Table 4, AudioSet) | 30.1 | 53.3 | 62.9 | |" in table
    assert f"{100 / COUNT:.2f}" in table
    shared, _ = evaluate(place, tmp_path / "two", "retrieval", "--batch", "8", "--benchmark", "AudioSet", W=2)
    assert shared == said


def test_ways_to_retrieve_differ(place, tmp_path):
    found = [
        evaluate(place, tmp_path / str(k), "retrieval", *more)[0]
        for k, more in enumerate(
            ([], ["--embedding", "original"], ["--vectors", "own"], ["--frames", "3"], ["--seeds", "1"])
        )
    ]
    keys = [json.dumps({name: value for name, value in one.items() if " to " in name}) for one in found]
    assert len(set(keys)) == len(keys)
    assert found[1]["image to audio R@10"]["half spread"] == 0


def test_a_list_says_which_clips(place, tmp_path, capsys):
    entries = [{"video_id": f"clip-{k}", "wav": "x", "video_path": "x", "labels": ""} for k in range(12)]
    (tmp_path / "list.json").write_text(json.dumps({"data": entries}))
    said, _ = evaluate(place, tmp_path / "few", "--clips", tmp_path / "list.json")
    expected = zero_shot_retrieval(model_of(place), CONFIG, clips(range(12)))
    assert said["clips"] == 12
    assert said["audio to image R@1"]["mean"] == pytest.approx(expected["audio to image R@1"][0])
    capsys.readouterr()
    for extra, message in (({"video_id": "gone"}, "1 of 13 clips of"), (None, "none of 1 names, such as 'gone'")):
        data = [*entries, entries[0] | extra] if extra else [entries[0] | {"video_id": "gone"}]
        (tmp_path / "list.json").write_text(json.dumps({"data": data}))
        typed = [
            "--weights",
            str(place / "run"),
            "--stream.url",
            str(place / "clips"),
            "--clips",
            str(tmp_path / "list.json"),
        ]
        assert cli.main(["eval", *typed]) in (1, 2)
        assert message in capsys.readouterr().err


def test_similarity_as_trained_is_that_of_training(place):
    """What the objective compares, for the draws of the same seed, epoch and clips."""
    pairs, model = clips(range(6)), model_of(place)
    batch = Clips(0, torch.arange(6), pairs.frames, pairs.waveform, pairs.lengths, torch.ones(6, dtype=torch.bool))
    with torch.no_grad():
        z_a, aug_a, z_v, aug_v, *_ = model(*make_views(CONFIG, batch))
        found = similarities(model, CONFIG, batch, CONFIG.seed, torch.autocast("cpu", enabled=False))
    for side, z, aug in (("audio", z_a, aug_a), ("image", z_v, aug_v)):
        column = columns().index((side, "as trained", "similarity"))
        assert torch.allclose(found[:, column], torch.cosine_similarity(z, aug).double(), atol=1e-5)


@pytest.mark.slow
def test_kinds_and_strengths_are_told_apart(place, tmp_path):
    said, table = evaluate(place, tmp_path / "one", "similarity", "--batch", "8", "--strengths", "1", "2")
    kinds = ["as trained", "crop", "jitter", "blur"]
    assert list(said["image"]) == [*kinds, "flip", "gray", *(f"{kind}, x2" for kind in kinds)]
    sounds = [*kinds, "flip", "mask and shift", *(f"{kind}, x2" for kind in (*kinds, "mask and shift"))]
    assert list(said["audio"]) == sounds
    flips = said["image"]["flip"]
    assert flips["sensitivity"] != 0  # against not flipping
    assert said["image"]["crop"]["sensitivity"] != 0
    assert said["image"]["jitter"] != said["image"]["jitter, x2"]
    assert table.count("± ") > 30
    shared, _ = evaluate(place, tmp_path / "two", "similarity", "--batch", "8", "--strengths", "1", "2", W=2)
    assert shared == said


def test_strengths_widen_what_is_drawn():
    from equiav.augment import AudioVectors, ImageVectors
    from equiav.evaluate.sides import stronger

    for kind in (AudioVectors, ImageVectors):
        of = kind(CONFIG.model, CONFIG.augment)
        assert stronger(CONFIG.augment, 1, of) == CONFIG.augment
        for strength in (0.1, 0.5, 1.5, 2, 10):
            other = of.drawing(stronger(CONFIG.augment, strength, of))
            t = other.draw(0, 0, torch.arange(400), Purpose.VIEW_IMAGE)[:, 0]
            assert of.encode(of.decode(t)).allclose(t)  # the same scale: what a model was trained to read
            p = of.decode(t)
            shares = p["width"] * p["height"] / (64 * 64 if kind is ImageVectors else of.frames * of.mels)
            assert shares.max() <= 1.03
            assert shares.min() == pytest.approx(max(0.01, 1 - 0.92 * strength), abs=0.03)
            assert p["sigma"].max() <= 2 * strength
            assert p["brightness"].abs().max() <= min(0.99, 0.4 * strength)


@pytest.mark.slow
def test_the_centroid_comes_nearer_as_it_grows(place, tmp_path):
    """Of encoded views that is arithmetic: their mean's distance falls as 1 / S."""
    said, table = evaluate(place, tmp_path / "one", "centroid", "--batch", "8", "--views", "24")
    for side in ("audio", "image"):
        encoded = [row["encoded views"] for row in said[side]["S"].values()]
        assert encoded[0] > encoded[1] > encoded[2] > encoded[4]
        assert encoded[0] / encoded[3] == pytest.approx(8, rel=0.5)
        assert set(said[side]["not trained on"]) == {
            "ranges x1.5",
            "ranges x2",
            "noise" if side == "audio" else "rotation",
        }
        assert all(math.isfinite(row["centroid"]) for row in said[side]["S"].values())
    assert table.count("\n| audio, ") == 5
    shared, _ = evaluate(place, tmp_path / "two", "centroid", "--batch", "8", "--views", "24", W=2)
    assert shared == said


def test_a_perfect_predictor_is_at_the_true_mean(monkeypatch):
    """Where every prediction is the mean of all views itself, nothing is left between them but what the views leave uncertain."""
    pairs, views = clips(range(12)), 16
    model = EquiAV(CONFIG.model, CONFIG.objective)
    model.init_weights(5)
    batch = Clips(0, torch.arange(12), *pairs, torch.ones(12, dtype=torch.bool))
    off = torch.autocast("cpu", enabled=False)
    with torch.no_grad():
        for side in sides(model, CONFIG, batch):
            t, of = draws(side, "as trained", 1.0, SEED, batch.samples, views)
            seen = [centroid._encoded(side, side.augmented(one, of), off).float() for one in t.unbind(1)]
            mean = torch.stack(seen).mean(dim=0)
            monkeypatch.setattr(
                side.branch.predictor, "forward", lambda h, t, mean=mean: mean[:, None].expand(-1, t.shape[1], -1)
            )
    values = centroid.distances(model, CONFIG, batch, views, off).numpy()
    for side in centroid.split(values).values():
        assert side.centroid.max() < 1e-9
        assert side.encoded[:, 0].min() > 1e-6
        assert side.unsure.min() > 0
    for said in centroid.summary(values).values():
        assert all(-0.5 < row["centroid"] < 1e-6 for row in said["S"].values())  # less what is uncertain of the mean


def test_distances_are_shares_of_the_variance_of_that_mean():
    """One direction, by hand: three clips; trained means at 0, 1, 2, those of stronger views twice as far apart."""
    n, S = 3, len(centroid.SIZES)
    half = np.zeros((n, 2 * S + 2 + 12 + 4))
    half[:, :S] = 1.0  # the centroid's squared distances
    half[:, 2 * S + 1] = 0.25  # uncertain
    half[:, 2 * S + 2 : 2 * S + 6] = [4.0, 2.0, 8.0, 0.0]  # stronger: centroid, of such vectors, original, uncertain
    half[:, -4:] = np.arange(3.0)[:, None] * [1, 2, 1, 1]
    said = centroid.summary(np.concatenate([half, half], axis=1))["audio"]
    assert said["S"]["1"]["centroid"] == pytest.approx((1 - 0.25) / (2 / 3))
    assert said["not trained on"]["ranges x1.5"]["centroid"] == pytest.approx(4 / (8 / 3))
    assert said["not trained on"]["ranges x1.5"]["original"] == pytest.approx(8 / (8 / 3))
    half[:, -4:] = 1.0
    with pytest.raises(DatasetError, match="all alike to this model"):
        centroid.summary(np.concatenate([half, half], axis=1))


def test_a_heat_map_adds_up_to_the_score(place):
    """What all patches add is what the picture's score is above that of its mean colour."""
    model, pairs = model_of(place), clips(range(6))
    image = original_image(pairs.frames, CONFIG.model.image_size)
    one = torch.zeros(1, dtype=torch.int64)
    _, t = sampled_vectors(CONFIG, 0, 0, one, 4)
    sound = torch.randn(6, CONFIG.model.head_width, generator=torch.Generator().manual_seed(0))
    maps = localize.heat(model, image, sound, t)
    gray = image.mean(dim=(2, 3), keepdim=True).expand_as(image)
    with torch.no_grad():
        above = ((model.embed_image(image, t) - model.embed_image(gray, t)) * sound).sum(dim=1)
    assert maps.shape == (6, *CONFIG.model.image_grid)
    assert torch.allclose(maps.sum(dim=(1, 2)), above, atol=0.03 * above.abs().max().item())


def test_pointing_is_that_of_the_masks(tmp_path):
    masks = np.zeros((4, 64, 64), bool)
    masks[:, 8:16, 40:48] = True
    maps = np.zeros((4, 8, 8))
    maps[:, 1, 5] = 1
    assert localize.pointing(maps, masks).right == 1
    maps[2:] = 0
    maps[2:, 7, 0] = 1
    assert localize.pointing(maps, masks).right == 0.5
    objects = np.zeros((4, 8, 8))
    objects[:, 1, 5] = [1, 1, 1, -1]
    one = localize.said_of(maps[:1], objects[:1], masks[:1], np.array([True]))
    assert one["all"]["heat map"] == {"pointing": 1.0, "error": None}
    assert "| heat map | 100.0 | 100.0 |" in localize.table(one, 1)
    said = localize.said_of(maps, objects, masks, np.array([True, True, False, False]))
    assert said["all"]["heat map"]["pointing"] == 0.5
    assert said["all"]["objectness"]["pointing"] == 0.75
    assert said["beside something silent"]["heat map"]["pointing"] == 1
    assert said["all"]["chance"]["pointing"] == pytest.approx(1 / 64)
    assert said["all"]["position only"]["pointing"] in (0, 1)


@pytest.mark.slow
def test_localization_of_the_synthetic_world(place, tmp_path, capsys):
    world = World(4, 64, 3, 2.56, rules=Rules(silent=0.5))
    encode = EncodeSynthetic(world, Shape(3, 64, 90, "wav", 30.0, False, DataConfig(silence=0.0)))
    items = [(f"synthetic-4-{k}", k) for k in range(30)]
    pack(items, encode, Store(str(tmp_path / "clips")), processes=0, part_items=10)
    common = ("--stream.url", tmp_path / "clips", "--world.silent", "0.5", "--examples", "3")
    said, table = evaluate(place, tmp_path / "one", "localize", *common, "--batch", "8")
    sounding = [world.masks(k)[1].any() for k in range(30)]
    assert said["all"]["clips"] == sum(sounding)
    beside = [bool(sounding[k] and (~world.there(k)[1]).any()) for k in range(30)]
    assert said["beside something silent"]["clips"] == sum(beside)
    assert "| objectness |" in table
    picture = Image.open(tmp_path / "one" / "localize.png")
    assert picture.width > 4 * 100
    assert evaluate(place, tmp_path / "two", "localize", *common, "--batch", "8", W=2) == (said, table)
    # The masks of another world would be numbers without a meaning.
    typed = ["eval", "localize", "--weights", str(place / "run"), "--stream.url", str(tmp_path / "clips"), "--out"]
    assert cli.main([*typed, str(tmp_path / "three")]) == 2
    assert "give --world.* as `equiav pack` had them" in capsys.readouterr().err


def test_clips_of_which_nobody_knows_what_sounds_have_maps_alone(place, tmp_path):
    said, table = evaluate(place, tmp_path / "one", "localize", "--examples", "2")
    assert "all" not in said
    assert "there are maps, and no numbers" in table
    assert (tmp_path / "one" / "localize.png").is_file()


def test_attention_is_the_predictors(place, tmp_path):
    said, table = evaluate(place, tmp_path / "one", "attention", "--batch", "8", "--examples", "2")
    for side, grid in (("audio", CONFIG.model.audio_grid), ("image", CONFIG.model.image_grid)):
        for kind, row in said[side].items():
            mean = np.array(row["mean map"])
            assert mean.shape == tuple(grid)
            assert mean.sum() == pytest.approx(1, abs=1e-3)
            assert 0 < row["looked at"] <= 1
            assert ("inside the crop" in row) == (kind in ("as trained", "crop"))
    assert "| audio | mask and shift |" in table
    assert evaluate(place, tmp_path / "two", "attention", "--batch", "8", "--examples", "2", W=2) == (said, table)


@pytest.mark.parametrize("kind", ["crop", "as trained"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_inside_a_crop_is_what_the_view_shows(kind, variant):
    """By the transformation itself: what a view does not depend on was not kept. As trained, spectrograms are rolled before."""
    config = from_dict(
        Config,
        {"model": {"size": "tiny", "depth": 1}, "augment": {"variant": variant, "blur_p": 0, "mask_p": 1}},
        "test",
    )
    config = replace(config, augment=replace(config.augment, max_mask_frames=0, max_mask_mels=0, jitter_p=0))
    model = EquiAV(config.model, config.objective)
    pairs = clips(range(6))
    batch = Clips(0, torch.arange(6), *pairs, torch.ones(6, dtype=torch.bool))
    side = sides(model, config, batch)[0]
    t, of = draws(side, kind, 1.0, 0, batch.samples, 4)
    kept = attention._kept(side, t, of).unflatten(-1, side.branch.encoder.grid)  # (6, 4, rows, columns)
    patch = config.model.audio_patch
    for k in range(4):
        given = torch.zeros(6, of.frames, of.mels, requires_grad=True)
        (seen,) = torch.autograd.grad(augment_spectrogram(given, t[:, k], of).sum(), given)
        shown = (seen != 0).double().transpose(1, 2)  # (6, mels, frames)
        share = torch.nn.functional.avg_pool2d(shown[:, None], patch)[:, 0]
        assert (share - kept[:, k]).abs().max() < 0.15, (kind, variant, k)  # a view's edges may weigh nothing


def test_examples_can_be_looked_at_and_listened_to(place, tmp_path):
    said, _ = evaluate(place, tmp_path / "one", "examples", "--examples", "4", "--batch", "8")
    assert [one["name"] for one in said["examples"]] == [f"a/clip-{k}" for k in (0, 12, 24, 36)]
    pairs = clips(range(COUNT))
    audio, image = embed_pairs(model_of(place), CONFIG, pairs, 0)
    similar = (audio.double() @ image.double().T).numpy()
    for one, k in zip(said["examples"], (0, 12, 24, 36), strict=True):
        assert one["score"] == pytest.approx(similar[k, k], abs=1e-5)
        assert one["place of the picture"] == 1 + (similar[k] > similar[k, k]).sum()
        assert one["place of the sound"] == 1 + (similar[:, k] > similar[k, k]).sum()
        assert [found["name"] for found in one["pictures found"]] == [
            f"a/clip-{n}" for n in np.argsort(-similar[k])[:3]
        ]
        assert [found["name"] for found in one["sounds found"]] == [
            f"a/clip-{n}" for n in np.argsort(-similar[:, k])[:3]
        ]
        wave, rate = soundfile.read(io.BytesIO(content(one["sound"])))
        assert (rate, len(wave) / rate) == (16000, pytest.approx(2.56, abs=0.2))
        frame = np.asarray(Image.open(io.BytesIO(content(one["picture"]))), float)
        assert np.abs(frame - pairs.frames[k].permute(1, 2, 0).numpy()).mean() < 8
        assert Image.open(io.BytesIO(content(one["heat"]))).mode == "RGBA"
    assert len(said["map"]["audio"]) == len(said["map"]["image"]) == len(said["map"]["names"]) == COUNT
    assert evaluate(place, tmp_path / "two", "examples", "--examples", "4", "--batch", "8", W=2)[0] == said


@pytest.mark.slow
def test_clips_that_cannot_be_decoded_cost_themselves_alone(place, tmp_path):
    """The first, which examples would show, among them."""
    world = World(4, 64, 3, 2.56)
    encode = EncodeSynthetic(world, Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    made = {k: encode(k) for k in range(6)}
    made[0] = made[0] | {f"{n}.jpg": b"no picture" for n in range(3)}
    pack([(f"synthetic-4-{k}", k) for k in range(6)], made.__getitem__, Store(str(tmp_path / "clips")), processes=0)
    for what in ("localize", "attention", "examples"):
        said, _ = evaluate(place, tmp_path / what, what, "--stream.url", tmp_path / "clips", "--examples", "1")
        assert said["clips"] == 5
        assert said["bad"] == {"image": 1}
        if what == "examples":
            assert [one["name"] for one in said["examples"]] == ["synthetic-4-1"]
        else:
            assert (tmp_path / what / f"{what}.png").is_file()


def content(address):
    return base64.b64decode(address.partition("base64,")[2])


@pytest.mark.slow
def test_predictors_that_were_not_trained_are_not_asked(tmp_path, place, capsys):
    config = from_dict(
        Config, {"model": {"size": "tiny", "depth": 1}, "objective": {"intra": "none", "inter_on": "original"}}, "test"
    )
    model = EquiAV(config.model, config.objective)
    model.init_weights(5)
    save_model(tmp_path / "model", model.state_dict(), config)
    typed = ["--weights", str(tmp_path / "model"), "--stream.url", str(place / "clips"), "--out", str(tmp_path / "out")]
    for what in ("similarity", "centroid", "attention"):
        assert cli.main(["eval", what, *typed]) == 2
        assert "its predictors know no augmentations" in capsys.readouterr().err
    for what in ("retrieval", "localize", "examples"):
        assert cli.main(["eval", what, *typed]) == 0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "weights is not set"),
        (["--weights", "RUN"], "stream.url is not set"),
        (["similar"], "what: found 'similar', expected one of retrieval, similarity, centroid"),
        (["--weights", "nowhere", "--stream.url", "CLIPS"], "weights is nowhere, expected a model folder"),
        (["--weights", "RUN", "--stream.url", "nowhere"], "nowhere holds no dataset"),
        (
            ["--weights", "RUN", "--stream.url", "CLIPS", "--clips", "no.json"],
            "clips is no.json, expected a list that exists",
        ),
        (["--weights", "RUN", "--stream.url", "CLIPS", "--frames", "0"], "frames is 0, expected 1 to 1000"),
    ],
)
def test_mistakes(place, capsys, typed, said):
    places = {"RUN": str(place / "run"), "CLIPS": str(place / "clips")}
    assert cli.main(["eval", *(places.get(word, word) for word in typed)]) in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "eval: " in line]
    assert said in lines[-1]
