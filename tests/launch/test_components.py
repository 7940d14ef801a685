"""`torchx` as users type it, in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torchx.components.component_test_base import ComponentTestCase

import launch.eval
import launch.finetune
import launch.pack
import launch.pretrain

TORCHX = str(Path(sys.executable).parent / "torchx")
RUN = ["--data", "s3://bucket/clips", "--out", "s3://bucket/runs/one"]


def torchx(*arguments, cwd, status=0, env=None):
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), **(env or {})}
    done = subprocess.run([TORCHX, *arguments], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def dryrun(*arguments, cwd, **options):
    """-> kind -> what would be applied"""
    text = torchx("run", "-s", "kubernetes", "--dryrun", *arguments, cwd=cwd, **options)
    request = text.split("=== SCHEDULER REQUEST ===\n")[1]
    return {one["kind"]: one for one in yaml.safe_load_all(request.split("\ntorchx 20")[0].split("\nequiav: ")[0])}


def command(made):
    return made["Job"]["spec"]["template"]["spec"]["containers"][0]["command"]


@pytest.mark.parametrize(
    "component",
    [
        launch.pretrain.pretrain,
        launch.pretrain.py,
        launch.finetune.finetune,
        launch.finetune.py,
        launch.pack.pack,
        launch.pack.py,
        launch.eval.evaluate,
        launch.eval.py,
    ],
)
def test_torchx_finds_no_fault_in_them(component):
    module = sys.modules[
        component.__wrapped__.__module__ if hasattr(component, "__wrapped__") else component.__module__
    ]

    class Case(ComponentTestCase):
        def runTest(self):  # noqa: N802
            self.validate(module, component.__name__)

    Case().runTest()


def test_fine_tuning_is_submitted_like_pretraining(tmp_path):
    given = [
        "--data",
        "s3://b/clips",
        "--out",
        "s3://b/tuned",
        "--weights",
        "s3://b/run",
        "--test",
        "s3://b/test",
        "--nodes",
        "1:2",
    ]
    text = torchx("run", "-s", "kubernetes", "--dryrun", "launch/finetune.py", *given, cwd=tmp_path, status=1)
    assert "weights: s3://b/run cannot be read from here" in text  # its size would be a guess
    given += ["--config", "smoke"]  # which says the size and the normalisation
    made = dryrun("launch/finetune.py", *given, "--", "--tune.loss", "one", "--tune.epochs", "3", cwd=tmp_path)
    assert command(made)[-2:] == ["--", "finetune"]
    settings = yaml.safe_load(made["ConfigMap"]["data"]["config.yaml"])
    assert (settings["stream"]["url"], settings["weights"]) == ("s3://b/clips", "s3://b/run")
    assert settings["tune"]["test_url"] == "s3://b/test"
    assert (settings["tune"]["loss"], settings["tune"]["epochs"]) == ("one", 3.0)
    assert settings["checkpoint"]["url"] == "s3://b/tuned/checkpoints"
    for missing in ("--data", "--out"):
        less = [word for k, word in enumerate(given) if word != missing and given[k - 1] != missing]
        text = torchx("run", "-s", "kubernetes", "launch/finetune.py", *less, cwd=tmp_path, status=1)
        assert f"{missing[2:]}: no " in text
    text = torchx(
        "run", "-s", "kubernetes", "launch/finetune.py", *given, "--", "--tune.mixup", "3", cwd=tmp_path, status=1
    )
    assert "tune.mixup is 3.0, expected a probability" in text


def test_evaluation_is_one_node_whose_processes_share_the_clips(tmp_path):
    given = ["--what", "localize", "--weights", "s3://b/run", "--data", "s3://b/test", "--out", "s3://b/run/eval"]
    made = dryrun("launch/eval.py", *given, "--workers", "4", "--", "--examples", "6", cwd=tmp_path)
    torchrun = [
        "python",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        "-m",
        "equiav",
        "eval",
    ]
    assert command(made)[:9] == torchrun
    assert command(made)[9:] == [
        *("localize", "--weights", "s3://b/run", "--stream.url", "s3://b/test", "--out", "s3://b/run/eval"),
        *("--device", "cpu", "--examples", "6"),
    ]
    assert made["Job"]["metadata"]["name"] == "eval-localize"
    assert command(dryrun("launch/eval.py", *given, cwd=tmp_path))[:4] == ["python", "-m", "equiav", "eval"]
    gpus = dryrun("launch/eval.py", *given, "--gpus", "2", cwd=tmp_path)
    assert command(gpus)[5] == "2"
    assert command(gpus)[-1] == "cuda"
    for missing in ("--weights", "--data", "--out"):
        less = [word for k, word in enumerate(given) if word != missing and given[k - 1] != missing]
        assert f"{missing[2:]}: no " in torchx(
            "run", "-s", "kubernetes", "launch/eval.py", *less, cwd=tmp_path, status=1
        )
    for wrong, said in (
        (["--seeds", "0"], "seeds is 0, expected 1 or more"),
        (["--clips", "x.json"], "clips is a list on"),
    ):
        text = torchx("run", "-s", "kubernetes", "launch/eval.py", *given, "--", *wrong, cwd=tmp_path, status=1)
        assert said in text


def test_the_literal_command_runs_something_sensible_and_says_what(tmp_path):
    begun = time.monotonic()
    text = torchx("run", "-s", "kubernetes", "--dryrun", "launch/pretrain.py", cwd=tmp_path)
    assert time.monotonic() - begun < 30  # it takes one; this is a bound for a loaded machine, no measurement
    assert "no --data is given: runs `equiav smoke`" in text
    assert command(dryrun("launch/pretrain.py", cwd=tmp_path)) == [
        "python",
        "-m",
        "equiav",
        "smoke",
        "--out",
        "/tmp/smoke",
    ]


def test_both_forms_and_the_builtins_are_there(tmp_path):
    short = dryrun("launch/pretrain.py", *RUN, cwd=tmp_path)
    root = Path(launch.__file__).parents[1]
    assert dryrun("launch/pretrain.py:pretrain", *RUN, cwd=root) == short
    assert dryrun("launch/pack.py:pack", "--to", "s3://a/b", cwd=root)["Job"]["metadata"]["name"] == "pack"
    text = torchx("builtins", cwd=tmp_path)
    assert all(name in text for name in ("launch/pretrain.py", "launch/pack.py", "dist.ddp", "utils.echo"))
    for scheduler in ("kubernetes", "kubernetes_volcano", "local_cwd", "slurm"):
        assert f"{scheduler}:" in torchx("runopts", scheduler, cwd=tmp_path)
    assert command(dryrun("utils.echo", "--msg", "hello", cwd=tmp_path))[-1] == "hello"


def test_a_run_of_several_nodes(tmp_path):
    arguments = ["--nodes", "2:4", "--gpus", "8", "--config", "audioset2m", "--secret", "store", "--name", "My_Run"]
    options = "namespace=team,grace=600,node_selector=gpu:h100,tolerations=spot,priority_class=high"
    text = torchx("run", "-s", "kubernetes", "-cfg", options, "--dryrun", "launch/pretrain.py", *arguments, *RUN,
                  "--", "--train.lr", "2e-4", cwd=tmp_path)  # fmt: skip
    made = {
        one["kind"]: one
        for one in yaml.safe_load_all(text.split("=== SCHEDULER REQUEST ===\n")[1].split("\nequiav: ")[0])
    }
    settings = yaml.safe_load(made["ConfigMap"]["data"]["config.yaml"])
    assert settings["train"]["lr"] == 2e-4
    assert settings["device"] == "cuda"
    assert settings["stream"]["url"] == "s3://bucket/clips"
    assert settings["checkpoint"]["url"] == "s3://bucket/runs/one/checkpoints"
    assert settings["stream"]["cache_bytes"] == (20 << 30) * 3 // 4  # of --scratch
    job, pod = made["Job"], made["Job"]["spec"]["template"]["spec"]
    assert job["metadata"]["name"].startswith("my-run-")
    assert job["metadata"]["namespace"] == "team"
    assert job["spec"]["completions"] == 4
    assert pod["terminationGracePeriodSeconds"] == 600
    words = command(made)
    assert words[words.index("--nodes") + 1] == "2:4"
    assert words[words.index("--workers") + 1] == "8"
    assert words[words.index("--index") + 1] == "$(JOB_COMPLETION_INDEX)"
    assert "further ones wait as spares" in text  # 16 micro-batches, 32 GPUs


def test_arguments_arrive_as_they_were_typed(tmp_path):
    odd = ["a b", 'it\'s "so"', "$HOME", "$(HOME)", "$$", "$${x}", "${app_id}", "line\nline", "ä"]
    out = f"/tmp/{''.join(odd)}"
    made = dryrun("launch/pretrain.py", "--data", "s3://b/c", "--out", "s3://b/r", "--env", "A=$(HOME) $x",
                  "--", "--out", out, cwd=tmp_path)  # fmt: skip
    assert yaml.safe_load(made["ConfigMap"]["data"]["config.yaml"])["out"] == out
    env = made["Job"]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert next(one["value"] for one in env if one["name"] == "A") == "$$(HOME) $$x"
    volume = ["--mounts", "type=volume,src=data,dst=/data"]
    made = dryrun("launch/pack.py", *volume, "--to", "s3://a/b", "--source", "/data/a b$(X)$$", cwd=tmp_path)
    assert command(made)[4] == "/data/a b$$(X)$$$$"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nodes", "2:x", *RUN], "nodes is '2:x', expected MIN:MAX"),
        (["--nodes", "3:2", *RUN], "nodes is '3:2'"),
        (["--nodes", "2"], "data: no dataset is named"),
        (["--data", "s3://a/b"], "out: no folder is named"),
        ([*RUN, "--config", "nope"], "--config nope: no such file, and the recipes are audioset2m, smoke"),
        ([*RUN, "--", "--train.lrr", "1"], "there is no --train.lrr; did you mean --train.lr?"),
        ([*RUN, "--", "--train.lr", "-1"], "train.lr_start"),
        ([*RUN, "--memory", "much"], "memory is 'much'"),
        ([*RUN, "--scratch", "9Q"], "scratch is '9Q'"),
        (["--data", "s3://key:word@a/b", "--out", "s3://a/c"], "a password would be seen"),
        (["--data", "s3://key:wo/rd@a/b", "--out", "s3://a/c"], "a password would be seen"),
        (["--data", "s3://a/b", "--out", "/tmp/here"], "which goes with its pod"),
        ([*RUN, "--", "--resume", "never"], "resume is never"),
        ([*RUN, "--", "--device", "cuda"], "device is cuda, and gpus is 0"),
        ([*RUN, "--mounts", "src=x"], "mounts:"),
        (
            [*RUN, "--mounts", "type=bind,src=/a,dst=/c,type=bind,src=/b,dst=/c/"],
            "mounts is '/c', expected each path once",
        ),
        ([*RUN, "--env", "POD_IP=1"], "env is 'POD_IP', expected a variable's name, and none of"),
        ([*RUN, "--env", "EQUIAV_CONFIG=1"], "env: EQUIAV_CONFIG is how the settings reach the program"),
        ([*RUN, "--env", "novalue"], "env: 'novalue' has no value"),
        ([*RUN, "--env", "JOB_COMPLETION_INDEX=0"], "env is 'JOB_COMPLETION_INDEX'"),
        ([*RUN, "--env", "AWS_SECRET_ACCESS_KEY=x"], "AWS_SECRET_ACCESS_KEY would be seen"),
        ([*RUN, "--env", "WANDB_API_KEY=x"], "--from-literal=WANDB_API_KEY=..., and --secret NAME"),
        ([*RUN, "--env", "HEADERS=Bearer abcdefgh"], "HEADERS ("),
        (
            [*RUN, "--", "--weights", "https://b.example/m.pth?X-Amz-Signature=0123456789"],
            "b.example/m.pth: a signature",
        ),
        ([*RUN, "--env", "URL=http://me:word@host/"], "URL (a password) would be seen"),
        ([*RUN, "--mounts", "type=volume,src=/etc,dst=/x"], "src of type=volume is '/etc', expected a claim's name"),
        ([*RUN, "--mounts", "type=bind,src=clips,dst=/x"], "src of type=bind is 'clips'"),
        ([*RUN, "--mounts", "type=volume,src=clips,dst=/"], "below its root"),
        ([*RUN, "--workers", "-1"], "workers is -1"),
        (["--data", "/clips", "--out", "s3://a/b"], "data is '/clips', which goes with its pod"),
        ([*RUN, "--config", "latin1.yaml"], "latin1.yaml: byte 3 is no UTF-8"),
    ],
)
def test_a_mistake_is_told_where_it_is_typed(arguments, told, tmp_path):
    (tmp_path / "latin1.yaml").write_bytes("# s\xf6\nseed: 1\n".encode("latin1"))
    text = torchx("run", "-s", "kubernetes", "launch/pretrain.py", *arguments, cwd=tmp_path, status=1)
    assert told in text
    assert "key:word" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("restarts=x", "invalid literal"),
        ("restart=5", "there is no option restart"),
        ("node_selector=a", "node_selector"),
        ("host_network=yes", "host_network is yes, expected true or false"),
    ],
)
def test_a_mistake_in_the_options_of_the_cluster_is_told(options, told, tmp_path):
    text = torchx("run", "-s", "kubernetes", "-cfg", options, "launch/pretrain.py", cwd=tmp_path, status=1)
    assert "equiav: -cfg" in text
    assert told in text
    assert "Traceback" not in text


@pytest.mark.parametrize("where", ["", "/nowhere/config"])
def test_no_cluster_is_one_clear_error(where, tmp_path):
    env = {"KUBECONFIG": where} if where else {}
    for arguments in (["run", "-s", "kubernetes", "launch/pretrain.py"], ["list", "-s", "kubernetes"]):
        assert "no cluster is known: " in torchx(*arguments, cwd=tmp_path, status=1, env=env)
    config = {
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    text = torchx("list", "-s", "kubernetes", cwd=tmp_path, status=1, env={"KUBECONFIG": str(tmp_path / "config")})
    assert "no cluster answers at http://127.0.0.1:9" in text


def test_a_dataset_that_would_go_with_its_pod_is_told(tmp_path):
    for arguments in (["--to", "/clips"], ["--to", "s3://a/b", "--source", "/videos"]):
        text = torchx("run", "-s", "kubernetes", "launch/pack.py", *arguments, cwd=tmp_path, status=1)
        assert "which goes with its pod" in text
    mounted = ["--mounts", "type=volume,src=clips,dst=/clips", "--to", "/clips/packed"]
    assert dryrun("launch/pack.py", *mounted, cwd=tmp_path)["Job"]


def test_a_variable_may_have_anything_in_it(tmp_path):
    made = dryrun("launch/pretrain.py", *RUN, "--env", "A=x=1,y,B=http://h:90/a@2?b=1,HOME=/x", cwd=tmp_path)
    env = made["Job"]["spec"]["template"]["spec"]["containers"][0]["env"]
    given = {one["name"]: one.get("value") for one in env}
    assert (given["A"], given["B"], given["HOME"]) == ("x=1,y", "http://h:90/a@2?b=1", "/x")
    assert len(given) == len(env)


def test_a_large_config_is_told(tmp_path):
    (tmp_path / "large.yaml").write_text("seed: 1 #" + "x" * 300_000 + "\n")  # what counts is what is resolved
    assert dryrun("launch/pretrain.py", *RUN, "--config", "large.yaml", cwd=tmp_path)["ConfigMap"]
    text = torchx("run", "-s", "kubernetes", "launch/pretrain.py", *RUN, "--", "--stream.cache", "/" + "x" * 120_000,
                  cwd=tmp_path, status=1)  # fmt: skip
    assert "size of the settings is '12" in text
    assert "at most 100,000" in text


@pytest.mark.slow
def test_nodes_of_this_machine(run_config, tmp_path):
    settings = yaml.safe_load(run_config.read_text())
    arguments = [
        "--nodes",
        "1:2",
        "--config",
        str(run_config),
        "--data",
        settings["stream"]["url"],
        "--out",
        str(tmp_path / "run"),
    ]
    text = torchx("run", "-s", "local_cwd", "launch/pretrain.py", *arguments, "--", "--train.steps", "6", cwd=tmp_path,
                  env={"TMPDIR": os.environ.get("TMPDIR", "/tmp")})  # fmt: skip
    assert "2 node(s) of 1 to 2, 2 worker(s); here rank(s) 1" in text
    assert "Job finished: SUCCEEDED" in text
    assert (tmp_path / "run" / "model" / "config.json").exists()
