"""A batch of decoded clips -> what the model is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equiav.augment.draws import Purpose
from equiav.augment.logmel import normalised_spectrogram
from equiav.augment.transforms import augment_image, augment_spectrogram, original_image
from equiav.augment.vectors import AudioVectors, ImageVectors
from equiav.config import Config


class Views(NamedTuple):
    """The arguments of `EquiAV.forward`, in its order."""

    audio: Tensor  # (B, T, F) x_a
    image: Tensor  # (B, 3, H, W) x_v
    audio_aug: Tensor | None  # (B, T, F) t_a(x_a)
    image_aug: Tensor | None  # (B, 3, H, W) t_v(x_v)
    t_a: Tensor  # (B, 1 + S, 24): the vector of the view, then the centroid's
    t_v: Tensor  # (B, 1 + S, 18)


def sampled_vectors(
    config: Config, epoch: int, samples: Tensor, queries: int, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Vectors for the centroid of Eq. 12: t_a (B, queries, 24), t_v (B, queries, 18). They have no view of their own."""
    seed = config.seed if seed is None else seed
    audio, image = AudioVectors(config.model, config.augment), ImageVectors(config.model, config.augment)
    return (audio.draw(seed, epoch, samples, Purpose.CENTROID_AUDIO, queries),
            image.draw(seed, epoch, samples, Purpose.CENTROID_IMAGE, queries))  # fmt: skip


@torch.no_grad()
def make_views(config: Config, epoch: int, samples: Tensor, frames: Tensor, waveform: Tensor) -> Views:
    """samples (B,) int64 ids, frames (B, 3, H, W) uint8, waveform (B, L) int16 -> views, on the device of the batch."""
    audio, image = AudioVectors(config.model, config.augment), ImageVectors(config.model, config.augment)
    t_a = audio.draw(config.seed, epoch, samples, Purpose.VIEW_AUDIO)
    t_v = image.draw(config.seed, epoch, samples, Purpose.VIEW_IMAGE)
    spectrogram = normalised_spectrogram(waveform, config.model, config.data)
    objective = config.objective
    needs_aug = objective.intra != "none" or objective.inter_on == "augmented"
    audio_aug = augment_spectrogram(spectrogram, t_a[:, 0], audio) if needs_aug else None
    image_aug = augment_image(frames, t_v[:, 0], image) if needs_aug else None
    if objective.inter_on == "centroid":
        centroid_a, centroid_v = sampled_vectors(config, epoch, samples, objective.centroid_size)
        t_a, t_v = torch.cat([t_a, centroid_a], dim=1), torch.cat([t_v, centroid_v], dim=1)
    return Views(spectrogram, original_image(frames, config.model.image_size), audio_aug, image_aug, t_a, t_v)
