"""What a run tells of itself costs it nothing, and is true to the end."""

import json
import os

from tests.train.test_pretrain import Run

STEPS = ["--train.steps", "3", "--train.warmup_steps", "1"]


def test_a_folder_that_cannot_be_used_costs_the_numbers_alone(run_config, tmp_path):
    (tmp_path / f"equiav-{os.getuid()}").write_text("in the way")
    env = {"TMPDIR": str(tmp_path)}
    text = Run(run_config, tmp_path / "out", None, "--metrics.port", "9", *STEPS, env=env).end()
    assert "no metrics are served" in text
    (tmp_path / f"equiav-{os.getuid()}").unlink()
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / f"equiav-{os.getuid()}").symlink_to(tmp_path / "open")
    text = Run(run_config, tmp_path / "two", None, "--metrics.port", "9", *STEPS, env=env).end()
    assert "is not a folder of yours alone; remove it, or set TMPDIR" in text
    assert list((tmp_path / "open").iterdir()) == []


def test_the_summary_is_of_who_did_the_steps(run_config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.part").mkdir()  # it cannot be written
    text = Run(run_config, out, None, *STEPS).end()
    assert "summary.json cannot be written" in text
    assert (out / "model" / "config.json").exists()
    (out / "summary.part").rmdir()
    two = tmp_path / "two"
    Run(run_config, two, None, *STEPS).end()
    before = json.loads((two / "summary.json").read_text())
    assert before["equiav_step"] == 3
    Run(run_config, two, None, *STEPS).end()  # it is finished
    assert json.loads((two / "summary.json").read_text()) == before


def test_of_a_head_that_is_not_trained_nothing_is_told(run_config, tmp_path):
    Run(run_config, tmp_path / "out", None, "--objective.weight_inter", "0", *STEPS).end()
    numbers = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "equiav_effective_rank" not in numbers
    assert set(numbers["equiav_loss_over_chance_ratio"]) == {"intra_audio", "intra_image"}
    assert "effective_rank_audio" in (tmp_path / "out" / "metrics.jsonl").read_text()
