"""A micro-batch, one modality at a time: what the evaluations of the predictors share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from equiav.augment import AudioVectors, Clips, ImageVectors, augment_image, augment_spectrogram
from equiav.augment.draws import Purpose
from equiav.augment.logmel import normalised_spectrogram
from equiav.augment.transforms import original_image
from equiav.augment.vectors import BLUR, CROP, JITTER
from equiav.config import AugmentConfig, ConfigError, ModelSettings
from equiav.model import EquiAV
from equiav.model.equiav import Branch, as_picture

ALL = "as trained"
KINDS = {"crop": CROP, "jitter": JITTER, "blur": BLUR, "flip": ("flip",)}
OF_IMAGES, OF_SOUNDS = {"gray": ("gray",)}, {"mask and shift": ("mask_on", "t0", "t1", "f0", "f1", "shift_on", "shift")}
SEED = 1 << 40  # of draws that no training has seen, unless that is its own seed
SMALLEST = 0.01  # area of a crop, however strong


class Side(NamedTuple):
    name: str  # audio, image
    branch: Branch
    vectors: AudioVectors | ImageVectors
    view: Purpose  # of draws
    centroid: Purpose
    given: Tensor  # (B, C, rows, columns), as the encoder takes it
    augmented: Callable[[Tensor, AudioVectors | ImageVectors], Tensor]  # t (B, d_t) -> likewise


def sides(model: EquiAV, settings: ModelSettings, clips: Clips) -> list[Side]:
    spectrogram = normalised_spectrogram(clips.waveform, clips.lengths, settings.model, settings.data)
    image = original_image(clips.frames, settings.model.image_size)
    audio_vectors, image_vectors = (kind(settings.model, settings.augment) for kind in (AudioVectors, ImageVectors))
    return [
        Side("audio", model.audio, audio_vectors, Purpose.VIEW_AUDIO, Purpose.CENTROID_AUDIO, as_picture(spectrogram),
             lambda t, of: as_picture(augment_spectrogram(spectrogram, t, of))),  # type: ignore[arg-type]
        Side("image", model.image, image_vectors, Purpose.VIEW_IMAGE, Purpose.CENTROID_IMAGE, image,
             lambda t, of: augment_image(clips.frames, t, of)),  # type: ignore[arg-type]
    ]  # fmt: skip


def needs_predictions(settings: ModelSettings) -> None:
    intra = settings.objective.intra
    if intra != "equivariant":
        raise ConfigError(
            f"model: it was trained with objective.intra={intra}, so its predictors know no augmentations"
        )


def kinds(side: str) -> dict[str, tuple[str, ...]]:
    """Of one modality: name -> its slots of the vector."""
    return {ALL: (), **KINDS, **(OF_SOUNDS if side == "audio" else OF_IMAGES)}


def draws(
    side: Side, kind: str, strength: float, seed: int, samples: Tensor, count: int
) -> tuple[Tensor, AudioVectors | ImageVectors]:
    """-> t (B, count, d_t), and what decodes it: of one kind of augmentation alone, always on, or of all as training has them."""
    augment, slots = side.vectors.augment, kinds(side.name)[kind]
    if slots:
        augment = replace(augment, jitter_p=1.0, blur_p=1.0, flip_p=1.0, gray_p=1.0, mask_p=1.0)
    of = side.vectors.drawing(stronger(augment, strength, side.vectors))
    t = torch.cat([of.draw(seed, epoch, samples, side.view) for epoch in range(count)], dim=1)
    if not slots:
        return t, of
    alone = of.identity(t.device).expand_as(t).clone()
    places = [of.slots.index(slot) for slot in slots]
    alone[..., places] = t[..., places]
    return alone, of


def stronger(augment: AugmentConfig, strength: float, vectors: AudioVectors | ImageVectors) -> AugmentConfig:
    """With ranges so many times as wide; 1: those of training. Switches stay as they are."""
    if strength == 1:
        return augment
    (low, high), (least, most) = augment.crop_scale, augment.blur_sigma
    T, F = (vectors.frames, vectors.mels) if isinstance(vectors, AudioVectors) else (0, 0)
    return replace(
        augment,
        crop_scale=(max(min(SMALLEST, low), high - (high - low) * strength), high),
        jitter_factor=min(0.99, augment.jitter_factor * strength),
        jitter_hue=min(0.5, augment.jitter_hue * strength),
        blur_sigma=(min(least, most * strength), most * strength),
        max_mask_frames=min(T, round(augment.max_mask_frames * strength)),
        max_mask_mels=min(F, round(augment.max_mask_mels * strength)),
    )
