"""`torchx run -s kubernetes launch/finetune.py`: fine-tuning on one node or many, on a cluster or on this machine."""

import functools
from typing import Any, List, Optional  # noqa: UP035  TorchX reads these spellings only

from torchx.specs import AppDef

from launch.component import IMAGE, refuse
from launch.trained import trained


def finetune(
    *settings: str,
    image: str = IMAGE,
    nodes: str = "1",
    gpus: int = 0,
    cpu: int = 0,
    memory: str = "",
    scratch: str = "20Gi",
    config: str = "",
    data: str = "",
    test: str = "",
    weights: str = "",
    out: str = "",
    name: str = "",
    queue: str = "",
    secret: str = "",
    env: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    workers: int = 0,
    metrics_port: int = 9108,
) -> AppDef:
    """Fine-tunes on labels, and tests. The same command starts a run, goes on with it, or says that it is finished.

    Args:
        settings: any setting of `equiav finetune`, after `--`: --tune.loss one --tune.epochs 50 --train.lr 1e-4
        image: of the container (default: of the environment variable EQUIAV_IMAGE, or what `make image` makes)
        nodes: MIN:MAX. The run begins with MIN, and uses up to MAX as they come and go; its result is the same
        gpus: of a node; 0 trains on its CPUs
        cpu: cores of a node (default: 12 for each GPU, else 2)
        memory: of a node (default: 64Gi for each GPU, else 8Gi)
        scratch: local disk of a node, mostly for the shards of the dataset that it reads again
        config: a recipe (tune_esc50, ...) or a YAML file on this machine
        data: folder of the dataset, with labels (`equiav label`): s3://BUCKET/NAME, or a path on a mounted volume
        test: folder of the dataset on which it is tested at the end
        weights: what it begins with: folder of a pretraining run or of a model, or a .pth file
        out: folder of the run: s3://BUCKET/NAME, or a path on a mounted volume. What it holds is gone on with
        name: of the job (default: the last part of `out`)
        queue: of Kueue, where the cluster has it: the job waits there until its nodes fit the quota
        secret: Kubernetes Secret whose keys become environment variables: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...
        env: further environment variables: NAME=VALUE,NAME=VALUE. No secrets: anybody who sees the job sees them
        mounts: type=volume,src=CLAIM,dst=/PATH or type=bind,src=/PATH,dst=/PATH, several after each other
        workers: processes of a node (default: one for each GPU, else 1)
        metrics_port: where Prometheus can ask each node for the run's numbers; 0: nowhere
    """
    if not data:
        refuse("data: no dataset is named. Give its folder (--data s3://BUCKET/NAME; `equiav pack` fills one)")
    given = [*(["--tune.test_url", test] if test else []), *(["--weights", weights] if weights else []), *settings]
    where = {"scratch": scratch, "queue": queue, "secret": secret}
    return trained("finetune", "FinetuneConfig", given, "" if weights else ", from scratch (--weights)", name=name, data=data,
                   out=out, config=config, nodes=nodes, workers=workers, metrics_port=metrics_port, where=where, image=image,
                   cpu=cpu, memory=memory, gpus=gpus, env=env, mounts=mounts)  # fmt: skip


@functools.wraps(finetune)
def py(*args: Any, **kwargs: Any) -> AppDef:
    # `launch/finetune.py` without a function's name: see launch/pretrain.py.
    return finetune(*args, **kwargs)
