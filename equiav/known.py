"""What a model folder says of its model without its weights being read: of what size it is, and what its inputs were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from equiav.config import ConfigError, ModelSettings, from_dict, to_dict
from equiav.terminal import masked
from streaming import Store

SETTINGS = "config.json"  # of a model folder
INPUTS = ("sample_rate", "audio_mean", "audio_std", "frame_size")  # of a model, among the settings of data


def model_knows(source: str, patience: float = 600.0) -> dict[str, dict[str, Any]]:
    """Of what a model of ours was made, and what its inputs were: as settings, by section. Empty: it is none, or does not say."""
    if source.endswith((".pth", ".pt")):
        return {}
    if "://" in source:
        store = model_store(source, patience)
        content = store.read(SETTINGS) if store.exists(SETTINGS) else b""
    else:
        path = model_folder(Path(source).expanduser()) / SETTINGS
        content = path.read_bytes() if path.is_file() else b""
    if not content:
        return {}
    values = to_dict(read_settings(content, f"weights: {masked(source)}: {SETTINGS}"))
    return {"model": values["model"], "data": {name: values["data"][name] for name in INPUTS}}


def read_settings(content: bytes, source: str) -> ModelSettings:
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected settings, found {type(values).__name__}")
    return from_dict(ModelSettings, values, source)


def model_folder(path: Path) -> Path:
    """Of a model, of a run, or of what a run on a cluster has left."""
    places = (path / inner for inner in ("", "model", "checkpoints/model"))
    return next((place for place in places if (place / SETTINGS).is_file()), path)


def model_store(url: str, patience: float) -> Store:
    """A model, a run's checkpoints, or a run on a cluster, which leaves its model beside those."""
    places = (Store(f"{url}{inner}", patience) for inner in ("", "/model", "/checkpoints/model"))
    return next((place for place in places if place.exists(SETTINGS)), Store(f"{url}/model", patience))
