"""Augmentation vectors t_v (18) and t_a (24): drawn, encoded, decoded (Appendix C; both layouts in docs/method.md).

Parameters are plain numbers in plain units (pixels, frames, factors). A vector holds the same numbers in the order and
scale that the variant asks for, so encoding is a permutation and a product, and decoding its inverse.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from equiav.augment.draws import Purpose, uniforms
from equiav.config import AugmentConfig, ModelConfig

CROP = (
    "crop_on",
    "left",
    "top",
    "width",
    "height",
)  # pixels; of a spectrogram: left, width in time, top, height in mel
JITTER = (
    "jitter_on",
    "first",
    "second",
    "third",
    "fourth",
    "brightness",
    "contrast",
    "saturation",
    "hue",
)  # factor - 1
ORDER = JITTER[1:5]  # each holds one of the numbers below
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
BLUR = ("blur_on", "sigma")
CONTINUOUS = {"brightness", "contrast", "saturation", "hue", "sigma"}  # everything else is a whole number
CROP_TRIES = 10  # as torchvision: a proposal that does not fit is drawn again; all ten fail once in 10^9

Parameters = dict[str, Tensor]  # name -> (...): one number for each vector
Uniforms = Iterator[Tensor]  # numbers in [0, 1), each (...)


class _Vectors(ABC):
    """The vectors of one modality."""

    def __init__(self, augment: AugmentConfig, slots: tuple[str, ...], scale: dict[str, float]):
        self.augment = augment
        self.slots = slots
        self.scale = [scale.get(name, 1.0) for name in slots]  # numbers, not a tensor: nothing to copy to a device

    def encode(self, parameters: Parameters) -> Tensor:
        """-> t (..., d_t) float32."""
        columns = [parameters[name].double() * scale for name, scale in zip(self.slots, self.scale, strict=True)]
        return torch.stack(columns, dim=-1).float()

    def decode(self, t: Tensor) -> Parameters:
        """t (..., d_t) -> parameters, float32; counts of pixels and frames are whole again."""
        if t.shape[-1] != len(self.slots):
            raise ValueError(f"augmentation vector has {t.shape[-1]} elements, expected {len(self.slots)}")
        parameters = {}
        for name, column, scale in zip(self.slots, t.double().unbind(-1), self.scale, strict=True):
            value = column / scale
            parameters[name] = (value if name in CONTINUOUS else value.round()).float()
        return parameters

    def draw(self, seed: int, epoch: int, samples: Tensor, purpose: Purpose, queries: int = 1) -> Tensor:
        """samples (B,) int64 -> vectors (B, queries, d_t)."""
        count = 2 * CROP_TRIES + len(
            self.slots
        )  # a bound: no slot takes more than one number, but for the crop's tries
        u = uniforms(seed, epoch, samples, purpose, queries * count).unflatten(1, (queries, count))
        return self.encode(self._parameters(iter(u.unbind(-1))))

    def drawing(self, augment: AugmentConfig) -> Self:
        """The same vectors, in the same scale, drawn by other settings: of strengths that a model was not trained on."""
        other = copy.copy(self)
        other.augment = augment
        return other

    @abstractmethod
    def _parameters(self, u: Uniforms) -> Parameters: ...

    def identity(self, device: torch.device | str = "cpu") -> Tensor:
        """The vector of doing nothing, (d_t,): every switch off, the default order."""
        values = {name: float(ORDER.index(name)) if name in ORDER else 0.0 for name in self.slots}
        return self.encode({name: torch.tensor(value, device=device) for name, value in values.items()})


class ImageVectors(_Vectors):
    def __init__(self, model: ModelConfig, augment: AugmentConfig):
        self.size = side = model.image_size
        scale: dict[str, float] = dict.fromkeys(("left", "top", "width", "height"), 1 / side)
        slots = (*CROP, *JITTER, *BLUR, "flip", "gray")
        if augment.variant == "released":
            slots = ("crop_on", "top", "left", "height", "width", *slots[5:])
        else:
            scale |= _unit_scale(augment)
        super().__init__(augment, slots, scale)

    def _parameters(self, u: Uniforms) -> Parameters:
        a = self.augment
        left, top, width, height = _crop(u, a.crop_scale, a.image_crop_ratio, self.size, self.size)
        on = _coin(u, a.jitter_p)
        order = _permutation(u, 4)
        jitter = [_between(u, -a.jitter_factor, a.jitter_factor) for _ in range(3)]
        jitter.append(_between(u, -a.jitter_hue, a.jitter_hue))
        blur = _coin(u, a.blur_p)
        sigma = _between(u, *a.blur_sigma)
        return {
            "crop_on": torch.ones_like(on),
            "left": left,
            "top": top,
            "width": width,
            "height": height,
            **_jitter(on, order, jitter),
            "blur_on": blur,
            "sigma": sigma * blur,
            "flip": _coin(u, a.flip_p),
            "gray": _coin(u, a.gray_p),
        }


class AudioVectors(_Vectors):
    def __init__(self, model: ModelConfig, augment: AugmentConfig):
        self.frames, self.mels = T, F = model.spectrogram_frames, model.spectrogram_mels
        slots = ("mask_on", "t0", "t1", "f0", "f1", "shift_on", "shift", *CROP, *JITTER, *BLUR, "flip")
        if augment.variant == "released":  # masks unscaled, positions divided by the other axis's length
            scale = {"shift": 1 / T, "left": 1 / F, "top": 1 / T, "width": 1 / F, "height": 1 / T}
        else:
            scale = {
                "t0": 1 / T,
                "t1": 1 / T,
                "f0": 1 / F,
                "f1": 1 / F,
                "shift": 1 / T,
                "left": 1 / T,
                "width": 1 / T,
                "top": 1 / F,
                "height": 1 / F,
                **_unit_scale(augment),
            }
        super().__init__(augment, slots, scale)

    def _parameters(self, u: Uniforms) -> Parameters:
        a, T, F = self.augment, self.frames, self.mels
        on = _coin(u, a.mask_p)
        t0, t1 = _mask(u, a.max_mask_frames, T)
        f0, f1 = _mask(u, a.max_mask_mels, F)
        shift = (next(u) * 2 * T).floor() - T
        top, left, height, width = _crop(u, a.crop_scale, a.audio_crop_ratio, F, T)
        jitter_on = _coin(u, a.jitter_p)
        if a.variant == "released":
            order = _permutation(u, 4)
            jitter = [_between(u, -a.jitter_factor, a.jitter_factor) for _ in range(3)]
            jitter.append(_between(u, -a.jitter_hue, a.jitter_hue))
        else:  # a spectrogram has one channel: brightness and contrast only
            order = _permutation(u, 2)
            jitter = [_between(u, -a.jitter_factor, a.jitter_factor) for _ in range(2)]
            jitter += [torch.zeros_like(on), torch.zeros_like(on)]
        blur = _coin(u, a.blur_p)
        sigma = _between(u, *a.blur_sigma)
        return {
            "mask_on": on,
            "t0": t0 * on,
            "t1": t1 * on,
            "f0": f0 * on,
            "f1": f1 * on,
            "shift_on": on,
            "shift": shift * on,
            "crop_on": torch.ones_like(on),
            "left": left,
            "top": top,
            "width": width,
            "height": height,
            **_jitter(jitter_on, order, jitter),
            "blur_on": blur,
            "sigma": sigma * blur,
            "flip": _coin(u, a.flip_p),
        }


def _unit_scale(augment: AugmentConfig) -> dict[str, float]:
    """The paper variant brings every element to about [-1, 1]."""
    factor = 1 / augment.jitter_factor if augment.jitter_factor else 1.0
    hue = 1 / augment.jitter_hue if augment.jitter_hue else 1.0
    return {
        **dict.fromkeys(ORDER, 1 / 3),
        "brightness": factor,
        "contrast": factor,
        "saturation": factor,
        "hue": hue,
        "sigma": 1 / augment.blur_sigma[1],
    }


def _coin(u: Uniforms, p: float) -> Tensor:
    return (next(u) < p).double()


def _between(u: Uniforms, low: float, high: float) -> Tensor:
    return low + (high - low) * next(u)


def _permutation(u: Uniforms, n: int) -> Tensor:
    """The first n (2 or 4) of 0..3 in random order, the rest in place: (..., 4)."""
    draw = (next(u) * math.factorial(n)).floor()
    if n == 2:
        return torch.stack([draw, 1 - draw, draw * 0 + 2, draw * 0 + 3], dim=-1)
    first, rest = (draw / 6).floor(), draw % 6
    second, third = (rest / 2).floor(), rest % 2  # places among those that are left
    second = second + (second >= first)
    third = third + (third >= torch.minimum(first, second))
    third = third + (third >= torch.maximum(first, second))
    return torch.stack([first, second, third, 6 - first - second - third], dim=-1)


def _jitter(on: Tensor, order: Tensor, factors: list[Tensor]) -> Parameters:
    order = torch.where(on.bool().unsqueeze(-1), order, torch.arange(4.0, dtype=order.dtype, device=order.device))
    return {
        "jitter_on": on,
        **dict(zip(ORDER, order.unbind(-1), strict=True)),
        **{name: factor * on for name, factor in zip(JITTER[5:], factors, strict=True)},
    }


def _mask(u: Uniforms, longest: int, size: int) -> tuple[Tensor, Tensor]:
    length = next(u) * longest
    start = (next(u) * (size - length)).floor()
    return start, start + length.floor()


def _crop(
    u: Uniforms, scale: tuple[float, float], ratio: tuple[float, float], x_size: int, y_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A box of `scale` of the area; `ratio` is its x share over its y share -> x, y, x length, y length, whole."""
    tries = [(_between(u, *scale), _between(u, math.log(ratio[0]), math.log(ratio[1]))) for _ in range(CROP_TRIES)]
    area, log_ratio = (torch.stack(values) for values in zip(*tries, strict=True))  # (tries, ...)
    side, stretch = area.sqrt(), (log_ratio / 2).exp()
    x_length, y_length = (side * stretch * x_size).round(), (side / stretch * y_size).round()
    fits = (x_length <= x_size) & (y_length <= y_size)
    first, none_fits = fits.byte().argmax(dim=0, keepdim=True), ~fits.any(dim=0)  # the first try that fits
    largest_x, largest_y = round(min(1.0, ratio[1]) * x_size), round(min(1.0, 1 / ratio[0]) * y_size)
    x_length = x_length.gather(0, first)[0].clamp(min=1).masked_fill(none_fits, largest_x)
    y_length = y_length.gather(0, first)[0].clamp(min=1).masked_fill(none_fits, largest_y)
    x, y = (next(u) * (x_size - x_length + 1)).floor(), (next(u) * (y_size - y_length + 1)).floor()
    return x, y, x_length, y_length
