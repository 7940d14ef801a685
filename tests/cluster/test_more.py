"""`make test-cluster-more`: what takes longer than a change may wait for."""

import json
import subprocess
import time

import pytest
import yaml

from launch.job import Job, objects
from tests.cluster import binaries

pytestmark = pytest.mark.cluster_more

NODES = 1024


@pytest.fixture
def simulated(kubectl, cluster):
    """As many machines with eight GPUs each, of which the API server believes that they are there."""
    nodes = []
    for number in range(NODES):
        about = {
            "name": f"simulated-{number}",
            "labels": {"kind": "simulated", "topology.kubernetes.io/zone": "zone-b"},
        }
        about["annotations"] = {"kwok.x-k8s.io/node": "fake"}
        whole = {"cpu": "128", "memory": "1Ti", "ephemeral-storage": "4Ti", "pods": "110", "nvidia.com/gpu": "8"}
        taint = {"key": "simulated", "effect": "NoSchedule"}
        nodes.append(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": about,
                "spec": {"taints": [taint]},
                "status": {"capacity": whole, "allocatable": whole},
            }
        )
    log = (cluster.folder / "kwok.log").open("ab")
    stages = cluster.folder / "stages.yaml"  # what becomes of nodes and pods: they are ready at once
    kept = sorted(binaries.program("kwok").parent.glob("*.yaml"))
    stages.write_text("---\n".join(path.read_text() for path in kept))
    command = [binaries.program("kwok"), "--kubeconfig", kubectl.kubeconfig, "--config", stages]
    command += ["--manage-all-nodes=false", "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake"]
    kwok = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        kubectl.apply(*nodes)
        cluster.until(lambda: len(ready(kubectl)) == NODES, 300, "simulated nodes are not ready")
        yield
    finally:
        kubectl("delete", "nodes", "-l", "kind=simulated", "--wait=false")
        kwok.terminate()
        kwok.wait()


def ready(kubectl):
    path = '{range .items[*]}{.status.conditions[?(@.type=="Ready")].status}{"\\n"}{end}'
    return [
        line
        for line in kubectl("get", "nodes", "-l", "kind=simulated", "-o", f"jsonpath={path}").split()
        if line == "True"
    ]


def pods(kubectl, namespace):
    """index -> (uid, phase), of those that are not ending"""
    listed = kubectl.json("-n", namespace, "get", "pods")["items"]
    return {
        int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]): pod
        for pod in listed
        if pod["status"]["phase"] in ("Pending", "Running")
    }


def test_a_thousand_nodes_in_one_job(kubectl, cluster, namespace, simulated):
    job = Job(
        "large",
        "equiav:0.1.0",
        ("true",),
        namespace=namespace,
        nodes=(512, NODES),
        gpus=8,
        cpu="96",
        memory="512Gi",
        node_selector={"kind": "simulated"},
        tolerations=("simulated",),
        settings="seed: 0\n",
    )
    text = yaml.safe_dump_all(objects(job))
    begun = time.monotonic()
    kubectl("apply", "-f", "-", input=text)
    print(f"\nthe Job has {len(json.dumps(objects(job)[-1])):,} bytes")

    def running():
        return sum(pod["status"]["phase"] == "Running" for pod in pods(kubectl, namespace).values()) == NODES

    cluster.until(running, 600, "not all pods run")
    print(f"{NODES} pods created, scheduled and running: {time.monotonic() - begun:.0f} s")
    before = pods(kubectl, namespace)
    begun = time.monotonic()
    lost = before[77]["metadata"]
    failed = json.dumps({"status": {"phase": "Failed"}})
    kubectl("-n", namespace, "patch", "pod", lost["name"], "--subresource=status", "--type=merge", "-p", failed)
    cluster.until(
        lambda: (pod := pods(kubectl, namespace).get(77)) and pod["status"]["phase"] == "Running", 120, "not replaced"
    )
    print(f"one of them failed and was replaced: {time.monotonic() - begun:.0f} s")
    after = pods(kubectl, namespace)
    changed = [index for index in range(NODES) if before[index]["metadata"]["uid"] != after[index]["metadata"]["uid"]]
    assert changed == [77]
