"""Model weights on disk: a folder with `model.safetensors` and `config.json`; and `equiav import`, which makes one from a
published checkpoint."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import tyro
from torch import Tensor

from equiav.config import ConfigError, ModelSettings, from_dict, to_dict
from equiav.model import EquiAV
from equiav.model.importers import CheckpointError, Imported, detect, import_state, strip


@dataclass(frozen=True)
class ImportConfig(ModelSettings):
    """Turns a published checkpoint into a model folder: released EquiAV, CAV-MAE or MAE."""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """The .pth file."""
    out: Path = Path("imported")
    """Folder to write; must not exist yet."""
    format: Literal["auto", "equiav", "cavmae", "mae"] = "auto"
    """Which program wrote the checkpoint; auto looks at its keys."""
    seed: int = 0
    """Of the initial values of whatever the checkpoint does not have (CAV-MAE and MAE: predictors and heads)."""


def save_model(folder: Path, weights: Mapping[str, Tensor], settings: ModelSettings) -> None:
    """Weights, and what it takes to use them. `config.json` is written last: where it stands, its weights are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors"
    )
    content = {f.name: getattr(settings, f.name) for f in dataclasses.fields(ModelSettings)}
    temporary = folder / "config.json.part"
    temporary.write_text(json.dumps(to_dict(ModelSettings(**content)), indent=2) + "\n")
    temporary.replace(folder / "config.json")


def load_model(folder: Path) -> tuple[EquiAV, ModelSettings]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} there; expected a model folder as `equiav import` writes it")
    source = str(folder / "config.json")
    try:
        settings = from_dict(ModelSettings, json.loads((folder / "config.json").read_text()), source)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from None
    with torch.device("meta"):
        model = EquiAV(settings.model, settings.objective)
    try:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        model.load_state_dict(state, assign=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{folder / 'model.safetensors'}: does not hold the weights of {source}: {error}") from None
    return model.eval(), settings


def import_checkpoint(config: ImportConfig) -> tuple[EquiAV, ModelSettings, Imported]:
    if config.checkpoint is None:
        raise ConfigError("no checkpoint named; expected `equiav import CHECKPOINT --out FOLDER`")
    if not config.checkpoint.is_file():
        raise ConfigError(f"{config.checkpoint}: no such file")
    if config.out.exists():
        raise ConfigError(f"--out {config.out}: exists already; name a folder that does not")
    try:
        checkpoint = torch.load(config.checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{config.checkpoint}: not a PyTorch checkpoint of plain tensors: {reason}") from None
    state, beside = strip(checkpoint)
    kind = detect(state) if config.format == "auto" else config.format
    settings: ModelSettings = config
    if kind == "equiav":  # its predictor knows the vectors of the released program only
        settings = dataclasses.replace(config, augment=dataclasses.replace(config.augment, variant="released"))
    with torch.device("meta"):
        model = EquiAV(config.model, config.objective)
    model.to_empty(device="cpu").init_weights(config.seed)
    imported = import_state(state, kind, model)
    imported.ignored |= dict.fromkeys(beside, "stands beside the weights: the state of a training program")
    model.load_state_dict(imported.state)
    return model.eval(), settings, imported


def run_import(config: ImportConfig) -> None:
    model, settings, imported = import_checkpoint(config)
    save_model(config.out, model.state_dict(), settings)
    print(f"used     {len(imported.used):4d} tensors")
    for reason in dict.fromkeys(imported.ignored.values()):
        keys = [key for key, why in imported.ignored.items() if why == reason]
        print(f"ignored  {len(keys):4d} tensors: {reason} ({keys[0]}{', ...' if len(keys) > 1 else ''})")
    for part in dict.fromkeys(".".join(name.split(".")[:2]) for name in imported.fresh):
        names = [name for name in imported.fresh if name.startswith(part)]
        print(f"initial  {len(names):4d} tensors: {part} is not in the checkpoint, filled from seed {config.seed}")
    print(f"wrote {config.out}, augmentation vectors of variant {settings.augment.variant}")
