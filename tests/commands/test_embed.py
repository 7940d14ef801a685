"""`equiav embed` of files, folders, lists and datasets, and `equiav search` in what it wrote."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from PIL import Image

import equiav
from equiav import cli
from equiav.commands import embed
from equiav.config import ConfigError, ModelSettings, from_dict
from equiav.model import EquiAV
from equiav.vectors import ENDINGS, Vectors, read
from equiav.weights import save_model
from tests.videos import tones, write_video

SETTINGS = from_dict(
    ModelSettings, {"model": {"size": "tiny"}, "data": {"audio_mean": -10.3, "audio_std": 3.9}}, "test"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    network = EquiAV(SETTINGS.model, SETTINGS.objective)
    network.init_weights(1)
    out = tmp_path_factory.mktemp("embed") / "run"
    save_model(out / "model", network.state_dict(), SETTINGS)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five videos, three sounds, one file that is none."""
    out = tmp_path_factory.mktemp("files")
    for k in range(5):
        write_video(out / f"{k}.mp4", seconds=3.0 + k, pitches=(300 + 200 * k, 900))
    for k in range(3):
        soundfile.write(out / f"sound-{k}.wav", tones(3.0, 16000, [500 + 300 * k])[0], 16000)
    (out / "broken.mp4").write_bytes(b"no video")
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("dataset") / "clips"
    argv = ["pack", "synthetic:40", "--to", str(out), "--frames", "2", "--short_side", "64", "--shard_samples", "16"]
    assert cli.main(argv) == 0
    return out


def test_every_format_holds_the_same(tmp_path):
    rng = np.random.default_rng(0)
    audio, image = (rng.normal(size=(7, 16)).astype(np.float32) for _ in range(2))
    image[3] = np.nan
    rows = Vectors(np.array([f"ä {k}" for k in range(7)]), np.arange(7.0), np.full(7, np.nan), audio, image, "digest")
    for ending in ENDINGS:
        rows.write(tmp_path / f"x{ending}")
        found = read(tmp_path / f"x{ending}")
        assert found.model == "digest"
        for one, other in zip(rows[:-1], found[:-1], strict=True):
            assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f"), ending
        (tmp_path / f"bad{ending}").write_bytes(b"nothing of the kind")
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path / f"bad{ending}")
        with pytest.raises(ConfigError, match=r"`equiav embed` writes it|cannot be read"):
            read(tmp_path / f"absent{ending}")
    with pytest.raises(ConfigError, match=r"expected \.npz, \.parquet"):
        read(tmp_path / "x.csv")
    np.savez(
        tmp_path / "evil.npz", name=np.array([{"a": 1}], dtype=object), begin=0, end=0, audio=0, image=0, model="x"
    )
    with pytest.raises(ConfigError, match="cannot be read: ValueError"):  # nothing is unpickled
        read(tmp_path / "evil.npz")


def test_a_folder_is_embedded_file_by_file(model, folder, tmp_path, capsys):
    out = tmp_path / "x.parquet"
    assert cli.main(["embed", str(folder), "--weights", str(model), "--out", str(out)]) == 1  # one is none
    assert "broken.mp4" in capsys.readouterr().out
    rows, of = read(out), equiav.load(model)
    assert {name.rpartition("/")[2] for name in rows.name} == {p.name for p in folder.iterdir()} - {"broken.mp4"}
    for k in (0, 4):
        own = rows.name == str(folder / f"{k}.mp4")
        alone = of.embed_video(folder / f"{k}.mp4")
        assert np.abs(rows.audio[own] - alone.audio).max() < 1e-5
        assert np.abs(rows.image[own] - alone.image).max() < 1e-5
        assert np.array_equal(rows.begin[own], alone.begin)
    assert np.isnan(rows.image[[name.endswith(".wav") for name in rows.name]]).all()
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "list.txt").write_text(f"{folder / '1.mp4'}\n{folder / 'sound-1.wav'}\n")
    assert (
        cli.main(["embed", str(tmp_path / "list.txt"), "--weights", str(model), "--out", str(tmp_path / "y.npz")]) == 0
    )
    listed = read(tmp_path / "y.npz")
    assert set(listed.name) == {str(folder / "1.mp4"), str(folder / "sound-1.wav")}


def test_a_dataset_is_embedded_clip_by_clip(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "CLIPS", 16)
    out = tmp_path / "x.safetensors"
    assert cli.main(["embed", str(dataset), "--weights", str(model), "--out", str(out), "--stream.workers", "0"]) == 0
    rows, of = read(out), equiav.load(model)
    assert sorted(rows.name) == sorted(f"synthetic-0-{k}" for k in range(40))
    from equiav.data.synthetic import World

    world = World(0, 64, 2)
    for name in ("synthetic-0-3", "synthetic-0-39"):
        clip = world.clip(int(name.rpartition("-")[2]))
        (row,) = np.flatnonzero(rows.name == name)
        assert rows.audio[row] @ of.embed_audio(clip.audio, 16000) > 0.9999
        assert rows.image[row] @ of.embed_image(clip.frames[1]) > 0.99  # a JPEG is between
    assert not list(tmp_path.glob(".*"))


def test_killed_it_goes_on_where_it_was(model, dataset, tmp_path):
    """With the same file in the end; another model begins anew."""
    program = (
        "import sys; from equiav.commands import embed; embed.CLIPS = 4; from equiav import cli; "
        f"sys.exit(cli.main(['embed', {str(dataset)!r}, '--weights', {str(model)!r}, '--out', 'x.npz', '--stream.workers', '0']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    while len(parts := list(tmp_path.glob(".x.npz.*.parts/*.npz"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in sorted(parts)[:2]}
    copy = shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    (whole,) = (read_after(program, tmp_path, kept),)
    shutil.rmtree(next(copy.glob(".x.npz.*.parts")))
    fresh = read_after(program, copy, {})
    assert whole.model == fresh.model
    for one, other in zip(whole[:-1], fresh[:-1], strict=True):
        assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def read_after(program, folder, kept):
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=folder, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    while process.poll() is None:
        for path, when in kept.items():
            assert not path.exists() or path.stat().st_mtime_ns == when
        time.sleep(0.02)
    assert process.returncode == 0
    return read(folder / "x.npz")


def test_what_is_nearest_is_found(model, folder, tmp_path, capsys):
    for ending in (".npz", ".faiss"):
        index = tmp_path / f"x{ending}"
        cli.main(["embed", str(folder), "--weights", str(model), "--out", str(index)])
        capsys.readouterr()
        rows = read(index)
        query = equiav.load(model).embed_video(folder / "2.mp4").audio[0]
        there = np.isfinite(rows.image).all(axis=1)
        best = rows.name[there][np.argmax(rows.image[there] @ query)]
        argv = ["search", str(folder / "2.mp4"), "--weights", str(model), "--index", str(index), "--top", "3"]
        assert cli.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert str(best) in lines[0]
        assert lines[3].endswith("candidates: image by audio")
        assert cli.main([*argv, "--among", "audio"]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert str(folder / "2.mp4") in first  # itself
        assert first.split()[0] == "1.0000"
    other = EquiAV(SETTINGS.model, SETTINGS.objective)
    other.init_weights(2)
    save_model(tmp_path / "other", other.state_dict(), SETTINGS)
    assert cli.main(["search", str(folder / "2.mp4"), "--weights", str(tmp_path / "other"), "--index", str(index)]) == 2
    assert "was made by another model" in capsys.readouterr().err
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(tmp_path / "a.png")
    assert cli.main(["search", str(tmp_path / "a.png"), "--weights", str(model), "--index", str(index)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("candidates: audio by image")
    assert json.loads((model / "model" / "config.json").read_text())["model"]["size"] == "tiny"


def test_a_part_that_is_lost_costs_itself_alone(model, tmp_path, capsys):
    """The middle of a transport stream of 40 s is not there; the file that follows is a picture."""
    path = write_video(tmp_path / "a.ts", video="libx264", seconds=40.0)
    content = path.read_bytes()
    packets = [content[k : k + 188] for k in range(0, len(content), 188)]
    path.write_bytes(b"".join(packets[: len(packets) * 9 // 20] + packets[len(packets) * 12 // 20 :]))
    Image.new("RGB", (80, 60), (200, 10, 10)).save(tmp_path / "b.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert cli.main(["embed", str(tmp_path), "--weights", str(model), "--out", str(tmp_path / "x.npz")]) == 1
    said = capsys.readouterr()
    assert re.search(r"a\.ts, [\d.]+ to [\d.]+ s: (hole|corrupt): ", said.out)
    assert "dot.png" in said.out
    assert "1 of 3 files could not be embedded; they are named above" in said.err
    assert cli.main(["score", str(path), "--weights", str(model)]) == 0
    scored = capsys.readouterr().out
    assert len(re.findall(r"^ *-?0\.\d+  .*a\.ts  [\d.]+ to [\d.]+ s$", scored, re.MULTILINE)) >= 2
    assert re.search(r"(hole|corrupt): ", scored)
    rows = read(tmp_path / "x.npz")
    of_video = np.flatnonzero([name.endswith("a.ts") for name in rows.name])
    assert len(of_video) >= 2
    assert np.diff(rows.begin[of_video]).max() > np.diff(rows.begin[of_video]).min()  # a part between is not there
    (picture,) = np.flatnonzero([name.endswith("b.png") for name in rows.name])
    assert np.isnan(rows.audio[picture]).all()
    assert rows.image[picture] @ equiav.load(model).embed_image(tmp_path / "b.png") > 0.9999
