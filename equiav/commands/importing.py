"""`equiav import`: a published checkpoint becomes a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from equiav.config import ConfigError, ModelSettings
from equiav.model import EquiAV
from equiav.model.importers import Imported
from equiav.weights import from_checkpoint, save_model, settings_of


@dataclass(frozen=True)
class ImportConfig(ModelSettings):
    """Turns a published checkpoint into a model folder: released EquiAV, CAV-MAE or MAE."""

    checkpoint: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = None
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
    if config.out.exists():
        raise ConfigError(f"--out {config.out}: exists already; name a folder that does not")
    kind, imported = from_checkpoint(config.checkpoint, config, config.seed, config.format)
    settings = settings_of(kind, config)
    with torch.device("meta"):
        model = EquiAV(settings.model, settings.objective)
    model.load_state_dict(imported.state, assign=True)
    return model.eval(), settings, imported


def run_import(config: ImportConfig) -> None:
    model, settings, imported = import_checkpoint(config)
    save_model(config.out, model.state_dict(), settings)
    print(*imported.account(), sep="\n")
    print(f"wrote {config.out}, augmentation vectors of variant {settings.augment.variant}")
