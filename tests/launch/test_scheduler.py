"""What `torchx status`, `list` and `describe` make of what an API server says, jobs of others included."""

import json
import re
from types import SimpleNamespace

import pytest
import yaml
from kubernetes.client import ApiClient
from torchx.specs import AppState

from launch.ended import FOR_GOOD, name_of
from launch.scheduler import Cluster, begins, end_of, pod_state, role_of, state_of, structured, to_yaml


def read(kind, about):
    """As the client reads an answer of the server."""
    return ApiClient().deserialize(SimpleNamespace(data=json.dumps(about)), kind)


def job(conditions=(), annotations=None, container=None, **spec):
    template = {"spec": {"containers": [container or {"name": "main"}]}}
    status = {"conditions": [{"type": one, "status": "True", "message": "the reason"} for one in conditions]}
    spec = {"selector": {}, "template": template, **spec}
    return read("V1Job", {"metadata": {"name": "run", "annotations": annotations}, "spec": spec, "status": status})


def pod(index=0, phase="Running", node="a", condition=None, age=0, reason=None, message=None, **state):
    """state: of its container. age: the larger, the later"""
    about = {
        "name": f"run-{index}",
        "creationTimestamp": f"2026-01-02T00:00:{age:02d}Z",
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
    }
    container = {"name": "main", "image": "i", "imageID": "", "ready": True, "restartCount": 0, "state": state}
    status = {"phase": phase, "containerStatuses": [container] if state else None}
    status |= {"conditions": [condition] if condition else None, "reason": reason, "message": message}
    spec = {"nodeName": node, "containers": [{"name": "main", "resources": {"limits": {"memory": "8Gi"}}}]}
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
        (job(), [pod(age=0, **ended(143, "saved")), pod(age=1)], AppState.PENDING, ""),
        (job(), [pod(age=0, **ended(143, "")), pod(age=1, **ended(2, f"{FOR_GOOD}bad"))], AppState.FAILED, "bad"),
        (job(), [pod(age=1, **ended(143, "")), pod(age=0, **ended(2, f"{FOR_GOOD}bad"))], AppState.FAILED, "bad"),
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
    assert (message["message"], message["errorCode"]) == ("ended with status 3: no such setting", 3)


SPACE = 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi". '
LOST = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "by a\npod"}


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (pod(), ""),
        (pod(phase="Succeeded", **ended(0, "")), ""),
        (pod(phase="Failed", reason="Evicted", message=SPACE), f"Evicted: {SPACE.strip()}"),
        (
            pod(phase="Failed", reason="Evicted", message=SPACE, **ended(137, "{" + "x" * 4000)),
            f"Evicted: {SPACE.strip()}",
        ),
        (pod(phase="Failed", reason="NodeLost"), "NodeLost"),
        (
            pod(**{"terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "{" + "x" * 4000}}),
            "was killed for its memory (OOMKilled): it took more than 8Gi (--memory)",
        ),
        (pod(**ended(137, "")), "ended with status 137 (SIGKILL)"),
        (pod(**ended(1, "a line\nan error\n\n")), "ended with status 1: an error"),
        (pod(**ended(2, f"{FOR_GOOD}a:\n  b")), f"ended with status 2: {FOR_GOOD}a: b"),
        (pod(condition=LOST), "is removed: PreemptionByScheduler: by a pod"),
        (pod(**ended(1, "\x1b[31m" + "y" * 9999)), "ended with status 1: [31m" + "y" * 475),
    ],
)
def test_how_a_pod_ended_is_one_line(of, said):
    assert end_of(of) == said
    told = structured(of)
    assert (json.loads(told)["message"]["message"] if said else said) == said


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


@pytest.mark.parametrize(
    "text", ["1e-4", "y", "0o17", "0x1f", "1_000", "12:30", ".5", "+1", "-1", "1.0", "no", "on", "~"]
)
def test_text_stays_text_for_who_reads_yaml_otherwise(text):
    """kubectl's reader takes some words for numbers that PyYAML's does not."""
    written = to_yaml([{"a": text}])
    assert re.search(r"""^- ?a: ['"]|^a: ['"]""", written, re.MULTILINE), written
    assert yaml.safe_load(written) == {"a": text}


def test_what_is_a_word_has_no_quotes():
    assert to_yaml([{"a": "3Gi", "b": "-m", "c": "s3://a/b", "d": "equiav:0.1.0"}]).count("'") == 0


def test_a_last_line_without_an_end_is_read():
    answer = SimpleNamespace(stream=lambda decode_content: iter([b"1 one\n2 tw", b"o\n3 three"]))
    of = SimpleNamespace(core=SimpleNamespace(read_namespaced_pod_log=lambda *_, **__: answer))
    assert list(Cluster.log(of, "pod", "namespace", None, False)) == [("1", "one\n"), ("2", "two\n"), ("3", "three\n")]


def test_a_signal_has_a_name_or_a_number():
    assert name_of(9) == "SIGKILL"
    assert name_of(35) == "signal 35"  # a real-time one
