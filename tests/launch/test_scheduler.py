"""What `torchx status`, `list` and `describe` make of what an API server says, jobs of others included."""

import json
from types import SimpleNamespace

import pytest
from kubernetes.client import ApiClient
from torchx.specs import AppState

from launch.ended import FOR_GOOD, name_of
from launch.scheduler import begins, pod_state, role_of, state_of, structured


def read(kind, about):
    """As the client reads an answer of the server."""
    return ApiClient().deserialize(SimpleNamespace(data=json.dumps(about)), kind)


def job(conditions=(), annotations=None, container=None, **spec):
    template = {"spec": {"containers": [container or {"name": "main"}]}}
    status = {"conditions": [{"type": one, "status": "True", "message": "the reason"} for one in conditions]}
    spec = {"selector": {}, "template": template, **spec}
    return read("V1Job", {"metadata": {"name": "run", "annotations": annotations}, "spec": spec, "status": status})


def pod(index=0, phase="Running", node="a", condition=None, **state):
    """state: of its container"""
    about = {"name": f"run-{index}", "annotations": {"batch.kubernetes.io/job-completion-index": str(index)}}
    container = {"name": "main", "image": "i", "imageID": "", "ready": True, "restartCount": 0, "state": state}
    status = {"phase": phase, "containerStatuses": [container] if state else None}
    status["conditions"] = [condition] if condition else None
    spec = {"nodeName": node, "containers": [{"name": "main"}]}
    return read("V1Pod", {"metadata": about, "spec": spec, "status": status})


def ended(status, message):
    return {"terminated": {"exitCode": status, "message": message, "finishedAt": "2026-01-02T03:04:05Z"}}


FULL = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}


@pytest.mark.parametrize(
    ("of", "pods", "state", "said"),
    [
        (job(["Complete"]), [], AppState.SUCCEEDED, "finished"),
        (job(["SuccessCriteriaMet"]), [pod(1, **ended(1, "late"))], AppState.SUCCEEDED, "finished"),
        (job(["Failed"]), [pod(**ended(3, "no such setting"))], AppState.FAILED, "run-0 ended with status 3: no such"),
        (job(["FailureTarget"]), [], AppState.FAILED, "the reason"),
        (job(), [pod(**ended(1, f"{FOR_GOOD}too bad"))], AppState.FAILED, "too bad"),
        (job(), [pod(1, **ended(137, "")), pod(0)], AppState.PENDING, "run-1 ended with status 137"),
        (job(suspend=True), [], AppState.PENDING, "waits for its queue"),
        (job(), [pod(phase="Pending", node=None, condition=FULL)], AppState.PENDING, "run-0 fits no node: 0/3"),
        (
            job(),
            [pod(phase="Pending", waiting={"reason": "ImagePullBackOff", "message": "not there"})],
            AppState.PENDING,
            "ImagePullBackOff: not there",
        ),
        (job(), [pod(phase="Pending", waiting={"reason": "ContainerCreating"})], AppState.PENDING, ""),
    ],
)
def test_the_state_of_a_job(of, pods, state, said):
    found, told = state_of(of, pods)
    assert found == state
    assert said in told if said else told == ""


def test_a_pod_begins_while_it_has_a_machine_and_no_container():
    assert begins(pod(phase="Pending"))
    assert not begins(pod(phase="Pending", node=None))
    assert not begins(pod(phase="Running"))
    assert pod_state(pod(phase="Failed")) == AppState.FAILED
    assert pod_state(pod(phase="Unknown")) == AppState.UNKNOWN
    message = json.loads(structured(pod(**ended(3, "no such setting "))))["message"]
    assert (message["message"], message["errorCode"]) == ("no such setting", 3)


def test_a_job_of_somebody_else_is_described():
    """Without limits, with fractions, arguments alone, and variables that come from elsewhere."""
    role = role_of(job(container={"name": "main", "image": "theirs", "args": ["--x"]}))
    assert (role.image, role.entrypoint, role.args, role.num_replicas) == ("theirs", "", ["--x"], 1)
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (0, 0, 0)
    limits = {"cpu": "1500m", "memory": "1.5Gi", "amd.com/gpu": "4", "ephemeral-storage": "1e9"}
    env = [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    container = {"name": "main", "command": ["sh", "-c"], "args": ["x"], "env": env, "resources": {"limits": limits}}
    role = role_of(job(container=container, completions=3))
    assert (role.entrypoint, role.args, role.env, role.num_replicas) == ("sh", ["-c", "x"], {"A": "1"}, 3)
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (2, 4, 1536)


def test_a_signal_has_a_name_or_a_number():
    assert name_of(9) == "SIGKILL"
    assert name_of(35) == "signal 35"  # a real-time one
