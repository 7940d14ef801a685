"""How near the centroid of predictions (Eq. 12) is to what it stands for: the mean over many augmented views (Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.augment import Clips
from equiav.augment.draws import Purpose, uniforms
from equiav.config import ModelSettings
from equiav.evaluate.sides import ALL, SEED, Side, draws, sides, stronger
from equiav.model import EquiAV
from streaming import DatasetError

SIZES = (1, 2, 4, 8, 16, 32)  # S
STRONGER = (1.5, 2.0)  # times the ranges of training
UNSEEN = {"audio": "noise", "image": "rotation"}  # which no vector describes
LARGEST_NOISE, LARGEST_TURN = 1.0, 30.0  # deviations of the spectrogram, degrees


class Columns(NamedTuple):
    """Of `distances`, for one modality: squared distances to the true means, and those means."""

    centroid: np.ndarray  # (n, SIZES)
    encoded: np.ndarray  # (n, SIZES), of the mean of so many other encoded views
    original: np.ndarray  # (n, 1)
    unsure: np.ndarray  # (n, 1), by which the true mean is uncertain
    others: np.ndarray  # (n, 3, 4): stronger, stronger still, unseen x centroid, that of such vectors, original, unsure
    means: np.ndarray  # (n, 4, d): the true mean as trained, stronger, stronger still, unseen


@torch.no_grad()
def distances(model: EquiAV, settings: ModelSettings, clips: Clips, views: int, computes: torch.autocast) -> Tensor:
    """-> (b, columns) float64. The true mean is that of `views` encoded views; it is compared where training compares
    predictions with views, through the intra-modal head."""
    found = []
    for side in sides(model, settings, clips):
        with computes:
            h = side.branch.encoder(side.given)[0]  # (b, N, D)
        S = SIZES[-1]

        def place(x: Tensor, side: Side = side) -> Tensor:
            """(b, D) -> (b, d)"""
            return F.normalize(side.branch.intra_head(x.float()).double(), dim=1)

        def told(t: Tensor, side: Side = side, h: Tensor = h) -> Tensor:
            with computes:
                return side.branch.predictor(h, t).double()  # (b, S, D)

        def seen(strength: float, count: int, side: Side = side) -> Tensor:
            t, of = draws(side, ALL, strength, SEED, clips.samples, count)
            return torch.stack([_encoded(side, side.augmented(one, of), computes) for one in t.unbind(1)], dim=1)

        encoded, predicted = seen(1.0, views + S), told(_of_centroid(side, 1.0, clips.samples))
        true, unsure = _mean(encoded[:, :views], place)
        original, centroid = place(h.float().mean(dim=1)), place(predicted.mean(dim=1))
        rows = [_apart(place(of[:, :k].mean(dim=1)), true) for of in (predicted, encoded[:, views:]) for k in SIZES]
        rows += [_apart(original, true), unsure]
        means = [true]
        for strength in STRONGER:
            other, unsure = _mean(seen(strength, views), place)
            such = place(told(_of_centroid(side, strength, clips.samples)).mean(dim=1))
            rows += [*(_apart(x, other) for x in (centroid, such, original)), unsure]
            means.append(other)
        changed = [_encoded(side, _unseen(side, clips.samples, k), computes) for k in range(views)]
        other, unsure = _mean(torch.stack(changed, dim=1), place)
        rows += [*(_apart(x, other) for x in (centroid, centroid, original)), unsure]
        means.append(other)
        found.append(torch.cat([torch.stack(rows, dim=1), *means], dim=1))
    return torch.cat(found, dim=1)


def split(values: np.ndarray) -> dict[str, Columns]:
    S = len(SIZES)
    found = {}
    for name, part in zip(("audio", "image"), np.split(values, 2, axis=1), strict=True):
        centroid, encoded, original, unsure, others, means = np.split(part, np.cumsum([S, S, 1, 1, 12]), axis=1)
        found[name] = Columns(
            centroid, encoded, original, unsure, others.reshape(-1, 3, 4), means.reshape(len(means), 4, -1)
        )
    return found


def summary(values: np.ndarray) -> dict[str, Any]:
    """Distances as shares of the variance between clips: 0 is the true mean itself, 1 is as far as the middle of all clips. By
    what the true mean is uncertain, is taken off."""
    said: dict[str, Any] = {}
    for side, c in split(values).items():
        between = ((c.means - c.means.mean(axis=0)) ** 2).sum(axis=2).mean(axis=0)  # (4,)
        if not between.min() > 0:
            raise DatasetError(
                "stream.url: the clips are all alike to this model: distances have nothing to be compared with"
            )

        def share(squared: np.ndarray, unsure: np.ndarray, of: float = between[0]) -> float:
            return float((squared.mean() - unsure.mean()) / of)

        said[side] = {
            "S": {
                str(S): {
                    "centroid": share(c.centroid[:, k], c.unsure),
                    "encoded views": share(c.encoded[:, k], c.unsure),
                }
                for k, S in enumerate(SIZES)
            },
            "original": share(c.original, c.unsure),
            "not trained on": {
                name: {
                    what: share(c.others[:, k, n], c.others[:, k, 3], between[1 + k])
                    for n, what in enumerate(("centroid", "centroid of such vectors", "original"))
                    if not (name == UNSEEN[side] and n == 1)
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
        f"Squared distance to the mean of {views} encoded views, after the intra-modal head, as a share of the variance between "
        "clips: at 1 it is no nearer than the middle of all clips. Encoded views: the mean of S others of them, which is what S "
        "predictions save. Not trained on: the mean is that of views with wider ranges, or with what no vector describes."
    )
    return "\n".join([*lines, "", told, ""])


def _of_centroid(side: Side, strength: float, samples: Tensor) -> Tensor:
    """-> t (b, S, d_t), as training draws them."""
    of = side.vectors.drawing(stronger(side.vectors.augment, strength, side.vectors))
    return of.draw(SEED, 0, samples, side.centroid, SIZES[-1])


def _mean(encoded: Tensor, place: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(b, views, D) -> where their mean lies (b, d), and the square by which it is uncertain (b,), from two halves."""
    halves = (place(half.mean(dim=1)) for half in (encoded[:, ::2], encoded[:, 1::2]))
    return place(encoded.mean(dim=1)), _apart(*halves) / 4


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
        u = uniforms(k, 0, samples, Purpose.UNSEEN, 2 * rows * columns).view(-1, 2, 1, rows, columns)
        noise = ((-2 * (1 - u[:, 0]).log()).sqrt() * (2 * torch.pi * u[:, 1]).cos()).float()
        return side.given + LARGEST_NOISE * strength.view(-1, 1, 1, 1) * noise
    angle = (2 * strength - 1) * LARGEST_TURN * torch.pi / 180
    cos, sin, nothing = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, nothing], 1), torch.stack([sin, cos, nothing], 1)], dim=1)  # (b, 2, 3)
    grid = F.affine_grid(turn, list(side.given.shape), align_corners=False)
    return F.grid_sample(side.given, grid, padding_mode="reflection", align_corners=False)
