"""Model weights on disk: a folder with `model.safetensors` and `config.json`; and `equiav import`, which makes one from a
published checkpoint."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import tyro

from equiav.config import ConfigError, ModelConfig, ObjectiveConfig, from_dict, to_dict
from equiav.model import EquiAV
from equiav.model.importers import CheckpointError, Imported, detect, import_state, strip


@dataclass(frozen=True)
class ModelFile:
    """What `config.json` holds beside the weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


@dataclass(frozen=True)
class ImportConfig:
    """Turns a published checkpoint into a model folder: released EquiAV, CAV-MAE or MAE."""

    checkpoint: tyro.conf.Positional[Path] = Path()
    """The .pth file."""
    out: Path = Path("imported")
    """Folder to write; must not exist yet."""
    format: Literal["auto", "equiav", "cavmae", "mae"] = "auto"
    """Which program wrote the checkpoint; auto looks at its keys."""
    seed: int = 0
    """Of the initial values of whatever the checkpoint does not have (CAV-MAE and MAE: predictors and heads)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


def save_model(folder: Path, model: EquiAV) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    content = ModelFile(model=model.config, objective=model.objective)
    (folder / "config.json").write_text(json.dumps(to_dict(content), indent=2) + "\n")


def load_model(folder: Path) -> EquiAV:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} there; expected a model folder as `equiav import` writes it")
    source = str(folder / "config.json")
    content = from_dict(ModelFile, json.loads((folder / "config.json").read_text()), source)
    model = EquiAV(content.model, content.objective)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval()


def import_checkpoint(config: ImportConfig) -> tuple[EquiAV, Imported]:
    if not config.checkpoint.is_file():
        raise ConfigError(f"{config.checkpoint}: no such file")
    if config.out.exists():
        raise ConfigError(f"--out {config.out}: exists already; name a folder that does not")
    try:
        checkpoint = torch.load(config.checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{config.checkpoint}: not a PyTorch checkpoint of plain tensors: {reason}") from None
    state = strip(checkpoint)
    kind = detect(state) if config.format == "auto" else config.format
    model = EquiAV(config.model, config.objective)
    model.init_weights(config.seed)
    imported = import_state(state, kind, model)
    model.load_state_dict(imported.state)
    return model.eval(), imported


def run_import(config: ImportConfig) -> None:
    model, imported = import_checkpoint(config)
    save_model(config.out, model)
    print(f"used     {len(imported.used):4d} tensors")
    for reason in dict.fromkeys(imported.ignored.values()):
        keys = [key for key, why in imported.ignored.items() if why == reason]
        print(f"ignored  {len(keys):4d} tensors: {reason} ({keys[0]}{', ...' if len(keys) > 1 else ''})")
    for part in dict.fromkeys(".".join(name.split(".")[:2]) for name in imported.fresh):
        names = [name for name in imported.fresh if name.startswith(part)]
        print(f"initial  {len(names):4d} tensors: {part} is not in the checkpoint, filled from seed {config.seed}")
    print(f"wrote {config.out}")
