"""How settings are read. Later over earlier: their defaults, a YAML file (`--config NAME_OR_PATH`), and the command line
(`--section.field value`). `model.size` names a set of model defaults that sits below all three. What all of them say together
is checked, once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import cattrs
import tyro
import yaml

from equiav.config.settings import ROUNDING, SIZES, WITHOUT_EFFECT, ConfigError

T = typing.TypeVar("T")


FORMERLY = {"init": "weights", "model": "weights"}  # settings that had another name
EXPLICIT = {"model": ("size",), "data": ("audio_mean", "audio_std")}  # with these given, nothing is asked of a model


def load(
    cls: type[T],
    command: str,
    argv: list[str],
    recipe: str | None = None,
    known: Callable[[str], dict[str, dict[str, Any]]] | None = None,
) -> tuple[T, bool]:
    """The resolved config of one command, and whether `--print-config` was asked for. `recipe` is the default YAML. `known`: what
    the model that `weights` names was made and trained with, section by section, which is taken where nothing else is given."""
    given = read_line(cls, argv)
    name, show = given.pop("config", recipe), bool(given.pop("print_config", False))
    values, source = read_yaml(name, cls) if name else ({}, "defaults")
    if given.pop("help", False):
        explain(cls, command, from_dict(cls, values, source))
    for path, value in given.items():
        *sections, field = path.split(".")
        place = values
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                break  # `from_dict` will say so
        else:
            place[field] = value
    if known and isinstance(weights := values.get("weights"), str) and weights:
        sections = {name: values.get(name) or {} for name in EXPLICIT}
        asked = [name in of for section, of in sections.items() if isinstance(of, dict) for name in EXPLICIT[section]]
        theirs = {} if all(asked) else known(weights)
        if sections["model"].get("size") not in (None, theirs.get("model", {}).get("size")):
            theirs.pop("model", None)  # another size, on purpose
        for section, of in theirs.items():
            values[section] = {**of, **(values.get(section) or {})}
    return from_dict(cls, values, source, given), show


def explain(cls: type, command: str, default: Any) -> None:
    """`--help`: prints, and ends."""
    footer = "also: --config NAME_OR_PATH (a recipe or YAML file), --print-config (show the resolved settings and stop)"
    described = f"{cls.__doc__}\n\n{footer}\nrecipes: {', '.join(recipe_names(cls))}"
    tyro.cli(
        cls, prog=f"equiav {command}", description=described, default=default, args=["--help"], use_underscores=True
    )


# ---- the command line

OF_ALL = {"config": str, "print_config": bool, "help": bool}


def read_line(cls: type, argv: list[str]) -> dict[str, Any]:
    """argv -> dotted name: what was given for it, in the type of that setting where it can be one."""
    options, places = OF_ALL | dict(_options(cls)), list(_places(cls))
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        # A clip's name may begin with a dash.
        if not word.startswith("--") and word != "-h" and (not word.startswith("-") or places or _number(word)):
            if not places:
                flat = "weights" in options and not any("." in name for name in options)
                hint = f"--weights {word}" if flat else "--section.field value"
                raise ConfigError(f"{word!r} is not expected; settings are given as {hint}")
            kind = options[places[0]]
            if typing.get_origin(kind) is tuple:  # of any length
                given.setdefault(places[0], []).append(word)
            else:
                given[places.pop(0)] = _value(word, kind)
            continue
        name, equals, value = word.removeprefix("-h" if word == "-h" else "--").partition("=")
        name = (name or "help").replace("-", "_")
        section, _, field = name.rpartition(".")
        positive = f"{section}.{field[3:]}" if section else field[3:]
        off = field.startswith("no_") and options.get(positive) is bool
        name = positive if off else name
        if name not in options:
            near = [one for one in options if one.endswith(f".{name}")]  # without its section
            near = near or difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            hint = f"did you mean --{near[0]}?" if near else "--help lists what there is"
            if name in FORMERLY and FORMERLY[name] in options:
                hint = f"it is --{FORMERLY[name]} now"
            raise ConfigError(f"there is no --{name}; {hint}")
        kind = options[name]
        if kind is bool:
            if equals and value.lower() not in ("true", "false"):
                raise ConfigError(f"--{name}: found {value!r}, expected true or false")
            if not equals and words and words[0].lower() in ("true", "false"):
                equals, value = "=", words.pop(0)
            given[name] = (value.lower() == "true" if equals else True) != off
            continue
        kinds = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
        most, least = (math.inf, 1) if ... in kinds else (len(kinds), len(kinds))
        parts = [value] if equals else []
        while len(parts) < most and words and (not words[0].startswith("-") or _number(words[0])):
            parts.append(words.pop(0))
        if len(parts) < least:
            wanted = "a value" if least == 1 else f"{least} values"
            raise ConfigError(f"--{name} {' '.join(parts)}".rstrip() + f": expected {wanted}")
        each = kinds[:1] * len(parts) if ... in kinds else kinds
        read = [_value(part, of) for part, of in zip(parts, each, strict=True)]
        given[name] = read if typing.get_origin(kind) is tuple else read[0]
    return given


def _options(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _options(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _places(cls: type) -> Iterator[str]:
    """Settings that are given by their place."""
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        if tyro.conf.Positional in getattr(kind, "__metadata__", ()):
            yield name


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _value(text: str, kind: Any) -> Any:
    """As text where it is none of that kind: the check of all settings will say so."""
    if isinstance(kind, types.UnionType):  # PATH | None
        kind = typing.get_args(kind)[0]
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


# ---- YAML


TUNING = "tune_"  # what the names of fine-tuning's recipes begin with


def recipe_names(cls: type | None = None) -> list[str]:
    """Those for one command, or all."""
    names = sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("equiav.config.recipes").iterdir()
        if p.name.endswith(".yaml")
    )
    tunes = cls is not None and "tune" in typing.get_type_hints(cls)
    return [name for name in names if cls is None or name.startswith(TUNING) == tunes]


def read_yaml(name_or_path: str, cls: type | None = None) -> tuple[dict[str, Any], str]:
    """A recipe by name or a YAML file by path -> its values, and what to call it in an error."""
    if name_or_path in recipe_names():
        if name_or_path.startswith(TUNING) and name_or_path not in recipe_names(cls):
            raise ConfigError(f"--config {name_or_path} is a recipe for `equiav finetune`")
        source, text = (
            f"recipe {name_or_path}",
            (resources.files("equiav.config.recipes") / f"{name_or_path}.yaml").read_text(),
        )
    elif Path(name_or_path).is_file():
        source = name_or_path
        try:
            text = Path(source).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--config {source}: byte {error.start} is no UTF-8; save it as UTF-8") from None
    else:
        raise ConfigError(f"--config {name_or_path}: no such file, and the recipes are {', '.join(recipe_names(cls))}")
    try:
        values = yaml.load(text, Strict)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{place}: not valid YAML: {error.problem or error.context}") from None
    except (
        yaml.YAMLError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:  # of values that are none of their kind
        raise ConfigError(f"{source}: not valid YAML: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source}: expected settings (`section:` then `field: value`), found {type(values).__name__}"
        )
    return values, source


class Strict(yaml.SafeLoader):
    """Names are text, and each stands once: YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # <<: *others
                continue
            if key.tag != "tag:yaml.org,2002:str":
                found = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list"
                raise yaml.MarkedYAMLError(problem=f"a name is {found}, expected text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# ---- both together


def from_dict(cls: type[T], values: dict[str, Any], source: str, given: Collection[str] = ()) -> T:
    """`values` as a config of class `cls`, strictly: unknown names and wrong types are errors that name the field. `given`: those
    that come from the command line, the others from `source`."""
    sections = typing.get_type_hints(cls)
    values = dict(values)
    for name in values:
        if values[name] is None and dataclasses.is_dataclass(sections.get(name)):
            values[name] = {}  # `model:` with nothing below it
    for name, value in values.items():
        if dataclasses.is_dataclass(sections.get(name)) and not isinstance(value, dict):
            raise ConfigError(f"{source}: {name}: found {value!r}, expected its settings (`field: value`)")
    if dataclasses.is_dataclass(sections.get("model")):
        model = values.get("model", {})
        size = model.get("size", "vit_b16")
        if not isinstance(size, str) or size not in SIZES:
            where = "" if "model.size" in given else f"{source}: "
            raise ConfigError(f"{where}model.size is {size!r}, expected one of {', '.join(SIZES)}")
        values["model"] = {**model, "size": size}
        for section in SIZES[size].keys() & sections.keys():
            values[section] = {**SIZES[size][section], **values.get(section, {})}
    try:
        return _converter().structure(values, cls)
    except cattrs.BaseValidationError as error:
        raise ConfigError("\n".join(_explain(error, source, "", values, given))) from None


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)

    def strict(kind: type) -> None:
        def hook(value: Any, _: Any) -> Any:
            if kind is float and isinstance(value, str):
                value = float(value)  # YAML 1.1 reads 1e-4 (no point) as text
            if kind is float and type(value) is int and abs(value) < 1 << 64:
                value = float(value)
            if type(value) is not kind or (kind is float and not math.isfinite(value)):
                raise ValueError(f"found {value!r}")
            if kind is str and "\0" in str(value):
                raise ValueError("holds a zero byte")
            return value

        converter.register_structure_hook(kind, hook)

    for kind in (bool, int, float, str):
        strict(kind)

    def path(value: Any, _: Any) -> Path:
        if "\0" in str(value):
            raise ValueError("holds a zero byte")
        return Path(value)

    converter.register_structure_hook(Path, path)
    return converter


def _explain(
    error: BaseException, source: str, path: str, values: Any, given: Collection[str], kind: Any = None
) -> list[str]:
    """One line for each thing wrong in a cattrs error tree."""
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        names = [f.name for f in dataclasses.fields(error.cl)]
        lines = []
        for name in sorted(error.extra_fields):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {path}{near[0]}?" if near else f"the fields are {', '.join(names)}"
            if not path and FORMERLY.get(name) in names:
                hint = f"it is {FORMERLY[name]} now"
            lines.append(f"{source}: unknown field {path}{name}; {hint}")
        return lines
    if isinstance(error, cattrs.ClassValidationError):
        known, rest = error.group_exceptions()
        lines = [line for e in rest for line in _explain(e, source, path, values, given)]
        for e, note in known:
            nested = isinstance(e, cattrs.ClassValidationError)
            value = values.get(note.name) if isinstance(values, dict) else None
            lines += _explain(e, source, f"{path}{note.name}" + ("." if nested else ""), value, given, note.type)
        return lines
    if isinstance(error, ConfigError):  # it begins with the setting's name
        name = str(error).split()[0]
        inside = isinstance(values, dict) and name.removeprefix(path) in values and name not in given
        return [f"{source}: {error}" if inside else str(error)]
    where = f"--{path}" if path in given else f"{source}: {path}"
    return [f"{where}: found {values!r}, expected {_expected(kind)}"]


def _expected(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        return f"{len(kinds)} values, each {_expected(kinds[0])}"
    return {int: "an integer", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}.get(
        kind, str(kind)
    )


def to_dict(config: Any) -> dict[str, Any]:
    return cattrs.Converter(unstruct_collection_overrides={tuple: list}).unstructure(config)


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(config: Any, began_with: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compares a run's settings with those it began with -> what makes it another run, and what may change its last bits.
    Settings that a later release has added had their default."""
    defaults = from_dict(type(config), {"model": {"size": config.model.size}}, "defaults")
    current = to_dict(config)
    began_with = {name if name in current else FORMERLY.get(name, name): value for name, value in began_with.items()}
    now, then = flat(current), flat(to_dict(defaults)) | flat(began_with)
    changed = {
        name: f"{name} is {now.get(name)}, was {then.get(name)}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name) and not without_effect(name)
    }
    refused = [text for name, text in changed.items() if name not in ROUNDING]
    return refused, [text for name, text in changed.items() if name in ROUNDING]


def without_effect(name: str) -> bool:
    return not WITHOUT_EFFECT.isdisjoint({name, name.partition(".")[0]})


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}, as JSON has the values."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(values)).items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
