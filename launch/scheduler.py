"""The TorchX scheduler `kubernetes`: an app becomes a headless Service, an Indexed Job and a ConfigMap. Nothing has to be
installed on the cluster, and nothing but the client on the laptop.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, NoReturn  # noqa: UP035  TorchX knows these spellings only

import yaml
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream, filter_regex
from torchx.schedulers.local_scheduler import LocalScheduler
from torchx.schedulers.local_scheduler import create_scheduler as create_local
from torchx.specs.api import (
    NONE,
    AppDef,
    AppDryRunInfo,
    AppState,
    BindMount,
    ReplicaStatus,
    Resource,
    Role,
    RoleStatus,
    VolumeMount,
    macros,
    runopts,
)
from torchx.util.types import to_dict

from launch.component import SETTINGS
from launch.ended import FOR_GOOD, name_of
from launch.job import APP, Job, JobError, Volume, literal, object_name, objects, variable
from launch.template import patch_from, patch_of, patched

CANCELLED = f"{APP}/cancelled"
LABEL = f"app.kubernetes.io/managed-by={APP}"
KUEUE = "v1beta2"  # of its API: since Kueue 0.15
SECONDS = 20  # for an answer of the cluster
LONGEST = 500  # characters of what a pod says of its end
NUMBER = re.compile(r"[-+]?\.?\d[0-9a-fA-F_xXoO.eE+:-]*|[yYnN]|[-+]?\.?\d*[eE][-+]?\d+")
CANNOT_START = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
)


def refuse(text: str) -> NoReturn:
    """TorchX would show a traceback for any other exception."""
    raise SystemExit(f"equiav: {text}")


class Options(runopts):
    """As TorchX's, which shows a traceback for a value that is wrong, and passes over a name that it does not know."""

    def cfg_from_str(self, cfg_str: str) -> dict[str, Any]:
        try:
            unknown = sorted(name for name in to_dict(cfg_str) if self.get(name) is None)
            given = super().cfg_from_str(cfg_str)
        except IndexError:
            refuse(
                f"-cfg {cfg_str}: a value has no KEY:VALUE; `torchx runopts kubernetes` lists the options and their kinds"
            )
        except ValueError as error:
            refuse(f"-cfg {cfg_str}: {error}; `torchx runopts kubernetes` lists the options and their kinds")
        for name, value in to_dict(cfg_str).items():  # TorchX takes whatever is not true for false
            option = self.get(name)
            if option and option.opt_type is bool and str(value).lower() not in ("true", "false"):
                refuse(f"-cfg: {name} is {value}, expected true or false")
        if unknown:
            refuse(f"-cfg: there is no option {', '.join(unknown)}; `torchx runopts kubernetes` lists them")
        return given


class KubernetesScheduler(Scheduler[Mapping[str, Any]]):
    def __init__(self, session_name: str):
        super().__init__("kubernetes", session_name)
        self._known: Cluster | None = None

    def _run_opts(self) -> runopts:
        opts = Options()
        for name, kind, default, what in (
            ("namespace", str, None, "of the job (default: that of the context)"),
            ("service_account", str, None, "of the pods; they get no token of it"),
            ("image_pull_secret", str, None, "Secret with which the image is pulled"),
            ("priority_class", str, None, "of the pods"),
            ("node_selector", Dict[str, str], None, "labels of the machines: KEY:VALUE;KEY:VALUE"),  # noqa: UP006
            ("tolerations", List[str], None, "taints that the pods stand: KEY or KEY:VALUE, separated by ;"),  # noqa: UP006
            ("gpu_resource", str, "nvidia.com/gpu", "by which a GPU is asked for; none: by a claim"),
            ("resources", Dict[str, str], None, "others of a pod: NAME:COUNT;NAME:COUNT, such as rdma/hca:1"),  # noqa: UP006
            ("claims", Dict[str, str], None, "devices of a pod: NAME:RESOURCE_CLAIM_TEMPLATE;..."),  # noqa: UP006
            ("labels", Dict[str, str], None, "of the pods: KEY:VALUE;KEY:VALUE"),  # noqa: UP006
            ("annotations", Dict[str, str], None, "of the pods: KEY:VALUE;KEY:VALUE"),  # noqa: UP006
            ("capabilities", List[str], None, "that the container gets, such as IPC_LOCK, separated by ;"),  # noqa: UP006
            ("host_network", bool, False, "the network of the machine, not one of the pod's own"),
            ("runtime_class", str, None, "of the pods"),
            ("scheduler_name", str, None, "of the pods"),
            ("pod_patch", str, None, "YAML file: a patch of the pod template (docs/kubernetes.md)"),
            ("same_zone", bool, True, "prefer one zone for all pods of a job"),
            ("grace", int, 300, "seconds between SIGTERM and SIGKILL, for a step and a save"),
            ("restarts", int, 100, "times that each pod may be replaced"),
            ("ttl", int, 7 * 86400, "seconds for which a job that has ended stays to be looked at"),
        ):
            opts.add(name, type_=kind, default=default, help=what)
        return opts

    # ---- from an app to objects

    def _submit_dryrun(self, app: AppDef, cfg: Mapping[str, Any]) -> AppDryRunInfo[Any]:
        if len(app.roles) != 1:
            refuse(f"the app has {len(app.roles)} roles, expected 1: each role would be a job of its own")
        try:
            job = job_of(app, cfg)
            made = objects(job)
            batch = made[-1]["spec"]
            patches = [patch_of(cfg, job.role), *([patch_from(cfg["pod_patch"])] if cfg.get("pod_patch") else [])]
            for patch in patches:
                batch["template"] = patched(batch["template"], patch)
        except JobError as error:
            refuse(str(error))
        return AppDryRunInfo(made, to_yaml)

    # ---- on a cluster

    def schedule(self, dryrun_info: AppDryRunInfo[Any]) -> str:
        made, cluster = dryrun_info.request, self._cluster()
        job = made[-1]
        name = job["metadata"]["name"]
        namespace = job["metadata"].get("namespace") or cluster.namespace
        with cluster.answers(f"namespace {namespace}"):
            cluster.check(made, namespace)
            cluster.make_way(name, namespace)
            # Of several that submit one name at once, one makes the job; what the job needs is that one's alone.
            waits = job["spec"].get("suspend", False)
            uid = cluster.create({**job, "spec": {**job["spec"], "suspend": True}}, namespace).metadata.uid
            owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "blockOwnerDeletion": False}
            try:
                for one in made[:-1]:  # they go with the job
                    cluster.put({**one, "metadata": {**one["metadata"], "ownerReferences": [owner]}}, namespace)
                if not waits:
                    cluster.patch("Job", name, namespace, {"spec": {"suspend": False}})
            except BaseException:
                cluster.remove("Job", name, namespace, uid)
                raise
        return f"{namespace}:{name}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        cluster, namespace, name = self._find(app_id)
        with cluster.answers(f"job {name} in namespace {namespace}"):
            job = cluster.job(name, namespace)
            if job is None:
                return None
            pods = cluster.pods(name, namespace)
            state, message = state_of(job, pods)
            for kind, stuck in [("Job", name)] * (not pods) + [
                ("Pod", pod.metadata.name) for pod in pods if begins(pod)
            ]:
                message = message or cluster.warning(kind, stuck, namespace)
        role = role_of(job)
        present = newest(pods)
        replicas = [
            ReplicaStatus(index, pod_state(pod), role.name, pod.spec.node_name or "", structured(pod))
            for index, pod in sorted(present.items())
        ]
        replaced = len(pods) - len(present)
        return DescribeAppResponse(
            app_id=app_id,
            state=state,
            num_restarts=replaced,
            msg=message,
            roles=[role],
            roles_statuses=[RoleStatus(role.name, replicas)],
        )

    def list(self) -> list[ListAppResponse]:
        cluster = self._cluster()
        with cluster.answers(f"jobs in namespace {cluster.namespace}"):
            found = cluster.batch.list_namespaced_job(cluster.namespace, label_selector=LABEL, _request_timeout=SECONDS)
        return [
            ListAppResponse(f"{cluster.namespace}:{job.metadata.name}", state_of(job, ())[0]) for job in found.items
        ]

    def _cancel_existing(self, app_id: str) -> None:
        """Its pods save and end. The job stays to be looked at, and the same command goes on with the run."""
        cluster, namespace, name = self._find(app_id)
        with cluster.answers(f"job {name} in namespace {namespace}"):
            job = cluster.job(name, namespace)
            if job is None:
                return
            if "kueue.x-k8s.io/queue-name" in (job.metadata.labels or {}):  # Kueue would start it again
                cluster.batch.delete_namespaced_job(name, namespace, propagation_policy="Foreground")
                return
            change = {"metadata": {"annotations": {CANCELLED: "true"}}, "spec": {"suspend": True}}
            cluster.batch.patch_namespaced_job(name, namespace, change, _request_timeout=SECONDS)

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Of the pods of an index one after the other, each to its end; those that come later too, where the log is followed."""
        if streams not in (None, Stream.COMBINED):
            raise ValueError("Kubernetes keeps one log of a container: streams is combined")
        lines = self._lines(app_id, k, since, should_tail)
        return filter_regex(regex, lines) if regex else lines

    def _lines(self, app_id: str, index: int, since: datetime | None, follow: bool) -> Iterable[str]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        cluster, namespace, name = self._find(app_id)
        read: set[str] = set()
        last: dict[str, str] = {}  # pod -> time of its last line
        while True:
            with cluster.answers(f"job {name} in namespace {namespace}"):
                job = cluster.job(name, namespace)
                pods = [pod for pod in cluster.pods(name, namespace) if index_of(pod) == index] if job else []
            begun = [pod for pod in pods if pod.metadata.name not in read and pod.status.phase != "Pending"]
            for pod in sorted(begun, key=lambda pod: pod.metadata.creation_timestamp):
                pod_name, trouble = pod.metadata.name, ""
                before = last.get(pod_name, "")
                try:
                    for when, line in cluster.log(pod_name, namespace, since, follow):
                        if when > before:  # no line twice, where the connection broke
                            last[pod_name] = when
                            yield line
                except ApiException as error:
                    trouble = f"(no log of pod {pod_name}: {reason(error)})\n"
                except HTTPError as error:  # its machine is gone, or the connection to the server
                    trouble = f"(the log of pod {pod_name} broke off: {error})\n"
                if trouble and follow and pod.status.phase == "Running":
                    continue  # from where it broke
                read.add(pod_name)
                if trouble:
                    yield trouble
            ended = job is None or state_of(job, ())[0] in (AppState.SUCCEEDED, AppState.FAILED, AppState.CANCELLED)
            if not follow or ended:
                return
            time.sleep(1)

    def _find(self, app_id: str) -> tuple[Cluster, str, str]:
        cluster = self._cluster()
        namespace, _, name = app_id.rpartition(":")
        return cluster, namespace or cluster.namespace, name

    def _cluster(self) -> Cluster:
        """Of the environment, for all commands alike: an option of `run` alone would let `cancel` meet another cluster's job."""
        if self._known is None:
            self._known = Cluster(os.environ.get("KUBE_CONTEXT", ""))
        return self._known


def job_of(app: AppDef, cfg: Mapping[str, Any]) -> Job:
    """What TorchX knows of an app, and what this cluster's options say."""
    role = app.roles[0]
    name = object_name(app.name)
    # Of Kubernetes' own variables one comes in, for TorchX's macro. What looks like one in an argument stays as it is.
    mark = "\0index\0"
    filled = macros.Values("", name, mark, "TORCHX_RANK0_HOST")
    index = variable("JOB_COMPLETION_INDEX")
    args = [literal(filled.substitute(arg)).replace(mark, index) for arg in role.args]
    env = {key: filled.substitute(value) for key, value in role.env.items()}
    own = {key: value for key, value in role.metadata.get("kubernetes", {}).items() if value}
    for setting, path in own.pop("paths", {}).items():
        path = filled.substitute(path)
        if not any(Path(path).is_relative_to(mount.dst_path) for mount in role.mounts):
            raise JobError(
                f"{setting} is {path!r}, which goes with its pod; expected a URL, or a path on a volume (--mounts)"
            )
    volumes = []
    for mount in role.mounts:
        if not isinstance(mount, BindMount | VolumeMount):
            raise JobError(f"mounts: {mount.src_path} is a device; ask for it by its resource's name")
        bind = isinstance(mount, BindMount)
        source = mount.src_path if bind else mount.src
        if bind != source.startswith("/"):
            kind, expected = ("bind", "a folder of the machine, /...") if bind else ("volume", "a claim's name")
            raise JobError(f"mounts: src of type={kind} is {source!r}, expected {expected}")
        volumes.append(Volume(source, mount.dst_path, mount.read_only))
    resource, more = role.resource, counts_of(cfg.get("resources") or {})
    gpu_resource = cfg.get("gpu_resource") or "nvidia.com/gpu"
    if gpu_resource == "none" and resource.gpu > 0 and not cfg.get("claims"):
        raise JobError("gpu_resource is none, and no claims bring the GPUs that --gpus says")
    if gpu_resource in more:
        raise JobError(f"resources: {gpu_resource} is what --gpus asks for")
    return Job(
        name=name,
        image=role.image,
        command=(role.entrypoint, *args),
        namespace=cfg.get("namespace") or "",
        nodes=(role.min_replicas or role.num_replicas, role.num_replicas),
        cpu=str(resource.cpu),
        memory=f"{resource.memMB}Mi",
        gpus=resource.gpu,
        gpu_resource="" if gpu_resource == "none" else gpu_resource,
        devices={**resource.devices, **more},
        settings=env.pop(SETTINGS, ""),
        env=env,
        volumes=tuple(volumes),
        service_account=cfg.get("service_account") or "",
        pull_secret=cfg.get("image_pull_secret") or "",
        priority_class=cfg.get("priority_class") or "",
        node_selector=dict(cfg.get("node_selector") or {}),
        tolerations=tuple(cfg.get("tolerations") or ()),
        same_zone=cfg.get("same_zone", True),
        grace=cfg.get("grace", 300),
        restarts=cfg.get("restarts", 100),
        ttl=cfg.get("ttl", 7 * 86400),
        ports=dict(role.port_map),
        role=object_name(role.name),
        **own,
    )


def counts_of(resources: Mapping[str, str]) -> dict[str, int]:
    for name, count in resources.items():
        if not re.fullmatch(r"[1-9]\d{0,6}", count):
            raise JobError(f"resources: {name} is {count!r}, expected a count, 1 or more")
    return {name: int(count) for name, count in resources.items()}


def to_yaml(made: list[dict[str, Any]]) -> str:
    return yaml.dump_all(made, Dumper=Plain, sort_keys=False, width=120)


class Plain(yaml.SafeDumper):
    """Text of several lines as such, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> Any:
    style = "|" if "\n" in data.strip() and "\t" not in data else None
    if NUMBER.fullmatch(data):  # what kubectl would read so, though PyYAML does not
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


Plain.add_representer(str, _text)


# ---- what a cluster says


def state_of(job: Any, pods: Iterable[Any]) -> tuple[AppState, str]:
    ends = {c.type: c for c in job.status.conditions or () if c.status == "True"}
    if "Complete" in ends or "SuccessCriteriaMet" in ends:
        return AppState.SUCCEEDED, "finished"
    for kind in ("Failed", "FailureTarget"):
        if kind in ends:
            return AppState.FAILED, f"{ends[kind].message}. {trouble(pods)}".strip()
    pods = list(pods)
    for pod in pods:  # a pod before it or after it may have ended otherwise
        if FOR_GOOD in (said := trouble([pod])):
            return AppState.FAILED, said
    said = trouble(newest(pods).values())
    if job.spec.suspend:
        if (job.metadata.annotations or {}).get(CANCELLED):
            return AppState.CANCELLED, "cancelled; the same command goes on with the run"
        return AppState.PENDING, "waits for its queue to admit it"
    return (AppState.RUNNING if job.status.ready else AppState.PENDING), said


def trouble(pods: Iterable[Any]) -> str:
    """Of the first pod that has any."""
    for pod in sorted(pods, key=index_of):
        for container in pod.status.container_statuses or ():
            waiting = container.state.waiting
            if waiting and waiting.reason in CANNOT_START:
                return f"pod {pod.metadata.name}: {waiting.reason}: {waiting.message or container.image}"
        if (said := end_of(pod)) and not pod.metadata.deletion_timestamp:
            return f"pod {pod.metadata.name} {said}"
        for condition in pod.status.conditions or ():
            if condition.type == "PodScheduled" and condition.status == "False":
                return f"pod {pod.metadata.name} fits no node: {condition.message}"
    return ""


def end_of(pod: Any) -> str:
    """In one line, how it ended; empty if it has not, or well. Kubernetes' own word comes first: a program that is killed for
    what it takes, or with its machine, has said nothing of that."""
    if pod.status.phase not in ("Failed", "Running", "Unknown"):
        return ""
    if pod.status.phase == "Failed" and pod.status.reason:  # Evicted, NodeLost, Preempting ...
        return one_line(f"{pod.status.reason}: {pod.status.message or ''}")
    for container in pod.status.container_statuses or ():
        ended = container.state.terminated
        if not ended or not ended.exit_code:
            continue
        if ended.reason == "OOMKilled":
            resources = next((one.resources for one in pod.spec.containers if one.name == container.name), None)
            limit = ((resources and resources.limits) or {}).get("memory", "its limit")
            return f"was killed for its memory (OOMKilled): it took more than {limit} (--memory)"
        by = f" ({name_of(ended.exit_code - 128)})" if ended.exit_code > 128 and not ended.message else ""
        return one_line(f"ended with status {ended.exit_code}{by}: {last_word(ended.message or ended.reason or '')}")
    for condition in pod.status.conditions or ():
        if condition.type == "DisruptionTarget" and condition.status == "True":
            return one_line(f"is removed: {condition.reason}: {condition.message or ''}")
    return ""


def last_word(text: str) -> str:
    """What a program has left, or the last line of its log, which Kubernetes gives where it has left nothing."""
    lines = [line.strip() for line in text[max(0, text.find(FOR_GOOD)) :].splitlines() if line.strip()]
    return " ".join(lines) if FOR_GOOD in text else lines[-1] if lines else ""


def one_line(text: str) -> str:
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip().removesuffix(":")[:LONGEST]


def newest(pods: Iterable[Any]) -> dict[int, Any]:
    """index -> its pod, less those that were replaced"""
    return {index_of(pod): pod for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp)}


def index_of(pod: Any) -> int:
    return int((pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index", 0))


def begins(pod: Any) -> bool:
    """Whether it has a machine, and no container yet."""
    return pod.status.phase == "Pending" and bool(pod.spec.node_name)


def pod_state(pod: Any) -> AppState:
    return {
        "Pending": AppState.PENDING,
        "Running": AppState.RUNNING,
        "Succeeded": AppState.SUCCEEDED,
        "Failed": AppState.FAILED,
    }.get(pod.status.phase, AppState.UNKNOWN)


def structured(pod: Any) -> str:
    said = end_of(pod)
    if not said:
        return NONE
    ended = [one.state.terminated for one in pod.status.container_statuses or () if one.state.terminated]
    when = next((int(one.finished_at.timestamp()) for one in ended if one.finished_at), 0)
    code = next((one.exit_code for one in ended if one.exit_code), 0)
    return json.dumps({"message": {"message": said, "errorCode": code, "extraInfo": {"timestamp": str(when)}}})


def role_of(job: Any) -> Role:
    from kubernetes.utils.quantity import parse_quantity

    container = job.spec.template.spec.containers[0]
    limits = (container.resources and container.resources.limits) or {}
    gpus = next((int(parse_quantity(count)) for name, count in limits.items() if name.endswith("/gpu")), 0)
    return Role(
        name=container.name,
        image=container.image,
        entrypoint=(container.command or [""])[0],
        args=[*(container.command or [""])[1:], *(container.args or [])],
        env={one.name: one.value for one in container.env or () if one.value},
        num_replicas=job.spec.completions or 1,
        resource=Resource(
            cpu=round(parse_quantity(limits.get("cpu", "0"))),
            gpu=gpus,
            memMB=int(parse_quantity(limits.get("memory", "0"))) >> 20,
        ),
    )


class Cluster:
    """An API server, through its Python client."""

    def __init__(self, context: str):
        from kubernetes import client, config

        try:
            api: Any = config.new_client_from_config(context=context or None)
            known: Any = config.list_kube_config_contexts()
            contexts, active = known
            chosen = context or active["name"]
            about = next(one["context"] for one in contexts if one["name"] == chosen)
            self.namespace = about.get("namespace", "default")
        except (config.ConfigException, StopIteration, TypeError, KeyError) as error:
            where = os.environ.get("KUBECONFIG") or "~/.kube/config"
            refuse(f"no cluster is known: {where}: {error}. Set KUBECONFIG, or try `kubectl cluster-info`")
        self.server = api.configuration.host
        api.configuration.retries = False  # an answer, or an error at once
        api = client.ApiClient(api.configuration)
        self.batch: Any = client.BatchV1Api(api)
        self.core: Any = client.CoreV1Api(api)
        self.custom: Any = client.CustomObjectsApi(api)

    def answers(self, what: str) -> Answers:
        return Answers(self, what)

    def job(self, name: str, namespace: str) -> Any:
        return found(lambda: self.batch.read_namespaced_job(name, namespace, _request_timeout=SECONDS))

    def pods(self, name: str, namespace: str) -> list[Any]:
        selector = f"batch.kubernetes.io/job-name={name}"
        return self.core.list_namespaced_pod(namespace, label_selector=selector, _request_timeout=SECONDS).items

    def check(self, made: list[dict[str, Any]], namespace: str) -> None:
        """The server would take the objects, and what the job refers to is there: else its pods would wait without end."""
        from kubernetes.client import ApiException

        job = made[-1]
        for one in made:
            try:
                self.create(one, namespace, dry_run="All")
            except ApiException as error:
                if error.status != 409:  # an earlier job's, in whose place it comes
                    raise
        container = job["spec"]["template"]["spec"]["containers"][0]
        names = [source["secretRef"]["name"] for source in container.get("envFrom", [])]
        names += [one["name"] for one in job["spec"]["template"]["spec"].get("imagePullSecrets", [])]
        for name in names:
            if not allowed(lambda name=name: found(lambda: self.core.read_namespaced_secret(name, namespace))):
                refuse(
                    f"there is no Secret {name} in namespace {namespace}; k8s/ has a template of one for an object store"
                )
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in job["spec"]["template"]["spec"]["volumes"]
            if "persistentVolumeClaim" in v
        ]
        for name in claims:
            if not allowed(
                lambda name=name: found(lambda: self.core.read_namespaced_persistent_volume_claim(name, namespace))
            ):
                refuse(f"there is no PersistentVolumeClaim {name} in namespace {namespace}")
        if queue := job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name"):
            get = self.custom.get_namespaced_custom_object
            if not allowed(lambda: found(lambda: get("kueue.x-k8s.io", KUEUE, namespace, "localqueues", queue))):
                refuse(
                    f"there is no LocalQueue {queue} in namespace {namespace} (of Kueue, which the cluster has to have)"
                )

    def make_way(self, name: str, namespace: str) -> None:
        """An earlier job of this name, which has ended, goes."""
        job = self.job(name, namespace)
        if job is None:
            return
        state, _ = state_of(job, self.pods(name, namespace))
        if (job.metadata.labels or {}).get("app.kubernetes.io/managed-by") != APP:
            refuse(f"there is a job {name} in namespace {namespace} that is none of ours; choose another --name")
        ends = job.metadata.deletion_timestamp is not None
        if not ends and state not in (AppState.SUCCEEDED, AppState.FAILED, AppState.CANCELLED):
            refuse(
                f"job {name} in namespace {namespace} is {state.name.lower()} already. To start it anew, first: torchx cancel kubernetes://torchx/{namespace}:{name}"
            )
        self.remove_all(job, namespace)
        until = time.monotonic() + 600  # its pods may be saving still
        while (there := self.job(name, namespace)) is not None and there.metadata.uid == job.metadata.uid:
            if time.monotonic() > until:
                refuse(f"the pods of the earlier job {name} do not end; look at them with kubectl")
            time.sleep(0.5)

    def remove_all(self, job: Any, namespace: str) -> None:
        """With its pods, which end first."""
        only = {"preconditions": {"uid": job.metadata.uid}, "propagationPolicy": "Foreground"}
        gone(
            lambda: self.batch.delete_namespaced_job(job.metadata.name, namespace, body=only, _request_timeout=SECONDS)
        )

    def put(self, one: dict[str, Any], namespace: str) -> None:
        """Makes it, in place of an earlier one."""
        kind, name = one["kind"], one["metadata"]["name"]
        there = found(lambda: getattr(self.core, f"read_namespaced_{KINDS[kind]}")(name, namespace))
        if there and (there.metadata.labels or {}).get("app.kubernetes.io/managed-by") != APP:
            refuse(f"there is a {kind} {name} in namespace {namespace} that is none of ours; choose another --name")
        if there:
            self.remove(kind, name, namespace, there.metadata.uid)
        self.create(one, namespace)

    def create(self, one: dict[str, Any], namespace: str, **options: str) -> Any:
        api = self.batch if one["kind"] == "Job" else self.core
        create = getattr(api, f"create_namespaced_{KINDS[one['kind']]}")
        return create(namespace, one, _request_timeout=SECONDS, **options)

    def remove(self, kind: str, name: str, namespace: str, uid: str) -> None:
        """This one, and none of the same name that came after it."""
        api = self.batch if kind == "Job" else self.core
        only = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        delete = getattr(api, f"delete_namespaced_{KINDS[kind]}")
        gone(lambda: delete(name, namespace, body=only, _request_timeout=SECONDS))

    def warning(self, kind: str, name: str, namespace: str) -> str:
        """Why a job has no pods (a quota, a guard of the namespace), or a pod no container (a volume)."""
        about = f"involvedObject.name={name},involvedObject.kind={kind},type=Warning"
        events = allowed(lambda: self.core.list_namespaced_event(namespace, field_selector=about).items)
        of = f"pod {name}: " if kind == "Pod" else ""
        return f"{of}{events[-1].message}" if isinstance(events, list) and events else ""

    def patch(self, kind: str, name: str, namespace: str, change: dict[str, Any]) -> None:
        api = self.batch if kind == "Job" else self.core
        getattr(api, f"patch_namespaced_{KINDS[kind]}")(name, namespace, change, _request_timeout=SECONDS)

    def log(self, pod: str, namespace: str, since: datetime | None, follow: bool) -> Iterable[tuple[str, str]]:
        """-> time and text of each line. The times can be compared."""
        seconds = {"since_seconds": max(1, int(time.time() - since.timestamp()))} if since else {}
        answer = self.core.read_namespaced_pod_log(
            pod, namespace, follow=follow, timestamps=True, _preload_content=False, **seconds
        )
        rest = b""
        for part in answer.stream(decode_content=False):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield stamped(line)
        if rest:
            yield stamped(rest)


def stamped(line: bytes) -> tuple[str, str]:
    when, _, text = line.decode(errors="replace").partition(" ")
    return when, f"{text}\n"


KINDS = {"Service": "service", "ConfigMap": "config_map", "Job": "job"}


class Answers:
    """Around requests: an error that names the server, what was asked for, and what to look at."""

    def __init__(self, cluster: Cluster, what: str):
        self.cluster, self.what = cluster, what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        server = self.cluster.server
        if isinstance(error, ApiException):
            hint = {401: "your credentials are refused", 403: "you lack the rights"}.get(int(error.status or 0), "")
            refuse(f"{server}: {self.what}: {hint + ': ' if hint else ''}{reason(error)}")
        if isinstance(error, HTTPError | OSError):
            refuse(f"no cluster answers at {server} ({type(error).__name__}); try `kubectl cluster-info`")


def reason(error: Any) -> str:
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(error.body)["message"])
    return f"{error.status} {error.reason}"


def found(ask: Any) -> Any:
    """None where the object is not there."""
    from kubernetes.client import ApiException

    try:
        return ask()
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def gone(delete: Any) -> None:
    """Whether by this or by somebody before, who may have made another of its name."""
    from kubernetes.client import ApiException

    try:
        delete()
    except ApiException as error:
        if error.status not in (404, 409):
            raise


def allowed(ask: Any) -> Any:
    """True where one may not look: the pods will tell."""
    from kubernetes.client import ApiException

    try:
        return ask()
    except ApiException as error:
        if error.status == 403:
            return True
        raise


def create_scheduler(session_name: str, **_: object) -> KubernetesScheduler:
    return KubernetesScheduler(session_name)


def create_local_scheduler(session_name: str, **options: Any) -> LocalScheduler:
    """TorchX's own, which also finds the `python` that runs this, whether its environment is activated or not."""
    return create_local(session_name, extra_paths=[str(Path(sys.executable).parent)], **options)
