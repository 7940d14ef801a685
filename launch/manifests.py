"""`python -m launch.manifests [IMAGE]`: writes what in k8s/ describes a job, from the code by which `torchx run` submits one:
the demonstration and a runtime for Kubeflow Trainer. Puts our image's name into all of k8s/.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

from launch.job import Job, objects, variable
from launch.pack import pack
from launch.pretrain import pretrain
from launch.scheduler import job_of, to_yaml

FOLDER = Path(__file__).parents[1] / "k8s"
HEAD = """\
# The demonstration: packs synthetic clips into the store, and pretrains on them with up to three pods.
# Written by `python -m launch.manifests`; `torchx run` makes such objects for a job of yours (docs/kubernetes.md).
"""
DATA, OUT = "s3://equiav/clips", "s3://equiav/demo"
RUNTIME = """\
# Where Kubeflow Trainer (2.2) is installed: a TrainJob that names this runtime is a run (docs/kubernetes.md).
# Written by `python -m launch.manifests`, too. Give the Secret of your store, and what a node of yours has.
"""
PORT = 9108  # of the metrics
CLUSTER = {"namespace": "equiav", "service_account": "equiav", "grace": 120}


def names(image: str) -> tuple[str, str]:
    """Of the demonstration's jobs: packing, training. A Job cannot be changed, so that another image makes others: else
    `kubectl apply` of a new release would be refused."""
    tag = f"{crc32(image.encode()):08x}"[:6]
    return f"demo-pack-{tag}", f"demo-{tag}"


def demo(image: str) -> list[dict[str, Any]]:
    packs, trains = names(image)
    with contextlib.redirect_stderr(io.StringIO()):  # what they say to who types
        packing = pack("--frames", "3", "--short_side", "64", image=image, cpu=1, memory="2Gi", scratch="2Gi",
                       source="synthetic:512", to=DATA, name=packs, secret="equiav-store")  # fmt: skip
        few = ("--train.micro_batch", "8", "--train.steps", "120", "--checkpoint.every_steps", "20")
        training = pretrain(*few, image=image, nodes="1:3", cpu=1, memory="3Gi", scratch="4Gi", data=DATA, out=OUT,
                            name=trains, secret="equiav-store")  # fmt: skip
    training.roles[0].metadata["kubernetes"]["waits_for"] = DATA
    return [one for made in (packing, training) for one in objects(job_of(made, CLUSTER))]


def runtime(image: str) -> dict[str, Any]:
    """Pods as in a job of ours. How many they are and where the first one is, Trainer says in variables named PET_..."""
    program = ["python", "-m", "launch.node", "--run", variable("TRAINJOB"), "--nodes", variable("PET_NNODES")]
    program += ["--workers", variable("PET_NPROC_PER_NODE"), "--index", variable("PET_NODE_RANK")]
    program += ["--host", variable("PET_MASTER_ADDR"), "--port", variable("PET_MASTER_PORT")]
    program += ["--metrics-port", str(PORT)]
    size = {"cpu": "96", "memory": "512Gi", "gpus": 8, "scratch": "200Gi"}
    job = Job("equiav", image, tuple(program), role="node", secret="equiav-store", metrics_port=PORT, **CLUSTER, **size)  # type: ignore
    spec = objects(job)[-1]["spec"]
    for name in ("completions", "parallelism", "ttlSecondsAfterFinished"):
        del spec[name]
    pod = spec["template"]
    del pod["metadata"]["labels"]["app.kubernetes.io/instance"], pod["spec"]["subdomain"]
    named = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/jobset-name']"}}
    env = pod["spec"]["containers"][0]["env"]
    env[:] = [one for one in env if one["name"] != "TORCHX_RANK0_HOST"] + [{"name": "TRAINJOB", "valueFrom": named}]
    # By this label Trainer knows whose pods they are whose number, arguments and resources a TrainJob gives.
    about = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    nodes = {"name": "node", "template": {"metadata": about, "spec": spec}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {
            "name": "equiav",
            "namespace": job.namespace,
            "labels": {"trainer.kubeflow.org/framework": "torch"},
        },
        "spec": {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": {"replicatedJobs": [nodes]}}},
    }


def main(image: str) -> None:
    (before,) = set(re.findall(r"^ *(?:- )?image: (.*)$", (FOLDER / "80-demo.yaml").read_text(), re.MULTILINE))
    (FOLDER / "80-demo.yaml").write_text(HEAD + to_yaml(demo(image)))
    budget = FOLDER / "70-disruption.yaml"
    of_demo = re.compile(r"(app.kubernetes.io/instance: )demo\S*")
    budget.write_text(of_demo.sub(rf"\g<1>{names(image)[1]}", budget.read_text()))
    (FOLDER / "optional" / "trainer.yaml").write_text(RUNTIME + to_yaml([runtime(image)]))
    for path in sorted(FOLDER.rglob("*.yaml")):
        ours = re.compile(rf"^( *(?:- )?image: ){re.escape(before)}$", re.MULTILINE)  # others' stay
        path.write_text(ours.sub(rf"\g<1>{image}", path.read_text()))


if __name__ == "__main__":
    from launch.component import IMAGE

    main(sys.argv[1] if len(sys.argv) > 1 else IMAGE)
