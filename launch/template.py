"""What a cluster asks of a pod beyond a job's own needs: a patch of the pod template, merged as Kubernetes merges a strategic
patch, and checked before anything is sent.

The options of the scheduler (`labels`, `capabilities` ...) are patches too; the file of `pod_patch` comes after them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.guard import named, secret_in
from launch.job import LABEL, OURS, JobError

# Lists whose items have an identity: by which field (x-kubernetes-patch-merge-key). Any other list is replaced as a whole.
KEYS = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "env": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "volumes": "name",
    "hostAliases": "ip",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "topologySpreadConstraints": "topologyKey",
    "ownerReferences": "uid",
}
DIRECTIVES = ("$patch", "$retainKeys")
# What the launcher relies on, of the pod and of the job's own container.
POD = (
    "restartPolicy",
    "subdomain",
    "hostname",
    "terminationGracePeriodSeconds",
    "activeDeadlineSeconds",
    "setHostnameAsFQDN",
)
CONTAINER = ("image", "command", "args", "envFrom", "terminationMessagePath", "terminationMessagePolicy", "workingDir")
OPTION = re.compile(r"--?[\w-]*(password|passwd|token|secret|api-?key)[\w-]*[= ]\S+", re.IGNORECASE)
MOUNTS = ("/tmp", "/dev/shm")


def patch_of(options: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Of the scheduler's options; role: the name of the job's own container."""
    claims = dict(options.get("claims") or {})
    add = list(options.get("capabilities") or ())
    for key, value in (options.get("labels") or {}).items():
        if not LABEL.fullmatch(value):
            raise JobError(
                f"labels is {key}:{value}, expected a label's value: 63 of letters, digits, - _ and . at most"
            )
    for one in add:
        if not re.fullmatch(r"[A-Z][A-Z_]*", one) or one == "ALL" or one.startswith("CAP_"):
            raise JobError(f"capabilities is {one}, expected a capability's name without CAP_, such as IPC_LOCK")
    container: dict[str, Any] = {"name": role}
    if add:
        container["securityContext"] = {"capabilities": {"add": add}}
    if claims:
        container["resources"] = {"claims": [{"name": name} for name in claims]}
    host = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}  # else the names of the pods are unknown there
    spec = {
        "runtimeClassName": options.get("runtime_class"),
        "schedulerName": options.get("scheduler_name"),
        **(host if options.get("host_network") else {}),
        "resourceClaims": [{"name": name, "resourceClaimTemplateName": of} for name, of in claims.items()],
        "containers": [container] if len(container) > 1 else [],
    }
    about = {"labels": options.get("labels"), "annotations": options.get("annotations")}
    return {
        part: {name: value for name, value in values.items() if value}
        for part, values in (("metadata", about), ("spec", spec))
    }


def patch_from(path: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise JobError(f"pod_patch: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not found.keys() <= {"metadata", "spec"}:
        shown = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise JobError(f"pod_patch: {path} has {shown}, expected metadata and spec of a pod template, or one of them")
    return found


def patched(template: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """The pod template of a job -> the same with the patch; a JobError names what is unknown, or is not to be changed."""
    try:
        made = merged(template, patch, "")
    except RecursionError:
        raise JobError("pod_patch: it refers to itself (& and *)") from None
    known(made, "V1PodTemplateSpec", "")
    unchanged(template, made)
    no_secrets(made, "")
    return made


def no_secrets(value: Any, where: str) -> None:
    """Anywhere in a pod: by shape, and by name where names are anybody's."""
    field = where.rpartition(".")[2]
    if isinstance(value, dict):
        free = field in ("labels", "annotations", "nodeSelector", "volumeAttributes", "options")
        named_here = free or ("name" in value and "value" in value)
        for name, item in value.items():
            of = str(value["name"]) if named_here and not free and name == "value" else str(name)
            if isinstance(item, str) and named_here and (free or name == "value") and named(of):
                refuse_secret(f"{where}.{of}".lstrip("."))
            no_secrets(item, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            no_secrets(item, f"{where}[{number}]")
    elif isinstance(value, str) and (secret_in(value) or OPTION.search(value)):
        refuse_secret(where)


def refuse_secret(where: str) -> None:
    raise JobError(
        f"{where} looks like a secret, which whoever may look at the job would see; put it into a Secret (--secret, or "
        "valueFrom.secretKeyRef in a patch)"
    )


def merged(one: Any, patch: Any, where: str) -> Any:
    """where: path of both, for errors."""
    field = where.rpartition(".")[2]
    if isinstance(patch, dict):
        how = patch.get("$patch")
        for name in patch:
            if str(name).startswith("$") and name not in DIRECTIVES:
                raise JobError(f"pod_patch: {where or 'the template'} has {name}, expected {' or '.join(DIRECTIVES)}")
        if how not in (None, "merge", "replace"):
            raise JobError(f"pod_patch: $patch of {where or 'the template'} is {how!r}, expected replace or merge")
        kept = one if isinstance(one, dict) and how != "replace" else {}
        if "$retainKeys" in patch:
            kept = {name: value for name, value in kept.items() if name in patch["$retainKeys"]}
        kept = dict(kept)
        for name, value in patch.items():
            if name in DIRECTIVES:
                continue
            if value is None:
                kept.pop(name, None)
            else:
                kept[name] = merged(kept.get(name), value, f"{where}.{name}".lstrip("."))
        return kept
    if isinstance(patch, list) and field in KEYS:
        return keyed(list(one or ()), patch, KEYS[field], where)
    return patch


def keyed(items: list[Any], patch: list[Any], key: str, where: str) -> list[Any]:
    """Items that are there keep their places; others come after them."""
    if any(isinstance(item, dict) and item.get("$patch") == "replace" and key not in item for item in patch):
        items, patch = [], [item for item in patch if item != {"$patch": "replace"}]
    for item in patch:
        if not isinstance(item, dict) or key not in item:
            raise JobError(f"pod_patch: an item of {where} has no {key}, by which it would be found")
        place = next((k for k, there in enumerate(items) if there[key] == item[key]), None)
        if item.get("$patch") == "delete":
            if place is None:
                raise JobError(
                    f"pod_patch: {where} has no item whose {key} is {item[key]!r}, which $patch would delete"
                )
            del items[place]
        elif place is None:
            items.append(merged(None, item, f"{where}[{item[key]}]"))
        else:
            items[place] = merged(items[place], item, f"{where}[{item[key]}]")
    return items


def known(value: Any, kind: str, where: str) -> None:
    """Every field is one that Kubernetes has, and of its type: a server passes over others in silence."""
    from kubernetes.client import models

    def fail(expected: str) -> None:
        raise JobError(f"pod_patch: {where or 'the template'} is {value!r}, expected {expected}")

    if listed := re.fullmatch(r"list\[(\w+)\]", kind):
        if not isinstance(value, list):
            fail("a list")
        for number, item in enumerate(value):
            name = item.get("name", number) if isinstance(item, dict) else number
            known(item, listed[1], f"{where}[{name}]")
    elif kind.startswith("dict"):
        numbers = where.rpartition(".")[2] in ("limits", "requests")  # quantities
        if not isinstance(value, dict):
            fail("names and values")
        for name, item in value.items():
            if not isinstance(name, str) or not isinstance(item, (str, int, float) if numbers else str):
                raise JobError(
                    f"pod_patch: {where}.{name} is {item!r}, expected a text, in quotes where it is a number"
                )
    elif hasattr(models, kind):
        fields = {
            getattr(models, kind).attribute_map[name]: of for name, of in getattr(models, kind).openapi_types.items()
        }
        if not isinstance(value, dict):
            fail("fields and values")
        for name, item in value.items():
            if name not in fields:
                raise JobError(
                    f"pod_patch: {where or 'the template'} has {name}, which Kubernetes does not know there; it knows "
                    f"{', '.join(sorted(fields))}"
                )
            known(item, fields[name], f"{where}.{name}".lstrip("."))
    elif kind in TYPES and (not isinstance(value, TYPES[kind]) or (kind != "bool" and isinstance(value, bool))):
        fail(
            {"str": "a text, in quotes where it looks like something else", "bool": "true or false"}.get(
                kind, "a number"
            )
        )


TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """What would break the job, and what has an option of its own."""

    def same(what: str, one: Any, other: Any) -> None:
        if one != other:
            raise JobError(f"pod_patch: {what} is the job's own, and not to be changed by a patch")

    for name in before["metadata"]["labels"]:
        same(
            f"metadata.labels.{name}",
            before["metadata"]["labels"][name],
            after.get("metadata", {}).get("labels", {}).get(name),
        )
    spec, new = before["spec"], after.get("spec", {})
    for name in POD:
        same(f"spec.{name}", spec.get(name), new.get(name))
    own = spec["containers"][0]
    found = (new.get("containers") or [{}])[0]
    where = f"spec.containers[{own['name']}]"
    same(where, own["name"], found.get("name"))
    for name in CONTAINER:
        same(f"{where}.{name}", own.get(name), found.get(name))
    for variable in (*OURS, "HOME", "TORCHX_JOB_ID"):
        old, now = ([one for one in of.get("env", ()) if one.get("name") == variable] for of in (own, found))
        same(f"{where}.env[{variable}]", old, now)
    ports = [one for one in own.get("ports", ()) if one not in found.get("ports", ())]
    same(f"{where}.ports", ports, [])
    for path in MOUNTS:
        if not any(one.get("mountPath") == path and not one.get("readOnly") for one in found.get("volumeMounts", ())):
            raise JobError(f"pod_patch: {where} has nothing at {path} that can be written, which the program needs")
