"""`equiav.load`: what others' programs and the commands embed, score and predict do with files as they come."""

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import equiav
from equiav import cli
from equiav.api import BATCH, Embedder, Labeller
from equiav.config import ConfigError, ModelSettings, from_dict
from equiav.data.clips import BadClipError, central_square
from equiav.data.synthetic import World
from equiav.evaluate.retrieval import Pairs, embed_pairs
from equiav.model import EquiAV
from equiav.model.classifier import Classifier
from equiav.weights import save_model
from tests.forks import APART
from tests.videos import ramp, rotate, tones, write_video

SETTINGS = from_dict(
    ModelSettings, {"model": {"size": "tiny"}, "data": {"audio_mean": -10.3, "audio_std": 3.9}}, "test"
)
CLIPS = [World(3, 64, 3, 2.56).clip(k) for k in range(BATCH + 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = EquiAV(SETTINGS.model, SETTINGS.objective)
    model.init_weights(1)
    out = tmp_path_factory.mktemp("api") / "run"
    save_model(out / "model", model.state_dict(), SETTINGS)
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    def of(modality):
        model = Classifier(SETTINGS.model, 3, modality != "image", modality != "audio")
        model.init_weights(2)
        out = tmp_path_factory.mktemp("tuned") / "model"
        save_model(out, model.state_dict(), SETTINGS)
        (out / "classes.json").write_text(json.dumps({"classes": ["a", "b", "c"], "modality": modality, "loss": "one"}))
        return out

    return of


def test_they_are_those_of_the_evaluation_whatever_the_batch(folder):
    model = equiav.load(folder)
    assert isinstance(model, Embedder)
    frames = torch.from_numpy(np.stack([clip.frames[1] for clip in CLIPS])).permute(0, 3, 1, 2)
    waveform = torch.from_numpy(np.stack([clip.audio for clip in CLIPS]))
    lengths = torch.full((len(CLIPS),), waveform.shape[1])
    audio, image = embed_pairs(model.network, SETTINGS, Pairs(frames, waveform, lengths), seed=0)
    together = model.embed_audio([clip.audio for clip in CLIPS], 16000), model.embed_image([c.frames[1] for c in CLIPS])
    assert np.abs(together[0] - audio.numpy()).max() < 1e-5
    assert np.abs(together[1] - image.numpy()).max() < 1e-5
    for k in (0, 5):
        assert np.abs(model.embed_audio(CLIPS[k].audio, 16000) - together[0][k]).max() < 1e-5
        assert np.abs(model.embed_image(CLIPS[k].frames[1]) - together[1][k]).max() < 1e-5
    score = model.score(CLIPS[2].audio, CLIPS[2].frames[1], 16000)
    assert score == pytest.approx(float(together[0][2] @ together[1][2]), abs=1e-5)


def test_as_users_of_open_clip_know_it(folder, tuned):
    model = equiav.load(folder, torch.device("cpu")).to("cpu:0")
    wave, frame = tones(2.56, 16000, [440])[0], np.ascontiguousarray(CLIPS[0].frames[0])
    pictures = torch.stack([model.preprocess(frame), model.preprocess(Image.fromarray(frame))])
    sounds = model.preprocess_audio(np.stack([wave, wave]), 16000)
    with torch.enable_grad():
        z_i, z_a = model.encode_image(pictures), model.encode_audio(sounds)
    assert z_i.requires_grad
    assert z_a.requires_grad
    assert np.abs(z_i.detach().numpy() - model.embed_image(frame)).max() < 1e-5
    assert np.abs(z_a.detach().numpy() - model.embed_audio(wave, 16000)).max() < 1e-5
    assert (model.dim, model.sample_rate) == (64, 16000)
    assert repr(model) == "Embedder(tiny, dim=64, hears 2.58 s at 16000 Hz, sees 64 x 64, on cpu:0)"
    score = model.score([wave, wave], [frame, frame], 16000)
    assert score.shape == (2,)
    assert abs(score[0] - model.score(wave, frame, 16000)) < 1e-5
    with pytest.raises(ConfigError, match="2 sounds and one picture, expected as many"):
        model.score([wave, wave], frame, 16000)
    for wrong in ("gpu", "mps", 3.5):
        with pytest.raises(ConfigError, match="device is"):
            model.to(wrong)
    assert dir(equiav) == ["__version__", "load"]
    assert (Path(equiav.__file__).parent / "py.typed").exists()
    assert np.abs(copy.deepcopy(model).embed_image(frame) - model.embed_image(frame)).max() == 0
    labeller = equiav.load(tuned("both"))
    assert repr(labeller) == "Labeller(tiny, 3 classes: a, b, c, on cpu)"
    assert labeller.features(wave, frame, 16000).shape[0] > 3
    named = labeller.predict([wave, wave], [frame, frame], 16000, top=2)
    assert [len(one) for one in named] == [2, 2]
    one = labeller.predict(wave, frame, 16000, top=2)
    assert [name for name, _ in named[0]] == [name for name, _ in one]
    assert abs(named[0][0][1] - one[0][1]) < 1e-5


def test_sounds_of_all_kinds(folder, tmp_path):
    model = equiav.load(folder)
    wave = tones(2.56, 16000, [440])[0]
    reference = model.embed_audio(wave, 16000)
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    soundfile.write(tmp_path / "float.wav", wave / 32767, 16000, subtype="FLOAT")
    same = [
        (wave.astype(np.float32) / 32767, 16000),
        (torch.from_numpy(wave.copy()), 16000),
        ((torch.from_numpy(np.stack([wave, wave])), 16000), None),  # as torchaudio gives it
        ((wave, 16000), None),
        ({"array": wave.astype(np.float64) / 32767, "sampling_rate": 16000, "path": None}, None),  # as datasets does
        ({"bytes": (tmp_path / "a.wav").read_bytes(), "path": "a.wav"}, None),
        ((tmp_path / "a.wav").read_bytes(), None),
        ((tmp_path / "a.wav").open("rb"), None),
        (f"file://{tmp_path / 'a.wav'}", None),
        (wave.astype(">i2"), 16000),
        (torch.from_numpy(wave / 32767).float().requires_grad_(), 16000),
        (str(tmp_path / "a.wav"), None),
        (str(tmp_path / "float.wav"), None),
        (tmp_path / "a.wav", None),
    ]
    for sound, rate in same:
        assert np.abs(model.embed_audio(sound, rate) - reference).max() < 1e-4
    stereo = np.stack([wave, wave])
    for given, channels in ((stereo, "first"), (stereo.T, "last")):
        assert np.abs(model.embed_audio(given, 16000, channels) - reference).max() < 1e-4
    batch = model.embed_audio(np.stack([wave, wave // 2, wave]), 16000)  # (B, L) are B sounds
    assert batch.shape == (3, 64)
    assert np.abs(batch[[0, 2]] - reference).max() < 1e-4
    assert np.abs(model.embed_audio(np.stack([stereo, stereo]), 16000, "first") - reference).max() < 1e-4
    half = (wave / wave.max()).astype(np.float16)  # up to 1, which has no place in 16 bits if it is scaled in these
    assert np.abs(model.embed_audio(half, 16000) - model.embed_audio(half.astype(np.float32), 16000)).max() == 0
    other = tones(2.56, 16000, [1000])[0]
    both = model.embed_audio((wave, other), 16000)
    assert np.abs(both - model.embed_audio([wave, other], 16000)).max() == 0
    assert both.shape == (2, 64)
    longer = np.concatenate([wave, wave])
    assert np.abs(model.embed_audio(longer, 16000) - model.embed_audio(longer[: model.length], 16000)).max() == 0
    for rate in (8000, 22050, 44100, 48000):
        assert model.embed_audio(tones(2.56, rate, [440])[0], rate) @ reference > 0.9  # an empty upper half is heard
    assert np.isfinite(model.embed_audio(np.zeros(16000, np.int16), 16000)).all()


@pytest.mark.parametrize(
    ("sound", "rate", "said"),
    [
        (np.zeros(16000, np.int16), None, "sound 0: its rate is None, expected samples a second"),
        (np.zeros(16000, np.int32), 16000, "sound 0: audio is int32, expected int16"),
        (np.zeros((2, 16000), bool), 16000, "sound 0: audio is bool, expected int16"),
        ((torch.zeros(64, 16000), 16000), None, "has 64 channels, expected 32 at most; several sounds are"),
        ([np.zeros((2, 16000), np.int16)], 16000, "has shape .2, 16000.; channels='first' or 'last' says which"),
        (np.zeros((2, 2, 2), np.int16), 16000, "has shape .2, 2, 2.; expected a file, bytes, samples"),
        (object(), 16000, "sound 0: is object, expected a file, bytes, samples .L,., .waveform, rate., or a dict"),
        ({"x": 1}, 16000, "sound 0: is a dict of x, expected a file, bytes"),
        (b"no sound", None, "sound 0: "),
        (
            (torch.stack([torch.ones(16000), -torch.ones(16000)]) * torch.linspace(-0.5, 0.5, 16000), 16000),
            None,
            "channels cancel",
        ),
        ((np.zeros(16000, np.int16), 16000), 8000, "its rate is 16000, and 8000 was given as well"),
        ("zz://a/b", None, "zz://a/b: cannot be read: ValueError: Protocol not known: zz"),
        (np.zeros(16000, np.int16), 22050.5, "its rate is 22050.5, expected samples a second"),
        (np.zeros(16000, np.int16), float("nan"), "its rate is nan, expected samples a second"),
        (np.zeros(16000, np.int16), "16000", "its rate is 16000, expected samples a second"),
        (np.zeros(16000, np.int16), 11127, "its rate is 11127, which 16000 has too little in common with"),
        (np.full(16000, np.nan, np.float32), 16000, "16000 values that are not finite"),
        (np.full(16000, 3.0, np.float32), 16000, "audio peaks at 3, expected floating point in"),
        (np.zeros(100, np.int16), 16000, "shorter than"),
        (np.zeros(0, np.int16), 16000, "has no audio"),
        ("nowhere.wav", None, "nowhere.wav"),
    ],
)
def test_sounds_that_are_none(folder, sound, rate, said):
    with pytest.raises(BadClipError, match=said):
        equiav.load(folder).embed_audio(sound, rate)


def test_pictures_of_all_kinds(folder, tmp_path):
    model = equiav.load(folder)
    frame = np.ascontiguousarray(CLIPS[0].frames[0])
    reference = model.embed_image(frame)
    upright = Image.fromarray(frame)
    turned = upright.rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "a.png")
    upright.convert("RGBA").save(tmp_path / "alpha.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-300])
    for picture in (upright, tmp_path / "a.png", str(tmp_path / "alpha.png"), tmp_path / "turned.png"):
        assert np.abs(model.embed_image(picture) - reference).max() < 1e-5
    blob = (tmp_path / "a.png").read_bytes()
    chw = torch.from_numpy(frame.transpose(2, 0, 1).copy())
    for picture in (blob, io.BytesIO(blob), {"bytes": blob, "path": None}, {"path": str(tmp_path / "a.png")}, chw,
                    f"file://{tmp_path / 'a.png'}", torch.from_numpy(frame)):  # fmt: skip
        assert np.abs(model.embed_image(picture) - reference).max() < 1e-5
    assert np.abs(model.embed_image(np.stack([frame, frame])) - reference).max() < 1e-5
    wide = np.concatenate([frame, frame[:, ::-1], frame], axis=1)
    assert np.abs(model.embed_image(wide) - model.embed_image(central_square(wide, 64))).max() < 1e-5
    assert model.embed_image(upright.convert("L")).shape == reference.shape
    for wrong, said in (
        (frame[..., 0], "expected .height, width, 3"),
        (frame / 255, "expected uint8"),
        ("no.png", "no.png"),
        (Image.fromarray(np.zeros((64, 64), np.float32)), "has mode F, expected 8 or 16 bits"),
        (tmp_path / "cut.png", "no picture: "),
    ):
        with pytest.raises(BadClipError, match=said):
            model.embed_image(wrong)
    with pytest.raises(ConfigError, match="nothing was given"):
        model.embed_image([])


def test_videos_in_parts(folder, tmp_path):
    model = equiav.load(folder)
    path = write_video(tmp_path / "a.mp4", seconds=8.5, size=(64, 64), pitches=(300, 300))
    found = model.embed_video(path)
    assert found.begin.tolist() == [0.0, 2.56, 5.12]  # what is left is shorter than half a part
    assert found.audio.shape == found.image.shape == (3, 64)
    assert np.abs(np.linalg.norm(found.image, axis=1) - 1).max() < 1e-5
    assert found.image[0] @ found.image[2] < 0.99999  # it grows brighter
    several = model.embed_video(path, frames=3)
    assert np.abs(several.audio - found.audio).max() < 1e-6
    assert np.abs(several.image - found.image).max() > 0
    short = model.embed_video(write_video(tmp_path / "b.mp4", seconds=2.0, size=(64, 64)))
    assert (len(short.begin), round(short.end[0])) == (1, 2)


@pytest.mark.parametrize(
    "kind",
    [
        {"fps": 7},
        {"sound": None},
        {"rate": 8000, "sound": "pcm_s16le", "name": "a.mov"},
        {"pitches": (300,) * 6, "rate": 48000},
        {"video": None},
        {"times": [0, 0.1, 0.5, 0.6, 1.3, 1.9, 2.4]},
    ],
    ids=["odd frame rate", "no sound", "8 kHz", "5.1", "no picture", "frames as they come"],
)
def test_videos_of_all_kinds(folder, tmp_path, kind):
    name = kind.pop("name", "a.mp4")
    found = equiav.load(folder).embed_video(write_video(tmp_path / name, seconds=2.5, size=(64, 64), **kind))
    assert (found.audio is None) == ("sound" in kind and kind["sound"] is None)
    assert (found.image is None) == ("video" in kind)
    assert all(np.isfinite(x).all() for x in (found.audio, found.image) if x is not None)


def test_a_video_that_lies_on_its_side(folder, tmp_path):
    model = equiav.load(folder)

    def picture(share, size):
        frame = ramp(share, size)
        frame[: size[1] // 2] = (200, 0, 0)
        return frame

    upright = write_video(tmp_path / "a.mp4", seconds=2.0, size=(64, 64), picture=picture)
    lies = write_video(
        tmp_path / "b.mp4", seconds=2.0, size=(64, 64), picture=lambda s, size: np.rot90(picture(s, size)).copy()
    )
    rotate(lies, (0, 1, -1, 0))
    one, other = model.embed_video(upright).image, model.embed_video(lies).image
    assert (one * other).sum() > 0.998  # a codec makes something else of it


def test_a_recording_that_does_not_say_how_long_it_is(folder, tmp_path):
    """Of sound alone, as a browser writes it."""
    import av

    with av.open(str(tmp_path / "a.webm"), "w", options={"live": "1"}) as file:
        stream = file.add_stream("libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tones(7.7, 48000, [440])[:1].copy(), format="s16", layout="mono")
        frame.sample_rate = 48000
        for one in (frame, None):
            file.mux(stream.encode(one))
    assert len(equiav.load(folder).embed_video(tmp_path / "a.webm").begin) == 3


def test_a_record_with_its_cover_has_no_picture(folder, tmp_path):
    import av
    from av.stream import Disposition

    with av.open(str(tmp_path / "a.mp3"), "w") as file:
        stream = file.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = file.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(tones(6.0, 44100, [440])[:1].copy(), format="s16", layout="mono")
        frame.sample_rate = 44100
        file.mux(cover.encode(av.VideoFrame.from_ndarray(CLIPS[0].frames[0].copy(), format="rgb24")))
        for one in (frame, None):
            file.mux(stream.encode(one))
    found = equiav.load(folder).embed_video(tmp_path / "a.mp3")
    assert found.image is None
    assert len(found.audio) == 2


def test_what_a_model_does_not_use_may_be_short(tuned, tmp_path):
    path = write_video(tmp_path / "a.mp4", seconds=8.5, size=(64, 64), audio=tones(4.0, 44100, [440, 440]))
    assert len(equiav.load(tuned("image")).predict_video(path)) == 3


@pytest.mark.parametrize("shorter", ["sound", "picture"])
def test_a_video_ends_where_its_sound_or_its_picture_does(folder, tmp_path, shorter):
    """What was embedded before is not lost."""
    picture, sound = (9, 4) if shorter == "sound" else (4, 9)
    both = write_video(tmp_path / "both.mp4", seconds=picture, audio=tones(sound, 44100, [440, 1000]))
    found = equiav.load(folder).embed_video(both)
    assert 1 <= len(found.begin) <= 2
    assert np.isfinite(found.audio).all()
    assert np.isfinite(found.image).all()


def test_one_file_that_cannot_be_read_does_not_cost_the_others(folder, tmp_path, capsys):
    good = str(write_video(tmp_path / "a.mp4", seconds=2.0))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    bad, out = str(tmp_path / "b.mp4"), tmp_path / "x.npz"
    assert cli.main(["embed", bad, good, "--weights", str(folder), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "1 of 2 files could not be embedded" in said.err
    assert bad in said.out
    assert np.load(out)["name"].tolist() == [good]
    out.unlink()
    assert cli.main(["embed", bad, "--weights", str(folder), "--out", str(out)]) == 2
    assert "none of 1 file(s) could be embedded" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(ConfigError, match="is a Path, which takes a slash from an address"):
        equiav.load(Path("s3://bucket/run"))


@pytest.mark.slow
def test_what_sounds(folder, tmp_path, capsys):
    model = equiav.load(folder)
    rng = np.random.default_rng(0)
    waves = [(3000 * rng.standard_normal(40_000)).astype(np.int16) for _ in range(3)]
    frames = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(20)]
    one = model.localize(waves[0], frames[0], 16000)
    assert one.shape == model.settings.model.image_grid
    many = model.localize(waves[0], frames, 16000)  # more than a batch
    assert np.allclose(many[0], one, atol=1e-6)
    both = model.localize([waves[0], waves[1]], frames[:2], 16000)
    assert np.allclose(both[0], one, atol=1e-6)
    others = model.embed_audio(waves[1:], 16000)
    beside = model.localize(waves[0], frames[0], 16000, others)
    alone = [model.localize(wave, frames[0], 16000) for wave in waves]
    assert np.allclose(beside, alone[0] - (alone[1] + alone[2]) / 2, atol=1e-5)  # it is linear in the sound
    with pytest.raises(ConfigError, match="2 sounds and 3 pictures, expected one sound, or as many"):
        model.localize(waves[:2], frames[:3], 16000)

    write_video(tmp_path / "long.mp4", seconds=6)
    typed = ["localize", str(tmp_path / "long.mp4"), "--weights", str(folder), "--out"]
    for k, seconds in enumerate((0.4, 1.2, 2.0, 4.4, 7.0, 9.0)):  # with a last part of any length
        write_video(tmp_path / "other.mp4", seconds=seconds, rate=8000)
        film = tmp_path / f"other{k}.mp4"
        more = ("--fps", "29.97") if k == 2 else ()
        assert (
            cli.main(["localize", str(tmp_path / "other.mp4"), "--weights", str(folder), "--out", str(film), *more])
            == 0
        )
        with av.open(str(film)) as file:
            times = [frame.time for frame in file.decode(video=0)]
        assert len(times) == pytest.approx((29.97 if more else 5) * seconds, abs=5 * 1.3 + 1)
        assert np.diff(times).min(initial=1) > 0.5 / (29.97 if more else 5)
    assert cli.main([*typed, str(tmp_path / "heat.mp4"), "--fps", "4"]) == 0
    with av.open(str(tmp_path / "heat.mp4")) as file:
        pictures = list(file.decode(video=0))
        seconds = sum(frame.samples for frame in av.open(str(tmp_path / "heat.mp4")).decode(audio=0)) / 48000
    assert seconds == pytest.approx(6, abs=1.3)  # a rest of less than half of what the model hears is left out
    assert 4 * 4 < len(pictures) < 4 * 8
    assert pictures[-1].time == pytest.approx(seconds, abs=0.5)
    assert (pictures[0].width, pictures[0].height) == (256, 256)
    assert (
        cli.main(["embed", str(tmp_path / "long.mp4"), "--weights", str(folder), "--out", str(tmp_path / "o.npz")]) == 0
    )
    assert cli.main([*typed, str(tmp_path / "heat.png"), "--others", str(tmp_path / "o.npz")]) == 0
    assert Image.open(tmp_path / "heat.png").height > 2 * 256
    capsys.readouterr()
    write_video(tmp_path / "silent.mp4", sound=None)
    (tmp_path / "text.npz").write_text("x")
    for more, said in (
        ([], "file is not given, expected a video with sound"),
        ([str(tmp_path / "silent.mp4"), "--out", str(tmp_path / "a.mp4")], "has no sound"),
        ([str(tmp_path / "long.mp4"), "--out", str(tmp_path / "a.txt")], "expected a name that ends in .mp4 or .png"),
        ([str(tmp_path / "long.mp4"), "--out", str(tmp_path / "long.mp4")], "expected another file than it reads"),
        ([str(tmp_path / "long.mp4"), "--others", str(tmp_path / "text.npz")], "holds no embeddings"),
    ):
        assert cli.main(["localize", *more, "--weights", str(folder)]) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not list(tmp_path.glob(".*"))  # what was begun
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"classes": "abc"}, {"classes": ["a", "a", "b"]}, {"loss": "onee"}, {"modality": None}, {"classes": [1, 2, 3]}],
)
def test_classes_that_are_none(tuned, wrong):
    path = tuned("both")
    said = json.loads((path / "classes.json").read_text())
    (path / "classes.json").write_text(json.dumps(said | wrong))
    with pytest.raises(ConfigError, match="does not say the classes of a fine-tuned model"):
        equiav.load(path)


def test_what_a_run_on_a_cluster_has_left(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "model", tmp_path / "run" / "checkpoints" / "model")
    assert isinstance(equiav.load(tmp_path / "run"), Embedder)


def test_what_is_no_video(folder, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing of the kind")
    with pytest.raises(BadClipError, match=r"a\.mp4: cannot be read"):
        equiav.load(folder).embed_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("modality", ["audio", "image", "both"])
def test_a_fine_tuned_model_names_classes(tuned, tmp_path, modality):
    model = equiav.load(tuned(modality))
    assert isinstance(model, Labeller)
    sounds = [clip.audio for clip in CLIPS] if modality != "image" else None
    pictures = [clip.frames[0] for clip in CLIPS] if modality != "audio" else None
    found = model.probabilities(sounds, pictures, 16000)
    assert found.shape == (len(CLIPS), 3)
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-6
    said = model.predict(sounds and sounds[4], pictures and pictures[4], 16000, top=2)
    assert [label for label, _ in said] == ["abc"[k] for k in np.argsort(-found[4])[:2]]
    assert said[0][1] == pytest.approx(found[4].max(), abs=1e-5)
    path = write_video(tmp_path / "a.mp4", seconds=6.0, size=(64, 64))
    assert sum(probability for _, probability in model.predict_video(path, frames=2)) == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"needs one|was trained without"):
        model.predict(None if sounds else CLIPS[0].audio, CLIPS[0].frames[0] if modality != "image" else None, 16000)


def test_the_commands(folder, tuned, tmp_path, capsys):
    both = str(write_video(tmp_path / "a.mp4", seconds=6.0, size=(64, 64)))
    mute = str(write_video(tmp_path / "b.mp4", seconds=2.0, size=(64, 64), sound=None))
    out = tmp_path / "x.npz"
    assert cli.main(["embed", both, mute, "--weights", str(folder), "--out", str(out)]) == 0
    with np.load(out) as kept:
        assert kept["name"].tolist() == [both, both, mute]
        assert np.isfinite(kept["image"]).all()
        assert np.isnan(kept["audio"]).all(axis=1).tolist() == [False, False, True]
    assert "without sound" in capsys.readouterr().out
    assert cli.main(["score", both, "--weights", str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.main(["predict", both, "--weights", str(tuned("both")), "--top", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"{both}: ")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["score", "MUTE", "--weights", "MODEL"], "has no sound, and a score needs both"),
        (["predict", "MUTE", "--weights", "TUNED"], "has no sound, which this model needs"),
        (["predict", "MUTE", "--weights", "MODEL"], "knows no classes; `equiav finetune` teaches it some"),
        (["embed", "MUTE", "--weights", "TUNED"], "was fine-tuned and has no embeddings to compare"),
        (
            ["embed", "nowhere.mp4", "--weights", "MODEL"],
            "files is nowhere.mp4, expected a file or a folder that exists",
        ),
        (["embed", "MUTE"], "weights is not set"),
        (["embed", "--weights", "MODEL"], "files is not given"),
        (["embed", "MUTE", "--weights", "nowhere"], "weights is nowhere, expected a model folder"),
        (["embed", "MUTE", "--weights", "MODEL", "--out", "no/x.npz"], "out is no/x.npz, expected a file in a folder"),
    ],
)
def test_mistakes(folder, tuned, tmp_path, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(tmp_path)
    mute = write_video(tmp_path / "b.mp4", seconds=2.0, size=(64, 64), sound=None)
    places = {"MUTE": str(mute), "MODEL": str(folder), "TUNED": str(tuned("both"))}
    assert cli.main([places.get(word, word) for word in typed]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_without_what_training_needs(folder, tmp_path):
    """Where only the bare package is installed: no PyAV, no matplotlib, no TorchX; nothing distributed is started."""
    soundfile.write(tmp_path / "a.wav", tones(2.0, 16000, [440])[0], 16000)
    Image.fromarray(CLIPS[0].frames[0]).save(tmp_path / "a.png")
    program = f"""
import sys
for name in ("av", "matplotlib", "torchx", "kubernetes", "sklearn", "onnx", "onnxscript", "onnxruntime", "rclone"):
    sys.modules[name] = None
import equiav
assert "torch" not in sys.modules
model = equiav.load({str(folder)!r})
assert model.embed_audio({str(tmp_path / "a.wav")!r}).shape == (64,)
assert model.embed_image({str(tmp_path / "a.png")!r}).shape == (64,)
import torch
assert not torch.distributed.is_initialized()
assert not any(name.startswith(("equiav.train", "equiav.tasks", "equiav.commands", "monitoring")) for name in sys.modules)
try:
    model.embed_video({str(tmp_path / "a.wav")!r})
except Exception as error:
    assert "equiav[prep]" in str(error), error
else:
    raise SystemExit("read without av")
from equiav import cli
import io
from contextlib import redirect_stderr
for typed, extra in (
    (["embed", {str(tmp_path / "a.wav")!r}, "--weights", {str(folder)!r}], "prep"),
    (["localize", {str(tmp_path / "a.wav")!r}, "--weights", {str(folder)!r}], "prep"),
    (["export", "--weights", {str(folder)!r}, "--out", {str(tmp_path / "out")!r}], "export"),
):
    with redirect_stderr(io.StringIO()) as said:
        assert cli.main(typed) == 2, typed
    assert f"equiav[{{extra}}]" in said.getvalue(), said.getvalue()
    assert "Traceback" not in said.getvalue()
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **APART})
