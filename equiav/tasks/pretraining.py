"""The paper's pretraining: views -> embeddings -> Eq. 16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from equiav.augment import Clips, make_views
from equiav.config import Config
from equiav.model import EquiAV
from equiav.model.arithmetic import forward_backward
from equiav.objective import Embeddings, Rows, Weights, equiav_loss, weights_at
from equiav.tasks.task import Metrics


class Pretraining:
    fewest = 2  # a contrast needs a negative
    hears = sees = True
    often: np.ndarray | None = None
    learns_from: Mapping[str, str] = {}

    def __init__(self, config: Config):
        self.config = config

    def build(self) -> EquiAV:
        return EquiAV(self.config.model, self.config.objective)

    def blocks(self, model: nn.Module) -> Iterator[nn.Module]:
        assert isinstance(model, EquiAV)
        for branch in (model.audio, model.image):
            yield from branch.encoder.blocks

    def prepared(self, clips: Clips) -> Clips:
        return clips

    def forward(self, model: nn.Module, clips: Clips, computes: Callable[[], Any]) -> Embeddings:
        views = make_views(self.config, clips)
        with computes():
            return Embeddings(*model(*views))

    def loss(self, whole: Embeddings, clips: Clips, rows: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return equiav_loss(whole, self.weights(step), self.config.objective, rows)

    def updated(self, model: nn.Module) -> None:
        assert isinstance(model, EquiAV)
        model.clamp_temperature()

    def reported(self, sums: Metrics) -> Metrics:
        return {
            name.replace("crowding", "effective_rank"): 1 / value if name.startswith("crowding") and value else value
            for name, value in sums.items()
        }

    def chance(self, step: int, clips: float) -> Metrics:
        # How many an anchor is compared with.
        intra = 2 * clips - (1 if self.config.objective.intra_positive_in_denominator else 2)
        terms = zip(("inter", "intra_audio", "intra_image"), (clips, intra, intra), self.weights(step), strict=True)
        losses = {term: (weight, math.log(n)) for term, n, weight in terms if weight and n > 1}
        return {term: loss for term, (_, loss) in losses.items()} | {"total": sum(w * x for w, x in losses.values())}

    def untrained(self, step: int) -> set[str]:
        # Of a head that nothing trains it says nothing.
        return set() if self.weights(step).inter else {"effective_rank_audio", "effective_rank_image"}

    def flops(self) -> int:
        return forward_backward(self.config.model, self.config.objective)

    def weights(self, step: int) -> Weights:
        return weights_at(step, self.config.train.steps, self.config.objective)
