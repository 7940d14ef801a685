"""`equiav import`: a published checkpoint becomes a model folder."""

from __future__ import annotations

import torch

from equiav.commands.settings import ImportConfig
from equiav.config import ModelSettings
from equiav.model import EquiAV
from equiav.model.importers import Imported
from equiav.weights import from_checkpoint, save_model, settings_of


def import_checkpoint(config: ImportConfig) -> tuple[EquiAV, ModelSettings, Imported]:
    assert config.checkpoint is not None
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
