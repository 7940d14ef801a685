"""`equiav show`: what it says is so, and what it draws is what a run would see."""

import io
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
import webdataset
from PIL import Image

from equiav import cli
from equiav.augment import make_views
from equiav.commands.pack import IndexConfig, PackConfig, run_index, run_pack
from equiav.commands.show import ShowConfig, _decoded, find
from equiav.config import from_dict
from equiav.data.clips import encode_frame, encode_wav
from equiav.data.stream import batches, open_stream
from equiav.data.survey import labels_of, member
from equiav.data.synthetic import CLASSES
from equiav.terminal import plain
from streaming import Dataset, Store
from tests.videos import ramp, tones


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show") / "clips"
    run_pack(PackConfig("synthetic:18", str(folder), frames=4, short_side=64, shard_samples=5, processes=1))
    return folder


def test_what_is_drawn_of_a_clip_is_what_a_run_sees(dataset, tmp_path):
    values = {"model": {"size": "tiny"}, "train": {"batch_size": 9, "micro_batch": 9, "warmup_steps": 1, "steps": 9}}
    values["stream"] = {"url": str(dataset), "workers": 0, "cache": str(tmp_path)}
    config = from_dict(ShowConfig, {**values, "seed": 3}, "test")
    found, store = Dataset(Store(str(dataset))), Store(str(dataset))
    keys = {
        number: looked for k in range(18) for looked in [find(found, f"synthetic-0-{k}")] for number in [looked.number]
    }
    assert sorted(keys) == list(range(18))
    with open_stream(config) as loader:
        for _, batch in zip(range(3), batches(loader), strict=False):  # of two epochs
            views = make_views(config, batch)
            for row, number in enumerate(batch.samples.tolist()):
                looked = keys[number]
                contents = {name: member(store, looked, name) for name in looked.sample.members}
                clip = _decoded(config, looked, contents, batch.epoch)
                assert torch.equal(clip.frames[0], batch.frames[row])
                alone = make_views(config, clip)
                for ours, theirs in zip(alone, views, strict=True):
                    assert torch.allclose(ours[0], theirs[row], atol=1e-5)


def test_a_dataset_is_described(dataset, tmp_path, capsys):
    assert cli.main(["show", str(dataset), "--png", str(tmp_path / "x.png")]) == 0
    told = capsys.readouterr().out
    assert "18 clips in 4 shards" in told
    assert "0.05 hours: 10.0 to 10.0 s" in told
    assert "pictures: 18 with 4" in told
    labels = [CLASSES[json.loads(member_of(dataset, k)["json"])["label"]] for k in range(18)]
    top = max(set(labels), key=labels.count)
    assert f"{top} {labels.count(top)}" in told
    width, height = Image.open(tmp_path / "x.png").size
    assert (width, height) == (6 * (128 + 6) + 6, 3 * (128 + 14 + 6) + 6)


def member_of(folder, k):
    looked = find(Dataset(Store(str(folder))), f"synthetic-0-{k}")
    return {name: member(Store(str(folder)), looked, name) for name in looked.sample.members}


def test_a_key_that_is_not_there(dataset, capsys):
    assert cli.main(["show", str(dataset), "synthetic-0-18"]) == 2
    assert "has no clip 'synthetic-0-18'; did you mean 'synthetic-0-" in capsys.readouterr().err


def test_without_a_terminal_it_says_how_to_draw(dataset, capsys):
    assert cli.main(["show", str(dataset), "synthetic-0-1"]) == 0
    told = capsys.readouterr().out
    assert "3.jpg: 64 x 64 pixels" in told
    assert told.endswith("--png FILE draws it\n")


def test_a_terminal_shows_it(dataset):
    command = [sys.executable, "-m", "equiav", "show", str(dataset), "--config", "smoke"]
    typed = ["script", "-qec", " ".join(command), "/dev/null"]
    environment = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "60"}
    done = subprocess.run(typed, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if "▀" in line]
    assert len(lines) > 10
    assert {line.count("▀") for line in lines} == {60}


@pytest.fixture
def shards(tmp_path):
    """Of somebody else: one clip that is sound, one without a picture, one that is no picture, and names that bite."""
    sound, picture = encode_wav(tones(2.0, 16000, [440])[0], 16000), encode_frame(ramp(0.5, (60, 40)), 90)
    clips = {
        "good": {"0.jpg": picture, "wav": sound, "json": b'{"labels": "/m/09x0r, /m/04rlf"}'},
        "blind": {"wav": sound, "json": b'{"labels": ["[bold]x\\u001b[31m"]}'},
        "broken": {"0.jpg": b"\xff\xd8 no picture", "wav": b"no sound", "json": b"[1]"},
        "esc\x1b[31m": {"0.jpg": picture, "wav": sound, "json": b"no json"},
    }
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as tar:
        for key, members in clips.items():
            tar.write({"__key__": key, **members})
    run_index(IndexConfig(str(tmp_path), tried=0))
    return tmp_path


def test_what_training_cannot_use_is_said_and_nothing_bites(shards, capsys):
    assert cli.main(["show", str(shards)]) == 0
    told = capsys.readouterr().out
    assert "pictures: 1 with 0, 3 with 1" in told
    assert "labels: " in told
    assert "/m/09x0r 1" in told
    assert r"[bold]x\x1b[31m 1" in told
    assert "training cannot use 1: audio is not a WAV file" in told
    assert "training cannot use broken: image cannot be decoded" in told
    for key, said in [
        ("blind", "it has sound alone: for `equiav finetune --tune.modality`, not for pretraining"),
        ("broken", "0.jpg: 13 bytes, image"),
    ]:
        assert cli.main(["show", str(shards), key]) == 0
        assert said in (told := capsys.readouterr().out)
        assert "\x1b" not in told
    assert cli.main(["show", str(shards), "esc\x1b[31m", "--png", str(shards / "x.png")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")  # as the program does
def test_what_is_hostile_costs_itself_alone(tmp_path, capsys):
    """Brackets without end, a picture that is a line, one that is a bomb, a name of 20,000 letters."""
    sound, bomb, line = encode_wav(tones(2.0, 16000, [440])[0], 16000), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (10_000, 10_000)).save(bomb, "png")
    Image.new("RGB", (2_000_000, 2)).save(line, "png")
    clips = {
        "deep": (line, b"[" * 200_000),
        "k" * 20_000: (line, b"{}"),
        "bomb": (bomb, b"{}"),
        "$(touch x)'": (line, b"{}"),
    }
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as tar:
        for key, (picture, about) in clips.items():
            tar.write({"__key__": key, "0.png": picture.getvalue(), "wav": sound, "json": about})
    (tmp_path / "._0.tar").write_text("what a Mac leaves")
    run_index(IndexConfig(str(tmp_path), tried=0))
    assert cli.main(["show", str(tmp_path), "--png", str(tmp_path / "x.png")]) == 0
    told = capsys.readouterr().out
    assert "training cannot use bomb: image cannot be decoded: 10000 x 10000 pixels, expected 26214400 at most" in told
    assert max(map(len, told.splitlines())) < 3000
    assert Image.open(tmp_path / "x.png").width < 10_000
    for key in ("deep", "$(touch x)'"):
        assert cli.main(["show", str(tmp_path), key]) == 0
    capsys.readouterr()


def test_what_show_proposes_can_be_pasted(tmp_path, capsys):
    folder = tmp_path / "odd name"
    with_key = {"__key__": "-it's $(touch x)", "0.jpg": encode_frame(ramp(0.5, (60, 40)), 90)}
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar"), encoder=False) as tar:
        tar.write({**with_key, "wav": encode_wav(tones(2.0, 16000, [440])[0], 16000)})
    run_index(IndexConfig(str(folder), tried=0))
    assert cli.main(["show", str(folder)]) == 0
    (proposed,) = [line for line in capsys.readouterr().out.splitlines() if "equiav show" in line]
    typed = shlex.split(proposed.partition("equiav ")[2])
    assert cli.main(typed) == 0
    assert capsys.readouterr().out.startswith("-it's $(touch x): sample 0")


def test_a_list_that_packing_did_not_write(shards, capsys):
    (shards / "rejected.jsonl").write_text("[1]\n")
    assert cli.main(["show", str(shards)]) == 2
    assert "rejected.jsonl: not the list that packing writes" in capsys.readouterr().err


def test_offsets_of_another_shard(shards, capsys):
    path = shards / "0.tar.offsets"
    path.write_bytes(path.read_bytes().replace(b"good", b"evil"))
    assert cli.main(["show", str(shards)]) == 1
    assert "shard 0.tar: its offsets file is not the one that the index was made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("about", "labels"),
    [
        (b'{"label": 3}', ["3"]),
        (b'{"labels": "a, b,"}', ["a", "b"]),
        (b'{"labels": ["a", 2]}', ["a", "2"]),
        (b'{"labels": null}', []),
        (b"{}", []),
        (b"[]", []),
        (b"\xff", []),
    ],
)
def test_labels(about, labels):
    assert labels_of(about) == labels


def test_plain_text():
    assert plain("a\x1b[0m\n猫\x9b") == r"a\x1b[0m\n猫\x9b"
