"""Each dataset of the paper's tables as it lies on a disk, a few clips of it: packed, labelled and fine-tuned by the commands of
docs/downstream.md, with its recipe at a tiny size; and each line of a recipe changes something."""

import json
from importlib import resources

import numpy as np
import pytest
import soundfile
import yaml

from equiav import cli
from equiav.config import FinetuneConfig, recipe_names
from equiav.data.clips import encode_frame
from tests.videos import ramp, tones, write_video

PITCHES = {0: 300, 1: 1200, 2: 3000}
LEFT = ("metrics.jsonl", "model/model.safetensors", "model/results.json", "model/results.md")
SHORT = ["--data.min_seconds", "0.3"]


def sound(path, kind, seconds=1.0, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.zeros(round(seconds * rate), np.int16) if kind is None else tones(seconds, rate, [PITCHES[kind]])[0]
    soundfile.write(path, wave, rate)


def video(path, kind, audio=True):
    path.parent.mkdir(parents=True, exist_ok=True)

    def picture(share, size):
        frame = ramp(share, size)
        frame[:, :, kind] = 250
        return frame

    write_video(
        path,
        seconds=2.0,
        size=(64, 64),
        fps=5,
        picture=picture,
        sound="aac" if audio else None,
        pitches=(PITCHES[kind],),
    )


def typed(*words):
    assert cli.main([str(word) for word in words]) == 0, words


def pack(source, to, *more):
    typed("pack", source, "--to", to, "--short_side", "64", "--frames", "3", "--processes", "1", *more)


# ---- the datasets. Each: makes its files, packs and labels them -> what `equiav finetune` is told of them


def audioset20k(root):
    """CAV-MAE's lists, and its file of classes."""
    (root / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00088,"Gargling"\n'
    )
    mids = ["/m/09x0r", "/m/05zppz", "/t/dd00088"]
    for part, first in (("train", 0), ("eval", 6)):
        entries = []
        for k in range(first, first + 6):
            name = f"-{k}abc_defgh"
            sound(root / "audio" / f"{name}.wav", k % 3, 2.0)
            for j in range(3):
                path = root / "video" / f"frame_{j}" / f"{name}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_frame(ramp((k % 3 + j) / 6, (64, 64)), 90))
            labels = ",".join([mids[k % 3], mids[0]] if k % 3 else [mids[0]])
            entries.append({"video_id": name, "wav": f"audio/{name}.wav", "video_path": "video", "labels": labels})
        (root / f"{part}.json").write_text(json.dumps({"data": entries}))
        pack(root / f"{part}.json", root / part)
        typed("label", root / part, root / f"{part}.json", "--classes", root / "class_labels_indices.csv")
    return ["--stream.url", root / "train", "--tune.test_url", root / "eval"]


def audioset2m(root):
    """Videos called by their ids, and the segments files."""
    mids = ["/m/09x0r", "/m/05zppz", "/t/dd00088"]
    head = "# Segments csv created\n# num_ytids=6\n# YTID, start_seconds, end_seconds, positive_labels\n"
    for part, first in (("unbalanced_train_segments", 0), ("eval_segments", 6)):
        rows = ""
        for k in range(first, first + 6):
            name, kind = f"--{k}xyz_12345", min(k % 6, 2)  # one is common
            video(root / "videos" / f"{name}.mp4", kind)
            rows += f'{name}, 30.000, 40.000, "{mids[kind]}{"," + mids[0] if kind == 1 else ""}"\n'
        (root / f"{part}.csv").write_text(head + rows)
    pack(root / "videos", root / "clips")
    typed("label", root / "clips", root / "unbalanced_train_segments.csv", root / "eval_segments.csv")
    return ["--stream.url", root / "clips", "--tune.test_on", "eval_segments"]


def vggsound(root):
    """Videos called by id and start; the one file, whose class names have commas."""
    classes = ["people marching", "waterfall burbling", "chainsawing trees, loudly"]
    rows = ""
    for k in range(12):
        kind = min(k % 6, 2)
        video(root / "videos" / f"-{k}wxyz_abcde_{10 * k:06d}.mp4", kind)
        rows += f'-{k}wxyz_abcde,{10 * k},"{classes[kind]}",{"test" if k < 6 else "train"}\n'
    (root / "vggsound.csv").write_text(rows)
    pack(root / "videos", root / "clips")
    typed("label", root / "clips", root / "vggsound.csv")
    return ["--stream.url", root / "clips", "--tune.test_on", "test"]


def esc50(root):
    rows = "filename,fold,target,category,esc10,src_file,take\n"
    for k in range(10):
        name = f"{k % 5 + 1}-{100032 + k}-A-{k % 2}.wav"
        sound(root / "ESC-50" / "audio" / name, k % 2, 5.0, 44100)
        rows += f"{name},{k % 5 + 1},{k % 2},{['dog', 'rooster'][k % 2]},True,{100032 + k},A\n"
    (root / "esc50.csv").write_text(rows)
    pack(root / "ESC-50" / "audio", root / "clips", "--modality", "audio")
    typed("label", root / "clips", root / "esc50.csv")
    return ["--stream.url", root / "clips", "--tune.test_on", "1"]


def spc1(root):
    """Thirty words and noise become twelve classes: ten words, other words, silence."""
    folder = root / "speech_commands"
    for word, kind in (("yes", 0), ("no", 1), ("bed", 2), ("cat", 2)):
        for k in range(4):
            sound(folder / word / f"0a7c2a8d_nohash_{k}.wav", kind, 0.4 if k == 3 else 1.0)
    for k in range(4):  # cut from the noises, by --clip_seconds 1 or before
        sound(folder / "_background_noise_" / f"white_noise-{k}.wav", None)
    (root / "testing_list.txt").write_text("".join(f"{w}/0a7c2a8d_nohash_0.wav\n" for w in ("yes", "no", "bed", "cat")))
    (root / "validation_list.txt").write_text("yes/0a7c2a8d_nohash_1.wav\n")
    (root / "classes.txt").write_text("yes\nno\n_unknown_\n_background_noise_\n")
    pack(folder, root / "clips", "--modality", "audio", *SHORT, "--data.silence", "0")
    lists = [root / "testing_list.txt", root / "validation_list.txt"]
    typed("label", root / "clips", "folders", *lists, "--classes", root / "classes.txt", "--other", "_unknown_")
    return ["--stream.url", root / "clips", "--tune.test_on", "testing_list"]


def fsd50k(root):
    truth = root / "FSD50K.ground_truth"
    truth.mkdir()
    (truth / "vocabulary.csv").write_text("0,Cat,/m/01yrx\n1,Purr,/m/02yds9\n")
    dev, evaluation = "fname,labels,mids,split\n", "fname,labels,mids\n"
    for k in range(8):
        label = '"Purr,Cat","/m/02yds9,/m/01yrx"' if k % 2 else "Cat,/m/01yrx"
        kind = "eval" if k < 3 else "dev"
        sound(root / f"FSD50K.{kind}_audio" / f"{64760 + k}.wav", k % 2, 0.5 if k in (2, 7) else 2.0, 44100)
        if kind == "dev":
            dev += f"{64760 + k},{label},{'val' if k == 3 else 'train'}\n"
        else:
            evaluation += f"{64760 + k},{label}\n"
    (truth / "dev.csv").write_text(dev)
    (truth / "eval.csv").write_text(evaluation)
    pack(root, root / "clips", "--modality", "audio", *SHORT)
    typed("label", root / "clips", truth / "dev.csv", truth / "eval.csv", "--classes", truth / "vocabulary.csv")
    return ["--stream.url", root / "clips", "--tune.test_on", "eval"]


def ucf101(root):
    rows = {"trainlist01": "", "testlist01": "", "trainlist02": "", "testlist02": ""}
    for k in range(8):
        word = ("ApplyEyeMakeup", "Archery")[k % 2]
        name = f"{word}/v_{word}_g{k + 1:02d}_c01.avi"
        video(root / "UCF-101" / name, k % 2, audio=False)
        for split in (1, 2):
            part = "testlist" if k // 2 == split else "trainlist"
            rows[f"{part}0{split}"] += name + (f" {k % 2 + 1}\n" if part == "trainlist" else "\n")
    for part, text in rows.items():
        (root / f"{part}.txt").write_text(text)
    (root / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    pack(root / "UCF-101", root / "clips", "--modality", "image")
    typed("label", root / "clips", *(root / f"{part}.txt" for part in rows), "--classes", root / "classInd.txt")
    return ["--stream.url", root / "clips", "--tune.train_on", "trainlist02", "--tune.test_on", "testlist02"]


def hmdb51(root):
    splits = root / "testTrainMulti_7030_splits"
    splits.mkdir()
    for kind, word in enumerate(("brush_hair", "sit")):
        rows = ["", "", ""]
        for k in range(5):
            name = f"#20_Rhett (a)_{word}_u_nm_np1_{k}.avi"
            video(root / "hmdb51" / word / name, kind, audio=False)
            for split in range(3):
                rows[split] += f"{name} {1 if k < 3 else 2 if k == 3 else 0} \n"
        for split in range(3):
            (splits / f"{word}_test_split{split + 1}.txt").write_text(rows[split])
    pack(root / "hmdb51", root / "clips", "--modality", "image")
    typed("label", root / "clips", *sorted(splits.iterdir()))
    return ["--stream.url", root / "clips", "--tune.train_on", "split1-train", "--tune.test_on", "split1-test"]


def kinetics400(root):
    head = "label,youtube_id,time_start,time_end,split\n"
    for part, first in (("train", 0), ("val", 6)):
        rows = ""
        for k in range(first, first + 6):
            word = ("abseiling", "air drumming")[k % 2]
            video(root / "k400" / part / word / f"-{k}YTwq0_73Y_{k:06d}_{k + 10:06d}.mp4", k % 2, audio=False)
            rows += f"{word},-{k}YTwq0_73Y,{k},{k + 10},{part}\n"
        (root / f"{part}.csv").write_text(head + rows)
    pack(root / "k400", root / "clips", "--modality", "image")
    typed("label", root / "clips", root / "train.csv", root / "val.csv")
    return ["--stream.url", root / "clips", "--tune.test_on", "val"]


DATASETS = {
    "tune_audioset20k": (audioset20k, 6, 6, "mAP"),
    "tune_audioset2m": (audioset2m, 6, 6, "mAP"),
    "tune_vggsound": (vggsound, 6, 6, "accuracy"),
    "tune_esc50": (esc50, 8, 2, "accuracy"),
    "tune_spc1": (spc1, 16, 4, "accuracy"),
    "tune_fsd50k": (fsd50k, 5, 3, "mAP"),
    "tune_ucf101": (ucf101, 6, 2, "accuracy"),
    "tune_hmdb51": (hmdb51, 6, 2, "accuracy"),
    "tune_kinetics400": (kinetics400, 6, 6, "accuracy"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """name of a recipe -> what to tell `equiav finetune` of its dataset; made once."""
    made = {}

    def of(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = [str(word) for word in DATASETS[name][0](root)]
        return made[name]

    return of


def small(name):
    """A recipe's values, at a size for these tests."""
    values = yaml.safe_load((resources.files("equiav.config.recipes") / f"{name}.yaml").read_text())
    values["model"] |= {"size": "tiny", "depth": 2}
    values["train"] |= {"batch_size": 8, "micro_batch": 4}
    values["tune"] |= {"epochs": 2, "warmup_epochs": min(1, values["tune"]["warmup_epochs"])}
    values["stream"] = {"workers": 0, "max_bad": 1.0}
    return values


def run(values, words, folder):
    """-> what it leaves."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    typed("finetune", "--config", folder / "config.yaml", "--out", folder / "run", *words)
    out = folder / "run"
    return {name: (out / name).read_bytes() for name in LEFT}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_from_a_datasets_own_files_to_the_papers_row(name, told, tmp_path):
    _, learned, tested, measure = DATASETS[name]
    left = run(small(name), told(name), tmp_path / "one")
    clips = [json.loads(line)["clips"] for line in left["metrics.jsonl"].splitlines()]
    assert sum(clips) == 2 * learned
    said = json.loads(left["model/results.json"])
    assert (said["clips"], said["of"], said["bad"]) == (tested, tested, {})
    assert 0 <= said[measure] <= 1
    assert ("accuracy" in said) == (measure == "accuracy")
    table = left["model/results.md"].decode()
    assert "| EquiAV, the paper | not reported" not in table
    assert f"{measure}, %" in table
    number = next(line for line in table.splitlines() if "the paper" in line).split("|")[2].split()[0]
    text = (resources.files("equiav.config.recipes") / f"{name}.yaml").read_text()
    assert number in text.partition("\nmodel:")[0]  # as its own head says


def test_there_is_one_for_each():
    assert sorted(DATASETS) == recipe_names(FinetuneConfig)


OTHER = {
    "model.spectrogram_frames": 192,
    "data.audio_mean": -3.0,
    "data.audio_std": 2.0,
    "data.min_seconds": 0.8,
    "data.silence": 1e-4,
    "train.batch_size": 4,
    "train.micro_batch": 3,
    "train.lr": 3e-3,
    "train.lr_start": 1e-4,
    "train.weight_decay": 0.1,
    "train.betas": [0.5, 0.6],
    "train.clip": 1e-3,
    "tune.modality": "audio",
    "tune.epochs": 3,
    "tune.warmup_epochs": 0,
    "tune.balance": False,
    "tune.mixup": 1.0,
    "tune.drop_path": 0.9,
    "tune.time_roll": False,
    "tune.test_frames": 1,
    "tune.benchmark": "",
}
NOT_HERE = {
    "model.size": "tiny is put in its place",
    "augment.max_mask_frames": "of pretraining: only checked against the input's length",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tune_vggsound", "tune_spc1", "tune_esc50"])
def test_each_line_changes_something(name, told, tmp_path):
    values = small(name)
    plain = run(values, told(name), tmp_path / "plain")
    assert run(values, told(name), tmp_path / "again") == plain
    own = yaml.safe_load((resources.files("equiav.config.recipes") / f"{name}.yaml").read_text())
    fields = {f"{section}.{field}" for section, of in own.items() for field in of}
    for field in sorted(fields - NOT_HERE.keys()):
        section, _, last = field.partition(".")
        other = {"one": "many", "many": "one"}[values["tune"]["loss"]] if field == "tune.loss" else OTHER[field]
        other = "image" if field == "tune.modality" and name == "tune_vggsound" else other
        if field == "tune.modality" and name != "tune_vggsound":
            continue  # its clips have no other
        if field == "tune.warmup_epochs" and not values["tune"]["warmup_epochs"]:
            other = 1
        assert values[section][last] != other, field
        changed = run({**values, section: {**values[section], last: other}}, told(name), tmp_path / field)
        assert changed != plain, field


def test_every_line_of_every_recipe_is_tried():
    fields = set()
    for name in DATASETS:
        values = yaml.safe_load((resources.files("equiav.config.recipes") / f"{name}.yaml").read_text())
        fields |= {f"{section}.{field}" for section, of in values.items() for field in of}
    assert fields == OTHER.keys() | NOT_HERE.keys() | {"tune.loss"}
    tried = set()
    for name in ("tune_vggsound", "tune_spc1", "tune_esc50"):
        values = yaml.safe_load((resources.files("equiav.config.recipes") / f"{name}.yaml").read_text())
        tried |= {f"{section}.{field}" for section, of in values.items() for field in of}
    assert tried == fields
