"""`equiav <command>`: parsing and calling, nothing else."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "smoke": "generate clips, pretrain the tiny model, retrieve, write a report: everything works here",
    "pretrain": "pretrain on a packed dataset; the same command goes on with a run that was interrupted",
    "pack": "turn videos, extracted frames and sounds, or synthetic clips into a dataset of shards",
    "index": "make the index of shards that somebody else packed",
    "verify": "compare every byte of a dataset with its index",
    "plan": "parameters, multiply-adds, memory and traffic of a configuration",
    "import": "turn a published checkpoint (EquiAV, CAV-MAE, MAE) into a model folder",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: equiav <command> [--help] [--config NAME_OR_PATH] [--print-config] [--section.field value ...]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:8s} {what}")
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command == "--version":
        print(importlib.metadata.version("equiav"))
        return 0
    if command not in COMMANDS:
        print(f"equiav: no command {command!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    gc.disable()  # until everything is imported
    problem = _environment_problem()
    if problem:
        print(f"equiav: {problem}", file=sys.stderr)
        return 1

    from equiav.config import ConfigError
    from equiav.data.clips import BadClipError
    from equiav.ending import Ending
    from equiav.model.importers import CheckpointError
    from streaming import CacheError, ChildDied, DatasetError, ShardError, StoreError, TooManyBadSamples

    try:
        _run(command, rest)
    except (
        FloatingPointError,
        BadClipError,
        ChildDied,
        DatasetError,
        ShardError,
        StoreError,
        TooManyBadSamples,
    ) as error:
        print(f"equiav {command}: {error}", file=sys.stderr)
        return 1
    except (ConfigError, CheckpointError, CacheError) as error:
        print(f"equiav {command}: {error}", file=sys.stderr)
        return 2
    except Ending as error:
        print(f"equiav {command}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"\nequiav {command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(command: str, argv: list[str]) -> None:
    from equiav.config import ConfigError, load, to_yaml

    recipe = None
    match command:
        case "smoke":
            try:
                from equiav.commands.smoke import SmokeConfig as Settings
                from equiav.commands.smoke import run_smoke as run
            except ModuleNotFoundError as error:
                raise ConfigError(f"{error.name} is not installed; `pip install 'equiav[smoke]'` brings it") from None
            recipe = "smoke"
        case "pretrain":
            from equiav.commands.pretrain import PretrainConfig as Settings
            from equiav.commands.pretrain import run_pretrain as run
        case "pack":
            from equiav.commands.pack import PackConfig as Settings
            from equiav.commands.pack import run_pack as run
        case "index":
            from equiav.commands.pack import IndexConfig as Settings
            from equiav.commands.pack import run_index as run
        case "verify":
            from equiav.commands.pack import VerifyConfig as Settings
            from equiav.commands.pack import run_verify as run
        case "plan":
            from equiav.commands.plan import PlanConfig as Settings
            from equiav.commands.plan import run_plan as run
        case _:
            from equiav.commands.importing import ImportConfig as Settings
            from equiav.commands.importing import run_import as run

    config, show = load(Settings, command, argv, recipe)
    # Everything imported so far stays: collecting garbage among it, now or while importing, costs a second of the start.
    gc.freeze()
    gc.enable()
    print(to_yaml(config), end="") if show else run(config)  # type: ignore[arg-type]


def _environment_problem() -> str | None:
    """What is wrong with what is installed, in one line; None where nothing is.

    torchaudio's last release, 2.11, loads only beside torch 2.11 to 2.13 built for CUDA 13 (on machines without a GPU too).
    """
    advice = (
        "install with `pip install -c constraints.txt equiav`, or torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0"
    )
    version = importlib.metadata.version("torch")
    major, minor = (int(part) for part in version.split(".")[:2])
    if not (2, 11) <= (major, minor) <= (2, 13):
        return f"torch {version} is installed, expected 2.11 to 2.13 (torchaudio 2.11 does not load beside others); {advice}"
    ours = Path(__file__).parent.parent / "streaming"
    found = importlib.util.find_spec("streaming")
    if found is None or found.origin is None or Path(found.origin).parent != ours:
        where = found.origin if found else "nowhere"
        return (
            f"`import streaming` finds {where}, expected {ours}: another distribution (mosaicml-streaming?) has a package "
            "of that name; install EquiAV into an environment of its own"
        )
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        return f"torchaudio does not load beside torch {version} ({reason}); {advice}"
    return None
