"""What a cluster asks of pods beyond a job's needs: flags and a patch, checked before anything is sent."""

import copy
import json
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from launch.job import JobError
from launch.template import KEYS, patch_from, patch_of, patched
from tests.launch.test_job import EVERYTHING, job_object

SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"


def template():
    return job_object(EVERYTHING)["spec"]["template"]


def apply(patch):
    return patched(template(), patch)


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
def test_lists_are_merged_by_the_fields_that_kubernetes_names(version):
    """Everywhere below a pod template."""
    kinds = json.loads((SCHEMAS / f"v{version}.0-local" / "_definitions.json").read_text())["$defs"]
    seen, keys, whole = set(), {}, set()

    def walk(name):
        if name in seen:
            return
        seen.add(name)
        for field, about in kinds[name].get("properties", {}).items():
            if key := about.get("x-kubernetes-patch-merge-key"):
                assert keys.setdefault(field, key) == key
            elif about.get("type") == "array":
                whole.add(field)
            for one in (about, about.get("items", {}), about.get("additionalProperties", {})):
                if isinstance(one, dict) and "$ref" in one:
                    walk(one["$ref"].rpartition("/")[2])

    walk("io.k8s.api.core.v1.PodTemplateSpec")
    keys.pop("evictionResponders", None)  # of 1.37, and not in the client that checks a patch
    assert keys == {field: KEYS[field] for field in keys}
    assert not whole & KEYS.keys()


def test_options_become_a_patch():
    options = {
        "labels": {"team": "vision"},
        "annotations": {"karpenter.sh/do-not-disrupt": "true"},
        "capabilities": ["IPC_LOCK"],
        "claims": {"gpus": "h100x8"},
        "host_network": True,
        "runtime_class": "nvidia",
        "scheduler_name": "volcano",
    }
    before, made = template(), apply(patch_of(options, "worker"))
    spec, (container,) = made["spec"], made["spec"]["containers"]
    assert made["metadata"]["labels"] == before["metadata"]["labels"] | {"team": "vision"}
    assert made["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
    assert container["resources"]["claims"] == [{"name": "gpus"}]
    assert container["resources"]["limits"] == before["spec"]["containers"][0]["resources"]["limits"]
    assert spec["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "h100x8"}]
    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert (spec["runtimeClassName"], spec["schedulerName"]) == ("nvidia", "volcano")
    job = copy.deepcopy(job_object(EVERYTHING))
    job["spec"]["template"] = made
    kubernetes_validate.validate(job, "1.34", strict=True)
    assert apply(patch_of({}, "worker")) == before


OWN = {"name": "worker"}
MISTAKES = [
    ({"spec": {"runtimeClas": "x"}}, "spec has runtimeClas, which Kubernetes does not know there; it knows"),
    (
        {"spec": {"containers": [OWN | {"securityContext": {"capabilites": {}}}]}},
        "spec.containers[worker].securityContext has",
    ),
    ({"spec": {"hostNetwork": "true"}}, "spec.hostNetwork is 'true', expected true or false"),
    ({"spec": {"priority": "high"}}, "spec.priority is 'high', expected a number"),
    ({"spec": {"priority": True}}, "spec.priority is True, expected a number"),
    ({"spec": {"runtimeClassName": 5}}, "spec.runtimeClassName is 5, expected a text"),
    ({"spec": {"tolerations": {"key": "x"}}}, "spec.tolerations is {'key': 'x'}, expected a list"),
    ({"metadata": {"annotations": {"a": True}}}, "metadata.annotations.a is True, expected a text, in quotes"),
    (
        {"metadata": {"labels": {"app.kubernetes.io/name": "x"}}},
        "metadata.labels.app.kubernetes.io/name is the job's own",
    ),
    ({"metadata": {"labels": None}}, "is the job's own, and not to be changed"),
    ({"spec": {"restartPolicy": "Always"}}, "spec.restartPolicy is the job's own"),
    ({"spec": {"subdomain": "x"}}, "spec.subdomain is the job's own"),
    ({"spec": {"containers": [OWN | {"command": ["sh"]}]}}, "spec.containers[worker].command is the job's own"),
    ({"spec": {"containers": [OWN | {"args": ["x"]}]}}, "spec.containers[worker].args is the job's own"),
    ({"spec": {"containers": [OWN | {"$patch": "delete"}]}}, "spec.containers[worker] is the job's own"),
    ({"spec": {"containers": None}}, "spec.containers[worker] is the job's own"),
    ({"spec": {"containers": [OWN | {"env": [{"name": "POD_IP", "value": "x"}]}]}}, "env[POD_IP] is the job's own"),
    (
        {"spec": {"containers": [OWN | {"env": [{"name": "DB_PWD", "value": "x"}]}]}},
        "env[7].DB_PWD looks like a secret",
    ),
    (
        {"spec": {"containers": [OWN | {"volumeMounts": [{"mountPath": "/tmp", "$patch": "delete"}]}]}},
        "nothing at /tmp",
    ),
    ({"spec": {"containers": [{"image": "x"}]}}, "an item of spec.containers has no name"),
    ({"spec": {"containers": [{"name": "gone", "$patch": "delete"}]}}, "has no item whose name is 'gone'"),
    ({"spec": {"nodeSelector": {"$patch": "remove"}}}, "$patch of spec.nodeSelector is 'remove'"),
    (
        {"spec": {"$setElementOrder/containers": []}},
        "spec has $setElementOrder/containers, expected $patch or $retainKeys",
    ),
]


@pytest.mark.parametrize(("patch", "told"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_in_a_patch_is_told(patch, told):
    with pytest.raises(JobError) as error:
        apply(patch)
    assert str(error.value).startswith("pod_patch: ") or "looks like a secret" in told
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "expected the node content"),
        ("- 1\n", "has list, expected metadata and spec"),
        ("template:\n  spec: {}\n", "has template, expected metadata and spec"),
        ("kind: Pod\nspec: {}\n", "has kind, spec, expected metadata and spec"),
    ],
)
def test_a_file_that_is_no_patch_is_told(text, told, tmp_path):
    (tmp_path / "patch.yaml").write_text(text)
    with pytest.raises(JobError, match=r"pod_patch: .*patch\.yaml") as error:
        patch_from(str(tmp_path / "patch.yaml"))
    assert told in str(error.value)
    with pytest.raises(JobError, match="No such file"):
        patch_from(str(tmp_path / "none.yaml"))


def test_a_patch_that_refers_to_itself(tmp_path):
    (tmp_path / "patch.yaml").write_text("spec: &s\n  affinity: *s\n")
    with pytest.raises(JobError, match="it refers to itself"):
        apply(patch_from(str(tmp_path / "patch.yaml")))
    for wrong in ("CAP_IPC_LOCK", "ALL", "ipc_lock"):
        with pytest.raises(JobError, match="expected a capability's name without CAP_"):
            patch_of({"capabilities": [wrong]}, "worker")


def test_a_patch_of_a_file_comes_after_the_options(tmp_path):
    path = tmp_path / "patch.yaml"
    path.write_text(
        yaml.safe_dump({"spec": {"runtimeClassName": "other", "containers": [{"name": "worker", "tty": True}]}})
    )
    made = patched(apply(patch_of({"runtime_class": "nvidia"}, "worker")), patch_from(str(path)))
    assert made["spec"]["runtimeClassName"] == "other"
    assert made["spec"]["containers"][0]["tty"] is True
    assert made["spec"]["containers"][0]["command"] == list(EVERYTHING.command)
