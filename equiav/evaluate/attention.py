"""What the predictor looks at, by kind of augmentation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiav.augment import AudioVectors, Clips, ImageVectors
from equiav.config import ConfigError, ModelSettings
from equiav.evaluate.sides import SEED, Side, draws, kinds, sides
from equiav.model import EquiAV
from equiav.model.predictor import AttentionPredictor

DRAWS = 8  # of each kind
NUMBERS = ("looked at", "inside")


def needs_attention(settings: ModelSettings) -> None:
    if settings.model.predictor != "attention":
        raise ConfigError(
            f"model: its predictor is {settings.model.predictor}, and only that with attention looks at patches"
        )


def columns(settings: ModelSettings) -> list[tuple[str, str]]:
    return [(side, kind) for side in ("audio", "image") for kind in kinds(side)]


@torch.no_grad()
def attentions(model: EquiAV, settings: ModelSettings, clips: Clips, computes: torch.autocast) -> Tensor:
    """-> (b, for each of `columns`: looked at, inside, then the N patches) float64. looked at: how many patches, as a share,
    would look so if all were looked at alike (from the entropy). inside: how much more than its area is looked at what a crop
    keeps; 1: as much."""
    found = []
    for side in sides(model, settings, clips):
        with computes:
            h = side.branch.encoder(side.given)[0]
        for kind in kinds(side.name):
            t, of = draws(side, kind, 1.0, SEED, clips.samples, DRAWS)
            assert isinstance(side.branch.predictor, AttentionPredictor)
            with computes:
                attention = side.branch.predictor.attention(h, t).double().mean(dim=1)  # (b, DRAWS, N)
            looked = (-(attention * attention.clamp(min=1e-300).log()).sum(dim=-1)).exp() / attention.shape[-1]
            kept = _kept(side, t, of)
            inside = (attention * kept).sum(dim=-1) / kept.mean(dim=-1)
            found += [looked.mean(dim=1, keepdim=True), inside.mean(dim=1, keepdim=True), attention.mean(dim=1)]
    return torch.cat(found, dim=1)


def split(
    values: np.ndarray, settings: ModelSettings
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """-> for each of `columns`: looked at (n,), inside (n,), maps (n, rows, columns)."""
    found, at = {}, 0
    for side, kind in columns(settings):
        rows, cells = settings.model.audio_grid if side == "audio" else settings.model.image_grid
        part = values[:, at : at + 2 + rows * cells]
        found[side, kind] = (part[:, 0], part[:, 1], part[:, 2:].reshape(-1, rows, cells))
        at += 2 + rows * cells
    return found


def summary(values: np.ndarray, settings: ModelSettings) -> dict[str, Any]:
    said: dict[str, Any] = {"audio": {}, "image": {}}
    for (side, kind), (looked, inside, maps) in split(values, settings).items():
        said[side][kind] = {"looked at": float(looked.mean()), "mean map": maps.mean(axis=0).round(6).tolist()}
        if "crop_on" in (*kinds(side)[kind], *(("crop_on",) if not kinds(side)[kind] else ())):
            said[side][kind]["inside the crop"] = float(inside.mean())
    return said


def table(said: dict[str, Any], clips: int) -> str:
    """-> Markdown."""
    lines = [
        f"| {clips:,} clips | augmentation | patches looked at, % | inside a crop, times its area |",
        "|---|---|---|---|",
    ]
    for side in ("audio", "image"):
        for kind, row in said[side].items():
            inside = f"{row['inside the crop']:.2f}" if "inside the crop" in row else "-"
            lines.append(f"| {side} | {kind} | {100 * row['looked at']:.1f} | {inside} |")
    told = (
        "Mean over heads and 8 draws; each kind alone, but for `as trained`. Patches looked at: of a predictor that looks at all "
        "alike, 100. Inside a crop: 1 if the predictor looks as much at what a crop takes away as at what it keeps."
    )
    return "\n".join([*lines, "", told, ""])


def _kept(side: Side, t: Tensor, of: AudioVectors | ImageVectors) -> Tensor:
    """-> (b, DRAWS, N): of each patch, the share that the crop keeps."""
    p = of.decode(t)
    _, rows, columns = side.branch.encoder.picture
    on = p["crop_on"] > 0
    # A spectrogram is rolled in time before it is cropped (not in the released program).
    rolled = p["shift"] if side.name == "audio" and of.augment.variant == "paper" else torch.zeros_like(p["left"])

    def inside(first: Tensor, length: Tensor, shift: Tensor, size: int, cells: int) -> Tensor:
        """-> (b, DRAWS, cells): of each cell, the share of its pixels that lie in the box"""
        first, length = torch.where(on, first, 0), torch.where(on, length, size)
        place = (torch.arange(size, device=t.device) + shift[..., None]) % size
        kept = (place >= first[..., None]) & (place < (first + length)[..., None])
        return kept.double().unflatten(-1, (cells, -1)).mean(dim=-1)

    grid = side.branch.encoder.grid
    across = inside(p["left"], p["width"], rolled, columns, grid[1])
    down = inside(p["top"], p["height"], torch.zeros_like(rolled), rows, grid[0])
    return (down[..., :, None] * across[..., None, :]).flatten(2)
