"""Draws -> augmentation vectors -> views. A view is a function of the clip and its vector; a vector of (seed, epoch,
sample id, purpose). No generator state, no loop over samples, any device."""

from equiav.augment.logmel import log_mel, normalised_spectrogram
from equiav.augment.transforms import augment_image, augment_spectrogram, original_image
from equiav.augment.vectors import AudioVectors, ImageVectors
from equiav.augment.views import Clips, Views, make_views, sampled_vectors

__all__ = [
    "AudioVectors",
    "Clips",
    "ImageVectors",
    "Views",
    "augment_image",
    "augment_spectrogram",
    "log_mel",
    "make_views",
    "normalised_spectrogram",
    "original_image",
    "sampled_vectors",
]
