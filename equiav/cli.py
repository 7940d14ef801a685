"""`equiav <command>`: parsing and calling, nothing else."""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    what: str
    module: str  # of equiav.commands
    settings: str
    run: str


COMMANDS = {
    "smoke": Command(
        "generate clips, pretrain the tiny model, retrieve, write a report: everything works here",
        "smoke",
        "SmokeConfig",
        "run_smoke",
    ),
    "pretrain": Command(
        "pretrain on a packed dataset; the same command goes on with a run that was interrupted",
        "pretrain",
        "PretrainConfig",
        "run_pretrain",
    ),
    "finetune": Command(
        "fine-tune on a dataset's labels, from a pretrained model; test it",
        "finetune",
        "FinetuneConfig",
        "run_finetune",
    ),
    "probe": Command(
        "say what frozen features of a model are worth on labels: a linear classifier, the nearest clips",
        "probe",
        "ProbeConfig",
        "run_probe",
    ),
    "eval": Command(
        "evaluate a pretrained model without labels: retrieval, what its predictors know, what sounds",
        "evaluate",
        "EvalConfig",
        "run_eval",
    ),
    "embed": Command("write the embeddings of files, or of a dataset's clips", "embed", "EmbedConfig", "run_embed"),
    "search": Command(
        "find what is nearest to a file: pictures by a sound, sounds by a picture",
        "search",
        "SearchConfig",
        "run_search",
    ),
    "score": Command("say how well sound and picture of a video belong together", "embed", "ScoreConfig", "run_score"),
    "localize": Command("show what of a video's pictures sounds", "localize", "LocalizeConfig", "run_localize"),
    "predict": Command("name the classes of files, by a fine-tuned model", "embed", "PredictConfig", "run_predict"),
    "export": Command(
        "write a model for others: programs that need no EquiAV, a model card", "export", "ExportConfig", "run_export"
    ),
    "diff": Command("say that two runs are equal, or where they part", "diff", "DiffConfig", "run_diff"),
    "report": Command("write one page about runs: curves, results, examples", "report", "ReportConfig", "run_report"),
    "top": Command("show how a run does, from its folder or from what its nodes serve", "top", "TopConfig", "run_top"),
    "pack": Command(
        "turn videos, extracted frames and sounds, or synthetic clips into a dataset of shards",
        "pack",
        "PackConfig",
        "run_pack",
    ),
    "index": Command("make the index of shards that somebody else packed", "pack", "IndexConfig", "run_index"),
    "verify": Command("compare every byte of a dataset with its index", "pack", "VerifyConfig", "run_verify"),
    "show": Command(
        "show a dataset: hours, labels, what was rejected, some clips; or one clip, and the views that training makes of it",
        "show",
        "ShowConfig",
        "run_show",
    ),
    "label": Command("give the clips of a dataset their labels", "label", "LabelConfig", "run_label"),
    "stats": Command(
        "say what a dataset is like: lengths, pictures, mean and deviation of its spectrograms",
        "stats",
        "StatsConfig",
        "run_stats",
    ),
    "plan": Command(
        "parameters, multiply-adds, memory and traffic of a configuration", "plan", "PlanConfig", "run_plan"
    ),
    "import": Command(
        "turn a published checkpoint (EquiAV, CAV-MAE, MAE) into a model folder",
        "importing",
        "ImportConfig",
        "run_import",
    ),
}
PEER_GONE = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|\bgloo/transport/.*(Timed out|SO_ERROR)", re.IGNORECASE
)


def main(argv: Sequence[str] | None = None) -> int:
    """-> the status with which to end."""
    try:
        return _main(argv)
    except KeyboardInterrupt:  # while it imports, too
        print("\nequiav: interrupted", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # which may know fewer letters than names have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # An agent that is killed would leave it behind, training beside those that take its place. First of all: imports
        # take seconds.
        from streaming.processes import end_with_parent

        end_with_parent()
    if os.getpid() == 1:  # of a container: the kernel spares it the default, which is to end
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: equiav <command> [--help] [--config NAME_OR_PATH] [--print-config] [--section.field value ...]\n")
        for name, listed in COMMANDS.items():
            print(f"  {name:8s} {listed.what}")
        recipes = sorted(path.stem for path in (Path(__file__).parent / "config" / "recipes").glob("*.yaml"))
        print(f"\nrecipes, for --config: {', '.join(recipes)}")
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command == "--version":
        print(importlib.metadata.version("equiav"))
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        text = f"no command {command!r}; {hint}"
        print(f"equiav: {text}", file=sys.stderr)
        _tell_agent(text, "never")
        return 2
    gc.disable()  # until everything is imported
    from equiav.config import ConfigError, to_yaml

    try:  # what can be said without anything heavy
        config, show = _settings(command, rest)
        if show:
            print(to_yaml(config), end="")
            return 0
        if hasattr(config, "ready"):
            config.ready()
    except ConfigError as error:
        return _told(command, error, "never", 2)
    problem = _environment_problem()
    if problem:
        print(f"equiav: {problem}", file=sys.stderr)
        return 1

    from equiav.data.clips import BadClipError, IncompleteError
    from equiav.ending import Ending
    from equiav.model.importers import CheckpointError
    from equiav.train.run import remedy
    from streaming import CacheError, CacheGone, ChildDied, DatasetError, ShardError, StoreError, TooManyBadSamples
    from streaming.dataset import NoDataset
    from streaming.store import NoStore

    mistakes = (ConfigError, CheckpointError, CacheError, NoDataset, NoStore)
    troubles = (
        FloatingPointError,
        BadClipError,
        IncompleteError,
        ChildDied,
        DatasetError,
        ShardError,
        StoreError,
        TooManyBadSamples,
    )
    try:
        return _run(command, config)
    except (*mistakes, *troubles, Ending) as error:
        mistake = isinstance(error, mistakes) and not isinstance(error, CacheGone)
        return _told(command, error, remedy(error), error.status if isinstance(error, Ending) else 1 + mistake)
    except RuntimeError as error:
        if not PEER_GONE.search(str(error)):
            raise
        return _told(command, f"another process of the run is gone: {str(error).splitlines()[0]}", "again", 1)
    except BrokenPipeError:  # whoever reads what it says has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:  # a disk that is full, or not ours
        print(f"equiav {command}: {error}", file=sys.stderr)
        return 1


def _told(command: str, what: object, remedy: str, status: int) -> int:
    print(f"equiav {command}: {what}", file=sys.stderr)
    _tell_agent(str(what), remedy)
    return status


def _tell_agent(text: str, remedy: str) -> None:
    """As one of torchrun's processes: what it ended with, and what can be done about it. torchrun would start it again and again
    all the same, so it is asked to end; our own agent (launch/agent.py) reads what is written here."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time())), "remedy": remedy}
        with contextlib.suppress(OSError):  # a full disk: the status says enough
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
    if remedy != "again" and "TORCHELASTIC_RUN_ID" in os.environ and "EQUIAV_NODE" not in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)


def _settings(name: str, argv: list[str]) -> tuple[Any, bool]:
    """-> a command's settings, and whether they are only to be shown."""
    from equiav.commands import settings
    from equiav.config import load
    from equiav.terminal import masked

    theirs: dict[str, dict[str, Any]] = {}

    def known(source: str) -> dict[str, dict[str, Any]]:
        from equiav.known import model_knows

        theirs.update(model_knows(source))
        return dict(theirs)

    begins = name in ("finetune", "probe")  # `pretrain` begins with weights that others made otherwise
    recipe = "smoke" if name == "smoke" else None
    config, show = load(getattr(settings, COMMANDS[name].settings), name, argv, recipe, known if begins else None)
    taken = [
        f"{section}.{field} {theirs[section][field]}"
        for section, field in (("model", "size"), *(("data", field) for field in theirs.get("data", {})))
        if section in theirs and getattr(getattr(config, section), field) == theirs[section][field]
    ]
    if taken and os.environ.get("RANK", "0") == "0":
        print(f"equiav {name}: as the model at {masked(config.weights)} has them: {', '.join(taken)}", file=sys.stderr)
    return config, show


def _run(name: str, config: Any) -> int:
    """-> the status with which to end."""
    from equiav.config import ConfigError

    command = COMMANDS[name]
    try:
        module = importlib.import_module(f"equiav.commands.{command.module}")
    except ModuleNotFoundError as error:
        if name != "smoke":
            raise
        raise ConfigError(f"{error.name} is not installed; `pip install 'equiav[smoke]'` brings it") from None
    # Everything imported so far stays: collecting garbage among it, now or while importing, costs a second of the start.
    gc.freeze()
    gc.enable()
    return getattr(module, command.run)(config) or 0


def _environment_problem() -> str | None:
    """What is wrong with what is installed, in one line; None where nothing is.

    torchaudio's last release, 2.11, loads only beside torch 2.11 to 2.13 built for CUDA 13 (on machines without a GPU too).
    """
    advice = "install with `pip install -c constraints.txt .` in a clone, or torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0"
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
