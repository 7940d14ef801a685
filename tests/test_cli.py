"""The commands as a user types them."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import yaml

from equiav import cli
from equiav.config import ModelSettings, from_dict
from equiav.model import EquiAV
from equiav.weights import save_model
from tests.forks import APART


def equiav(*argv, **kwargs):
    return subprocess.run([sys.executable, "-m", "equiav", *argv], capture_output=True, text=True, **kwargs)


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)
    assert cli.main([]) == 2


def test_unknown_command_is_named(capsys):
    assert cli.main(["pretrian"]) == 2
    assert capsys.readouterr().err == "equiav: no command 'pretrian'; did you mean pretrain?\n"
    assert cli.main(["zzz"]) == 2
    assert "the commands are smoke, pretrain" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_print_config_shows_what_would_run(capsys, command):
    assert cli.main([command, "--print-config", *(["x.pth"] if command == "import" else [])]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    if command == "eval":
        assert (settings["what"], settings["weights"]) == ("retrieval", "")
    elif command in ("pack", "index", "verify"):
        assert settings["processes"] >= 1
    elif command == "label":
        assert settings["labels"] == []
    elif command == "diff":
        assert settings == {"one": "", "two": ""}
    elif command == "export":
        assert (settings["weights"], settings["formats"]) == ("", ["torch", "onnx"])
    elif command == "report":
        assert (settings["runs"], settings["title"]) == ([], "")
    elif command == "search":
        assert (settings["file"], settings["top"]) == ("", 10)
    elif command == "localize":
        assert (settings["file"], settings["out"]) == ("", "heat.mp4")
    elif command in ("embed", "score", "predict"):
        assert (settings["files"], settings["weights"]) == ([], "")
    elif command == "top":
        assert settings == {"where": [], "seconds": 2.0, "once": False}
    else:
        assert settings["model"]["width"] == (64 if command == "smoke" else 768)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command):
    done = equiav(command, "--help")
    assert done.returncode == 0
    assert f"usage: equiav {command}" in done.stdout


def test_a_mistake_is_one_line_and_a_status(tmp_path):
    (tmp_path / "run.yaml").write_text("model:\n  widht: 3\n")
    done = equiav("plan", "--config", "run.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "equiav plan: run.yaml: unknown field model.widht; did you mean model.width?\n"


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "2.15.0+cpu"])
def test_another_torch_is_one_clear_line(monkeypatch, capsys, version):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else real(name))
    assert cli.main(["plan"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"equiav: torch {version} is installed, expected 2.11 to 2.13")
    assert "-c constraints.txt" in message
    assert message.count("\n") == 1


def test_a_torchaudio_that_does_not_load_is_one_clear_line(tmp_path):
    """As beside a torch built for CPU only: the import of torchaudio fails for want of a library."""
    (tmp_path / "torchaudio.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')")
    done = equiav("plan", env={"PYTHONPATH": str(tmp_path), **APART})
    assert done.returncode == 1
    assert done.stderr.startswith("equiav: torchaudio does not load beside torch")
    assert "libc10_cuda.so" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_prints_its_tables(capsys):
    assert cli.main(["plan", "--model.size", "tiny", "--world_size", "4"]) == 0
    printed = capsys.readouterr().out
    for title in ("Parameters, tiny", "Multiply-adds per sample", "Appendix Table B", "one of 4 processes"):
        assert title in printed


@pytest.mark.slow
def test_smoke_at_its_smallest(tmp_path, capsys):
    """Every part of the command, in seconds; the whole run is tests/test_smoke.py."""
    argv = [
        "smoke",
        "--clips",
        "16",
        "--held_out",
        "10",
        "--out",
        str(tmp_path / "run"),
        "--train.steps",
        "3",
        "--train.batch_size",
        "8",
        "--train.warmup_steps",
        "1",
    ]
    for _ in range(2):  # a second run takes the first one's place
        assert cli.main(argv) == 0
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    report = (run / "report.md").read_text()
    for part in (
        "Zero-shot retrieval among 10 held-out clips",
        "R@1 over chance",
        "similarity audio",
        "gain image",
        "loss inter",
    ):
        assert part in report
    assert "<h2>Examples</h2>" in (run / "report.html").read_text()
    assert json.loads((run / "report.data.json").read_text())["runs"][0]["verdict"][0] == "finished"
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 3
    assert (run / "model" / "model.safetensors").is_file()
    assert "report.html" in capsys.readouterr().out


def test_smoke_refuses_a_gpu_that_is_not_there(capsys, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["smoke", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "device is cuda, expected cpu: this torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "smoke"])
def test_what_print_config_prints_can_be_read(command, tmp_path, capsys):
    assert cli.main([command, "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(printed := capsys.readouterr().out)
    assert cli.main([command, "--config", str(tmp_path / "printed.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("status", [None, 1])
def test_whose_peer_is_gone_says_so_in_a_line(status, monkeypatch, capsys):
    text = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
    error = RuntimeError(text if status else "shapes differ")

    def fail(name, config):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    if status is None:
        with pytest.raises(RuntimeError, match="shapes differ"):
            cli.main(["pretrain", "--stream.url", "x"])
    else:
        assert cli.main(["pretrain", "--stream.url", "x"]) == status
        assert capsys.readouterr().err == f"equiav pretrain: another process of the run is gone: {text}\n"


def test_what_a_model_folder_knows_is_taken_and_told(tmp_path, capsys, monkeypatch):
    """Its size and its inputs, for fine-tuning and probes; another is given on purpose."""
    settings = from_dict(
        ModelSettings, {"model": {"size": "tiny"}, "data": {"audio_mean": -10.3, "audio_std": 3.9}}, "test"
    )
    model = EquiAV(settings.model, settings.objective)
    model.init_weights(1)
    save_model(tmp_path / "run" / "model", model.state_dict(), settings)
    for command in ("finetune", "probe"):
        assert cli.main([command, "--weights", str(tmp_path / "run"), "--print-config"]) == 0
        out, err = capsys.readouterr()
        values = yaml.safe_load(out)
        assert (values["model"]["size"], values["model"]["heads"]) == ("tiny", settings.model.heads)
        assert (values["data"]["audio_mean"], values["data"]["audio_std"]) == (-10.3, 3.9)
        assert f"as the model at {tmp_path / 'run'} has them: model.size tiny, data.sample_rate 16000" in err
        other = ["--data.audio_mean", "-3", "--model.size", "vit_b16"]
        assert cli.main([command, "--weights", str(tmp_path / "run"), *other, "--print-config"]) == 0
        values = yaml.safe_load(capsys.readouterr().out)
        assert (values["model"]["size"], values["model"]["heads"]) == ("vit_b16", 12)
        assert (values["data"]["audio_mean"], values["data"]["audio_std"]) == (-3.0, 3.9)
    (tmp_path / "run" / "model" / "config.json").write_text('{"model": 3}')
    assert cli.main(["probe", "--weights", str(tmp_path / "run"), "--print-config"]) == 2
    assert "config.json: model: found 3" in capsys.readouterr().err


PLACES = {"report": "RUN", "top": "RUN", "stats": "URL", "localize": "FILE", "diff": "RUN RUN", "pack": "SOURCE", "index": "URL",
          "label": "URL FILE", "show": "URL KEY", "embed": "FILE", "search": "FILE"}  # fmt: skip


@pytest.mark.parametrize("command", PLACES)
def test_what_is_given_by_its_place_has_a_name(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    usage = " ".join(capsys.readouterr().out.partition("\n\n")[0].split())
    assert PLACES[command] in usage
    assert "[STR" not in usage
