"""`torchx run -s kubernetes launch/pretrain.py`: pretraining on one node or many, on a cluster or on this machine."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, List, Optional  # noqa: UP035  TorchX reads these spellings only

from torchx.specs import AppDef, macros

from launch.component import IMAGE, app, bytes_of, checked, literal, on_volumes, refuse, say, size_of


def pretrain(
    *settings: str,
    image: str = IMAGE,
    nodes: str = "1",
    gpus: int = 0,
    cpu: int = 0,
    memory: str = "",
    scratch: str = "20Gi",
    config: str = "",
    data: str = "",
    out: str = "",
    name: str = "",
    queue: str = "",
    secret: str = "",
    env: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    workers: int = 0,
    metrics_port: int = 9108,
) -> AppDef:
    """Pretrains EquiAV. The same command starts a run, goes on with it, or says that it is finished.

    Without any argument it is the smoke run, on clips that it makes itself.

    Args:
        settings: any setting of `equiav pretrain`, after `--`: --train.lr 1e-4 --checkpoint.every_steps 500
        image: of the container (default: of the environment variable EQUIAV_IMAGE, or what `make image` makes)
        nodes: MIN:MAX. The run begins with MIN, and uses up to MAX as they come and go; its result is the same
        gpus: of a node; 0 trains on its CPUs
        cpu: cores of a node (default: 12 for each GPU, else 2)
        memory: of a node (default: 64Gi for each GPU, else 8Gi)
        scratch: local disk of a node, mostly for the shards of the dataset that it reads again
        config: a recipe (smoke, audioset2m) or a YAML file on this machine (default: smoke)
        data: folder of the dataset, as `equiav pack` writes it: s3://BUCKET/NAME, or a path on a mounted volume
        out: folder of the run: s3://BUCKET/NAME, or a path on a mounted volume. What it holds is gone on with
        name: of the job (default: the last part of `out`)
        queue: of Kueue, where the cluster has it: the job waits there until its nodes fit the quota
        secret: Kubernetes Secret whose keys become environment variables: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...
        env: further environment variables: NAME=VALUE,NAME=VALUE. No secrets: anybody who sees the job sees them
        mounts: type=volume,src=CLAIM,dst=/PATH or type=bind,src=/PATH,dst=/PATH, several after each other
        workers: processes of a node (default: one for each GPU, else 1)
        metrics_port: where Prometheus can ask each node for the run's numbers; 0: nowhere
    """
    least, most = size_of(nodes)
    common = {"image": image, "cpu": cpu, "memory": memory, "gpus": gpus, "env": env, "mounts": mounts}
    where = {"scratch": scratch, "queue": queue, "secret": secret}
    disk = bytes_of("scratch", scratch)
    if not data:
        if most > 1 or config or out:
            refuse("data: no dataset is named. Give its folder (--data s3://BUCKET/NAME; `equiav pack` fills one)")
        chosen = ["--out", "/tmp/smoke", *settings]
        checked("equiav.commands.smoke" if settings else "equiav.config", "SmokeConfig" if settings else "RunConfig",
                "smoke", chosen, "smoke")  # fmt: skip
        say(
            "no --data is given: runs `equiav smoke` on one node, which makes clips, pretrains the tiny model, retrieves"
        )
        return app(name or "smoke", ["equiav", "smoke", *map(literal, chosen)], metadata=where, **common)
    if not out:
        refuse("out: no folder is named for the run. Give one that outlives its nodes (--out s3://BUCKET/NAME)")
    name = name or out.rstrip("/").rpartition("/")[2]
    remote = "://" in out
    folder = f"{out.rstrip('/')}/checkpoints"
    given = ["--stream.url", data, "--out", f"/tmp/{name}" if remote else out, "--device", "cuda" if gpus else "cpu"]
    given += ["--checkpoint.url", folder] if remote else []
    run = checked("equiav.config", "RunConfig", "pretrain", [*given, *settings], config or "smoke")
    if run.resume == "never":
        refuse(
            "resume is never: a node that is replaced could not go on. Choose a folder that is empty instead (--out)"
        )
    if run.device == "cuda" and not gpus:
        refuse("device is cuda, and gpus is 0: say how many a node has (--gpus 8)")
    if run.stream.cache_bytes > disk * 3 // 4:
        stream = dataclasses.replace(run.stream, cache_bytes=disk * 3 // 4)
        run = dataclasses.replace(run, stream=stream)
    if workers < 0:
        refuse(f"workers is {workers}, expected 0 or more")
    workers = workers or gpus or 1
    size = "" if config or "--config" in settings else ", recipe smoke (--config audioset2m is the paper's)"
    say(f"pretrains {run.model.size} on {run.stream.url}{size}: {nodes} node(s) of {workers} worker(s), into {out}")
    if most * workers > run.train.micro_batches:
        say(f"train.batch_size has work for {run.train.micro_batches} workers; further ones wait as spares")
    from equiav.config import to_yaml

    program = ["launch.node", f"--run={name}", "--nodes", f"{least}:{most}", "--workers", str(workers)]
    folder = run.checkpoint.url or str(Path(run.out) / "checkpoints")
    program += ["--folder", folder]
    paths = {"out": folder, "data": run.stream.url} | ({"init": run.init} if run.init else {})
    program += ["--metrics-port", str(metrics_port)] if metrics_port else []
    program = [*map(literal, program), "--index", macros.replica_id, "--", "pretrain"]
    return app(name, program, nodes=(least, most), settings=to_yaml(run),
               metadata={**where, "metrics_port": metrics_port, "paths": on_volumes(paths)}, **common)  # fmt: skip


@functools.wraps(pretrain)
def py(*args: Any, **kwargs: Any) -> AppDef:
    # `launch/pretrain.py` without a function's name: TorchX looks for the component `launch/pretrain` + `.py`.
    return pretrain(*args, **kwargs)
