"""`equiav pack`, `index` and `verify`: from a user's files to a dataset, with a summary, and errors that name the setting."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from equiav import cli
from equiav.commands.pack import IndexConfig, PackConfig, VerifyConfig, run_index, run_pack, run_verify
from equiav.config import ConfigError, DataConfig
from equiav.data.clips import decode_frame, decode_wav, encode_frame, encode_wav
from equiav.data.synthetic import World
from streaming import Dataset, DatasetError, Store
from tests.videos import peaks, ramp, still, time_of, tones, write_video


def read_plainly(folder):
    """key -> members, by webdataset alone."""
    samples = webdataset.WebDataset([str(p) for p in sorted(Path(folder).glob("*.tar"))], shardshuffle=False)
    return {s["__key__"]: {name: data for name, data in s.items() if name[0] != "_"} for s in samples}


def reasons(folder):
    lines = [json.loads(line) for line in (Path(folder) / "rejected.jsonl").read_text().splitlines()]
    return {line["key"]: line["reason"] for line in lines}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three clips that are good and five that are not."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    write_video(folder / "good.mp4", video="libx264")
    write_video(folder / "sub" / "tall.v2.mkv", size=(48, 80))
    write_video(folder / "wide.webm", size=(160, 48), video="libvpx", sound="libopus", rate=48000)
    write_video(folder / "mute.mp4", sound=None)
    write_video(folder / "dark.mp4", video=None)
    write_video(folder / "silent.mp4", loudness=0.0)
    write_video(folder / "frozen.mp4", picture=still)
    (folder / "damaged.mp4").write_bytes(write_video(folder / "x.mp4").read_bytes()[:-2000])
    (folder / "x.mp4").unlink()
    return folder


@pytest.fixture(scope="module")
def dataset(videos, tmp_path_factory):
    """They, packed: (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("packed") / "clips"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "equiav",
            "pack",
            str(videos),
            "--to",
            str(folder),
            "--short_side",
            "32",
            "--processes",
            "1",
            "--in_order",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_folder_of_videos_becomes_a_dataset(dataset):
    folder, _ = dataset
    samples = read_plainly(folder)
    assert list(samples) == ["good", "sub/tall_v2", "wide"]
    for key, shape, name in [
        ("good", (32, 48), "good.mp4"),
        ("sub/tall_v2", (53, 32), "tall.v2.mkv"),
        ("wide", (32, 107), "wide.webm"),
    ]:
        members = samples[key]
        frames = [decode_frame(members[f"{k}.jpg"], key) for k in range(10)]
        assert {frame.shape[:2] for frame in frames} == {shape}
        times = np.array([time_of(frame) for frame in frames])
        assert np.abs(times - (np.arange(10) + 0.5) / 10).max() < 0.06
        audio = decode_wav(members["wav"], key, DataConfig())
        assert abs(len(audio) / 48000 - 1) < 0.02
        assert np.allclose(peaks(audio, 16000, 2), [440, 1000], atol=2)
        assert json.loads(members["json"])["source"] == name


def test_whatever_was_left_out_is_listed_and_counted(dataset):
    folder, printed = dataset
    assert reasons(folder) == {
        "damaged": "corrupt",
        "dark": "no picture",
        "frozen": "frozen",
        "mute": "no sound",
        "silent": "silent",
    }
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert f"3 of 8 clips in 1 shards, {size / 2**20:,.1f} MiB, at {folder}" in printed
    for reason in set(reasons(folder).values()):
        assert f"rejected: 1 {reason}" in printed
    assert f"{folder}/rejected.jsonl" in printed


def test_a_packed_dataset_is_whole_until_a_bit_of_it_changes(dataset, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in dataset[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert cli.main(["verify", str(folder)]) == 0
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert f"3 samples in 1 shards, {size:,} bytes: every byte is as the index says" in capsys.readouterr().out
    tar = next(folder.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[content.index(b"good.mp4")] ^= 1  # in the JSON of that clip
    tar.write_bytes(content)
    assert cli.main(["verify", str(folder)]) == 1
    told = capsys.readouterr()
    assert f"{tar.name}, sample good: member json is damaged" in told.out
    assert told.err == f"equiav verify: {folder}: 1 damaged shards, 1 damaged samples\n"


def test_shards_without_an_index_get_the_one_that_packing_would_have_written(dataset, tmp_path, capsys):
    for path in dataset[0].glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert cli.main(["index", str(tmp_path), "--processes", "2"]) == 0
    assert f"3 samples in 1 shards at {tmp_path}" in capsys.readouterr().out
    for path in [*dataset[0].glob("*.offsets"), dataset[0] / "index"]:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    run_verify(VerifyConfig(str(tmp_path)))


def test_a_list_names_files_that_are_not_there(videos, tmp_path):
    (tmp_path / "list.txt").write_text(f"{videos}/good.mp4\ngone.mp4\n{videos}/frozen.mp4\n")
    run_pack(
        PackConfig(
            str(tmp_path / "list.txt"),
            str(tmp_path / "to"),
            processes=1,
            keep_frozen=True,
            frames=3,
            short_side=32,
            audio="flac",
        )
    )
    assert reasons(tmp_path / "to") == {"gone": "missing"}
    samples = read_plainly(tmp_path / "to")
    assert {key: sorted(members) for key, members in samples.items()} == {
        key: ["0.jpg", "1.jpg", "2.jpg", "flac", "json"] for key in ("good", "frozen")
    }


def test_a_cav_mae_list_packs_frames_as_they_are(tmp_path):
    entries, frames = [], {}
    for clip in ("a", "b", "c"):
        for k in range(10):
            path = tmp_path / "frames" / f"frame_{k}" / f"{clip}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            frames[clip, k] = encode_frame(ramp(k / 10, (50, 40)), 70)
            path.write_bytes(frames[clip, k])
        (tmp_path / f"{clip}.wav").write_bytes(encode_wav(tones(2.0, 16000, [500])[0], 16000))
        entries.append(
            {
                "video_id": clip,
                "wav": str(tmp_path / f"{clip}.wav"),
                "video_path": str(tmp_path / "frames"),
                "labels": f"/m/{clip}",
            }
        )
    (tmp_path / "frames" / "frame_4" / "b.jpg").unlink()
    (tmp_path / "list.json").write_text(json.dumps({"data": entries}))
    run_pack(PackConfig(str(tmp_path / "list.json"), str(tmp_path / "to"), processes=1, in_order=True))
    samples = read_plainly(tmp_path / "to")
    assert list(samples) == ["a", "c"]
    for clip, members in samples.items():
        assert [members[f"{k}.jpg"] for k in range(10)] == [frames[clip, k] for k in range(10)]
        assert json.loads(members["json"])["labels"] == f"/m/{clip}"
    (line,) = (tmp_path / "to" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "key": "b",
        "reason": "missing frames",
        "detail": f"1 of 10, first {tmp_path}/frames/frame_4/b.jpg",
    }


def test_synthetic_clips_are_packed_by_count(tmp_path, capsys):
    config = PackConfig("synthetic:7", str(tmp_path), short_side=32, frames=2, shard_samples=4, seed=5, processes=1)
    run_pack(config)
    samples = read_plainly(tmp_path)
    assert sorted(samples) == [f"synthetic-5-{k}" for k in range(7)]
    assert list(samples) != sorted(samples)  # mixed over the shards
    assert [shard.samples for shard in Dataset(Store(str(tmp_path)))] == [4, 3]
    clip = World(5, 32, 2).clip(6)
    assert np.array_equal(decode_wav(samples["synthetic-5-6"]["wav"], "s", DataConfig()), clip.audio)
    printed = capsys.readouterr().out
    assert "7 of 7 clips in 2 shards" in printed
    assert "rejected:" not in printed
    run_pack(config)
    assert "7 of 7 clips in 2 shards" in (again := capsys.readouterr().out)
    assert "it was finished before, nothing was done" in again
    with pytest.raises(DatasetError, match="already holds a dataset, of other items or settings"):
        run_pack(replace(config, quality=30))


def test_a_dataset_of_which_nothing_can_be_used_is_refused_however_small(tmp_path, capsys):
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "0.jpg": encode_frame(ramp(0.5, (60, 40)), 90), "wav": b"no sound"})
    assert cli.main(["index", str(tmp_path)]) == 1
    assert "training would end for 1 samples of 1" in capsys.readouterr().err


def test_names_that_cutting_makes_are_each_clips_own(tmp_path):
    (tmp_path / "videos").mkdir()
    for name, seconds in (("clip.mp4", 4.0), ("clip-000000000.mp4", 2.0)):
        write_video(tmp_path / "videos" / name, seconds=seconds)
    run_pack(PackConfig(str(tmp_path / "videos"), str(tmp_path / "out"), clip_seconds=2, short_side=32, processes=1))
    assert sorted(read_plainly(tmp_path / "out")) == ["clip-000000000", "clip-000000000-2", "clip-000002000"]


def test_a_long_video_is_cut_into_clips(tmp_path, capsys):
    """Picture and sound of a clip are of the same time, and its name says which."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "long.mp4", seconds=17.0, video="libx264", fps=10)
    write_video(tmp_path / "videos" / "short.mp4", seconds=3.0)
    settings = {"frames": 4, "short_side": 32, "processes": 1, "in_order": True, "clip_seconds": 5.0}
    run_pack(PackConfig(str(tmp_path / "videos"), str(tmp_path / "clips"), **settings))
    samples = read_plainly(tmp_path / "clips")
    assert list(samples) == ["long-000000000", "long-000005000", "long-000010000", "short"]  # a rest of 2 s is left out
    for k, key in enumerate(list(samples)[:3]):
        about = json.loads(samples[key]["json"])
        assert about["begin_seconds"] == 5 * k
        assert np.allclose(about["frame_seconds"], (np.arange(4) + 0.5) * 5 / 4, atol=0.11)
        times = [17 * time_of(decode_frame(samples[key][f"{n}.jpg"], key)) for n in range(4)]
        assert np.allclose(times, 5 * k + (np.arange(4) + 0.5) * 5 / 4, atol=0.4)
        assert abs(len(decode_wav(samples[key]["wav"], key, DataConfig())) - 5 * 16000) <= 16
    settings |= {"clip_overlap": 2.5}
    run_pack(PackConfig(str(tmp_path / "videos"), str(tmp_path / "more"), **settings))
    begins = [json.loads(members["json"]).get("begin_seconds") for members in read_plainly(tmp_path / "more").values()]
    assert begins == [0, 2.5, 5, 7.5, 10, 12.5, None]


def test_the_sound_of_a_clip_is_of_its_time(tmp_path):
    """A tone that changes at 6 s is heard where it is."""
    rate = 44100
    tone = np.concatenate([tones(6.0, rate, (440, 440)), tones(6.0, rate, (1500, 1500))], axis=1)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv", seconds=12.0, audio=tone)
    run_pack(
        PackConfig(
            str(tmp_path / "videos"), str(tmp_path / "clips"), frames=2, short_side=32, processes=1, clip_seconds=4.0
        )
    )
    samples = read_plainly(tmp_path / "clips")
    sound = {key: decode_wav(members["wav"], key, DataConfig()) for key, members in samples.items()}
    assert np.allclose(peaks(sound["a-000000000"], 16000, 1), [440], atol=2)
    assert np.allclose(peaks(sound["a-000008000"], 16000, 1), [1500], atol=2)
    middle = sound["a-000004000"]
    assert np.allclose(peaks(middle[: 2 * 16000 - 800], 16000, 1), [440], atol=3)
    assert np.allclose(peaks(middle[2 * 16000 + 800 :], 16000, 1), [1500], atol=3)


def test_every_file_of_a_folder_is_packed_rejected_or_named(tmp_path, capsys):
    folder = tmp_path / "videos"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    for name in ("x.mp4", "x.mkv", "a/clip.mp4", "b/clip.mp4", "y.wmv"):
        write_video(folder / name, **({"video": "wmv2", "sound": "ac3"} if name.endswith("wmv") else {}))
    (folder / "notes.txt").write_text("x")
    (folder / "no_ending").write_text("x")
    (folder / "linked").symlink_to(tmp_path)
    run_pack(PackConfig(str(folder), str(tmp_path / "clips"), frames=2, short_side=32, processes=1))
    assert sorted(read_plainly(tmp_path / "clips")) == ["a/clip", "b/clip", "x_mkv", "x_mp4", "y"]
    named = map(json.loads, (tmp_path / "clips" / "passed-over.jsonl").read_text().splitlines())
    assert {Path(line["path"]).name: line["why"] for line in named} == {
        "notes.txt": "its name ends in .txt",
        "no_ending": "its name has no ending",
        "linked": "a linked folder",
    }
    assert "passed over: 1, a linked folder (passed-over.jsonl names them)" in capsys.readouterr().out


def test_shards_of_ones_own_are_judged_as_training_will(tmp_path, capsys):
    """Per sample, with the reason, when they are indexed and when they are verified."""
    sound = {
        "good": encode_wav(tones(2.0, 16000, (440,))[0], 16000),
        "rate": encode_wav(tones(2.0, 44100, (440,))[0], 44100),
        "short": encode_wav(tones(0.3, 16000, (440,))[0], 16000),
    }
    picture = encode_frame(ramp(0.5, (60, 40)), 90)
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for name, content in sound.items():
            tar.write({"__key__": name, "0.jpg": picture, "wav": content})
        tar.write({"__key__": "mp3", "0.jpg": picture, "mp3": b"ID3"})
        tar.write({"__key__": "named", "frame.bmp": picture, "wav": sound["good"]})
    for run, config in ((run_index, IndexConfig(str(tmp_path))), (run_verify, VerifyConfig(str(tmp_path)))):
        with pytest.raises(DatasetError, match=r"training would end for 4 samples of 5 that it cannot use"):
            run(config)
        told = capsys.readouterr().out
        assert "training cannot use 2 of 5: audio, such as a.tar, sample 1 (rate): wav: audio is at 44100 Hz" in told
        assert "training cannot use 2 of 5: member missing, such as a.tar, sample 3 (mp3): has 0.jpg, mp3" in told
    run_index(IndexConfig(str(tmp_path), tried=1))
    assert "training can use all of the 1 samples that were decoded" in capsys.readouterr().out


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "frames is 0, expected a positive number"),
        ({"short_side": -1}, "short_side is -1"),
        ({"shard_samples": 0}, "shard_samples is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"max_seconds": 0.0}, r"max_seconds is 0\.0"),
        ({"timeout": 0.0}, r"timeout is 0\.0"),
        ({"quality": 101}, "quality is 101, expected 1 to 100"),
        ({"quality": 0}, "quality is 0, expected 1 to 100"),
        ({"clip_seconds": 0.5}, r"clip_seconds is 0\.5, expected data\.min_seconds=1\.0 to max_seconds=30\.0"),
        (
            {"clip_seconds": 5.0, "clip_overlap": 5.0},
            r"clip_overlap is 5\.0, expected 0 to nine tenths of clip_seconds",
        ),
        ({"max_shard_bytes": 1000}, "max_shard_bytes is 1000, expected 65536 or more"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        PackConfig(**settings)


@pytest.mark.parametrize("source", ["synthetic:", "synthetic:0", "synthetic:-3", "synthetic:many", "nowhere/at/all"])
def test_a_source_that_is_none_is_named(tmp_path, source):
    with pytest.raises(ConfigError, match=f"source is {source}, expected "):
        run_pack(PackConfig(source, str(tmp_path / "to")))
    assert not (tmp_path / "to").exists()


def test_a_place_is_asked_for():
    with pytest.raises(ConfigError, match=r"to is not set, expected the folder to pack into \(--to s3://bucket/name\)"):
        PackConfig("synthetic:3").ready()
    for config in (IndexConfig(), VerifyConfig()):
        with pytest.raises(ConfigError, match="url is not given"):
            config.ready()


def test_a_folder_without_shards_or_without_an_index_is_named(tmp_path):
    with pytest.raises(DatasetError, match=f"{tmp_path} has no shards: no file there ends in .tar"):
        run_index(IndexConfig(str(tmp_path)))
    with pytest.raises(DatasetError, match=f"{tmp_path} holds no dataset"):
        run_verify(VerifyConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["pack"], 2, "source is not given"),
        (["pack", "synthetic:3"], 2, "to is not set"),
        (["pack", "nowhere", "--to", "x"], 2, "source is nowhere, expected a folder, a file, or synthetic:COUNT"),
        (["index", "."], 2, "no shards"),
        (["verify", "."], 2, "holds no dataset"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_a_status(tmp_path, monkeypatch, capsys, argv, status, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == status
    told = capsys.readouterr().err
    assert told.startswith(f"equiav {argv[0]}: ")
    assert message in told
    assert told.count("\n") == 1
