"""How settings are read. Later over earlier: their defaults, a YAML file (`--config NAME_OR_PATH`), and the command line
(`--section.field value`). `model.size` names a set of model defaults that sits below all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import cattrs
import tyro
import yaml

from equiav.config.settings import ROUNDING, SIZES, WITHOUT_EFFECT, ConfigError

T = typing.TypeVar("T")


def load(cls: type[T], command: str, argv: list[str], recipe: str | None = None) -> tuple[T, bool]:
    """The resolved config of one command, and whether `--print-config` was asked for. `recipe` is the default YAML."""
    common = argparse.ArgumentParser(prog=f"equiav {command}", add_help=False, allow_abbrev=False)
    common.add_argument("--config", default=recipe)
    common.add_argument("--print-config", action="store_true")
    common.add_argument("--model.size", dest="size", default=None)
    known, _ = common.parse_known_args(argv)
    rest = _without(argv, "--config", values=1)
    rest = _without(rest, "--print-config", values=0)
    values, source = read_yaml(known.config) if known.config else ({}, "defaults")
    default = from_dict(cls, values, source, size=known.size)
    footer = "also: --config NAME_OR_PATH (a recipe or YAML file), --print-config (show the resolved settings and stop)"
    config = tyro.cli(
        cls,
        prog=f"equiav {command}",
        description=f"{cls.__doc__}\n\n{footer}",
        default=default,
        args=rest,
        use_underscores=True,
    )
    return config, known.print_config


def _without(argv: list[str], flag: str, values: int) -> list[str]:
    """argv less `flag` and its values, in both spellings (`--flag value`, `--flag=value`)."""
    kept, skip = [], 0
    for word in argv:
        if skip:
            skip -= 1
        elif word == flag:
            skip = values
        elif not word.startswith(flag + "="):
            kept.append(word)
    return kept


def recipe_names() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("equiav.config.recipes").iterdir()
        if p.name.endswith(".yaml")
    )


def read_yaml(name_or_path: str) -> tuple[dict[str, Any], str]:
    """A recipe by name or a YAML file by path -> its values, and what to call it in an error."""
    if name_or_path in recipe_names():
        source, text = (
            f"recipe {name_or_path}",
            (resources.files("equiav.config.recipes") / f"{name_or_path}.yaml").read_text(),
        )
    elif Path(name_or_path).is_file():
        source = name_or_path
        try:
            text = Path(source).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--config {source}: byte {error.start} is no UTF-8; save it as UTF-8") from None
    else:
        raise ConfigError(f"--config {name_or_path}: no such file, and the recipes are {', '.join(recipe_names())}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source}: expected settings (`section:` then `field: value`), found {type(values).__name__}"
        )
    return values, source


def from_dict(cls: type[T], values: dict[str, Any], source: str, size: str | None = None) -> T:
    """`values` as a config of class `cls`, strictly: unknown names and wrong types are errors that name the field."""
    sections = typing.get_type_hints(cls)
    values = {name: {} if value is None else value for name, value in values.items()}  # `model:` with nothing below it
    model = values.get("model", {})
    if "model" in sections and isinstance(model, dict):
        size = size or model.get("size", "vit_b16")
        if size not in SIZES:
            raise ConfigError(f"{source}: model.size is {size!r}, expected one of {', '.join(SIZES)}")
        values = {**values, "model": {**model, "size": size}}
        for section in SIZES[size].keys() & sections.keys():
            if isinstance(values.setdefault(section, {}), dict):
                values[section] = {**SIZES[size][section], **values[section]}
    try:
        return _converter().structure(values, cls)
    except cattrs.BaseValidationError as error:
        raise ConfigError("\n".join(_explain(error, source, path=""))) from None


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)

    def strict(kind: type) -> None:
        def hook(value: Any, _: Any) -> Any:
            if kind is float and isinstance(value, str):
                value = float(value)  # YAML 1.1 reads 1e-4 (no point) as text
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind or (kind is float and not math.isfinite(value)):
                raise ValueError(f"found {value!r}")
            return value

        converter.register_structure_hook(kind, hook)

    for kind in (bool, int, float, str):
        strict(kind)
    converter.register_structure_hook(Path, lambda value, _: Path(value))
    return converter


def _explain(error: BaseException, source: str, path: str, kind: Any = None) -> list[str]:
    """One line for each thing wrong in a cattrs error tree."""
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        names = [f.name for f in dataclasses.fields(error.cl)]
        lines = []
        for name in sorted(error.extra_fields):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {path}{near[0]}?" if near else f"the fields are {', '.join(names)}"
            lines.append(f"{source}: unknown field {path}{name}; {hint}")
        return lines
    if isinstance(error, cattrs.ClassValidationError):
        known, rest = error.group_exceptions()
        lines = [line for e in rest for line in _explain(e, source, path)]
        for e, note in known:
            nested = isinstance(e, cattrs.ClassValidationError)
            lines += _explain(e, source, f"{path}{note.name}" + ("." if nested else ""), note.type)
        return lines
    if isinstance(error, ConfigError):
        return [f"{source}: {error}"]
    expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    found = str(error) if str(error).startswith("found") else f"cannot read it ({error})"
    return [f"{source}: {path}: {found}, expected {expected}"]


def to_dict(config: Any) -> dict[str, Any]:
    return cattrs.Converter(unstruct_collection_overrides={tuple: list}).unstructure(config)


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(config: Any, began_with: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of a run that began with other settings: what makes it another run, and what it is rounded otherwise for. Settings that
    a later release has added had their default."""
    defaults = from_dict(type(config), {"model": {"size": config.model.size}}, "defaults")
    now, then = flat(to_dict(config)), flat(to_dict(defaults)) | flat(began_with)
    changed = {
        name: f"{name} is {now.get(name)}, was {then.get(name)}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name) and not name.startswith(WITHOUT_EFFECT)
    }
    refused = [text for name, text in changed.items() if name not in ROUNDING]
    return refused, [text for name, text in changed.items() if name in ROUNDING]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}, as JSON has the values."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(values)).items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
