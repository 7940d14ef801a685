"""A linter's opinion of the manifests. What it is told to pass over has its reason here."""

import json
import subprocess
from pathlib import Path

import pytest

from launch.template import KEYS, merged
from tests.cluster import binaries
from tests.launch.test_job import EVERYTHING, job_object

pytestmark = pytest.mark.cluster

PASSED_OVER = {
    # An image is named by a tag that is never moved, or a digest: to ask the registry again at each start would make a
    # restart depend on it.
    "container-image-pull-policy",
    # The demonstration's store has one volume, which is at one node at a time.
    "deployment-replicas",
    "deployment-strategy",
}


def test_the_linter_has_nothing_to_say():
    command = [binaries.program("kube-score"), "score", "--output-format", "ci", "--exit-one-on-warning"]
    for name in sorted(PASSED_OVER):
        command += ["--ignore-test", name]
    done = subprocess.run([*command, *sorted(Path("k8s").glob("*.yaml"))], capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if not line.startswith(("[OK]", "[SKIPPED]"))]
    assert done.returncode == 0, "\n".join([*told, done.stderr])
    assert "[OK]" in done.stdout


PATCHES = [
    {"metadata": {"labels": {"a": "b", "app.kubernetes.io/component": None}, "annotations": {"c": "d"}}},
    {
        "spec": {
            "tolerations": [{"key": "x"}],
            "terminationGracePeriodSeconds": None,
            "nodeSelector": {"$patch": "replace", "a": "b"},
        }
    },
    {
        "spec": {
            "volumes": [
                {"name": "scratch", "hostPath": {"path": "/nvme"}, "emptyDir": None},
                {"name": "new", "emptyDir": {}},
            ]
        }
    },
    {"spec": {"volumes": [{"name": "scratch", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/nvme"}}]}},
    {
        "spec": {
            "containers": [{"name": "worker", "env": [{"name": "A", "$patch": "delete"}, {"name": "N", "value": "1"}]}]
        }
    },
    {
        "spec": {
            "containers": [{"name": "worker", "securityContext": {"capabilities": {"add": ["IPC_LOCK"], "drop": []}}}]
        }
    },
    {
        "spec": {
            "containers": [
                {"name": "worker", "volumeMounts": [{"mountPath": "/data", "name": "volume-0"}]},
                {"name": "n"},
            ]
        }
    },
    {"spec": {"initContainers": [{"name": "wait", "$patch": "delete"}], "hostAliases": [{"ip": "1.2.3.4"}]}},
    {"spec": {"containers": [{"$patch": "replace"}, {"name": "other", "image": "i"}], "affinity": None}},
    {
        "spec": {
            "topologySpreadConstraints": [{"topologyKey": "rack", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule"}]
        }
    },
]


@pytest.mark.parametrize("patch", PATCHES, ids=range(len(PATCHES)))
def test_a_patch_is_merged_as_kubernetes_merges_it(patch, tmp_path):
    template = job_object(EVERYTHING)["spec"]["template"]
    whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    (tmp_path / "template.json").write_text(json.dumps(whole))
    command = [binaries.program("kubectl"), "patch", "--local", "-f", tmp_path / "template.json", "-o", "json"]
    command += ["--type=strategic", "-p", json.dumps({"template": patch})]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["template"]
    theirs["metadata"].pop("creationTimestamp", None)
    assert sorted_by_key(merged(template, patch, "")) == sorted_by_key(theirs)


def sorted_by_key(value, field=""):
    """The order of lists whose items have an identity says nothing."""
    if isinstance(value, dict):
        # An empty one is none.
        return {name: made for name, one in value.items() if (made := sorted_by_key(one, name)) not in ({}, [], None)}
    if isinstance(value, list):
        made = [sorted_by_key(one) for one in value]
        return sorted(made, key=lambda one: str(one[KEYS[field]])) if field in KEYS else made
    return value
