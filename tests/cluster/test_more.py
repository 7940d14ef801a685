"""`make test-cluster-more`: what takes longer than a change may wait for."""

import base64
import json
import os
import re
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from launch.job import Job, objects
from tests.cluster import binaries
from tests.cluster.cluster import run
from tests.cluster.test_run import (
    DEMO,
    NAMESPACE,
    RUN,
    applied,
    ended,
    launcher,
    pods,
    store_folder,
    torchx,
    trouble,
    until,
)

pytestmark = pytest.mark.cluster_more
__all__ = ["applied", "launcher"]  # fixtures

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


def indexed(kubectl, namespace):
    """index -> pod, of those that are not ending"""
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
        return sum(pod["status"]["phase"] == "Running" for pod in indexed(kubectl, namespace).values()) == NODES

    cluster.until(running, 600, "not all pods run")
    print(f"{NODES} pods created, scheduled and running: {time.monotonic() - begun:.0f} s")
    before = indexed(kubectl, namespace)
    begun = time.monotonic()
    lost = before[77]["metadata"]
    failed = json.dumps({"status": {"phase": "Failed"}})
    kubectl("-n", namespace, "patch", "pod", lost["name"], "--subresource=status", "--type=merge", "-p", failed)
    cluster.until(
        lambda: (pod := indexed(kubectl, namespace).get(77)) and pod["status"]["phase"] == "Running",
        120,
        "not replaced",
    )
    print(f"one of them failed and was replaced: {time.monotonic() - begun:.0f} s")
    after = indexed(kubectl, namespace)
    changed = [index for index in range(NODES) if before[index]["metadata"]["uid"] != after[index]["metadata"]["uid"]]
    assert changed == [77]


# ---- controllers of others. They run beside the API server instead of in a pod: what they do to jobs is the same.


def certificate(folder):
    """For this machine's address. -> what those trust who ask there"""
    folder.mkdir(parents=True, exist_ok=True)
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=local", "-addext",
        "subjectAltName=IP:127.0.0.1", "-keyout", folder / "tls.key", "-out", folder / "tls.crt")  # fmt: skip
    return base64.b64encode((folder / "tls.crt").read_bytes()).decode()


def asked(name, port, authority, groups):
    """What the API server is to ask a controller about objects of these groups."""
    for number, hook in enumerate(yaml.safe_load_all((binaries.program(name).parent / "manifests.yaml").read_text())):
        hook["metadata"]["name"] = f"{name}-{number}"
        for one in hook["webhooks"]:
            path = one["clientConfig"]["service"]["path"]
            one["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": authority}
        hook["webhooks"] = [one for one in hook["webhooks"] if one["rules"][0]["apiGroups"][0] in groups]
        yield hook


def define(kubectl, name, group):
    """Its kinds of objects, before it asks for them."""
    paths = sorted(binaries.program(name).parent.glob(f"{group}_*.yaml"))
    for path in paths:
        kubectl("apply", "--server-side", "-f", path)
    for path in paths:
        kubectl("wait", "--for=condition=Established", "--timeout=120s", "-f", path)


@contextmanager
def controller(kubectl, name, command, log, hooks):
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "TMPDIR": str(log.parent)})
    try:
        kubectl.apply(*hooks)

        def there(work):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                return work()
            except RuntimeError:  # it listens soon
                return False

        yield lambda work: until(lambda: there(work), 60, lambda: log.read_text()[-3000:])
    finally:
        process.terminate()
        process.wait()
        for hook in hooks:
            kubectl("delete", hook["kind"].lower(), hook["metadata"]["name"])


@pytest.fixture
def kueue(kubectl, cluster):
    folder = cluster.folder / "kueue"
    authority = certificate(folder)
    define(kubectl, "kueue", "kueue.x-k8s.io")
    settings = {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": "127.0.0.1:8081"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"port": 9443, "certDir": str(folder)},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "integrations": {"frameworks": ["batch/job"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kueue-system"}})
    # Certificates of its metrics are sought in one place alone.
    place = f"mount -t tmpfs none /etc && mkdir -p /etc/kueue/metrics && ln -s {folder} /etc/kueue/metrics/certs"
    command = ["unshare", "--mount", "sh", "-c", f'{place} && exec "$@"', "sh"]
    command += [binaries.program("kueue"), "--config", folder / "config.yaml"]
    command += ["--kubeconfig", kubectl.kubeconfig, "--feature-gates=VisibilityOnDemand=false"]
    hooks = list(asked("kueue", 9443, authority, ("batch", "kueue.x-k8s.io")))
    with controller(kubectl, "kueue", command, folder / "log", hooks) as when_there:
        when_there(lambda: kubectl("apply", "-f", "k8s/optional/kueue.yaml"))
        yield


@pytest.fixture
def trainer(kubectl, cluster):
    """Kubeflow's, and the JobSet that it makes its jobs of."""
    folder = cluster.folder / "trainer"
    # The place where they look for it, in their folder for temporary files.
    authority = certificate(folder / "k8s-webhook-server" / "serving-certs")
    names = {"jobset": "jobset.x-k8s.io", "trainer-controller-manager": "trainer.kubeflow.org"}
    commands = []
    for number, (name, group) in enumerate(names.items()):
        define(kubectl, name, group)
        settings = {
            "apiVersion": f"config.{group}/v1alpha1",
            "kind": "Configuration",
            "health": {"healthProbeBindAddress": f"127.0.0.1:{8082 + number}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"port": 9444 + number},
            "leaderElection": {"leaderElect": False},
            **({"certManagement": {"enable": False}} if number else {"internalCertManagement": {"enable": False}}),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        commands.append(
            [binaries.program(name), "--config", folder / f"{name}.yaml", "--kubeconfig", kubectl.kubeconfig]
        )
    with ExitStack() as stack:
        for number, (command, (name, group)) in enumerate(zip(commands, names.items(), strict=True)):
            hooks = list(asked(name, 9444 + number, authority, [group]))
            when_there = stack.enter_context(controller(kubectl, name, command, folder / f"{name}.log", hooks))
        when_there(lambda: kubectl("apply", "-f", "k8s/optional/trainer.yaml"))
        yield


def test_a_quota_for_one_of_two_jobs(kubectl, launcher, kueue):
    """The second waits whole. Preempted by a third, it saves, comes back, and ends as the first did, to the last bit."""
    until(lambda: ended(kubectl, DEMO), 300, trouble(kubectl, DEMO))  # two cores
    quota = json.loads(kubectl("get", "clusterqueue", "equiav", "-o", "json"))["spec"]["resourceGroups"]
    next(one for one in quota[0]["flavors"][0]["resources"] if one["name"] == "cpu")["nominalQuota"] = "2"
    change = json.dumps({"spec": {"resourceGroups": quota}})
    kubectl("patch", "clusterqueue", "equiav", "--type=merge", "-p", change)
    urgent = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}}
    kubectl.apply({**urgent, "value": 1000})

    def submit(name):
        torchx(*launcher, "launch/pretrain.py", "--nodes", "2", "--cpu", "1", "--memory", "3Gi", "--scratch", "4Gi", "--data",
               "s3://equiav/clips", "--out", f"s3://equiav/{name}", "--secret", "equiav-store", "--queue", "equiav",
               "--", *RUN)  # fmt: skip
        return store_folder(kubectl) / name / "checkpoints"

    def suspended(name):
        return kubectl.json("-n", NAMESPACE, "get", "job", name)["spec"]["suspend"]

    first = submit("first")
    until(lambda: len(pods(kubectl, "first")) == 2, 60, trouble(kubectl, "first"))
    second = submit("second")
    told = torchx("status", f"kubernetes://torchx/{NAMESPACE}:second")
    assert "PENDING" in told
    assert "waits for its queue" in told
    until(lambda: ended(kubectl, "first") or pods(kubectl, "second"), 400, trouble(kubectl, "first"))
    assert ended(kubectl, "first") == "Complete"
    until(lambda: len(pods(kubectl, "second")) == 2, 60, trouble(kubectl, "second"))  # whole
    until(lambda: list(second.glob("step-*/manifest.json")), 120, trouble(kubectl, "second"))

    options = f"{launcher[-1]},priority_class=urgent"
    pack = [
        "launch/pack.py",
        "--name",
        "urgent",
        "--source",
        "synthetic:256",
        "--to",
        "s3://equiav/urgent",
        "--cpu",
        "2",
    ]
    pack += ["--memory", "2Gi", "--scratch", "2Gi", "--secret", "equiav-store", "--queue", "equiav"]
    torchx(*launcher[:-1], options, *pack)
    until(lambda: suspended("second"), 60, trouble(kubectl, "second"))
    until(lambda: ended(kubectl, "urgent"), 200, trouble(kubectl, "urgent"))
    assert ended(kubectl, "urgent") == "Complete"
    until(lambda: ended(kubectl, "second"), 400, trouble(kubectl, "second"))
    assert ended(kubectl, "second") == "Complete"
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_train_job(kubectl, launcher, trainer):
    """Two nodes, one of whose pods is deleted: it ends as the demonstration did, to the last bit."""
    until(lambda: ended(kubectl, DEMO), 300, trouble(kubectl, DEMO))
    assert ended(kubectl, DEMO) == "Complete"
    (text,) = re.findall(r"```yaml\n(.*?)```", Path("docs/kubernetes.md").read_text(), re.DOTALL)
    job = yaml.safe_load(text)
    name = job["metadata"]["name"]
    few = ["--train.micro_batch", "8", "--train.steps", "120", "--checkpoint.every_steps", "20", "--device", "cpu"]
    given = [
        f"s3://equiav/{name}/checkpoints" if one.endswith("/checkpoints") else one
        for one in job["spec"]["trainer"]["args"]
    ]
    given = ["s3://equiav/clips" if one == "s3://bucket/clips" else one for one in given]
    given[given.index("--config") + 1] = "smoke"
    size = {"cpu": "1", "memory": "3Gi", "ephemeral-storage": "4Gi"}
    job["spec"]["trainer"] |= {"args": given + few, "resourcesPerNode": {"requests": size, "limits": size}}
    kubectl.apply(job)
    folder = store_folder(kubectl) / name / "checkpoints"
    own = f"{name}-node-0"
    until(lambda: len(pods(kubectl, own)) == 2, 60, trouble(kubectl, own))
    until(lambda: list(folder.glob("step-*/manifest.json")), 120, trouble(kubectl, own))
    kubectl("-n", NAMESPACE, "delete", "pod", pods(kubectl, own)[1]["metadata"]["name"], "--wait=false")
    until(lambda: ended(kubectl, own), 400, trouble(kubectl, own))

    def complete():
        conditions = kubectl.json("-n", NAMESPACE, "get", "trainjob", name)["status"].get("conditions", [])
        return any(one["type"] == "Complete" and one["status"] == "True" for one in conditions)

    until(complete, 60, lambda: kubectl("-n", NAMESPACE, "get", "trainjob", name, "-o", "yaml"))
    demo = store_folder(kubectl) / "demo" / "checkpoints"
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (demo / name).read_bytes() == (folder / name).read_bytes()
