"""How well a predictor knows what an augmentation does (Table 7), by kind of augmentation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.augment import AudioVectors, Clips, ImageVectors, augment_image, augment_spectrogram
from equiav.augment.draws import Purpose
from equiav.augment.logmel import normalised_spectrogram
from equiav.augment.transforms import original_image
from equiav.augment.vectors import BLUR, CROP, JITTER
from equiav.config import ConfigError, ModelSettings
from equiav.model import EquiAV
from equiav.model.equiav import Branch, as_picture

ALL = "as trained"
KINDS = {"crop": CROP, "jitter": JITTER, "blur": BLUR, "flip": ("flip",)}
OF_IMAGES, OF_SOUNDS = {"gray": ("gray",)}, {"mask and shift": ("mask_on", "t0", "t1", "f0", "f1", "shift_on", "shift")}
NUMBERS = ("similarity", "gain", "sensitivity")


def kinds(side: str) -> dict[str, tuple[str, ...]]:
    """Of one modality: name -> its slots of the vector."""
    return {ALL: (), **KINDS, **(OF_SOUNDS if side == "audio" else OF_IMAGES)}


def columns() -> list[tuple[str, str, str]]:
    """What `similarities` computes: modality, kind, number."""
    return [(side, kind, number) for side in ("audio", "image") for kind in kinds(side) for number in NUMBERS]


def similarities(model: EquiAV, settings: ModelSettings, clips: Clips, seed: int, computes: torch.autocast) -> Tensor:
    """-> (b, columns) float64. similarity: cosine of the predicted and the augmented embedding. gain: that, less the cosine
    without prediction. sensitivity: that, less the cosine of what is predicted from another draw of the same kind."""
    always = replace(settings.augment, jitter_p=1.0, blur_p=1.0, flip_p=1.0, gray_p=1.0, mask_p=1.0)
    spectrogram = normalised_spectrogram(clips.waveform, clips.lengths, settings.model, settings.data)
    image = original_image(clips.frames, settings.model.image_size)
    found = []
    for side, vectors, purpose in (
        ("audio", AudioVectors, Purpose.VIEW_AUDIO),
        ("image", ImageVectors, Purpose.VIEW_IMAGE),
    ):
        branch, given = getattr(model, side), as_picture(spectrogram) if side == "audio" else image
        for kind, slots in kinds(side).items():
            of = vectors(settings.model, settings.augment if kind == ALL else always)
            t = torch.cat([of.draw(seed, epoch, clips.samples, purpose) for epoch in (0, 1)], dim=1)  # (b, 2, d_t)
            if slots:
                alone = of.identity(t.device).expand_as(t).clone()
                if len(slots) == 1:  # a switch has no other draw: its other prediction is that of doing nothing
                    t[:, 1] = of.identity(t.device)
                places = [of.slots.index(slot) for slot in slots]
                alone[..., places] = t[..., places]
                t = alone
            if side == "audio":
                augmented = as_picture(augment_spectrogram(spectrogram, t[:, 0], of))  # type: ignore[arg-type]
            else:
                augmented = augment_image(clips.frames, t[:, 0], of)  # type: ignore[arg-type]
            with computes:
                found.append(_of_views(branch, given, augmented, t))
    return torch.cat(found, dim=1)


def _of_views(branch: Branch, given: Tensor, augmented: Tensor, t: Tensor) -> Tensor:
    """-> (b, NUMBERS)"""
    h, h_aug = branch.encoder(given, augmented)
    if h_aug is None:
        raise ConfigError("model: its encoders were trained without augmented views: there is no prediction to compare")
    predicted = branch.predictor(h, t)  # (b, 2, D)
    parts = torch.cat([h_aug.mean(dim=1), predicted[:, 0], predicted[:, 1], h.mean(dim=1)])
    z_aug, right, other, plain = F.normalize(branch.intra_head(parts).double(), dim=1).chunk(4)
    cosine = [(z * z_aug).sum(dim=1) for z in (right, plain, other)]
    return torch.stack([cosine[0], cosine[0] - cosine[1], cosine[0] - cosine[2]], dim=1)
