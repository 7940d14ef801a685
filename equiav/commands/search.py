"""`equiav search`: the clips of an index that are nearest to a sound, a picture or a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equiav.api import Embedder, load
from equiav.commands.settings import SearchConfig
from equiav.config import ConfigError
from equiav.data.clips import PICTURES
from equiav.data.sources import SOUNDS
from equiav.terminal import say
from equiav.vectors import read


def run_search(config: SearchConfig) -> None:
    index = read(config.index)
    model = load(config.weights, config.device)
    if not isinstance(model, Embedder):
        raise ConfigError(f"weights: {config.weights} was fine-tuned and has no embeddings to compare")
    ending = Path(config.file).suffix.lower()
    if ending in PICTURES and config.by == "audio":
        raise ConfigError(f"by: {config.file} is a picture, and has no sound")
    if ending in PICTURES:
        by, query = "image", model.embed_image(config.file)
    elif ending in SOUNDS and config.by != "image":
        by, query = "audio", (found := model.embed_video(config.file)).audio[0]  # type: ignore[index]
    else:
        found = model.embed_video(config.file)
        by = config.by if config.by != "auto" else "audio" if found.audio is not None else "image"
        vectors = found.audio if by == "audio" else found.image
        if vectors is None:
            raise ConfigError(f"file: {config.file} has no {'sound' if by == 'audio' else 'picture'}")
        query = vectors[0]
    among = config.among if config.among != "auto" else {"audio": "image", "image": "audio"}[by]
    if index.model != model.digest():
        raise ConfigError(
            f"index: {config.index} was made by another model than {config.weights}, or another state of it"
        )
    candidates = getattr(index, among)
    scores = candidates @ query
    there = np.flatnonzero(np.isfinite(scores))
    if not len(there):
        raise ConfigError(f"index: nothing in {config.index} has {'sound' if among == 'audio' else 'a picture'}")
    for k in there[np.argsort(-scores[there], kind="stable")[: config.top]]:
        span = f"  {index.begin[k]:.1f} to {index.end[k]:.1f} s" if np.isfinite(index.end[k]) else ""
        say(f"{scores[k]:7.4f}  {index.name[k]}{span}")
    say(f"{len(there):,} candidates: {among} by {by}")
