"""`equiav import`: a published checkpoint becomes a model folder."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from equiav.config import ConfigError, ModelSettings
from equiav.model import EquiAV
from equiav.model.importers import CheckpointError, Imported, detect, import_state, strip
from equiav.weights import save_model


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
