"""Multiply-adds of one sample, by the sizes of the products it takes. `tests/model/test_arithmetic.py` holds them against what
torch counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from equiav.config import AUDIO_VECTOR, IMAGE_VECTOR, ModelConfig, ObjectiveConfig
from equiav.model.predictor import PREDICTORS

TABLE_B = (1, 4, 8, 16)  # sizes of the centroid


@dataclass
class Side:
    """Of one modality, forward, but for `forward_backward`."""

    encoder: int  # both views
    predictor: int  # the query of the view and the S of the centroid, key and value once
    heads: int  # projection heads
    baseline: int  # the paper's Table B baseline: both views, the view's own query, the heads that its losses need
    forward_backward: int
    centroid: dict[int, int] = field(default_factory=dict)  # S -> added for the centroid, given the key and value
    separate: dict[int, int] = field(default_factory=dict)  # S -> added where key and value are computed again

    @property
    def forward(self) -> int:
        return self.encoder + self.predictor + self.heads


def count(model: ModelConfig, objective: ObjectiveConfig) -> tuple[Side, Side]:
    """-> audio, image"""
    audio = _side(model, objective, model.audio_grid, model.audio_patch**2, AUDIO_VECTOR)
    return audio, _side(model, objective, model.image_grid, 3 * model.image_patch**2, IMAGE_VECTOR)


def forward_backward(model: ModelConfig, objective: ObjectiveConfig) -> int:
    return sum(side.forward_backward for side in count(model, objective))


def encoders(model: ModelConfig, audio: bool, image: bool) -> int:
    """Forward and backward, of one view through those encoders: what fine-tuning takes."""
    total = 0
    for used, grid, patch in (
        (audio, model.audio_grid, model.audio_patch**2),
        (image, model.image_grid, 3 * model.image_patch**2),
    ):
        N = grid[0] * grid[1]
        total += used * (3 * _encoder(model, N, patch, 1) - N * patch * model.width)  # no gradient goes to pictures
    return total


def _encoder(m: ModelConfig, N: int, patch: int, views: int) -> int:
    D = m.width
    return views * N * patch * D + views * m.depth * (N * 12 * D * D + 2 * N * N * D)


def _side(m: ModelConfig, objective: ObjectiveConfig, grid: tuple[int, int], patch: int, d_t: int) -> Side:
    """patch: numbers of one."""
    N, D = grid[0] * grid[1], m.width
    views = 2 if objective.needs_augmented else 1
    patches = views * N * patch * D
    encoder = _encoder(m, N, patch, views)
    shared, query = PREDICTORS[m.predictor].multiply_adds(m, N, d_t)
    predicted = objective.intra == "equivariant" or objective.inter_on in ("equivariant", "centroid")
    queries = 1 + objective.sampled if predicted else 0
    head = D * m.head_hidden + m.head_hidden**2 + m.head_hidden * m.head_width
    # The inter-modal loss takes one embedding, the intra-modal loss two. The metrics `gain` and `sensitivity` take one more each.
    lossy = 1 + 2 * (objective.intra != "none")
    heads = lossy + (objective.intra != "none") * (1 + (objective.intra == "equivariant" and objective.sampled > 0))
    predictor = (queries > 0) * shared + queries * query
    # A product's backward pass is two products; but no gradient goes to pictures and vectors.
    inputs = patches + queries * d_t * m.aug_width
    sizes = sorted({*TABLE_B, objective.centroid_size})
    return Side(
        encoder=encoder,
        predictor=predictor,
        heads=heads * head,
        baseline=encoder + shared + query + lossy * head,
        forward_backward=3 * (encoder + predictor + heads * head) - inputs,
        centroid={S: S * query for S in sizes},
        separate={S: shared + S * query for S in sizes},
    )
