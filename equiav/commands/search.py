"""`equiav search`: the clips of an index that are nearest to a sound, a picture or a video."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from equiav.api import Embedder, load
from equiav.config import ConfigError, require
from equiav.data.clips import PICTURES
from equiav.data.sources import SOUNDS
from equiav.terminal import say
from equiav.vectors import read


@dataclass(frozen=True)
class SearchConfig:
    """Prints what of an index (`equiav embed --out`) is nearest to a file: pictures by a sound, sounds by a picture."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = ""
    """A sound, a picture, or a video, whose first part is taken."""
    weights: str = ""
    """The model by which the index was made: its folder, or a run's."""
    index: Path = Path("embeddings.npz")
    """What `equiav embed` wrote."""
    by: Literal["auto", "audio", "image"] = "auto"
    """What of the file is compared: its sound or its picture. auto: of a video its sound."""
    among: Literal["auto", "audio", "image"] = "auto"
    """What of the index it is compared with. auto: the other."""
    top: int = 10
    """Rows that are printed."""
    device: str = "cpu"
    """Where the model computes."""

    def __post_init__(self) -> None:
        require(self.top >= 1, "top", self.top, "1 or more")


def run_search(config: SearchConfig) -> None:
    require(bool(config.file), "file", "not given", "a sound, a picture or a video")
    require(bool(config.weights), "weights", "not set", "a model folder, or the folder of a run")
    require("://" in config.file or Path(config.file).is_file(), "file", config.file, "a file that exists")
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
