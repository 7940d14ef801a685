"""`torchx run -s kubernetes launch/pack.py`: packs clips into a dataset, near the store that it goes to."""

import functools
from typing import Any, List, Optional  # noqa: UP035  TorchX reads these spellings only

from torchx.specs import AppDef

from launch.component import IMAGE, app, bytes_of, checked, literal, on_volumes, refuse, say


def pack(
    *settings: str,
    image: str = IMAGE,
    cpu: int = 4,
    memory: str = "8Gi",
    scratch: str = "20Gi",
    source: str = "synthetic:2048",
    to: str = "",
    name: str = "pack",
    queue: str = "",
    secret: str = "",
    env: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> AppDef:
    """Packs clips into a dataset of shards. Killed and started again, it goes on where it was.

    Args:
        settings: any setting of `equiav pack`, after `--`: --short_side 256 --audio flac
        image: of the container (default: of the environment variable EQUIAV_IMAGE, or what `make image` makes)
        cpu: cores, each of which decodes and encodes
        memory: of the pod
        scratch: local disk of the pod
        source: a folder of videos or a list, on a mounted volume, or synthetic:COUNT
        to: folder of the dataset: s3://BUCKET/NAME, or a path on a mounted volume
        name: of the job
        queue: of Kueue, where the cluster has it
        secret: Kubernetes Secret whose keys become environment variables: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...
        env: further environment variables: NAME=VALUE,NAME=VALUE. No secrets: anybody who sees the job sees them
        mounts: type=volume,src=CLAIM,dst=/PATH or type=bind,src=/PATH,dst=/PATH, several after each other
    """
    bytes_of("scratch", scratch)
    if not to:
        refuse("to: no folder is named for the dataset (--to s3://BUCKET/NAME)")
    chosen = [source, "--to", to, "--processes", str(cpu), *settings]
    checked("equiav.commands.settings", "PackConfig", "pack", chosen)
    say(f"packs {source} into {to}")
    where = {"scratch": scratch, "queue": queue, "secret": secret}
    common = {"image": image, "cpu": cpu, "memory": memory, "env": env, "mounts": mounts}
    paths = {"to": to, **({} if source.startswith("synthetic:") else {"source": source})}
    where = {**where, "paths": on_volumes(paths)}
    return app(name, ["equiav", "pack", *map(literal, chosen)], metadata=where, **common)


@functools.wraps(pack)
def py(*args: Any, **kwargs: Any) -> AppDef:
    # `launch/pack.py` without a function's name: TorchX looks for the component `launch/pack` + `.py`.
    return pack(*args, **kwargs)
