"""How well a predictor knows what an augmentation does (Table 7), by kind of augmentation and by strength."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.augment import Clips
from equiav.config import ModelSettings
from equiav.evaluate.sides import ALL, draws, kinds, sides
from equiav.model import EquiAV
from equiav.model.equiav import Branch

NUMBERS = ("similarity", "gain", "sensitivity")


def compared(side: str, strengths: tuple[float, ...]) -> dict[str, tuple[str, float]]:
    """Of one modality: name -> kind of augmentation, strength. A switch has no strength."""
    return {
        kind + (f", x{strength:g}" if strength != 1 else ""): (kind, strength)
        for strength in sorted(strengths, key=lambda strength: strength != 1)
        for kind, slots in kinds(side).items()
        if strength == 1 or len(slots) != 1
    }


def columns(strengths: tuple[float, ...] = (1.0,)) -> list[tuple[str, str, str]]:
    """What `similarities` computes: modality, name, number."""
    return [
        (side, name, number) for side in ("audio", "image") for name in compared(side, strengths) for number in NUMBERS
    ]


def similarities(
    model: EquiAV,
    settings: ModelSettings,
    clips: Clips,
    seed: int,
    computes: torch.autocast,
    strengths: tuple[float, ...] = (1.0,),
) -> Tensor:
    """-> (b, columns) float64. similarity: cosine of the predicted and the augmented embedding. gain: that, less the cosine
    without prediction. sensitivity: that, less the cosine of what is predicted from another draw of the same kind."""
    found = []
    for side in sides(model, settings, clips):
        for kind, strength in compared(side.name, strengths).values():
            t, of = draws(side, kind, strength, seed, clips.samples, 2)  # (b, 2, d_t)
            if kind != ALL and len(kinds(side.name)[kind]) == 1:
                t[:, 1] = of.identity(
                    t.device
                )  # a switch has no other draw: its other prediction is that of doing nothing
            augmented = side.augmented(t[:, 0], of)
            with computes:
                found.append(_of_views(side.branch, side.given, augmented, t))
    return torch.cat(found, dim=1)


def _of_views(branch: Branch, given: Tensor, augmented: Tensor, t: Tensor) -> Tensor:
    """-> (b, NUMBERS)"""
    h, h_aug = branch.encoder(given, augmented)
    assert h_aug is not None
    predicted = branch.predictor(h, t)  # (b, 2, D)
    parts = torch.cat([h_aug.mean(dim=1), predicted[:, 0], predicted[:, 1], h.mean(dim=1)])
    z_aug, right, other, plain = F.normalize(branch.intra_head(parts).double(), dim=1).chunk(4)
    cosine = [(z * z_aug).sum(dim=1) for z in (right, plain, other)]
    return torch.stack([cosine[0], cosine[0] - cosine[1], cosine[0] - cosine[2]], dim=1)
