"""`equiav finetune` as users run it: one curve and one result, whatever is killed and however many processes go on."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import webdataset
import yaml

from equiav import cli
from equiav.config import ModelSettings, from_dict
from equiav.data.clips import encode_frame, encode_wav
from equiav.data.labels import Said, give
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from equiav.model import EquiAV
from equiav.weights import initial_weights, save_model
from streaming import Dataset, Store
from streaming.labels import read_labels, write_labels
from streaming.order import COPY, sample_of
from streaming.pack import pack
from tests.train.test_pretrain import Run, same_weights, steps
from tests.videos import ramp, tones, write_video

STEPS = 16  # 4 epochs of 26 clips in batches of 8


def dataset(folder, count, seed, label=lambda k, clip: ["few", "many"][clip.label % 2]):
    from equiav.config import DataConfig

    world = World(seed, 64, 3, 2.56)
    encode = EncodeSynthetic(world, Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    pack([(f"clip-{k}", k) for k in range(count)], encode, Store(str(folder)), processes=0, part_items=4)
    opened = Dataset(Store(str(folder)))
    found = {f"clip-{k}": Said([label(k, world.clip(k))], [f"fold {k % 3}"]) for k in range(count)}
    write_labels(opened.store, opened.fingerprint, give(opened, found).labels)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    settings = {
        "model": {"size": "tiny", "depth": 1},
        "data": {"audio_mean": -10.3, "audio_std": 3.9},
        "stream": {"url": str(dataset(folder / "clips", 26, 1)), "window": 3, "lanes": 2, "workers": 0},
        "train": {"batch_size": 8, "micro_batch": 2, "lr": 1e-3, "lr_start": 1e-6},
        "tune": {
            "loss": "one", "epochs": 4, "warmup_epochs": 1, "mixup": 0.5, "drop_path": 0.2, "time_roll": True,
            "test_url": str(dataset(folder / "test", 11, 2)), "test_frames": 2,
        },
        "checkpoint": {"every_steps": 4},
    }  # fmt: skip
    model = from_dict(ModelSettings, {name: settings[name] for name in ("model", "data")}, "test")
    weights = EquiAV(model.model, model.objective)
    weights.init_weights(7)
    save_model(folder / "pretrained", weights.state_dict(), model)
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "weights": str(folder / "pretrained")}))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    text = Run(config, out, command="finetune").end()
    assert "begins with the weights of" in text
    return out


def test_steps_follow_from_the_epochs_and_the_encoders_are_those_of_the_start(config, whole):
    rows = steps(whole)
    assert list(rows) == list(range(STEPS))
    assert [rows[k]["clips"] for k in range(4)] == [8, 8, 8, 2]
    began = yaml.safe_load((whole / "config.yaml").read_text())
    assert (began["train"]["steps"], began["train"]["warmup_steps"]) == (STEPS, 4)
    there = json.loads((whole / "model" / "classes.json").read_text())
    assert there == {"classes": ["few", "many"], "modality": "both", "loss": "one"}
    weights = safetensors.torch.load_file(whole / "model" / "model.safetensors")
    assert weights["head.weight"].shape == (2, 128)
    assert not any("predictor" in name or "norm_aug" in name or "_head" in name for name in weights)


@pytest.mark.slow
def test_killed_and_resized_it_is_the_same_run_with_the_same_result(config, whole, tmp_path):
    run = Run(config, tmp_path, 3, command="finetune")
    run.reach(6)
    run.process.kill()
    for process in run.workers().values():
        os.kill(process, signal.SIGKILL)
    run.process.communicate()
    last = Run(config, tmp_path, 2, command="finetune").end()
    assert "goes on at step" in last
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    same_weights(tmp_path, whole)
    assert json.loads((tmp_path / "model" / "results.json").read_text()) == json.loads(
        (whole / "model" / "results.json").read_text()
    )
    assert "is finished at step 16" in Run(config, tmp_path, command="finetune").end()


def test_what_it_is_worth_is_said_of_every_clip(whole):
    said = json.loads((whole / "model" / "results.json").read_text())
    assert (said["clips"], said["of"]) == (11, 11)
    assert 0 <= said["accuracy"] <= 1
    assert said["accuracy 95%"][0] <= said["accuracy"] <= said["accuracy 95%"][1]
    assert set(said["by class"]) == {"few", "many"}


def test_the_protocol_is_the_mean_of_probabilities_over_frames(whole, config):
    """Computed here frame by frame, with no loader."""
    from equiav.augment.logmel import normalised_spectrogram
    from equiav.augment.transforms import original_image
    from equiav.config import Config
    from equiav.model.classifier import Classifier

    settings = yaml.safe_load(config.read_text())
    values = from_dict(Config, {name: settings[name] for name in ("model", "data")}, "test")
    model = Classifier(values.model, 2)
    model.load_state_dict(safetensors.torch.load_file(whole / "model" / "model.safetensors"))
    world, hits = World(2, 64, 3, 2.56), []
    from equiav.data.clips import decode_frame, encode_frame

    for k in range(11):
        clip = world.clip(k)
        waveform = torch.from_numpy(clip.audio)[None]
        sound = normalised_spectrogram(waveform, torch.tensor([waveform.shape[1]]), values.model, values.data)
        scores = torch.zeros(2, dtype=torch.float64)
        for at in (0.25, 0.75):
            frame = decode_frame(encode_frame(clip.frames[int(at * 3)], 90), "k")
            picture = original_image(torch.from_numpy(frame.copy()).permute(2, 0, 1)[None], values.model.image_size)
            with torch.no_grad():
                scores += model(sound, picture)[0].double().softmax(0)
        hits.append(int(scores.argmax()) == clip.label % 2)
    assert json.loads((whole / "model" / "results.json").read_text())["accuracy"] == pytest.approx(np.mean(hits))


@pytest.mark.slow
def test_balanced_and_without_a_fold_it_is_one_run_at_every_number_of_processes(config, whole, tmp_path):
    """Rare classes come more often, a clip several times in an epoch, each time with draws of its own; a fold is left out."""
    typed = ["--tune.test_url", "", "--tune.test_on", "fold 1", "--tune.balance", "--log_samples"]
    Run(config, tmp_path / "one", None, *typed, command="finetune").end()
    run = Run(config, tmp_path / "more", 3, *typed, command="finetune")
    run.reach(5)
    run.process.kill()
    for process in run.workers().values():
        os.kill(process, signal.SIGKILL)
    run.process.communicate()
    Run(config, tmp_path / "more", 2, *typed, command="finetune").end()
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "more/metrics.jsonl").read_bytes()
    same_weights(tmp_path / "one", tmp_path / "more")
    results = [(tmp_path / out / "model/results.json").read_text() for out in ("one", "more")]
    assert results[0] == results[1]
    assert json.loads(results[0])["clips"] == 9  # every third of 26
    ids = [json.loads(line)[2] for line in (tmp_path / "one/samples-0.jsonl").read_text().splitlines()]
    per_epoch = [[one for step in ids[k : k + 3] for one in step] for k in range(0, len(ids), 3)]
    assert [len(epoch) for epoch in per_epoch] == [17, 17, 17, 17]
    opened = Dataset(Store(yaml.safe_load(config.read_text())["stream"]["url"]))
    labels = read_labels(opened)
    fold = np.flatnonzero(labels.parts.has(["fold 1"]))
    came = np.concatenate(per_epoch)
    assert not set(fold) & set(sample_of(came).tolist())
    assert (came >= COPY).any()
    kinds = np.bincount(labels.classes.many_hot(came).argmax(axis=1), minlength=2)
    assert abs(kinds[0] - kinds[1]) <= 4  # of 68


@pytest.mark.parametrize("modality", ["audio", "image"])
def test_one_modality_alone_from_files_to_a_result(config, tmp_path, modality, capsys):
    """Sound files and soundless videos, in folders that are their classes; short ones, where the settings allow them."""
    files = tmp_path / "files"
    for number, (name, pitch) in enumerate((("low", 300), ("high", 3000)) * 4):
        (files / name).mkdir(parents=True, exist_ok=True)
        if modality == "audio":
            soundfile.write(files / name / f"{number}.flac", tones(0.7, 22050, [pitch])[0], 22050)
        else:
            write_video(files / name / f"{number}.mp4", sound=None, size=(64, 64), seconds=2.0)
    clips, short = tmp_path / "clips", ["--data.min_seconds", "0.3"]
    assert cli.main(["pack", str(files), "--to", str(clips), "--modality", modality, "--short_side", "64", *short]) == 0
    assert cli.main(["label", str(clips), "folders"]) == 0
    assert cli.main(["verify", str(clips), *short]) == 0
    assert f"its clips have {'sound' if modality == 'audio' else 'pictures'} alone" in capsys.readouterr().out
    typed = [
        "--config",
        str(config),
        "--out",
        str(tmp_path / "out"),
        "--stream.url",
        str(clips),
        "--tune.test_url",
        str(clips),
    ]
    assert cli.main(["finetune", *typed, "--tune.modality", modality, "--tune.epochs", "2", *short]) == 0
    said = json.loads((tmp_path / "out" / "model" / "results.json").read_text())
    assert (said["clips"], list(said["by class"])) == (8, ["high", "low"])
    capsys.readouterr()
    assert cli.main(["finetune", *typed, "--out", str(tmp_path / "other")]) == 2
    lacks = "pictures" if modality == "audio" else "sound"
    assert f"and this run needs {lacks}, too" in capsys.readouterr().err
    assert cli.main(["pretrain", "--config", "smoke", "--out", str(tmp_path / "pre"), "--stream.url", str(clips)]) == 2
    assert f"and this run needs {lacks}, too" in capsys.readouterr().err


def test_who_asks_for_another_test_of_a_finished_run_is_told(config, whole, tmp_path):
    text = Run(config, whole, None, "--tune.test_frames", "1", command="finetune").end()
    assert "and is not tested anew; remove" in text
    assert "not tested anew" not in Run(config, whole, command="finetune").end()


def test_bad_clips_of_the_test_are_said_and_do_not_count(config, tmp_path):
    folder = tmp_path / "test"
    picture, sound = encode_frame(ramp(0.5, (64, 64))), encode_wav(tones(2.0, 16000, [440])[0], 16000)
    clips = {"good": (picture, sound), "half": (picture, sound), "none": (picture, b"no sound")}
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar"), encoder=False) as tar:
        for key, (image, wav) in clips.items():
            tar.write({"__key__": key, "0.jpg": image, "1.jpg": b"" if key == "half" else image, "wav": wav})
    assert cli.main(["index", str(folder), "--tried", "0"]) == 0
    (tmp_path / "l.csv").write_text("good,few\nhalf,many\nnone,few\n")
    (tmp_path / "classes.txt").write_text("few\nmany\n")
    assert cli.main(["label", str(folder), str(tmp_path / "l.csv"), "--classes", str(tmp_path / "classes.txt")]) == 0
    typed = ["--tune.test_url", str(folder), "--tune.epochs", "1", "--tune.warmup_epochs", "0"]
    text = Run(config, tmp_path / "out", 2, *typed, command="finetune").end()
    assert "of 1 nothing could be used" in text
    said = json.loads((tmp_path / "out" / "model" / "results.json").read_text())
    assert (said["clips"], said["of"], said["bad"]) == (2, 3, {"image": 1, "audio": 2})


def test_a_fine_tuned_model_is_a_beginning_too(config, whole, tmp_path):
    typed = ["--weights", str(whole), "--tune.epochs", "1", "--tune.warmup_epochs", "0"]
    assert "begins with the weights" in Run(config, tmp_path, None, *typed, command="finetune").end()
    alone = Run(config, tmp_path / "a", None, *typed, "--tune.modality", "audio", command="finetune")
    alone.end()
    text = Run(config, tmp_path / "b", None, *typed[2:], "--weights", str(tmp_path / "a"), command="finetune").end(2)
    assert "has no encoder for image, which this run needs" in text


def test_what_is_learned_from_cannot_change_on_the_way(config, tmp_path):
    """Elsewhere for the test, nothing of the dataset would be left out any more."""
    typed = ["--tune.epochs", "0", "--tune.warmup_epochs", "0", "--train.steps", "4", "--train.warmup_steps", "0"]
    url = yaml.safe_load(config.read_text())["stream"]["url"]
    first = ["--tune.test_url", url, "--tune.test_on", "fold 1"]
    Run(config, tmp_path, None, *typed, *first, command="finetune").end()
    text = Run(config, tmp_path, None, *typed, "--tune.test_on", "fold 1", command="finetune").end(2)
    assert "the clips are others" in text
    assert "is finished at step 4" in Run(config, tmp_path, None, *typed, "--tune.test_url", f"{url}/", *first[2:],
                                          command="finetune").end()  # fmt: skip


def test_where_the_test_has_no_room_it_is_said_before_the_first_step(config, tmp_path):
    """Of a store: its shards have to fit, too."""
    import shutil

    from equiav.data.local_s3 import LocalS3

    with LocalS3(tmp_path / "store") as s3:
        url = yaml.safe_load(config.read_text())["tune"]["test_url"]
        shutil.copytree(url, s3.folder / "bucket" / "test")
        of = s3.options
        env = {
            "AWS_ENDPOINT_URL": of["endpoint_url"],
            "AWS_ACCESS_KEY_ID": of["key"],
            "AWS_SECRET_ACCESS_KEY": of["secret"],
        }
        typed = [
            "--tune.test_url",
            "s3://bucket/test",
            "--stream.cache",
            str(tmp_path / "cache"),
            "--stream.cache_bytes",
            "9999",
        ]
        text = Run(config, tmp_path / "out", None, *typed, env=env, command="finetune").end(2)
    assert "cache_bytes is 9999, expected" in text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_other_labels_are_another_run(config, whole, tmp_path, capsys):
    folder = Path(yaml.safe_load(config.read_text())["stream"]["url"])
    before = (folder / "labels").read_bytes()
    opened = Dataset(Store(str(folder)))
    other = {f"clip-{k}": Said([["few", "many"][k % 2]], []) for k in range(26)}
    write_labels(opened.store, opened.fingerprint, give(opened, other).labels)
    try:
        assert cli.main(["finetune", "--config", str(config), "--out", str(whole)]) == 2
        assert "the labels are others" in capsys.readouterr().err
    finally:
        (folder / "labels").write_bytes(before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--tune.test_url", "nowhere"], "nowhere holds no dataset"),
        (["--stream.url", "bare"], "bare has no labels; `equiav label` gives it some"),
        (["--stream.url", "several"], "1 of 3 clips of several have not exactly one label; tune.loss=one needs that"),
        (["--tune.test_url", "strange"], "has other classes than"),
        (["--stream.url", "alone"], "labels is 1 class, expected two or more"),
        (["--tune.test_on", "fold 7"], "tune.test_on is fold 7, expected parts of"),
        (["--tune.train_on", "none of it"], "tune.train_on is none of it, expected parts of"),
        (
            ["--tune.test_url", "", "--tune.test_on", "fold 0,fold 1,fold 2"],
            "expected parts that leave clips to learn from",
        ),
        (
            ["--tune.test_url", "", "--tune.test_on", "fold 1", "--tune.train_on", "fold 0, fold 1"],
            "have 9 clips in common",
        ),
        (["--tune.mixup", "2"], "tune.mixup is 2.0, expected a probability"),
        (["--tune.warmup_epochs", "9"], "tune.warmup_epochs is 9.0, expected 0 to tune.epochs=4"),
    ],
)
def test_mistakes(config, tmp_path, monkeypatch, capsys, change, said):
    monkeypatch.chdir(tmp_path)
    name = change[1]
    if name in ("bare", "several", "strange", "alone"):
        dataset(tmp_path / name, 3, 1, lambda k, clip: "same" if name == "alone" else f"class {k}")
        if name == "bare":
            (tmp_path / name / "labels").unlink()
        if name == "several":
            opened = Dataset(Store(str(tmp_path / name)))
            write_labels(
                opened.store,
                opened.fingerprint,
                give(opened, {f"clip-{k}": Said(said, []) for k, said in enumerate((["a"], ["b", "a"], ["b"]))}).labels,
            )
    assert cli.main(["finetune", "--config", str(config), "--out", str(tmp_path / "out"), *change]) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("equiav finetune: ")]
    assert said in line


def test_of_a_longer_input_the_positions_of_the_first_columns_are_kept(tmp_path):
    longer = from_dict(ModelSettings, {"model": {"size": "tiny", "depth": 1, "spectrogram_frames": 512}}, "test")
    shorter = from_dict(
        ModelSettings,
        {
            "model": {"size": "tiny", "depth": 1, "spectrogram_frames": 128, "spectrogram_mels": 64},
            "augment": {"max_mask_frames": 40},
        },
        "test",
    )
    weights = EquiAV(longer.model, longer.objective)
    weights.init_weights(0)
    save_model(tmp_path / "long", weights.state_dict(), longer)
    taken = initial_weights(str(tmp_path / "long"), shorter, 0).state["audio.encoder.positions"]
    own = EquiAV(shorter.model, shorter.objective)
    own.init_weights(0)
    assert torch.equal(taken, own.audio.encoder.positions)  # of sines and cosines by row and column
