"""A folder as people have them: what becomes of each file, by `equiav pack`, `verify`, `show`, and a run of some steps."""

import io
import json
import os
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from equiav import cli
from equiav.commands.pack import stamp
from equiav.config import DataConfig
from equiav.data.clips import decode_frame, decode_wav
from streaming import Dataset, Store
from tests.commands.test_pack import read_plainly, reasons
from tests.videos import pause, peaks, photo, rotate, shown_from, time_of, tones, write_video

SECONDS = 4.0
QUARTER = (0, 1, -1, 0)  # turns a picture by 90 degrees
UNEVEN = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, 200))
UNEVEN = [0.0, *UNEVEN[UNEVEN < SECONDS]]


def cut_to(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


# name -> how it is written, and (height, width) of what is packed at a short side of 32
GOOD = {
    "h264.mp4": ({"video": "libx264"}, (32, 48)),
    "hevc.mkv": ({"video": "libx265"}, (32, 48)),
    "vp9.webm": ({"video": "libvpx-vp9", "sound": "libopus", "rate": 48000}, (32, 48)),
    "mjpeg.avi": ({"video": "mjpeg", "sound": "pcm_s16le", "format": "yuvj420p"}, (32, 48)),
    "mpeg2.ts": ({"video": "mpeg2video", "sound": "mp2", "clock": 25}, (32, 48)),
    "windows.wmv": ({"video": "wmv2", "sound": "wmav2"}, (32, 48)),
    "mpeg4.avi": ({"video": "mpeg4", "sound": "libmp3lame"}, (32, 48)),
    "lossless.mkv": ({"video": "libx264", "sound": "flac"}, (32, 48)),
    "vertical.mp4": ({"video": "libx264", "size": (64, 96)}, (48, 32)),
    "rotated.mp4": ({"video": "libx264", "then": lambda path: rotate(path, QUARTER)}, (48, 32)),
    "anamorphic.mp4": ({"video": "libx264", "aspect": Fraction(2)}, (32, 96)),
    "variable rate.mp4": ({"video": "libx264", "times": UNEVEN}, (32, 48)),
    "surround.mkv": ({"video": "libx264", "sound": "ac3", "rate": 48000, "pitches": (440, 1000) * 3}, (32, 48)),
    "telephone.mkv": ({"video": "libx264", "sound": "pcm_s16le", "rate": 8000}, (32, 48)),
    "loud and late.mp4": ({"video": "libx264", "late": 0.5}, (32, 48)),
    "a/clip.mp4": ({"video": "libx264"}, (32, 48)),
    "b/clip.mp4": ({"video": "libx264"}, (32, 48)),
    "same.mp4": ({"video": "libx264"}, (32, 48)),
    "same.mkv": ({"video": "libx264"}, (32, 48)),
    "dotted.name.v2.mp4": ({"video": "libx264"}, (32, 48)),
    "SHOUTED.MP4": ({"video": "libx264"}, (32, 48)),
    "ünïcode 猫 [bold].mp4": ({"video": "libx264"}, (32, 48)),
    "new\nline.mp4": ({"video": "libx264"}, (32, 48)),
    "12:30.mp4": ({"video": "libx264"}, (32, 48)),
    os.fsdecode(b"caf\xe9.mp4"): ({"video": "libx264"}, (32, 48)),
    "-dash.mp4": ({"video": "libx264"}, (32, 48)),
}
# name -> how it is written, and the reason for which it is rejected
BAD = {
    "cut.mp4": ({"video": "libx264", "then": cut_to(0.5)}, "corrupt"),
    "empty.mp4": ({"then": cut_to(0)}, "corrupt"),
    "renamed.mp4": ({"then": lambda path: path.write_text("notes of mine")}, "corrupt"),
    "frozen.mp4": ({"video": "libx264", "picture": photo, "size": (320, 192), "bit_rate": 60_000}, "frozen"),
    "mute.mp4": ({"sound": None}, "no sound"),
    "dark.mp4": ({"video": None}, "no picture"),
    "silent.mp4": ({"loudness": 0.0}, "silent"),
    "short.mp4": ({"seconds": 0.4}, "too short"),
    "line.mp4": ({"video": "libx264", "size": (600, 2)}, "odd shape"),
    "pause.mkv": ({"video": "libx264", "then": lambda path: pause(path, 2.0, 5e6)}, "clock jumps"),
    "long.mp4": ({"seconds": 31.0, "fps": 2}, "too long"),
    "little sound.mp4": ({"seconds": 12.0, "audio": tones(3.0, 44100, (440,))}, "lengths differ"),
}
OTHER = {
    "notes.txt": "its name ends in .txt",
    "no ending": "its name has no ending",
    "song.mp3": "its name ends in .mp3",
    "linked": "a linked folder",
    "pipe.mp4": "it is no file",
}
KEYS = {
    os.fsdecode(b"caf\xe9.mp4"): "caf_e9",
    "same.mp4": "same_mp4",
    "same.mkv": "same_mkv",
    "dotted.name.v2.mp4": "dotted_name_v2",
}


def key_of(name):
    return KEYS.get(name, name.rpartition(".")[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, (how, _) in {**GOOD, **BAD}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        settings = {"seconds": SECONDS, "fps": 25, **{k: v for k, v in how.items() if k != "then"}}
        write_video(folder / name, **settings)
        how.get("then", lambda path: None)(folder / name)
    for name in OTHER:
        if name == "linked":
            (folder / name).symlink_to(folder / "a")
        elif name == "pipe.mp4":
            os.mkfifo(folder / name)
        else:
            (folder / name).write_text("something else")
    return folder


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "clips"
    arguments = ["--short_side", "32", "--shard_samples", "7"]
    assert cli.main(["pack", str(folder), "--to", str(out), *arguments]) == 0
    return out


def test_whatever_is_there_is_packed_or_named(packed, folder):
    assert sorted(read_plainly(packed)) == sorted(map(key_of, GOOD))
    assert reasons(packed) == {key_of(name): reason for name, (_, reason) in BAD.items()}
    listed = [json.loads(line) for line in (packed / "passed-over.jsonl").read_text().splitlines()]
    assert {os.path.relpath(one["path"], folder): one["why"] for one in listed} == OTHER
    assert " 0x" not in (packed / "rejected.jsonl").read_text()


@pytest.mark.parametrize("name", GOOD)
def test_a_good_one_is_upright_in_time_and_in_tune(packed, name):
    _, size = GOOD[name]
    members = read_plainly(packed)[key_of(name)]
    frames = [decode_frame(members[f"{k}.jpg"], name) for k in range(10)]
    assert {frame.shape[:2] for frame in frames} == {size}
    times = np.array([time_of(frame) for frame in frames])
    assert np.abs(times - (np.arange(10) + 0.5) / 10).max() < 0.06
    audio = decode_wav(members["wav"], name, DataConfig())
    assert abs(len(audio) / 16000 - SECONDS) < 0.1  # what picture and sound share
    assert np.allclose(peaks(audio, 16000, 2), [440, 1000], atol=2)
    about = json.loads(members["json"])
    assert about["source"] == os.path.basename(name)


@pytest.mark.parametrize("ending", ["mp4", "mov"])
@pytest.mark.parametrize("at", [2.0, 5.3])
def test_of_a_video_that_was_cut_without_encoding_what_is_shown_is_packed(tmp_path, ending, at):
    path = write_video(tmp_path / f"cut.{ending}", seconds=10.0, fps=25, video="libx264", pitches=(440,))
    shown_from(path, at)
    assert cli.main(["pack", str(tmp_path), "--to", str(tmp_path / "out"), "--short_side", "32"]) == 0
    members = read_plainly(tmp_path / "out")["cut"]
    times = np.array([10 * time_of(decode_frame(members[f"{k}.jpg"], "cut")) for k in range(10)])
    assert np.abs(times - (at + (np.arange(10) + 0.5) * (10 - at) / 10)).max() < 0.15
    said = json.loads(members["json"])["frame_seconds"]
    assert np.abs(np.array(said) + at - times).max() < 0.15


def test_a_list_in_the_folder_where_one_stands(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "list.txt").write_text("12:30.mp4\n")
    (folder / "list.txt").write_text("12:30.mp4\n")
    assert cli.main(["pack", "list.txt", "--to", str(tmp_path / "out"), "--short_side", "32"]) == 0
    (folder / "list.txt").unlink()
    assert list(read_plainly(tmp_path / "out")) == ["12:30"]


def test_an_entry_of_a_list_is_another_when_any_of_its_files_is(tmp_path):
    entry = {"video_id": "a", "wav": str(tmp_path / "a.wav"), "video_path": str(tmp_path), "labels": ""}
    stamps = [stamp(entry, 2)]
    for name in ("a.wav", "frame_0/a.jpg", "frame_1/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        stamps.append(stamp(entry, 2))
    assert len(set(stamps)) == 4
    assert stamp(17, 2) == ""


def test_what_was_packed_is_whole_and_can_be_used(packed, capsys):
    assert cli.main(["verify", str(packed)]) == 0
    assert f"training can use all of the {len(GOOD)} samples" in capsys.readouterr().out
    assert len(Dataset(Store(str(packed)))) > 1


def test_each_can_be_looked_at(packed, tmp_path, capsys):
    assert cli.main(["show", str(packed), "--png", str(tmp_path / "all.png")]) == 0
    told = capsys.readouterr().out
    assert f"{len(GOOD)} clips in" in told
    assert "rejected when it was packed (rejected.jsonl names each): corrupt 3, " in told
    assert "passed over when it was packed (passed-over.jsonl names each): " in told
    assert "\\n" not in told or "new\\nline" in told
    for name in ("new\nline.mp4", "ünïcode 猫 [bold].mp4"):
        assert (
            cli.main(["show", str(packed), key_of(name), "--config", "smoke", "--png", str(tmp_path / "one.png")]) == 0
        )
        assert f"{key_of(name)}".replace("\n", "\\n") in capsys.readouterr().out


def test_a_mended_file_is_packed_the_next_time(folder, packed, tmp_path, capsys):
    """Into another folder: a dataset that is finished stays as it is."""
    again = ["pack", str(folder), "--short_side", "32", "--shard_samples", "7"]
    assert cli.main([*again, "--to", str(packed)]) == 0
    assert "it was finished before, nothing was done" in capsys.readouterr().out
    write_video(folder / "empty.mp4", seconds=SECONDS, video="libx264")
    assert cli.main([*again, "--to", str(packed)]) == 1
    assert "or of files that have changed since; remove it, or pack into another folder" in capsys.readouterr().err
    assert cli.main([*again, "--to", str(tmp_path / "new")]) == 0
    assert set(reasons(packed)) - set(reasons(tmp_path / "new")) == {"empty"}


def photograph(path, colour, size=(60, 40), **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **settings)


def test_pictures_alone_are_clips_of_one_frame_for_a_classifier_of_pictures(tmp_path):
    """Folders of classes: upright, of any format, labels by the folders; a run on them tells the classes apart."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for k in range(10):
        shade = 20 * k
        photograph(tmp_path / "photos" / "red" / f"{k}.jpg", (255, shade, shade), exif=turned)
        photograph(tmp_path / "photos" / "blue" / f"{k}.png", (shade, shade, 255))
    photograph(tmp_path / "photos" / "blue" / "dot.png", (0, 0, 255), size=(1, 1))
    Image.fromarray(np.full((40, 60), 40000, np.uint16)).save(tmp_path / "photos" / "blue" / "deep.png")
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    middle = len(whole.getvalue()) // 2
    rot = whole.getvalue()[:middle] + b"\x00\xff\xd9\x55" * 15 + whole.getvalue()[middle + 60 :]
    (tmp_path / "photos" / "red" / "rot.jpg").write_bytes(rot)
    (tmp_path / "photos" / "red" / "torn.jpg").write_bytes((tmp_path / "photos" / "red" / "0.jpg").read_bytes()[:200])
    out, typed = str(tmp_path / "packed"), ["--short_side", "32", "--shard_samples", "8"]
    assert cli.main(["pack", str(tmp_path / "photos"), "--modality", "image", "--to", out, *typed]) == 0
    found = read_plainly(out)
    assert len(found) == 21
    assert reasons(out) == {"red/torn": "corrupt", "red/rot": "corrupt", "blue/dot": "corrupt"}
    assert abs(decode_frame(found["blue/deep"]["0.jpg"], "x").mean() - 40000 / 257) < 2
    frame = decode_frame(found["red/4"]["0.jpg"], "x")
    assert frame.shape == (48, 32, 3)
    assert np.abs(frame.mean(axis=(0, 1)) - (255, 80, 80)).max() < 4
    assert json.loads(found["blue/4"]["json"]) == {"source": "4.png"}
    assert cli.main(["label", out, "folders"]) == 0
    tuning = [
        "--config",
        "smoke",
        "--stream.url",
        out,
        "--tune.modality",
        "image",
        "--tune.loss",
        "one",
        "--tune.epochs",
        "20",
    ]
    tuning += ["--tune.test_url", out, "--train.batch_size", "8", "--train.micro_batch", "8", "--stream.workers", "0"]
    assert cli.main(["finetune", *tuning, "--data.frame_size", "32", "--out", str(tmp_path / "tuned")]) == 0
    said = json.loads((tmp_path / "tuned" / "model" / "results.json").read_text())
    assert said["accuracy"] > 0.9


def test_a_sound_and_the_picture_beside_it_are_a_clip(tmp_path):
    folder = tmp_path / "album"
    for k, name in enumerate(("one", "two", "long", "alone", "both")):
        write_video(
            tmp_path / "x.wav",
            seconds=9.0 if name == "long" else 2.0,
            video=None,
            sound="pcm_s16le",
            pitches=(440 + 100 * k,),
        )
        folder.mkdir(exist_ok=True)
        (tmp_path / "x.wav").rename(folder / f"{name}.wav")
        if name != "alone":
            photograph(folder / f"{name}.JPG", (50 * k, 0, 0), format="JPEG")
    photograph(folder / "both.png", (0, 0, 0))
    photograph(folder / "cover.png", (0, 0, 0))
    typed = ["--short_side", "32", "--stills", "--clip_seconds", "3", "--to", str(tmp_path / "out")]
    assert cli.main(["pack", str(folder), *typed]) == 0
    found = read_plainly(tmp_path / "out")
    assert sorted(found) == ["long-000000000", "long-000003000", "long-000006000", "one", "two"]
    for k, key in ((0, "one"), (1, "two"), (2, "long-000003000")):
        (tone,) = peaks(decode_wav(found[key]["wav"], key, DataConfig()), 16000, 1)
        assert abs(tone - 440 - 100 * k) < 2
        assert abs(decode_frame(found[key]["0.jpg"], key)[..., 0].mean() - 50 * k) < 4
    about = json.loads(found["long-000003000"]["json"])
    assert about == {"source": "long.wav", "picture": "long.JPG", "seconds": 3.0, "begin_seconds": 3.0}
    listed = [json.loads(line) for line in (tmp_path / "out" / "passed-over.jsonl").read_text().splitlines()]
    assert {os.path.basename(one["path"]): one["why"] for one in listed} == {
        "alone.wav": "no pictures of its name are beside it",
        "both.wav": "2 pictures of its name are beside it",
        "both.JPG": "its name ends in .jpg",
        "both.png": "its name ends in .png",
        "cover.png": "its name ends in .png",
    }
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
