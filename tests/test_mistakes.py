"""Mistakes of a first hour: each gets one line that names what, where, and what to do. To add one, add a row."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from equiav import cli
from tests.forks import APART

FILES = {
    "file": "x",
    "one.mp4": "no video",
    "numbers.yaml": "1: {a: 2}\n",
    "list.yaml": "train: [1, 2]\n",
    "twice.yaml": "train: {steps: 5}\ntrain: {lr: 1.0e-3}\n",
    "nested.yaml": "train: {steps: {a: 1}}\n",
    "nul.yaml": 'out: "a\\0b"\n',
    "old.yaml": "init: runs/one\n",
    "ten.yaml": "train: {steps: 10}\n",
    "others/a.doc": "x",
    "dots.txt": ".\n",
    "nul.txt": "a\0b.mp4\n",
    "deep.json": "[" * 100_000,
    "none.json": '{"data": []}',
}
NOTHING_IN = "`equiav pack` writes one; `equiav index` makes the index of shards that are there already"

# what is typed -> what is said
MISTAKES = {
    "smok": "equiav: no command 'smok'; did you mean smoke?",
    "pretrain": "stream.url is not set, expected the folder of a packed dataset; `equiav pack` makes one",
    "pretrain --stream.url nowhere": NOTHING_IN,
    "pretrain --stream.url s3://": "s3:// names no bucket, expected s3://BUCKET/NAME",
    "pretrain --stream.url zz://b/x": "zz://b/x: Protocol not known: zz",
    "pretrain --stream.url memory://x/y --stream.cache file/x": "stream.cache: file/x cannot be made ([Errno 20] Not a directory",
    "pretrain --stream.url nowhere --out file": "out: file cannot be made",
    "pretrain --stream.url nowhere --out /proc/x/y": "set a folder that can be written",
    "pretrain --config nowhere.yaml": "no such file, and the recipes are audioset2m, smoke",
    "pretrain --config others": "no such file, and the recipes are audioset2m, smoke",
    "pretrain --config bytes.yaml": "--config bytes.yaml: byte 2 is no UTF-8; save it as UTF-8",
    "pretrain --config zero.yaml": "zero.yaml: not valid YAML: unacceptable character #x0000",
    "pretrain --config numbers.yaml": "numbers.yaml, line 1: not valid YAML: a name is '1', expected text",
    "pretrain --config list.yaml": "list.yaml: train: found [1, 2], expected its settings (`field: value`)",
    "pretrain --config twice.yaml": "twice.yaml, line 2: not valid YAML: train stands there twice",
    "pretrain --config nested.yaml": "nested.yaml: train.steps: found {'a': 1}, expected an integer",
    "pretrain --config ten.yaml": "train.warmup_steps is 14790, expected 0 to train.steps=10",
    "pretrain --stall_seconds nan": "--stall_seconds: found nan, expected a finite number",
    "pretrain --stall_seconds -1": "stall_seconds is -1.0, expected 0 to 100000000 seconds",
    "pretrain --stall_seconds 1e300": "stall_seconds is 1e+300, expected 0 to 100000000 seconds",
    "pretrain --stream.patience 1e300": "stream.patience is 1e+300, expected 0 to 100000000",
    "pretrain --checkpoint.patience 1e300": "checkpoint.patience is 1e+300, expected 0 to 100000000 seconds",
    "pretrain --stream.ahead 100000000": "stream.ahead is 100000000, expected 0 to 64",
    "pretrain --stream.lanes 1000000000": "stream.lanes is 1000000000, expected 1 to 1048576",
    "pretrain --stream.workers 100000": "stream.workers is 100000, expected 0 to 256",
    "pretrain --lr 1e-4": "there is no --lr; did you mean --train.lr?",
    "embed one.mp4 --weights nowhere": "weights is nowhere, expected a model folder, or the folder of a run; there is nothing",
    "finetune --init runs/one": "there is no --init; it is --weights now",
    "embed one.mp4 --model runs/one": "there is no --model; it is --weights now",
    "export runs/one": "'runs/one' is not expected; settings are given as --weights runs/one",
    "finetune --config old.yaml": "old.yaml: unknown field init; it is weights now",
    "pretrain --train.recompute maybe": "'maybe' is not expected; settings are given as --section.field value",
    "pretrain --stream.url s3:/bucket/x": "s3:/bucket/x is neither a path nor an address, expected s3://bucket/x",
    "pack synthetic:4 --to s3:/bucket/x": "s3:/bucket/x is neither a path nor an address, expected s3://bucket/x",
    "embed one.mp4 --weights others --out x.csv": "out is x.csv, expected a name that ends in .npz, .parquet",
    "pretrain --config nul.yaml": "out: found 'a\\x00b', expected a path",
    "pretrain --stream.url a::b": "a::b: a chain of file systems (::) is not supported, expected one URL or folder",
    "smoke --out others": "out: others holds something that `equiav smoke` did not make; name another folder, or remove it",
    "pretrain --train.lr nan": "--train.lr: found nan, expected a finite number",
    "pretrain --train.lr x": "--train.lr: found 'x', expected a finite number",
    "pretrain --train.lr": "--train.lr: expected a value",
    "pretrain --train.betas 0.9": "--train.betas 0.9: expected 2 values",
    "pretrain --train.betas 0.9 0.95 0.99": "'0.99' is not expected; settings are given as --section.field value",
    "pretrain --train.lrr 1": "there is no --train.lrr; did you mean --train.lr?",
    "pretrain --train.steps 1.5": "--train.steps: found '1.5', expected an integer",
    "pretrain --model.size huge": "model.size is 'huge', expected one of tiny, vit_s16, vit_b16, vit_l16",
    "pretrain --stream.max_bad 2": "stream.max_bad is 2.0, expected a share",
    "pretrain --seed -1": "seed is -1, expected 0 to 2^63 - 1",
    "pretrain --weights nowhere.pth --stream.url nowhere": NOTHING_IN,
    "pack": "source is not given, expected what to pack: a folder, a list, or synthetic:COUNT",
    "pack nowhere --to out": "source is nowhere, expected a folder, a file, or synthetic:COUNT; this path does not exist",
    "pack others --to out": "source others has none of these files: .mp4, ",
    "pack synthetic:x --to out": "source is synthetic:x, expected synthetic:COUNT with a positive number",
    "pack synthetic:4": "to is not set, expected the folder to pack into (--to s3://bucket/name)",
    "pack synthetic:4 --to s3://": "s3:// names no bucket, expected s3://BUCKET/NAME",
    "pack synthetic:4 --to file": "to: file cannot be made",
    "show": "url is not given, expected the folder of a dataset",
    "show nowhere": NOTHING_IN,
    "show nowhere --png x.jpg": "png is x.jpg, expected a name that ends in .png",
    "show nowhere --png nowhere/x.png": "png is nowhere/x.png, expected a file in a folder that is there",
    "stats": "url is not given, expected the folder of a dataset",
    "plan --price -1": "price is -1.0, expected 0 or more",
    "plan --stream.url nowhere --write nowhere/x.yaml": "write is nowhere/x.yaml, expected a file in a folder that is there",
    "stats nowhere --write nowhere/x.yaml": "write is nowhere/x.yaml, expected a file in a folder that is there",
    "pack dots.txt --to out": "source dots.txt: '.' names no file, expected a video's path a line",
    "pack nul.txt --to out": "names no file, expected a video's path a line",
    "pack deep.json --to out": "source deep.json is not a list of clips (RecursionError",
    "pack none.json --to out": "source none.json lists no clips",
    "pack synthetic:99999999999999999999 --to out": "expected synthetic:COUNT with a positive number below 10^8",
    "pack synthetic:4 --to out --frames 1000000000": "frames is 1000000000, expected at most 1000",
    "pack synthetic:4 --to out --short_side 1": "short_side is 1, expected 2 or more",
    "pack others --to out --clip_seconds 2 --clip_overlap 1.99": "clip_overlap is 1.99, expected 0 to nine tenths",
    "plan --keep": "keep is True, expected a dataset to try the settings with (--stream.url)",
    "index": "url is not given, expected the folder of the shards",
    "index nowhere": "nowhere has no shards: no file there ends in .tar",
    "verify others": NOTHING_IN,
    "plan --world_size 9": "world_size is 9, expected 1 to 8, the micro-batches in a step",
    "top": "where: no run is named. Give its folder, or HOST:PORT of its nodes: equiav top runs/one",
    "top others": "where: others has no metrics.jsonl: no run has written there",
    "top localhost:1": "no node answers at localhost:1: ",
    "diff a": "two runs are needed: equiav diff RUN RUN",
    "diff a b": "a: neither a run's folder (config.yaml) nor one of checkpoints (step-...) is there",
    "import": "no checkpoint named; expected `equiav import CHECKPOINT --out FOLDER`",
    "import nowhere.pth": "nowhere.pth: no such file",
    "import others": "others is a folder, expected a .pth file",
    "import one.mp4": "not a PyTorch checkpoint of plain tensors: was not written by torch.save",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "bytes.yaml").write_bytes(b"a:\xff\n")
    (tmp_path / "zero.yaml").write_bytes(b"a: \x00\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(typed, here, capsys):
    before = set(os.listdir())
    assert cli.main(typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert MISTAKES[typed] in line
    assert line.startswith("equiav")
    assert Path("others/a.doc").read_text() == "x"
    assert set(os.listdir()) <= before | {"runs", "out"}


LOOKS = (" nowhere", " others", "synthetic:", ".txt", ".json", "import ", "localhost", "diff a b", "s3:", "://", "::")
FORKS = """
import os, sys
from equiav import cli
from equiav.commands import settings

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os._exit(7)

sys.meta_path.insert(0, Torch())
for line in sys.stdin.read().splitlines():
    if not os.fork():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            cli.main(line.split())
        except SystemExit:
            pass
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]) == 7:
        print(line, flush=True)
"""


def test_what_is_mistyped_and_help_are_answered_before_torch_is_imported(here):
    """What looks for nothing: no file, no folder, no store."""
    typed = [line for line in MISTAKES if not any(what in line for what in LOOKS)]
    assert len(typed) > 40
    lines = "\n".join([*typed, *(f"{command} --help" for command in cli.COMMANDS)])
    command, apart = [sys.executable, "-c", FORKS], {**os.environ, **APART}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, env=apart)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [("http://127.0.0.1:1", "EndpointConnectionError"), ("http://nowhere.invalid", "EndpointConnectionError")],
)
def test_a_store_that_does_not_answer_is_said_while_it_is_asked(endpoint, said, here, capsys, caplog, monkeypatch):
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("ENDPOINT_URL", endpoint)):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(
        "streaming.store.SAY", 0.2
    )  # the pauses are random: no two of them may lie around the usual 2 s
    assert cli.main(["pretrain", "--stream.url", "s3://clips/x", "--stream.patience", "6"]) == 1
    told = [record.getMessage() for record in caplog.records if record.name == "streaming.store"]
    first = next(
        message for message in told if message.startswith("s3://clips/")
    )  # threads of other tests may speak, too
    assert first.startswith("s3://clips/x/index: no answer for ")
    assert said in first
    assert "it is asked again until 6 s (patience)" in first
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "s3://clips/x/index: no answer for" in line


def test_a_name_that_no_bucket_can_have(here, capsys, monkeypatch):
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("ENDPOINT_URL", "http://127.0.0.1:1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    assert cli.main(["verify", "s3://My_Clips!/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("equiav verify: s3://My_Clips!/x/index: Parameter validation failed: Invalid bucket name")


def test_patience_is_a_setting_of_all_who_ask_a_store(here, capsys, monkeypatch):
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("ENDPOINT_URL", "http://127.0.0.1:1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    for typed in ("pack synthetic:2 --to", "index", "verify", "stats"):
        assert cli.main([*typed.split(), "s3://clips/x", "--patience", "1"]) == 1
        assert "no answer for 1 s (patience)" in capsys.readouterr().err


def test_an_endpoint_without_a_scheme(here, capsys, monkeypatch):
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("ENDPOINT_URL", "localhost:9000")):
        monkeypatch.setenv(f"AWS_{name}", value)
    assert cli.main(["pretrain", "--stream.url", "s3://clips/x"]) == 2
    assert "AWS_ENDPOINT_URL is http://HOST:PORT or https://HOST" in capsys.readouterr().err


def test_a_refused_http_store_is_not_missing(here, capsys):
    assert cli.main(["pretrain", "--stream.url", "http://127.0.0.1:1/x", "--stream.patience", "1"]) == 1
    assert "http://127.0.0.1:1/x/index: no answer for" in capsys.readouterr().err


def test_one_clip_is_nothing_to_learn_from(here, capsys):
    assert cli.main(["pack", "synthetic:1", "--to", "one", "--frames", "1", "--short_side", "64"]) == 0
    capsys.readouterr()
    assert cli.main(["pretrain", "--config", "smoke", "--stream.url", "one", "--out", "runs/one"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "stream.url: one has 1 clip(s) to learn from, expected 2 or more" in line
