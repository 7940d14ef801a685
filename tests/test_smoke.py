"""`equiav smoke`: retrieval far above chance on clips it has not seen, and the parts that this rests on."""

import re
import subprocess
import sys
from itertools import islice

import pytest
from rich.progress import Progress

from equiav.config import from_dict
from equiav.smoke import HELD_OUT_FROM, SmokeConfig, batches, generate, write_report


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
def clips():
    with Progress(disable=True) as progress:
        return generate(small(), progress)


def test_held_out_clips_are_others(clips):
    names = [clip.name for clip in clips]
    assert len(set(names)) == len(names) == 22
    assert names[:12] == [f"synthetic-0-{k}" for k in range(12)]
    assert names[12:] == [f"synthetic-0-{HELD_OUT_FROM + k}" for k in range(10)]


def test_batches_pair_every_clip_with_its_own_frame_and_sound(clips):
    training, config = clips[:12], small()
    epochs = list(islice(batches(training, config), 6))  # two epochs of three
    assert [b.epoch for b in epochs] == [0, 0, 0, 1, 1, 1]
    orders = [[int(k) for b in epochs[i : i + 3] for k in b.samples] for i in (0, 3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1]
    for b in epochs:
        for row, sample in enumerate(b.samples.tolist()):
            assert (b.waveform[row].numpy() == training[sample].audio).all()
            assert b.lengths[row] == len(training[sample].audio)
    again = next(batches(training, config))
    assert (again.frames == epochs[0].frames).all()


def test_report_states_chance_among_the_held_out(tmp_path):
    config = small(out=str(tmp_path))
    retrieval = {f"{d} R@{k}": (20.0, 1.0) for d in ("image to audio", "audio to image") for k in (1, 5, 10)}
    rows = [{"loss_inter": 1.0, "accuracy_inter": 0.5, "loss": 1.0, "lr": 0.1}] * 3
    text = write_report(config, rows, retrieval, {"in all": 1.0})
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
