"""Model weights on disk: a folder with `model.safetensors` and `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from equiav.config import ConfigError, ModelSettings, from_dict, to_dict
from equiav.model import EquiAV


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
