"""`equiav embed`, `equiav score`, `equiav predict`: a trained model, used on files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from equiav.api import Embedder, Labeller, load
from equiav.config import ConfigError, NotHere, require
from equiav.data.clips import BadClipError
from equiav.files import beside
from equiav.terminal import say


@dataclass(frozen=True)
class UseConfig:
    files: tyro.conf.Positional[tuple[str, ...]] = field(default=())
    """Videos or sound files."""
    model: str = ""
    """Model folder, or a run's: a path, s3://..., or any other that fsspec reads."""
    frames: int = 1
    """Pictures of each part of a video, over which is averaged."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it computes."""

    def __post_init__(self) -> None:
        require(1 <= self.frames <= 1000, "frames", self.frames, "1 to 1000")


@dataclass(frozen=True)
class EmbedConfig(UseConfig):
    """Writes the embeddings of files: each in parts as long as the model hears."""

    out: Path = Path("embeddings.npz")
    """File to write: name, begin and end (seconds) of each part, its audio and its image (rows that are not a number where it has
    none)."""


@dataclass(frozen=True)
class ScoreConfig(UseConfig):
    """Says how well sound and picture of each file belong together, part by part: the cosine of their embeddings."""


@dataclass(frozen=True)
class PredictConfig(UseConfig):
    """Names the likeliest classes of each file, by a fine-tuned model."""

    top: int = 5
    """Classes that are named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top >= 1, "top", self.top, "1 or more")


def opened(config: UseConfig) -> Embedder | Labeller:
    require(bool(config.files), "files", "not given", "videos or sound files")
    require(bool(config.model), "model", "not set", "a model folder, or the folder of a run")
    for name in config.files:
        require(Path(name).is_file(), "files", name, "a file that exists")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("device is cuda, expected cpu: this torch sees no GPU")
    return load(config.model, config.device)


def embedder(config: UseConfig) -> Embedder:
    model = opened(config)
    if not isinstance(model, Embedder):
        raise ConfigError(
            f"model: {config.model} was fine-tuned and has no embeddings to compare; `equiav predict` uses it"
        )
    return model


def run_embed(config: EmbedConfig) -> None:
    require(config.out.absolute().parent.is_dir(), "out", config.out, "a file in a folder that is there")
    require(not config.out.is_dir(), "out", config.out, "a file; there is a folder of that name")
    require(config.out.suffix == ".npz", "out", config.out, "a name that ends in .npz, which is what is written")
    model = embedder(config)
    width = model.settings.model.head_width
    columns: dict[str, list[np.ndarray]] = {"name": [], "begin": [], "end": [], "audio": [], "image": []}
    problems = []
    for name in config.files:
        try:
            found = model.embed_video(name, config.frames)
        except BadClipError as error:  # the others' embeddings are not to be lost
            problems.append(str(error))
            say(f"{error}")
            continue
        parts = len(found.begin)
        nothing = np.full((parts, width), np.nan, np.float32)
        columns["name"].append(np.array([name] * parts))
        columns["begin"].append(found.begin)
        columns["end"].append(found.end)
        columns["audio"].append(nothing if found.audio is None else found.audio)
        columns["image"].append(nothing if found.image is None else found.image)
        lacks = " without sound" * (found.audio is None) + " without picture" * (found.image is None)
        say(f"{name}: {parts} part(s), {found.end[-1]:.1f} s{lacks}")
    if len(problems) == len(config.files):
        raise ConfigError(f"files: none of {len(problems)} could be embedded, such as {problems[0]}")
    part = beside(config.out.with_suffix(".npz"))
    try:
        np.savez(part, **{name: np.concatenate(rows) for name, rows in columns.items()})  # type: ignore[arg-type]
        part.replace(config.out)
    finally:
        part.unlink(missing_ok=True)
    done = len(config.files) - len(problems)
    say(f"{config.out}: {sum(map(len, columns['begin']))} parts of {done} file(s), {width} numbers each")
    if problems:
        raise BadClipError(
            f"{len(problems)} of {len(config.files)} files", "could not be embedded; they are named above"
        )


def run_score(config: ScoreConfig) -> None:
    model, problems = embedder(config), []
    for name in config.files:
        try:
            found = model.embed_video(name, config.frames)
            if found.audio is None or found.image is None:
                raise BadClipError(
                    name, f"has no {'sound' if found.audio is None else 'picture'}, and a score needs both"
                )
        except BadClipError as error:  # the others' scores are not to be lost
            problems.append(str(error))
            say(str(error))
            continue
        scores = (found.audio * found.image).sum(axis=1)
        for begin, end, score in zip(found.begin, found.end, scores, strict=True):
            say(f"{score:7.4f}  {name}  {begin:.1f} to {end:.1f} s")
    if len(problems) == len(config.files):
        raise ConfigError(f"files: none of {len(problems)} could be scored, such as {problems[0]}")
    if problems:
        raise BadClipError(f"{len(problems)} of {len(config.files)} files", "could not be scored; they are named above")


def run_predict(config: PredictConfig) -> None:
    model = opened(config)
    if not isinstance(model, Labeller):
        raise ConfigError(f"model: {config.model} knows no classes; `equiav finetune` teaches it some")
    for name in config.files:
        said = model.predict_video(name, config.frames, config.top)
        say(f"{name}: " + ", ".join(f"{label} {probability:.3f}" for label, probability in said))
