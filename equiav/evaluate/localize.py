"""What of a picture sounds: heat maps without any label, and how well they point."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.augment import ImageVectors, augment_image
from equiav.augment.draws import Purpose
from equiav.config import ModelSettings
from equiav.evaluate.sides import SEED
from equiav.model import EquiAV

STEPS = 16  # of the integral: its sum is within some percent of what it stands for
TOGETHER = 50  # predictions of a clip: other predictors than that with attention take much memory for each
DRAWS = 1000  # of augmentations, among which the nearest to the centroid is chosen (Figure 3)


@torch.enable_grad()
def heat(model: EquiAV, image: Tensor, sound: Tensor, t: Tensor | None) -> Tensor:
    """image (B, 3, H, W), sound (B, d), t as of `embed_image` -> (B, rows, columns): what each patch adds to the score
    <sound, embedding of the image>, by integrated gradients from a picture of its mean colour. All patches together add, within
    some percent, what the picture's score is above that one's."""
    gray = image.mean(dim=(2, 3), keepdim=True).expand_as(image)
    slope = torch.zeros_like(image)
    for k in range(STEPS):
        between = torch.lerp(gray, image, (k + 0.5) / STEPS).detach().requires_grad_()
        score = (model.embed_image(between, t) * sound).sum()
        slope += torch.autograd.grad(score, between)[0]
    added = ((image - gray) * slope / STEPS).sum(dim=1)  # (B, H, W)
    side = model.config.image_patch
    return F.avg_pool2d(added.unsqueeze(1), side)[:, 0] * side * side


@torch.no_grad()
def nearest_to_centroid(
    model: EquiAV, settings: ModelSettings, image: Tensor, samples: Tensor, draws: int = DRAWS
) -> Tensor:
    """image (B, 3, H, W), samples (B,) -> t (B, d_t): of so many, the one whose prediction is nearest to the mean of all
    predictions: it stands for the centroid in the input space."""
    t = ImageVectors(settings.model, settings.augment).draw(SEED, 0, samples, Purpose.CENTROID_IMAGE, draws)
    h = model.encode_image(image)
    predicted = torch.cat([model.predict_image(h, some) for some in t.split(TOGETHER, dim=1)], dim=1)  # (B, draws, D)
    predicted = F.normalize(predicted.float(), dim=-1)
    centroid = F.normalize(predicted.mean(dim=1, keepdim=True), dim=-1)
    nearest = (predicted * centroid).sum(dim=-1).argmax(dim=1)
    return t[torch.arange(len(t), device=t.device), nearest]


def as_centroid(settings: ModelSettings, frames: Tensor, t: Tensor) -> Tensor:
    """frames (B, 3, H, W) uint8 -> the views that stand for the centroids, (B, 3, size, size)."""
    return augment_image(frames, t, ImageVectors(settings.model, settings.augment))


def objectness(image: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) -> (B, rows, columns): how much a patch differs from the picture's mean colour. Knows nothing of the sound."""
    apart = (image - image.mean(dim=(2, 3), keepdim=True)).square().sum(dim=1, keepdim=True)
    return F.avg_pool2d(apart, patch)[:, 0]


class Pointed(NamedTuple):
    right: float  # share of the clips whose highest place lies on what sounds
    error: float | None  # standard error; of one clip there is none


def pointing(maps: np.ndarray, masks: np.ndarray) -> Pointed:
    """maps (n, rows, columns), masks (n, H, W) bool -> how often the highest place, on the smooth map, lies in the mask."""
    n, H, W = masks.shape
    smooth = F.interpolate(torch.from_numpy(maps)[:, None].float(), (H, W), mode="bicubic", align_corners=False)
    highest = smooth.flatten(1).argmax(dim=1).numpy()
    right = masks.reshape(n, -1)[np.arange(n), highest]
    return Pointed(float(right.mean()), float(right.std(ddof=1) / np.sqrt(n)) if n > 1 else None)


def said_of(
    maps: np.ndarray, objects: np.ndarray, masks: np.ndarray | None, choose: np.ndarray | None = None
) -> dict[str, Any]:
    """maps, objects (n, rows, columns); where it is known: masks (n, H, W) of what sounds, and in which clips (n,) something else
    is in sight that does not."""
    position = maps.mean(axis=0)
    spread = ((maps - position) ** 2).mean()
    said: dict[str, Any] = {
        "share of the maps that is position alone": float(1 - spread / max((maps**2).mean(), 1e-30))
    }
    if masks is None or choose is None:
        return said
    rows, columns = position.shape
    y, x = (np.arange(n) - (n - 1) / 2 for n in (rows, columns))
    ways = {
        "heat map": maps,
        "objectness": objects,
        "position only": position,
        "centre": -(y[:, None] ** 2 + x[None] ** 2),
    }
    there = masks.any(axis=(1, 2))
    for which, some in (("all", there), ("beside something silent", there & choose)):
        if not some.any():
            continue
        said[which] = {"clips": int(some.sum()), "chance": {"pointing": float(masks[some].mean()), "error": 0.0}}
        for name, way in ways.items():
            right = pointing(np.broadcast_to(way, maps.shape)[some].copy(), masks[some])
            said[which][name] = {"pointing": right.right, "error": right.error}
    return said


def table(said: dict[str, Any], clips: int) -> str:
    """-> Markdown."""
    which = [name for name in ("all", "beside something silent") if name in said]
    lines = [
        "| points at what sounds, % | " + " | ".join(f"{name}, {said[name]['clips']:,} clips" for name in which) + " |"
    ]
    lines.append("|---" * (1 + len(which)) + "|")
    for name in ("heat map", "objectness", "position only", "centre", "chance"):
        cells = (percent(said[of][name]) for of in which)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if not which:
        lines = ["What sounds is not known of these clips: there are maps, and no numbers."]
    told = (
        "The heat map is what each patch adds to the score of the picture and what its sound has of its own (the mean of all "
        "sounds is taken off). Objectness: the patch least like the picture's mean colour. Position only: the mean of all maps, "
        "the same for every clip. Chance: the share of the picture that sounds. "
        f"Of the maps' squares, {100 * said['share of the maps that is position alone']:.0f}% are the same for every clip "
        f"({clips:,} clips)."
    )
    return "\n".join([*lines, "", told, ""])


def percent(of: dict[str, Any]) -> str:
    return f"{100 * of['pointing']:.1f}" + ("" if of["error"] is None else f" ± {100 * of['error']:.1f}")
