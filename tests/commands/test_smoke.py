"""`equiav smoke`: retrieval far above chance on clips it has not seen, and the parts that this rests on."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from rich.progress import Progress

from equiav.commands.smoke import HELD_OUT_FROM, SmokeConfig, evaluate, pack_clips, take_folder, write_report
from equiav.config import ConfigError, from_dict
from equiav.data.clips import decode_frame, encode_frame
from equiav.data.local_s3 import LocalS3
from equiav.data.stream import batches, open_stream
from equiav.data.synthetic import World
from equiav.evaluate.retrieval import Pairs, zero_shot_retrieval
from equiav.model import EquiAV
from equiav.train.run import Done
from streaming import Stats


def small(**values):
    values = {
        "clips": 12,
        "held_out": 10,
        "model": {"size": "tiny"},
        "train": {"batch_size": 4, "warmup_steps": 0},
        **values,
    }
    return from_dict(SmokeConfig, values, "test")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with LocalS3(tmp_path_factory.mktemp("store")) as s3, Progress(disable=True) as progress:
        pack_clips(small(), s3, progress)
        yield s3


def stream_config(tmp_path):
    config = small()
    return replace(config, stream=replace(config.stream, url="s3://smoke/train", cache=tmp_path, workers=0))


def as_packed(frame):
    return decode_frame(encode_frame(frame), "s")


def test_held_out_clips_are_others(store, tmp_path):
    keys = {}
    for name in ("train", "held-out"):
        folder = store.folder / "smoke" / name
        lines = [line for path in sorted(folder.glob("*.offsets")) for line in path.read_text().splitlines()]
        keys[name] = [json.loads(line)[0] for line in lines]
    assert keys["train"] == [f"synthetic-0-{k}" for k in range(12)]
    assert keys["held-out"] == [f"synthetic-0-{HELD_OUT_FROM + k}" for k in range(10)]


def test_the_stream_pairs_every_clip_with_its_own_frame_and_sound(store, tmp_path):
    config = stream_config(tmp_path)
    world = World(0, 64, seconds=2.56)
    with open_stream(config, options=store.options) as loader:
        epochs = list(islice(batches(loader), 6))  # two epochs of three
    assert [b.epoch for b in epochs] == [0, 0, 0, 1, 1, 1]
    for b in epochs:
        for row, sample in enumerate(b.samples.tolist()):
            clip = world.clip(sample)
            assert (b.waveform[row, : b.lengths[row]].numpy() == clip.audio[: b.lengths[row]]).all()
            frame = b.frames[row].permute(1, 2, 0).numpy()
            assert any(np.array_equal(frame, as_packed(other)) for other in clip.frames)


@pytest.mark.slow
def test_what_is_evaluated_are_the_held_out_clips(store, tmp_path):
    """The smoke run's retrieval is that of their middle frames and their sounds."""
    config = replace(small(out=str(tmp_path)), stream=stream_config(tmp_path).stream)
    model = EquiAV(config.model, config.objective)
    model.init_weights(0)
    found = evaluate(config, model.eval(), store)
    assert set(found) == {"retrieval", "similarity", "centroid", "localize", "attention", "examples"}
    clips = [World(0, 64, seconds=2.56).clip(HELD_OUT_FROM + k) for k in range(10)]
    frames = torch.from_numpy(np.stack([as_packed(clip.frames[5]) for clip in clips])).permute(0, 3, 1, 2)
    waveform = torch.from_numpy(np.stack([clip.audio for clip in clips]))
    pairs = Pairs(frames, waveform, torch.full((10,), waveform.shape[1]))
    for name, (mean, half) in zero_shot_retrieval(model, config, pairs).items():
        assert found["retrieval"][name] == {"mean": pytest.approx(mean), "half spread": pytest.approx(half)}
    assert {one["name"] for one in found["examples"]["examples"]} == {
        f"synthetic-0-{HELD_OUT_FROM + k}" for k in range(10)
    }


def test_of_an_ablation_what_there_is_is_evaluated(store, tmp_path):
    config = small(out=str(tmp_path), objective={"intra": "none", "inter_on": "original"})
    config = replace(config, stream=stream_config(tmp_path).stream)
    model = EquiAV(config.model, config.objective)
    model.init_weights(0)
    assert set(evaluate(config, model.eval(), store)) == {"retrieval", "localize", "examples"}


def test_report_states_chance_among_the_held_out(tmp_path):
    config = small(out=str(tmp_path))
    retrieval = {
        f"{d} R@{k}": {"mean": 20.0, "half spread": 1.0}
        for d in ("image to audio", "audio to image")
        for k in (1, 5, 10)
    }
    rows = [{"loss_inter": 1.0, "accuracy_inter": 0.5, "loss": 1.0, "lr": 0.1}] * 3
    stats = Stats(Counter(requests=3, retries=1, bytes=1 << 20), [0.5], [100], 2.0, 0)
    text = write_report(config, rows, retrieval, {"in all": 1.0}, Done(None, 0, stats, Counter(checksum=2), None))
    assert "100 clips decoded, 5.00 ms each; 2 quarantined. 3 requests to S3, 1 retries, 1.0 MiB." in text
    assert "| chance | 10.00 | 50.00 | 100.00 | 1x |" in text
    assert "| image to audio | 20.0 ± 1.0 | 20.0 ± 1.0 | 20.0 ± 1.0 | 2.0x |" in text


@pytest.mark.slow
def test_retrieval_is_ten_times_chance(tmp_path, device):
    command = [sys.executable, "-m", "equiav", "smoke", "--out", str(tmp_path / "run"), "--device", device]
    subprocess.run(command, check=True)
    report = (tmp_path / "run" / "report.md").read_text()
    over_chance = [float(value) for value in re.findall(r"to (?:audio|image) .*\| ([\d.]+)x \|", report)]
    assert len(over_chance) == 2
    assert min(over_chance) >= 10, report


def test_what_others_have_made_is_not_removed(tmp_path):
    """A run's folder; one of its own it takes again."""
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "one" / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="holds something that `equiav smoke` did not make"):
        take_folder(tmp_path / "one")
    assert (tmp_path / "one" / "metrics.jsonl").exists()
    for _ in range(2):
        take_folder(tmp_path / "two")
        (tmp_path / "two" / "report.md").write_text("x")
    (tmp_path / "empty").mkdir()
    take_folder(tmp_path / "empty")
