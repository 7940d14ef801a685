"""What `equiav eval` can be told. No torch here: `torchx run` reads it, too."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from equiav.config import StreamConfig, require
from equiav.data.synthetic import Rules


@dataclass(frozen=True)
class EvalConfig:
    """Evaluates a pretrained model. retrieval: finds each clip's picture by its sound and the other way round (Table 4).
    similarity: how well the predictors know what augmentations do, by kind and strength (Table 7). centroid: how near the
    centroid of S predictions is to the mean of many augmented views. localize: what of a picture sounds (Figure 3).
    attention: what the predictors look at. examples: clips to look at and listen to, for `equiav report`."""

    what: tyro.conf.Positional[Literal["retrieval", "similarity", "centroid", "localize", "attention", "examples"]] = (
        "retrieval"
    )
    """The evaluation to run."""
    weights: str = ""
    """Model folder, or a run's: a path, s3://..., or any other that fsspec reads."""
    out: str = ""
    """Folder of WHAT.json, WHAT.md and WHAT.png: a path, or s3://... By default `eval` in the model's folder, where
    `equiav report` finds them; of a model in a store, runs/eval."""
    clips: Path | None = None
    """List of the clips that are looked at (CAV-MAE's and EquiAV's format, .json). Without it: all of the dataset."""
    embedding: Literal["trained", "original"] = "trained"
    """For retrieval: what training compared (by default the centroid of predictions), or the untransformed clip's embedding."""
    vectors: Literal["shared", "own"] = "shared"
    """Vectors of the centroid: the same for every clip, or drawn for each, as the released program does."""
    seeds: int = 3
    """Draws of the vectors; the mean and half the spread are told."""
    frames: int = 1
    """Pictures of a clip, from the middles of equal parts, over which embeddings are averaged; 1: the middle one."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """For similarity: times the ranges of training."""
    views: int = 64
    """For centroid: augmented views that are encoded, whose mean is the true one."""
    examples: int = 12
    """Clips that are shown, from everywhere in the dataset."""
    benchmark: Literal["", "MSR-VTT", "AudioSet", "VGGSound"] = ""
    """Name of the dataset in the paper's Table 4: its numbers are shown beside the result."""
    batch: int = 32
    """Clips that are computed together; a process has two of these."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of the encoders."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    world: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "seeds", self.seeds, "1 or more")
        require(1 <= self.frames <= 1000, "frames", self.frames, "1 to 1000")
        require(self.batch >= 1, "batch", self.batch, "1 or more")
        require(2 <= self.views <= 10_000, "views", self.views, "2 to 10,000")
        require(0 <= self.examples <= 200, "examples", self.examples, "0 to 200")
        allowed = bool(self.strengths) and all(0 < x <= 10 for x in self.strengths)
        require(allowed, "strengths", self.strengths, "numbers above 0, at most 10")
        apart = len({f"{strength:g}" for strength in self.strengths}) == len(self.strengths)
        require(apart, "strengths", self.strengths, "numbers that differ in their first six digits")

    def ready(self) -> None:
        require_weights(self.weights)
        self.stream.ready()


def require_weights(weights: str) -> None:
    """Raises where nothing is there, without reading the weights."""
    require(bool(weights), "weights", "not set", "a model folder, or the folder of a run")
    there = "://" in weights or Path(weights).expanduser().exists()
    require(there, "weights", weights, "a model folder, or the folder of a run; there is nothing of that name")
