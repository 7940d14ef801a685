"""docs/guide.md, as it is written: from real videos to a report, an exported model, a video with its heat map."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from equiav import cli
from tests.videos import ramp, write_video

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"
# What stands in the guide -> what stands for it here.
HERE = {
    "s3://bucket/clips": "clips",
    "s3://bucket/labelled": "labelled",
    "s3://bucket/test": "test",
    "s3://bucket/runs/one": "kept",
    "~/clips": "videos",
}
SMALL = ["--stream.workers", "0"]
MORE = {  # what this machine needs beside: a tiny model, few steps
    "pack": ["--frames", "4", "--short_side", "64", "--processes", "1"],
    "plan": ["--config", "smoke", "--device", "cpu"],
    "pretrain": [
        "--stream.url",
        "clips",
        "--config",
        "smoke",
        "--train.steps",
        "6",
        "--train.batch_size",
        "8",
        "--train.warmup_steps",
        "1",
        *SMALL,
    ],
    "finetune": ["--config", "smoke", "--tune.epochs", "1", "--train.batch_size", "8", *SMALL],
    "eval": ["--examples", "2", "--batch", "4", *SMALL],
    "export": ["--formats", "torch"],
}


def commands():
    """Of the guide's blocks, in their order: `equiav ...`."""
    text = GUIDE.read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        line.partition("  #")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if line.startswith("equiav ")
    ]


def typed(line):
    line = line.replace("--weights mae_pretrain_vit_base.pth ", "").replace("--clip_seconds 10", "--clip_seconds 2.5")
    for name in sorted(HERE, key=len, reverse=True):
        line = line.replace(name, HERE[name])
    words = shlex.split(line)[1:]
    if words[0] in ("pretrain", "plan"):  # a recipe in place of the one that `plan` writes for this machine
        words = [
            word for k, word in enumerate(words) if word not in ("--config", "run.yaml") or words[k - 1] == "--write"
        ]
        words = [word for k, word in enumerate(words) if not (word == "cuda" or word == "--device")]
    return [*words, *MORE.get(words[0], [])]


def test_every_command_of_the_guide_is_one():
    found = [line.split()[1] for line in commands()]
    assert found == ["pack", "show", "show", "verify", "plan", "pretrain", "eval", "eval", "report", "finetune", "embed",
                     "search", "score", "localize", "predict", "export"]  # fmt: skip


@pytest.mark.slow
def test_the_guide_from_videos_to_a_report(tmp_path, monkeypatch, capsys):
    """Odd rates of frames, pictures on their side, 5.1 sound, 8 kHz among them; without sound or picture: named, left out."""
    monkeypatch.chdir(tmp_path)
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)

    def one(name, **more):
        pitches = tuple(float(x) for x in rng.uniform(200, 2000, more.pop("channels", 2)))
        write_video(videos / name, **({"seconds": 6.0, "size": (96, 64), "picture": ramp, "pitches": pitches} | more))

    for k in range(6):
        one(f"v{k}.mp4", fps=(10, 24, 30, 12, 5, 15)[k])
    one("odd.mp4", fps=7)
    one("surround.mkv", channels=6, sound="flac")
    one("low.mp4", rate=8000)
    one("tall.mp4", size=(64, 128))
    one("mute.mp4", sound=None)
    one("dark.m4a", video=None)
    (videos / "notes.txt").write_text("no video")

    def run(line, status=0):
        assert cli.main(typed(line)) == status, line
        return capsys.readouterr().out

    lines = commands()
    run(lines[0])
    for name in ("test", "labelled"):
        assert cli.main(typed(lines[0].replace("s3://bucket/clips", name))) == 0
    rejected = [json.loads(row) for row in Path("clips/rejected.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rejected} == {"no sound"}
    assert all(row["key"].startswith("mute") for row in rejected)
    passed = Path("clips/passed-over.jsonl").read_text()
    assert "notes.txt" in passed
    HERE["KEY"] = json.loads(next(Path("clips").glob("*.offsets")).read_text().splitlines()[0])[0]
    for line in lines[1:6]:
        run(line)
    assert Path("clip.png").is_file()
    assert yaml.safe_load(Path("run.yaml").read_text())["train"]["steps"] > 0
    for name in ("test", "labelled"):
        with Path(f"{name}.csv").open("w") as file:
            file.write("key,label\n")
            for offsets in sorted(Path(name).glob("*.offsets")):
                for row in offsets.read_text().splitlines():
                    key = json.loads(row)[0]
                    file.write(f"{key},{'odd' if 'odd' in key or 'v1' in key else 'even'}\n")
        assert cli.main(["label", name, f"{name}.csv"]) == 0
    write_video(tmp_path / "my.mp4", seconds=6)
    for line in lines[6:]:
        run(line)
    page = Path("runs/one/report.html").read_text()
    for part in ("<h2>Learning", "<h2>Zero-shot retrieval", "<h2>Examples", "finished"):
        assert part in page
    assert np.isfinite(np.load("my.npz")["audio"]).all()
    for made in ("heat.mp4", "exported/README.md", "exported/audio.pt2"):
        assert Path(made).stat().st_size > 0
    assert cli.main(["report", "runs/one", "runs/tuned", "--out", "both.html"]) == 0
