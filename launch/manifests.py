"""`python -m launch.manifests [IMAGE]`: writes the job of the demonstration, k8s/80-demo.yaml, from what `torchx run` would
submit, and puts the image's name into all of k8s/.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

from launch.job import objects
from launch.pack import pack
from launch.pretrain import pretrain
from launch.scheduler import job_of, to_yaml

FOLDER = Path(__file__).parents[1] / "k8s"
HEAD = """\
# The demonstration: packs synthetic clips into the store, and pretrains on them with up to three pods.
# Written by `python -m launch.manifests`; `torchx run` makes such objects for a job of yours (docs/kubernetes.md).
"""
DATA, OUT = "s3://equiav/clips", "s3://equiav/demo"
CLUSTER = {"namespace": "equiav", "service_account": "equiav", "grace": 120}


def demo(image: str) -> list[dict[str, Any]]:
    with contextlib.redirect_stderr(io.StringIO()):  # what they say to who types
        packing = pack("--frames", "3", "--short_side", "64", image=image, cpu=1, memory="2Gi", scratch="2Gi",
                       source="synthetic:512", to=DATA, name="demo-pack", secret="equiav-store")  # fmt: skip
        few = ("--train.micro_batch", "8", "--train.steps", "120", "--checkpoint.every_steps", "20")
        training = pretrain(*few, image=image, nodes="1:3", cpu=1, memory="3Gi", scratch="4Gi", data=DATA, out=OUT,
                            secret="equiav-store")  # fmt: skip
    training.roles[0].metadata["kubernetes"]["waits_for"] = DATA
    return [one for made in (packing, training) for one in objects(job_of(made, CLUSTER))]


def main(image: str) -> None:
    (FOLDER / "80-demo.yaml").write_text(HEAD + to_yaml(demo(image)))
    for path in sorted(FOLDER.rglob("*.yaml")):
        text = re.sub(r"^( *(?:- )?image: ).*$", rf"\g<1>{image}", path.read_text(), flags=re.MULTILINE)
        path.write_text(text)


if __name__ == "__main__":
    from launch.component import IMAGE

    main(sys.argv[1] if len(sys.argv) > 1 else IMAGE)
