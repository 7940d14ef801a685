"""`torchx run -s kubernetes launch/eval.py`: evaluates a trained model, near the store that has it."""

import functools
from typing import Any, List, Optional  # noqa: UP035  TorchX reads these spellings only

from torchx.specs import AppDef

from launch.component import IMAGE, app, bytes_of, checked, literal, on_volumes, refuse, say


def evaluate(
    *settings: str,
    image: str = IMAGE,
    gpus: int = 0,
    cpu: int = 0,
    memory: str = "",
    scratch: str = "20Gi",
    what: str = "retrieval",
    weights: str = "",
    data: str = "",
    out: str = "",
    name: str = "",
    queue: str = "",
    secret: str = "",
    env: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    workers: int = 0,
) -> AppDef:
    """Evaluates a pretrained model on one node, whose processes share the clips; the numbers are those of one process.

    Args:
        settings: any setting of `equiav eval`, after `--`: --seeds 5 --benchmark VGGSound
        image: of the container (default: of the environment variable EQUIAV_IMAGE, or what `make image` makes)
        gpus: of the node; 0 computes on its CPUs
        cpu: cores of the node (default: 12 for each GPU, else 2)
        memory: of the node (default: 64Gi for each GPU, else 8Gi)
        scratch: local disk of the node, mostly for the shards of the dataset
        what: retrieval, similarity, centroid, localize, attention or examples
        weights: of the model: its folder, or that of a run: s3://BUCKET/NAME, or a path on a mounted volume
        data: folder of the dataset: s3://BUCKET/NAME, or a path on a mounted volume
        out: folder of the results: s3://BUCKET/NAME, or a path on a mounted volume
        name: of the job (default: eval, and what)
        queue: of Kueue, where the cluster has it
        secret: Kubernetes Secret whose keys become environment variables: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...
        env: further environment variables: NAME=VALUE,NAME=VALUE. No secrets: anybody who sees the job sees them
        mounts: type=volume,src=CLAIM,dst=/PATH or type=bind,src=/PATH,dst=/PATH, several after each other
        workers: processes of the node (default: one for each GPU, else 1)
    """
    bytes_of("scratch", scratch)
    for setting, given, wanted in (
        ("weights", weights, "no model is named. Give the folder of a run (--weights s3://BUCKET/NAME)"),
        ("data", data, "no dataset is named. Give its folder (--data s3://BUCKET/NAME; `equiav pack` fills one)"),
        ("out", out, "no folder is named for the results. Give one that outlives the node (--out s3://BUCKET/NAME)"),
    ):
        if not given:
            refuse(f"{setting}: {wanted}")
    if workers < 0:
        refuse(f"workers is {workers}, expected 0 or more")
    workers = workers or gpus or 1
    chosen = [
        what,
        "--weights",
        weights,
        "--stream.url",
        data,
        "--out",
        out,
        "--device",
        "cuda" if gpus else "cpu",
        *settings,
    ]
    config = checked("equiav.evaluate.settings", "EvalConfig", "eval", chosen)
    if config.clips is not None:
        refuse(
            "clips is a list on this machine, which the pod does not see; pack the clips of the list, and leave it out"
        )
    say(f"evaluates {weights} on {data} ({what}), into {out}: one node of {workers} worker(s)")
    program = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), "-m", "equiav"]
    program = [*(program if workers > 1 else ["equiav"]), "eval", *map(literal, chosen)]
    where = {"scratch": scratch, "queue": queue, "secret": secret}
    where |= {"paths": on_volumes({"weights": weights, "data": data, "out": out})}
    common = {"image": image, "cpu": cpu, "memory": memory, "gpus": gpus, "env": env, "mounts": mounts}
    return app(name or f"eval-{what}", program, metadata=where, **common)


@functools.wraps(evaluate)
def py(*args: Any, **kwargs: Any) -> AppDef:
    # `launch/eval.py` without a function's name: see launch/pretrain.py.
    return evaluate(*args, **kwargs)
