"""That the cluster is one: what other tests take for granted."""

import json
import time

import pytest

pytestmark = pytest.mark.cluster

SERVER = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=8000, bind='0.0.0.0')"
LOST = 5  # seconds for which a pod waits for its node


def until(condition, seconds, what):
    begun = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - begun < seconds, what() if callable(what) else what
        time.sleep(0.5)
    return found, time.monotonic() - begun


def spec(image, *command, **more):
    container = {
        "name": "main",
        "image": image,
        "command": list(command),
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    safe = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    rest = {"securityContext": safe, "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 1}
    return {"containers": [container], "restartPolicy": "Never", **rest, **more}


def pod(namespace, name, spec, **labels):
    about = {"name": name, "namespace": namespace, "labels": {"app": "test"} | labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}


def phase(kubectl, namespace, name):
    return kubectl("-n", namespace, "get", "pod", name, "-o", "jsonpath={.status.phase}")


def running(kubectl, namespace, *names):
    def described():
        return kubectl("-n", namespace, "describe", "pods")

    for name in names:
        until(lambda name=name: phase(kubectl, namespace, name) == "Running", 60, described)


def reaches(kubectl, namespace, name, host):
    program = f"""
import sys, urllib.request
try:
    urllib.request.urlopen("http://{host}:8000", timeout=3)
except OSError as error:
    sys.exit(print("no:", error))
print("yes")"""
    said = kubectl("-n", namespace, "exec", name, "--", "python", "-c", program)
    assert said.startswith(("yes", "no:")), said
    return said.startswith("yes")


def nodes(kubectl):
    return [item["metadata"]["name"] for item in kubectl.json("get", "nodes")["items"]]


def service(namespace):
    about = {"clusterIP": "None", "selector": {"app": "test"}, "publishNotReadyAddresses": True}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "pods", "namespace": namespace}, "spec": about}


def place(kubectl, namespace, image):
    """A pod on each node that serves port 8000, and has a name."""
    names = [f"pod-{number}" for number in range(len(nodes(kubectl)))]
    made = [
        pod(namespace, name, spec(image, "python", "-c", SERVER, nodeName=node, hostname=name, subdomain="pods"))
        for name, node in zip(names, nodes(kubectl), strict=True)
    ]
    kubectl.apply(service(namespace), *made)
    running(kubectl, namespace, *names)
    return names


def policy(namespace, name, **about):
    about = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} | about
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": about}


def test_the_nodes_are_ready(cluster):
    found = {item["metadata"]["name"]: item for item in cluster.kubectl.json("get", "nodes")["items"]}
    assert sorted(found) == cluster.nodes == ["node-0", "node-1", "node-2"]
    assert all(cluster.ready(number) for number in range(3))
    assert {item["metadata"]["labels"]["topology.kubernetes.io/zone"] for item in found.values()} == {"zone-a"}


def test_pods_reach_each_other_by_name(kubectl, namespace, image):
    names = place(kubectl, namespace, image)
    for one in names:
        for other in names:
            until(lambda one=one, other=other: reaches(kubectl, namespace, one, f"{other}.pods"), 30, f"{one}, {other}")
    assert "GET / HTTP" in kubectl("-n", namespace, "logs", names[0])


def test_a_pod_that_is_not_restricted_is_refused(kubectl, namespace, image):
    about = spec(image, "sleep", "1")
    del about["securityContext"]["seccompProfile"]
    with pytest.raises(RuntimeError, match="seccompProfile"):
        kubectl.apply(pod(namespace, "loose", about))


def test_the_image_has_what_the_project_needs(kubectl, namespace, image):
    program = "import os, torch, equiav, streaming; print(os.getuid(), torch.ones(2).sum().item())"
    kubectl.apply(pod(namespace, "imports", spec(image, "python", "-c", program)))
    until(lambda: phase(kubectl, namespace, "imports") in ("Succeeded", "Failed"), 120, "the pod has not ended")
    assert kubectl("-n", namespace, "logs", "imports").split() == ["10001", "2.0"]
    assert phase(kubectl, namespace, "imports") == "Succeeded"


def test_the_root_of_a_pod_is_read_only(kubectl, namespace, image):
    program = "touch /tmp/a; touch /usr/a; touch $(dirname $(dirname $(command -v python)))/a; grep Seccomp: /proc/self/status"
    kubectl.apply(pod(namespace, "writes", spec(image, "sh", "-c", program)))
    until(lambda: phase(kubectl, namespace, "writes") in ("Succeeded", "Failed"), 60, "the pod has not ended")
    said = kubectl("-n", namespace, "logs", "writes")
    assert said.count("Read-only file system") == 3
    assert said.split()[-2:] == ["Seccomp:", "2"]


def test_network_policies_are_enforced(kubectl, namespace, image):
    first, second, third = place(kubectl, namespace, image)[:3]
    until(lambda: reaches(kubectl, namespace, first, f"{second}.pods"), 30, "no way without a policy")
    kubectl("-n", namespace, "label", "pod", first, "role=client")
    kubectl("-n", namespace, "label", "pod", second, "role=server")
    client, server = ({"podSelector": {"matchLabels": {"role": role}}} for role in ("client", "server"))
    names = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    port = [{"port": 8000, "protocol": "TCP"}]
    kubectl.apply(
        policy(namespace, "nothing"),
        policy(namespace, "client", **client, policyTypes=["Egress"], egress=[names, {"to": [server], "ports": port}]),
        policy(namespace, "server", **server, policyTypes=["Ingress"], ingress=[{"from": [client], "ports": port}]),
    )
    until(lambda: not reaches(kubectl, namespace, third, address(kubectl, namespace, second)), 30, "not enforced")
    until(lambda: reaches(kubectl, namespace, first, f"{second}.pods"), 30, "what is allowed does not pass")
    assert not reaches(kubectl, namespace, first, address(kubectl, namespace, third))
    assert not reaches(kubectl, namespace, third, address(kubectl, namespace, second))


def address(kubectl, namespace, name):
    return kubectl("-n", namespace, "get", "pod", name, "-o", "jsonpath={.status.podIP}")


def test_a_claim_that_names_no_class_is_bound_and_shared(cluster, namespace):
    cluster.volumes()
    about = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "5Gi"}}}
    metadata = {"name": "data", "namespace": namespace}
    kubectl = cluster.kubectl
    kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": about})
    for number, command in ((0, "echo something > /data/a"), (2, "cat /data/a")):
        volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
        made = spec(cluster.image, "sh", "-c", command, volumes=volumes)
        made["nodeSelector"] = {"kubernetes.io/hostname": f"node-{number}"}
        made["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        kubectl.apply(pod(namespace, f"pod-{number}", made))
        until(lambda n=number: phase(kubectl, namespace, f"pod-{n}") == "Succeeded", 60, "the pod has not ended")
    assert kubectl("-n", namespace, "logs", "pod-2") == "something\n"


def job(namespace, image):
    lost = [
        {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST}
        for what in ("not-ready", "unreachable")
    ]
    apart = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"app": "test"}},
    }
    template = spec(image, "sleep", "1000", tolerations=lost, topologySpreadConstraints=[apart])
    about = {
        "completionMode": "Indexed",
        "completions": 3,
        "parallelism": 3,
        "backoffLimitPerIndex": 10,
        "podReplacementPolicy": "TerminatingOrFailed",
        "template": {"metadata": {"labels": {"app": "test"}}, "spec": template},
    }
    metadata = {"name": "job", "namespace": namespace}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": about}


@pytest.mark.parametrize(("lose", "restore"), [("kill", "start"), ("cut", "join")])
def test_a_lost_node_is_found_and_its_pod_replaced(cluster, namespace, lose, restore):
    kubectl = cluster.kubectl

    def pods():
        """index -> the node of its pod that is running and not given up."""
        items = kubectl.json("-n", namespace, "get", "pods")["items"]
        alive = [i for i in items if i["status"]["phase"] == "Running" and "deletionTimestamp" not in i["metadata"]]
        return {
            i["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: i["spec"]["nodeName"] for i in alive
        }

    kubectl.apply(job(namespace, cluster.image))
    until(lambda: sorted(pods().values()) == cluster.nodes, 60, lambda: json.dumps(pods()))
    index = next(index for index, node in pods().items() if node == "node-1")
    getattr(cluster, lose)(1)
    try:
        _, noticed = until(lambda: not cluster.ready(1), 20, "the node is still ready")
        _, replaced = until(lambda: pods().get(index, "node-1") != "node-1", 30, lambda: json.dumps(pods()))
        print(f"{lose}: NotReady after {noticed:.0f} s, its pod runs elsewhere {replaced:.0f} s later")
        assert len(pods()) == 3
    finally:
        getattr(cluster, restore)(1)
    _, back = until(lambda: cluster.ready(1), 60, "the node does not come back")
    print(f"{restore}: Ready after {back:.0f} s")

    def left():
        items = kubectl.json("-n", namespace, "get", "pods", "--field-selector", "spec.nodeName=node-1")["items"]
        return [item["metadata"]["name"] for item in items if "deletionTimestamp" in item["metadata"]]

    until(lambda: not left(), 60, lambda: f"still there: {left()}")  # the node has let go of what it had
    program = spec(cluster.image, "python", "-c", SERVER, nodeName="node-1", hostname="again", subdomain="pods")
    kubectl.apply(service(namespace), pod(namespace, "again", program))
    running(kubectl, namespace, "again")
    other = next(
        item["metadata"]["name"]
        for item in kubectl.json("-n", namespace, "get", "pods")["items"]
        if item["spec"]["nodeName"] != "node-1" and item["status"]["phase"] == "Running"
    )
    until(lambda: reaches(kubectl, namespace, other, "again.pods"), 30, "the node's new pods are not reached")
