"""How near the centroid of predictions (Eq. 12) is to what it stands for: the mean over many augmented views (Eq. 11)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.augment import Clips
from equiav.augment.draws import Purpose, uniforms
from equiav.config import ModelSettings
from equiav.evaluate.sides import ALL, Side, draws, sides
from equiav.model import EquiAV

SIZES = (1, 2, 4, 8, 16, 32)  # S
STRONGER = (1.5, 2.0)  # times the ranges of training
UNSEEN = {"audio": "noise", "image": "rotation"}  # which no vector describes
LARGEST_NOISE, LARGEST_TURN = 1.0, 30.0  # deviations of the spectrogram, degrees


class Columns(NamedTuple):
    """Of `distances`, for one modality: squared distances to the true mean, and that mean."""

    predicted: np.ndarray  # (n, SIZES)
    encoded: np.ndarray  # (n, SIZES), of the mean of so many other encoded views
    original: np.ndarray  # (n, 1)
    within: np.ndarray  # (n, 1) variance of the encoded views
    others: np.ndarray  # (n, 3, 3): stronger, stronger still, unseen x centroid, centroid told of it, original
    mean: np.ndarray  # (n, D)


@torch.no_grad()
def distances(model: EquiAV, settings: ModelSettings, clips: Clips, views: int, computes: torch.autocast) -> Tensor:
    """-> (b, columns) float64. The true mean is that of `views` encoded views."""
    found = []
    for side in sides(model, settings, clips):
        with computes:
            h = side.branch.encoder(side.given)[0]  # (b, N, D)
        original = h.float().mean(dim=1).double()

        def predicted(kind_t: Tensor, side: Side = side, h: Tensor = h) -> Tensor:
            with computes:
                return side.branch.predictor(h, kind_t).double()  # (b, S, D)

        t, of = draws(side, ALL, 1.0, 0, clips.samples, views + SIZES[-1])
        encoded = torch.stack([_encoded(side, side.augmented(one, of), computes) for one in t.unbind(1)], dim=1)
        mean, more = encoded[:, :views].mean(dim=1), encoded[:, views:]
        within = encoded[:, :views].var(dim=1, correction=1).sum(dim=1)
        told = predicted(of.draw(0, 0, clips.samples, side.centroid, SIZES[-1]))
        rows = [_apart(many[:, :S].mean(dim=1), mean) for many in (told, more) for S in SIZES]
        rows += [_apart(original, mean), within]
        centroid = told.mean(dim=1)
        for strength in STRONGER:
            t, of = draws(side, ALL, strength, 0, clips.samples, views)
            true = torch.stack([_encoded(side, side.augmented(one, of), computes) for one in t.unbind(1)]).mean(dim=0)
            stronger = predicted(of.draw(0, 0, clips.samples, side.centroid, SIZES[-1])).mean(dim=1)
            rows += [_apart(x, true) for x in (centroid, stronger, original)]
        turned = (_unseen(side, clips.samples, k) for k in range(views))
        true = torch.stack([_encoded(side, picture, computes) for picture in turned]).mean(dim=0)
        rows += [_apart(x, true) for x in (centroid, centroid, original)]
        found.append(torch.cat([torch.stack(rows, dim=1), mean], dim=1))
    return torch.cat(found, dim=1)


def split(values: np.ndarray) -> dict[str, Columns]:
    S = len(SIZES)
    found = {}
    for name, part in zip(("audio", "image"), np.split(values, 2, axis=1), strict=True):
        places = np.cumsum([S, S, 1, 1, 9])
        predicted, encoded, original, within, others, mean = np.split(part, places, axis=1)
        found[name] = Columns(predicted, encoded, original, within, others.reshape(-1, 3, 3), mean)
    return found


def summary(values: np.ndarray, views: int) -> dict[str, Any]:
    """Distances as shares of the variance between clips: 0 is the true mean itself, 1 is as far as clips are from each other's
    middle. What is uncertain of the true mean, having so many views, is taken off."""
    said: dict[str, Any] = {}
    for side, c in split(values).items():
        between = ((c.mean - c.mean.mean(axis=0)) ** 2).sum(axis=1).mean()
        uncertain = c.within.mean() / views

        def share(squared: np.ndarray, between: float = between, uncertain: float = uncertain) -> float:
            return float((squared.mean() - uncertain) / between)

        said[side] = {
            "S": {
                str(S): {"centroid": share(c.predicted[:, k]), "encoded views": share(c.encoded[:, k])}
                for k, S in enumerate(SIZES)
            },
            "original": share(c.original),
            "another clip": 2.0,
            "not trained on": {
                name: {
                    what: share(c.others[:, k, place])
                    for place, what in enumerate(("centroid", "centroid of such vectors", "original"))
                    if not (name == UNSEEN[side] and place == 1)
                }
                for k, name in enumerate((*(f"ranges x{strength:g}" for strength in STRONGER), UNSEEN[side]))
            },
        }
    return said


def table(said: dict[str, Any], clips: int, views: int) -> str:
    """-> Markdown."""
    lines = [f"| {clips:,} clips | " + " | ".join(f"S = {S}" for S in SIZES) + " | original |"]
    lines.append("|---" * (len(SIZES) + 2) + "|")
    for side in ("audio", "image"):
        for what in ("centroid", "encoded views"):
            cells = [f"{said[side]['S'][str(S)][what]:.3f}" for S in SIZES]
            original = f"{said[side]['original']:.3f}" if what == "centroid" else ""
            lines.append(f"| {side}, {what} | " + " | ".join(cells) + f" | {original} |")
    lines += ["", "| not trained on | centroid | centroid of such vectors | original |", "|---|---|---|---|"]
    for side in ("audio", "image"):
        for name, row in said[side]["not trained on"].items():
            cells = (row.get(what) for what in ("centroid", "centroid of such vectors", "original"))
            lines.append(f"| {side}, {name} | " + " | ".join("-" if x is None else f"{x:.3f}" for x in cells) + " |")
    told = (
        f"Squared distance to the mean of {views} encoded views, as a share of the variance between clips: at 1 it is no nearer "
        "than the middle of all clips. Encoded views: the mean of S others of them, which is what S predictions save. Not "
        "trained on: the mean is that of views with wider ranges, or with what no vector describes."
    )
    return "\n".join([*lines, "", told, ""])


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """-> (b,)"""
    return (x - y).square().sum(dim=1)


def _encoded(side: Side, picture: Tensor, computes: torch.autocast) -> Tensor:
    """-> (b, D), as an augmented view is encoded."""
    with computes:
        h = side.branch.encoder(picture, picture)[1]
    assert h is not None
    return h.float().mean(dim=1).double()


def _unseen(side: Side, samples: Tensor, k: int) -> Tensor:
    """The original, with noise or turned."""
    strength = uniforms(k, 1, samples, Purpose.UNSEEN, 1)[:, 0].float()  # (b,)
    if side.name == "audio":
        rows, columns = side.given.shape[2:]
        u = uniforms(k, 0, samples, Purpose.UNSEEN, 2 * rows * columns).float().view(-1, 2, 1, rows, columns)
        noise = (-2 * (1 - u[:, 0]).log()).sqrt() * (2 * torch.pi * u[:, 1]).cos()
        return side.given + LARGEST_NOISE * strength.view(-1, 1, 1, 1) * noise
    angle = (2 * strength - 1) * LARGEST_TURN * torch.pi / 180
    cos, sin, nothing = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, nothing], 1), torch.stack([sin, cos, nothing], 1)], dim=1)  # (b, 2, 3)
    grid = F.affine_grid(turn, list(side.given.shape), align_corners=False)
    return F.grid_sample(side.given, grid, padding_mode="reflection", align_corners=False)
