"""`make test-cluster-more`: what takes longer than a change may wait for."""

import base64
import json
import subprocess
import time

import pytest
import yaml

from launch.job import Job, objects
from tests.cluster import binaries
from tests.cluster.cluster import run
from tests.cluster.test_run import NAMESPACE, RUN, applied, ended, launcher, pods, store_folder, torchx, trouble, until

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


# ---- a queue


@pytest.fixture
def kueue(kubectl, cluster):
    """Its controller, beside the API server instead of in a pod: what it does to jobs is the same."""
    folder = cluster.folder / "kueue"
    folder.mkdir(exist_ok=True)
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kueue", "-addext",
        "subjectAltName=IP:127.0.0.1", "-keyout", folder / "tls.key", "-out", folder / "tls.crt")  # fmt: skip
    authority = base64.b64encode((folder / "tls.crt").read_bytes()).decode()
    kept = binaries.program("kueue").parent
    for path in kept.glob("kueue.x-k8s.io_*.yaml"):
        kubectl("apply", "--server-side", "-f", path)
    hooks = []
    for hook in yaml.safe_load_all((kept / "manifests.yaml").read_text()):
        for one in hook["webhooks"]:
            path = one["clientConfig"]["service"]["path"]
            one["clientConfig"] = {"url": f"https://127.0.0.1:9443{path}", "caBundle": authority}
        ours = ("batch", "kueue.x-k8s.io")
        hook["webhooks"] = [one for one in hook["webhooks"] if one["rules"][0]["apiGroups"][0] in ours]
        hooks.append(hook)
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
    log = (folder / "log").open("ab")
    # Certificates of its metrics are sought in one place alone.
    place = f"mount -t tmpfs none /etc && mkdir -p /etc/kueue/metrics && ln -s {folder} /etc/kueue/metrics/certs"
    command = ["unshare", "--mount", "sh", "-c", f'{place} && exec "$@"', "sh"]
    command += [binaries.program("kueue"), "--config", folder / "config.yaml"]
    command += ["--kubeconfig", kubectl.kubeconfig, "--feature-gates=VisibilityOnDemand=false"]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        kubectl.apply(*hooks)

        def there():
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                return kubectl("apply", "-f", "k8s/optional/kueue.yaml")
            except RuntimeError:  # it listens soon
                return False

        until(there, 60, lambda: (folder / "log").read_text()[-3000:])
        yield
    finally:
        process.terminate()
        process.wait()
        kubectl("delete", "validatingwebhookconfigurations,mutatingwebhookconfigurations", "--all")


def test_a_quota_for_one_of_two_jobs(kubectl, launcher, kueue):
    """The second waits whole. Preempted by a third, it saves, comes back, and ends as the first did, to the last bit."""
    until(lambda: ended(kubectl, "demo"), 300, trouble(kubectl, "demo"))  # two cores
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
