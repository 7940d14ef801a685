"""A batch of decoded clips -> what the model is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.augment.draws import Purpose
from equiav.augment.logmel import normalised_spectrogram
from equiav.augment.transforms import augment_image, augment_spectrogram, original_image
from equiav.augment.vectors import AudioVectors, ImageVectors
from equiav.config import Config, ModelSettings


class Clips(NamedTuple):
    """Decoded clips."""

    epoch: int
    samples: Tensor  # (B,) int64, the ids that the draws depend on
    frames: Any  # (B, 3, H, W) uint8, one frame of each clip; None, as the next two, where the run does not use it
    waveform: Any  # (B, L) int16
    lengths: Any  # (B,) int64, samples of each waveform that are its own; the rest is filling
    valid: Tensor  # (B,) bool, on the host; false: no sample in this place (the epoch has ended, or it cannot be used)
    targets: Any = None  # (B, classes) float32, where a run learns labels
    there: Any = None  # (B,) bool, `valid` on the device

    def rows(self, part: slice) -> Clips:
        """Some of the clips."""
        return Clips(self.epoch, *_each(lambda x: x[part], self[1:]))

    def padded(self, rows: int) -> Clips:
        """With as many rows as asked for; those added are no clips."""
        missing = rows - len(self.samples)
        if not missing:
            return self
        samples = F.pad(self.samples, (0, missing), value=-1)
        others = _each(lambda x: F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)), self[2:])
        return Clips(self.epoch, samples, *others)

    def to(self, device: torch.device) -> Clips:
        """Through pinned memory where the device is a GPU, so that the copy does not hold up the host."""
        pinned = _each(lambda x: x.pin_memory() if device.type == "cuda" else x, (*self[1:5], self.targets, self.valid))
        *tensors, targets, there = _each(lambda x: x.to(device, non_blocking=True), pinned)
        return Clips(self.epoch, *tensors, valid=self.valid, targets=targets, there=there)


def _each(change: Callable[[Tensor], Tensor], tensors: Iterable[Any]) -> list[Any]:
    return [None if x is None else change(x) for x in tensors]


class Views(NamedTuple):
    """The arguments of `EquiAV.forward`, in its order."""

    audio: Tensor  # (B, T, F) x_a
    image: Tensor  # (B, 3, H, W) x_v
    audio_aug: Tensor | None  # (B, T, F) t_a(x_a)
    image_aug: Tensor | None  # (B, 3, H, W) t_v(x_v)
    t_a: Tensor  # (B, 1 + S, 24): the vector of the view, then the centroid's
    t_v: Tensor  # (B, 1 + S, 18)


def sampled_vectors(
    settings: ModelSettings, seed: int, epoch: int, samples: Tensor, queries: int
) -> tuple[Tensor, Tensor]:
    """Vectors for the centroid of Eq. 12: t_a (B, queries, 24), t_v (B, queries, 18). They have no view of their own."""
    audio, image = (kind(settings.model, settings.augment) for kind in (AudioVectors, ImageVectors))
    return (
        audio.draw(seed, epoch, samples, Purpose.CENTROID_AUDIO, queries),
        image.draw(seed, epoch, samples, Purpose.CENTROID_IMAGE, queries),
    )


@torch.no_grad()
def make_views(config: Config, batch: Clips) -> Views:
    """On the device of the batch, in float32 under any autocast."""
    audio, image = AudioVectors(config.model, config.augment), ImageVectors(config.model, config.augment)
    t_a = audio.draw(config.seed, batch.epoch, batch.samples, Purpose.VIEW_AUDIO)
    t_v = image.draw(config.seed, batch.epoch, batch.samples, Purpose.VIEW_IMAGE)
    spectrogram = normalised_spectrogram(batch.waveform, batch.lengths, config.model, config.data)
    original = original_image(batch.frames, config.model.image_size)
    audio_aug = image_aug = None
    if config.objective.needs_augmented:
        with torch.autocast(batch.frames.device.type, enabled=False):
            audio_aug = augment_spectrogram(spectrogram, t_a[:, 0], audio)
            image_aug = augment_image(batch.frames, t_v[:, 0], image)
    if config.objective.sampled:
        sampled = sampled_vectors(config, config.seed, batch.epoch, batch.samples, config.objective.sampled)
        t_a, t_v = torch.cat([t_a, sampled[0]], dim=1), torch.cat([t_v, sampled[1]], dim=1)
    return Views(spectrogram, original, audio_aug, image_aug, t_a, t_v)
