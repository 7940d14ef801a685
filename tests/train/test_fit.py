"""`equiav plan --stream.url`: settings that fit, and with which a run begins."""

import pytest
import yaml

from equiav import cli
from equiav.config import RunConfig, load
from tests.train.test_pretrain import Run


@pytest.mark.slow
def test_settings_that_fit_a_small_dataset(run_config, tmp_path, capsys):
    url = yaml.safe_load(run_config.read_text())["stream"]["url"]
    path = tmp_path / "run.yaml"
    typed = [
        "plan",
        "--model.size",
        "tiny",
        "--model.depth",
        "1",
        "--stream.url",
        url,
        "--write",
        str(path),
        "--price",
        "3",
    ]
    assert cli.main(typed) == 0
    told = capsys.readouterr().out
    assert (
        "26 clips: batches of 4, 140 steps (20 epochs), of which 14 to warm up; learning rate 0.002; micro-batches of 4"
        in told
    )
    assert "s here, in one process: the run would take" in told
    assert "at 3 an hour" in told
    assert "a batch this small has little to compare with" in told
    config, _ = load(RunConfig, "pretrain", ["--config", str(path)])
    assert (config.train.batch_size, config.train.steps, config.stream.url) == (4, 140, url)
    assert -14 < config.data.audio_mean < -8
    assert config.model.depth == 1  # what was asked for is the run's, too
    text = Run(path, tmp_path / "out", None, "--train.steps", "20", "--checkpoint.every_steps", "10").end()
    assert "spectrograms have mean" not in text
    assert "each clip will be seen" not in text
    assert cli.main(typed) == 2
    assert "which exists, expected a file that does not" in capsys.readouterr().err
    assert (
        cli.main([*typed[:5], "--keep", "--train.batch_size", "8", "--train.micro_batch", "4", "--stream.url", url])
        == 0
    )
    assert "26 clips: batches of 8, 147,900 steps" in capsys.readouterr().out
    assert cli.main(["plan", "--keep"]) == 2
    assert "keep is True, expected a dataset to try the settings with (--stream.url)" in capsys.readouterr().err
    assert cli.main(["plan", "--write", str(tmp_path / "other.yaml")]) == 2
    assert "expected a dataset to fit the settings to (--stream.url)" in capsys.readouterr().err
