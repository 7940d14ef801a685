"""What a job becomes: objects that every supported Kubernetes takes, with nothing in them that a cluster's guards refuse."""

import json
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from launch import manifests
from launch.job import LONGEST_NAME, MOST_SETTINGS, Job, JobError, Volume, literal, object_name, objects
from launch.scheduler import to_yaml

K8S = Path(__file__).parents[2] / "k8s"
EVERYTHING = Job(
    name="run-1",
    image="registry.example/equiav@sha256:0",
    command=("python", "-m", "launch.node"),
    namespace="team",
    nodes=(2, 4),
    gpus=8,
    devices={"rdma/hca": 1},
    env={"A": "b $(HOME) c"},
    secret="store",
    settings="a: 1\n",
    waits_for="s3://bucket/clips",
    volumes=(Volume("claim", "/data", True), Volume("/nvme", "/cache")),
    service_account="equiav",
    pull_secret="registry",
    priority_class="high",
    queue="team",
    node_selector={"gpu": "h100"},
    tolerations=("dedicated:gpu", "spot"),
    metrics_port=9108,
)


LIST_PODS = ("91-prometheus.yaml:prometheus", "92-state.yaml:state")  # and ask the API server for them


def job_object(job):
    return objects(job)[-1]


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("job", [Job("smoke", "equiav:1", ("true",)), EVERYTHING], ids=["least", "everything"])
def test_the_schemas_of_kubernetes_accept_it(job, version):
    for one in objects(job):
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("path", sorted(K8S.glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_schemas_accept_the_manifests(path, version):
    for one in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(one, version, strict=True)


def pods():
    """Every pod that this project describes."""
    for path in sorted(K8S.glob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text()):
            if "template" in one.get("spec", {}):
                yield f"{path.name}:{one['metadata']['name']}", one["spec"]["template"]["spec"]
    runtime = yaml.safe_load((K8S / "optional" / "trainer.yaml").read_text())
    (nodes,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    yield "trainer", nodes["template"]["spec"]["template"]["spec"]
    yield "everything", job_object(EVERYTHING)["spec"]["template"]["spec"]


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=[name for name, _ in pods()])
def test_pods_have_no_more_rights_than_they_need(name, pod):
    assert pod["automountServiceAccountToken"] is (name in LIST_PODS)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for kind in ("memory", "ephemeral-storage"):
            assert container["resources"]["requests"][kind] == container["resources"]["limits"][kind]
        for one in container.get("env", []):
            assert not ("SECRET" in one["name"] and "value" in one)
    for volume in pod.get("volumes", ()):
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"]


def test_nobody_gets_every_right():
    roles = [one for one in yaml.safe_load_all((K8S / "10-access.yaml").read_text()) if one["kind"] == "Role"]
    assert roles
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "secrets" not in rule["resources"]


def test_requests_are_limits_and_everything_asked_for_is_there():
    one = job_object(EVERYTHING)
    pod = one["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["resources"]["limits"]["rdma/hca"] == "1"
    assert {"name": "A", "value": "b $$(HOME) c"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert pod["priorityClassName"] == "high"
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert {"key": "dedicated", "operator": "Equal", "value": "gpu"} in pod["tolerations"]
    assert {"key": "spot", "operator": "Exists"} in pod["tolerations"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert one["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert one["spec"]["suspend"] is True
    assert one["spec"]["backoffLimitPerIndex"] == 100
    assert "podFailurePolicy" not in one["spec"]
    assert "suspend" not in job_object(Job("a", "i", ("c",)))["spec"]


@pytest.mark.parametrize(
    "name", ["smoke", "a-b-c", "My_Run.1", "x" * 63, "x" * 64, "1-2-3", "-", "Ä", "a--b", "run/of/today"]
)
def test_any_name_of_a_run_becomes_one_of_kubernetes(name):
    made = object_name(name)
    job = Job(made, "image", ("true",), nodes=(1, 2048))
    assert len(f"{made}-2047-abcde") <= 63
    for one in objects(job):
        kubernetes_validate.validate(one, "1.34", strict=True)
    assert object_name(made) == made


def test_different_runs_have_different_names():
    names = ["a.b", "a-b", "a_b", "A-b", "x" * 60, "x" * 61, "x" * 62]
    assert len({object_name(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "A"}, "name is 'A'"),
        ({"name": "x" * (LONGEST_NAME + 1)}, "name is"),
        ({"image": ""}, "image is ''"),
        ({"image": "a b"}, "image is 'a b'"),
        ({"nodes": (0, 1)}, "nodes is '0:1'"),
        ({"nodes": (3, 2)}, "nodes is '3:2'"),
        ({"memory": "lots"}, "memory is 'lots'"),
        ({"memory": "500m"}, "memory is '500m'"),
        ({"memory": "0.5"}, "memory is '0.5'"),
        ({"cpu": "0"}, "cpu is '0'"),
        ({"cpu": "0.0001"}, "cpu is '0.0001'"),
        ({"cpu": "0.5m"}, "cpu is '0.5m'"),
        ({"cpu": "4Gi"}, "cpu is '4Gi'"),
        ({"env": {"NODE_NAME": "c"}}, "env is 'NODE_NAME'"),
        ({"volumes": (Volume("a", "/tmp"),)}, "mounts is '/tmp', expected each path once"),
        ({"settings": "x" * (MOST_SETTINGS + 1)}, "at most 100,000"),
        ({"env": {"A B": "c"}}, "env is 'A B'"),
        ({"volumes": (Volume("claim", "data"),)}, "mounts is 'data'"),
        ({"node_selector": {"a": "b c"}}, "node_selector is 'a=b c'"),
    ],
)
def test_what_is_wrong_with_a_job_is_named(settings, told):
    with pytest.raises(JobError, match=told.replace("(", r"\(")):
        Job(**{"name": "a", "image": "i", "command": ("c",), **settings})


def test_two_thousand_nodes_are_one_small_object():
    made = objects(Job("large", "image", ("true",), nodes=(1024, 2048), settings="x" * MOST_SETTINGS))
    assert [one["kind"] for one in made] == ["ConfigMap", "Service", "Job"]
    assert len(json.dumps(made[-1])) < 10_000


@pytest.mark.parametrize("text", ["a b", "$(HOME)", "$$(HOME)", "$$", "$$$", "$HOME", 'it\'s "so"', "a\nb", "", "ä\t"])
def test_text_survives(text):
    """Kubernetes reads $(NAME) as a variable, and $$ as $."""
    (made,) = (one for one in objects(Job("a", "i", ("echo", literal(text)), env={"A": text})) if one["kind"] == "Job")
    read = yaml.safe_load(to_yaml([made]))
    (container,) = read["spec"]["template"]["spec"]["containers"]
    assert container["command"][1].replace("$$", "$") == text
    assert next(one["value"] for one in container["env"] if one["name"] == "A").replace("$$", "$") == text


def test_the_demonstration_is_what_the_code_makes():
    image = next(
        one["spec"]["template"]["spec"]["containers"][0]["image"]
        for one in yaml.safe_load_all((K8S / "80-demo.yaml").read_text())
        if one["kind"] == "Job"
    )
    written = (K8S / "80-demo.yaml").read_text()
    assert written == manifests.HEAD + to_yaml(manifests.demo(image)), "run `python -m launch.manifests`"
    written = (K8S / "optional" / "trainer.yaml").read_text()
    assert written == manifests.RUNTIME + to_yaml([manifests.runtime(image)]), "run `python -m launch.manifests`"
    listed = yaml.safe_load((K8S / "Kustomization").read_text())["resources"]
    assert listed == sorted(path.name for path in K8S.glob("*.yaml"))
    images = {c["image"] for name, pod in pods() if name != "everything" for c in pod["containers"]}
    assert {one.rpartition(":")[0] for one in images - {image}} == {
        "docker.io/prom/prometheus",
        "docker.io/grafana/grafana",
        "registry.k8s.io/kube-state-metrics/kube-state-metrics",
    }
