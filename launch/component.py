"""What the components share: settings that are checked where they are typed, and an AppDef that any TorchX scheduler runs."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from torchx.specs import AppDef, Resource, Role
from torchx.specs.builders import parse_mounts
from torchx.specs.finder import ComponentValidationException

from launch.guard import PASSWORD, named, secret_in
from launch.job import QUANTITY, object_name, size

IMAGE = os.environ.get("EQUIAV_IMAGE") or f"equiav:{version('equiav')}"  # the second is what `make image` makes
SETTINGS = "EQUIAV_CONFIG"  # environment variable that brings the resolved settings to the program


def refuse(text: str) -> NoReturn:
    raise ComponentValidationException(text)


def say(text: str) -> None:
    print(f"equiav: {text}", file=sys.stderr)


def checked(module: str, settings: str, command: str, argv: Sequence[str], recipe: str | None = None) -> Any:
    """The settings of a command, as it would read them itself."""
    from equiav.config import ConfigError, load

    kind = getattr(importlib.import_module(module), settings)
    try:
        config, show = load(kind, command, list(argv), recipe, knows if command == "finetune" else None)
    except ConfigError as error:
        refuse(str(error))
    except SystemExit as error:  # of the parser, which has said why
        sys.exit(1 if error.code else 0)
    if show:
        from equiav.config import to_yaml

        print(to_yaml(config), end="")
        sys.exit()
    for value in flat(config):
        if what := secret_in(str(value)):
            where = PASSWORD.sub("://***@", str(value)).partition("?")[0] if "://" in str(value) else "a setting"
            refuse(f"{where}: {what} would be seen by whoever may look at the job; put it into a Secret (--secret)")
    return config


def knows(source: str) -> dict[str, dict[str, Any]]:
    """Of the model with which a run begins, if it can be read from here."""
    from equiav.config import ConfigError
    from equiav.known import model_knows
    from streaming import StoreError

    try:
        found = model_knows(source, patience=10)
        why = "is no model folder here"
    except (StoreError, OSError) as error:
        found, why = {}, f"cannot be read from here ({error})"
    if not found and not source.endswith((".pth", ".pt")):
        raise ConfigError(
            f"weights: {source} {why}, so that nothing says of what size that model is and what its inputs were: give "
            "--model.size, --data.audio_mean and --data.audio_std, or a recipe that has them (--config)"
        )
    return found


def flat(config: Any) -> list[Any]:
    from equiav.config import to_dict

    def values(of: Any) -> list[Any]:
        return [one for value in of.values() for one in values(value)] if isinstance(of, dict) else [of]

    return values(to_dict(config))


def bytes_of(setting: str, quantity: str) -> int:
    if not QUANTITY.fullmatch(quantity):
        refuse(f"{setting} is {quantity!r}, expected a quantity, such as 16Gi")
    return size(quantity)


def app(
    name: str,
    program: Sequence[str],
    image: str,
    nodes: tuple[int, int] = (1, 1),
    cpu: int = 0,
    memory: str = "",
    gpus: int = 0,
    env: str = "",
    mounts: list[str] | None = None,
    settings: str = "",
    metadata: dict[str, Any] | None = None,
) -> AppDef:
    """program: after `python -m`. Only macros of TorchX may have a `$` in it that is no `$$`."""
    variables = variables_of(env)
    if SETTINGS in variables:
        refuse(f"env: {SETTINGS} is how the settings reach the program; give them after `--`, or with --config")
    memory = memory or f"{max(1, gpus) * (64 if gpus else 8)}Gi"
    try:
        volumes = parse_mounts(mounts or [])
    except (KeyError, ValueError) as error:
        refuse(f"mounts: {error.args[0]}; expected type=volume,src=CLAIM,dst=/PATH or type=bind,src=/PATH,dst=/PATH")
    role = Role(
        name="worker",
        image=image,
        entrypoint="python",
        args=["-m", *program],
        env={name: literal(value) for name, value in variables.items()},
        min_replicas=nodes[0],
        num_replicas=nodes[1],
        resource=Resource(cpu=cpu or (12 * gpus or 2), gpu=gpus, memMB=bytes_of("memory", memory) >> 20),
        mounts=volumes,
        metadata={"kubernetes": metadata or {}},
    )
    if settings:
        role.env[SETTINGS] = literal(settings)
    return AppDef(name=object_name(name), roles=[role])


def on_volumes(paths: dict[str, str]) -> dict[str, str]:
    """Of what a run reads and leaves, by setting: what has to lie on a volume, where it runs in a pod."""
    return {setting: literal(path) for setting, path in paths.items() if "://" not in path}


def variables_of(env: str) -> dict[str, str]:
    """NAME=VALUE,NAME=VALUE. A value may have commas and equals signs in it, but none that looks like a further NAME=."""
    pairs = [pair.partition("=") for pair in re.split(r",(?=[A-Za-z_]\w*=)", env) if env]
    for name, equals, value in pairs:
        if not equals:
            refuse(f"env: {name!r} has no value, expected NAME=VALUE,NAME=VALUE")
        if (what := secret_in(value)) or named(name):
            why = f" ({what})" if what else ""
            refuse(
                f"env: {name}{why} would be seen by whoever may look at the job; put it into a Secret "
                f"(kubectl create secret generic NAME --from-literal={name}=..., and --secret NAME)"
            )
    return {name: value for name, _, value in pairs}


def literal(text: str) -> str:
    """TorchX replaces $macros in arguments, environment and metadata."""
    return text.replace("$", "$$")


def size_of(nodes: str) -> tuple[int, int]:
    """MIN:MAX"""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", nodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        refuse(f"nodes is {nodes!r}, expected MIN:MAX, such as 2:4, or a number")
    return least, most
