"""A job of one or more nodes -> the Kubernetes objects that run it: settings, a name for each pod, an Indexed Job.

The only description of a pod in this project: `torchx run` and the manifests in k8s/ both come from here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

APP = "equiav"
MOST_SETTINGS = 100_000  # bytes: they reach the pod as an environment variable, of which Linux allows 128 KiB
LONGEST_NAME = 52  # with the index and Kubernetes' own ending, a pod's name has at most 63
USER = 10001  # of the image
LOST = 5  # seconds for which a node may be away before its pods are given up
QUANTITY = re.compile(r"\d+(\.\d+)?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15} | {
    f"{unit}i": 1024**power for power, unit in enumerate("KMGTP", 1)
}
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
RESOURCE = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OURS = ("POD_IP", "NODE_NAME", "EQUIAV_SUBMISSION", "TORCHX_RANK0_HOST", "EQUIAV_CONFIG", "JOB_COMPLETION_INDEX")


class JobError(ValueError):
    """What is wrong with a job: which setting, what was found, what is expected."""


@dataclass(frozen=True)
class Volume:
    """A persistent volume claim, or a folder of the machine."""

    source: str  # the claim's name, or an absolute path
    path: str  # in the pod
    read_only: bool = False


@dataclass(frozen=True)
class Job:
    name: str
    image: str
    command: tuple[str, ...]
    """As the container gets it; `$(NAME)` of an environment variable is written by `variable(NAME)` alone."""
    namespace: str = ""
    nodes: tuple[int, int] = (1, 1)
    """The least that can run it, and the most: one pod each."""
    cpu: str = "2"
    memory: str = "8Gi"
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    """Empty: the GPUs come by a claim."""
    devices: dict[str, int] = field(default_factory=dict)
    """Others of a node, such as RDMA interfaces: resource name -> count."""
    scratch: str = "20Gi"
    """Local disk of a pod, at /tmp: shards of the dataset, what a checkpoint needs on its way."""
    env: dict[str, str] = field(default_factory=dict)
    secret: str = ""
    """Of whose keys each becomes an environment variable."""
    settings: str = ""
    """What the program reads as EQUIAV_CONFIG."""
    waits_for: str = ""
    """URL of a dataset that may not be packed yet."""
    volumes: tuple[Volume, ...] = ()
    service_account: str = ""
    pull_secret: str = ""
    priority_class: str = ""
    queue: str = ""
    """Of Kueue: the job begins when its nodes fit the quota, all at once."""
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    """Taints that its pods stand: KEY or KEY:VALUE."""
    same_zone: bool = True
    """Prefer one zone for all pods: gradients cross the network at every step."""
    ports: dict[str, int] = field(default_factory=dict)
    metrics_port: int = 0
    grace: int = 300
    """Seconds between SIGTERM and SIGKILL: longer than a step and a save take."""
    restarts: int = 100
    """Times that a pod is replaced. Lost workers do not count: the node program starts them again."""
    ttl: int = 7 * 86400
    """Seconds for which a job that has ended stays to be looked at."""
    role: str = "worker"

    def __post_init__(self) -> None:
        name = re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.name)
        require(
            bool(name) and len(self.name) <= LONGEST_NAME, "name", self.name, f"a-z, 0-9 and -, {LONGEST_NAME} at most"
        )
        require(bool(self.image) and not re.search(r"\s", self.image), "image", self.image, "an image's name")
        least, most = self.nodes
        require(1 <= least <= most, "nodes", f"{least}:{most}", "MIN:MAX, 1 or more")
        require(self.gpus >= 0, "gpus", self.gpus, "0 or more")
        for resource, count in self.devices.items():
            good = RESOURCE.fullmatch(resource) and count > 0
            require(bool(good), "resources", f"{resource}:{count}", "DOMAIN/NAME:COUNT, such as rdma/hca:1")
        cores = re.fullmatch(r"(\d+)(\.\d{1,3}|m)?", self.cpu)
        require(bool(cores and re.search("[1-9]", self.cpu)), "cpu", self.cpu, "a number of cores, such as 4 or 500m")
        for setting in ("memory", "scratch"):
            value = getattr(self, setting)
            good = QUANTITY.fullmatch(value) and size(value) >= 1
            require(bool(good), setting, value, "a quantity, such as 16Gi")
        length = len(self.settings.encode())
        require(length <= MOST_SETTINGS, "size of the settings", f"{length:,} bytes", f"at most {MOST_SETTINGS:,}")
        for variable in self.env:
            good = VARIABLE.fullmatch(variable) and variable not in OURS
            require(
                bool(good), "env", variable, f"a variable's name, and none of {', '.join(OURS)}, which the job sets"
            )
        for key, value in self.node_selector.items():
            require(
                bool(key) and bool(LABEL.fullmatch(value)), "node_selector", f"{key}={value}", "a label and its value"
            )
        for volume in self.volumes:
            good = volume.path.startswith("/") and bool(volume.path.strip("/"))
            require(good, "mounts", volume.path, "an absolute path in the pod, below its root")
        paths = ["/tmp", "/dev/shm", *(volume.path.rstrip("/") for volume in self.volumes)]
        twice = next((path for path in paths if paths.count(path) > 1), "")
        require(not twice, "mounts", twice, "each path once (/tmp and /dev/shm are the job's own)")
        port = self.metrics_port
        require(0 <= port < 65536, "metrics_port", port, "0 to 65535")
        for setting in ("grace", "ttl", "restarts"):
            require(getattr(self, setting) >= 0, setting, getattr(self, setting), "0 or more")


def require(condition: bool, setting: str, found: object, expected: str) -> None:
    if not condition:
        raise JobError(f"{setting} is {found!r}, expected {expected}")


def object_name(name: str) -> str:
    """Of a run, whatever its own name is: what Kubernetes allows, and different for different names."""
    plain = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")
    if plain == name and len(name) <= LONGEST_NAME:
        return name
    return f"{plain[: LONGEST_NAME - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def variable(name: str) -> str:
    """In a command: the value of an environment variable of the pod."""
    return f"$({name})"


def literal(text: str) -> str:
    """In a command or an environment variable: this text, whatever is in it."""
    return text.replace("$", "$$")


def first_pod(name: str) -> str:
    """The host name of the pod with index 0, in its namespace."""
    return f"{name}-0.{name}"


def size(quantity: str) -> int:
    """16Gi -> bytes"""
    number = re.match(r"[\d.]+", quantity)
    assert number, "checked when the job was made"
    return int(float(number[0]) * BYTES[quantity[number.end() :]])


def quantity(count: int) -> str:
    """Bytes, as Kubernetes itself would write them: else every `kubectl apply` finds a change."""
    unit = next((power for power in range(5, 0, -1) if count % 1024**power == 0), 0)
    return f"{count // 1024**unit}{' KMGTP'[unit].strip()}{'i' if unit else ''}"


def objects(job: Job) -> list[dict[str, Any]]:
    labels = {
        "app.kubernetes.io/name": APP,
        "app.kubernetes.io/instance": job.name,
        "app.kubernetes.io/managed-by": APP,
    }
    about = {"name": job.name, "labels": labels, **({"namespace": job.namespace} if job.namespace else {})}
    queue = {"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {}
    # A quota that has room for some of the nodes only is enough, from the least on.
    partly = {
        "kueue.x-k8s.io/job-min-parallelism": str(job.nodes[0]),
        "kueue.x-k8s.io/job-completions-equal-parallelism": "true",
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": about,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the pods find each other before any of them is ready
            "selector": {"app.kubernetes.io/name": APP, "app.kubernetes.io/instance": job.name},
        },
    }
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            **about,
            "labels": {**labels, **queue},
            **({"annotations": partly} if job.queue and job.nodes[0] < job.nodes[1] else {}),
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes[1],
            "parallelism": job.nodes[1],
            # Each index has its own count, so that the loss of one restarts no other. A pod failure policy would forbid to
            # replace a pod whose node is lost; that an end is for good is told by other means (launch/ended.py).
            "backoffLimitPerIndex": job.restarts,
            "podReplacementPolicy": "TerminatingOrFailed",
            # The run is finished when the first pod says so.
            "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
            "ttlSecondsAfterFinished": job.ttl,
            **({"suspend": True} if job.queue else {}),  # until Kueue admits it
            "template": {"metadata": pod_metadata(job, labels), "spec": pod_spec(job)},
        },
    }
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"config.yaml": job.settings}}
    return [*([settings] if job.settings else []), service, batch]


def pod_metadata(job: Job, labels: dict[str, str]) -> dict[str, Any]:
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": str(job.metrics_port)} if job.metrics_port else {}
    return {
        "labels": {**labels, "app.kubernetes.io/component": job.role},
        **({"annotations": scraped} if scraped else {}),
    }


def pod_spec(job: Job) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # the Job counts for each index; a new pod may also be on another machine
        "subdomain": job.name,
        "terminationGracePeriodSeconds": job.grace,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": tolerations(job),
        **({"initContainers": [waiting(job)]} if job.waits_for else {}),
        "containers": [container(job)],
        "volumes": [
            {"name": "scratch", "emptyDir": {"sizeLimit": quantity(size(job.scratch))}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(size(job.memory) // 2)}},
            *(volume_of(number, volume) for number, volume in enumerate(job.volumes)),
        ],
    }
    optional = {
        "serviceAccountName": job.service_account,
        "priorityClassName": job.priority_class,
        "nodeSelector": job.node_selector,
        "imagePullSecrets": [{"name": job.pull_secret}] if job.pull_secret else [],
        "affinity": affinity(job) if job.same_zone and job.nodes[1] > 1 else {},
        "topologySpreadConstraints": spread(job) if job.nodes[1] > 1 else [],
    }
    return spec | {name: value for name, value in optional.items() if value}


def container(job: Job) -> dict[str, Any]:
    whole = {
        "cpu": job.cpu,
        "memory": quantity(size(job.memory)),
        "ephemeral-storage": quantity(size(job.scratch) + (1 << 30)),
    }  # and its log
    whole |= {job.gpu_resource: str(job.gpus)} if job.gpus and job.gpu_resource else {}
    whole |= {name: str(count) for name, count in job.devices.items()}
    env: list[dict[str, Any]] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        # One submission of the run: what its pods have in common, and those of the next do not.
        {
            "name": "EQUIAV_SUBMISSION",
            "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}},
        },
        {"name": "TORCHX_RANK0_HOST", "value": first_pod(job.name)},
    ]
    env += [] if "HOME" in job.env else [{"name": "HOME", "value": "/tmp"}]  # the only folder that can be written
    if job.settings:
        where = {"configMapKeyRef": {"name": job.name, "key": "config.yaml"}}
        env.append({"name": "EQUIAV_CONFIG", "valueFrom": where})
    env += [{"name": name, "value": literal(value)} for name, value in job.env.items()]
    ports = {**job.ports, **({"metrics": job.metrics_port} if job.metrics_port else {})}
    mounts = [{"name": "scratch", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]
    mounts += [
        {"name": f"volume-{number}", "mountPath": volume.path, **({"readOnly": True} if volume.read_only else {})}
        for number, volume in enumerate(job.volumes)
    ]
    return {
        "name": job.role,
        "image": job.image,
        "command": list(job.command),
        "env": env,
        **({"envFrom": [{"secretRef": {"name": job.secret}}]} if job.secret else {}),
        **({"ports": [{"name": name, "containerPort": port} for name, port in ports.items()]} if ports else {}),
        "resources": {"requests": whole, "limits": whole},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def waiting(job: Job) -> dict[str, Any]:
    """As the job's own container, with little of a machine."""
    own = container(job)
    few = {"cpu": "100m", "memory": "512Mi", "ephemeral-storage": "1Gi"}
    own.pop("ports", None)
    return own | {
        "name": "wait",
        "command": ["python", "-m", "launch.wait", job.waits_for],
        "resources": {"requests": few, "limits": few},
    }


def tolerations(job: Job) -> list[dict[str, Any]]:
    """Of a node that is gone, for some seconds alone: then its pod is replaced on another."""
    away = [
        {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST}
        for what in ("not-ready", "unreachable")
    ]
    asked = []
    for taint in job.tolerations:
        key, is_value, value = taint.partition(":")
        asked.append({"key": key, **({"operator": "Equal", "value": value} if is_value else {"operator": "Exists"})})
    if job.gpus and job.gpu_resource:
        asked.append({"key": job.gpu_resource, "operator": "Exists"})
    return [*away, *asked]


def affinity(job: Job) -> dict[str, Any]:
    together = {
        "topologyKey": "topology.kubernetes.io/zone",
        "labelSelector": {"matchLabels": {"batch.kubernetes.io/job-name": job.name}},
    }
    preferred = [{"weight": 100, "podAffinityTerm": together}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}


def spread(job: Job) -> list[dict[str, Any]]:
    """Over machines, where there are some: the loss of one is the loss of one pod."""
    return [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"batch.kubernetes.io/job-name": job.name}},
        }
    ]


def volume_of(number: int, volume: Volume) -> dict[str, Any]:
    if volume.source.startswith("/"):
        return {"name": f"volume-{number}", "hostPath": {"path": volume.source, "type": "Directory"}}
    return {
        "name": f"volume-{number}",
        "persistentVolumeClaim": {"claimName": volume.source, "readOnly": volume.read_only},
    }
