"""`torchx run -s kubernetes launch/pretrain.py`: pretraining on one node or many, on a cluster or on this machine."""

import functools
from typing import Any, List, Optional  # noqa: UP035  TorchX reads these spellings only

from torchx.specs import AppDef

from launch.component import IMAGE, app, checked, literal, refuse, say, size_of
from launch.trained import trained


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
    common = {"image": image, "cpu": cpu, "memory": memory, "gpus": gpus, "env": env, "mounts": mounts}
    where = {"scratch": scratch, "queue": queue, "secret": secret}
    if not data:
        if size_of(nodes)[1] > 1 or config or out:
            refuse("data: no dataset is named. Give its folder (--data s3://BUCKET/NAME; `equiav pack` fills one)")
        chosen = ["--out", "/tmp/smoke", *settings]
        checked("equiav.commands.settings" if settings else "equiav.config", "SmokeConfig" if settings else "RunConfig",
                "smoke", chosen, "smoke")  # fmt: skip
        say(
            "no --data is given: runs `equiav smoke` on one node, which makes clips, pretrains the tiny model, retrieves"
        )
        return app(name or "smoke", ["equiav", "smoke", *map(literal, chosen)], metadata=where, **common)
    if not out:
        refuse("out: no folder is named for the run. Give one that outlives its nodes (--out s3://BUCKET/NAME)")
    size = "" if config or "--config" in settings else ", recipe smoke (--config audioset2m is the paper's)"
    return trained("pretrain", "RunConfig", settings, size, name=name, data=data, out=out, config=config or "smoke",
                   nodes=nodes, workers=workers, metrics_port=metrics_port, where=where, **common)  # fmt: skip


@functools.wraps(pretrain)
def py(*args: Any, **kwargs: Any) -> AppDef:
    # `launch/pretrain.py` without a function's name: TorchX looks for the component `launch/pretrain` + `.py`.
    return pretrain(*args, **kwargs)
