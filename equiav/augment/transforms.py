"""Views from vectors: every sample with its own parameters, all samples at once, on the device the batch is on.

The order of operations is that of the vector: [mask, shift,] crop, jitter, blur, flip [, grayscale].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.augment.vectors import BRIGHTNESS, CONTRAST, HUE, ORDER, SATURATION, AudioVectors, ImageVectors, Parameters

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
LUMA = (0.2989, 0.587, 0.114)


def original_image(frames: Tensor, size: int) -> Tensor:
    """The untransformed input: frames (B, 3, H, W) uint8 -> (B, 3, size, size), the central square, normalised."""
    left, top, side = _central_square(frames)
    whole = torch.full((1,), float(side), device=frames.device)  # the same for all
    columns = _taps(whole * 0 + left, whole, side, frames.shape[3], size)
    rows = _taps(whole * 0 + top, whole, side, frames.shape[2], size)
    return _normalise(_resample(_unit_range(frames), rows, columns))


def augment_image(frames: Tensor, t: Tensor, vectors: ImageVectors) -> Tensor:
    """t_v(x_v): frames (B, 3, H, W) uint8, t (B, 18) -> (B, 3, size, size), normalised.

    Crops are cut from the central square, the field that the original view shows, at the frame's own resolution.
    """
    p = vectors.decode(t)
    size = vectors.size
    left, top, side = _central_square(frames)
    x, y, width, height = _box(p, size, size)
    columns = _taps(left + x * (side / size), width * (side / size), side, frames.shape[3], size)
    rows = _taps(top + y * (side / size), height * (side / size), side, frames.shape[2], size)
    image = _resample(_unit_range(frames), rows, columns)
    image = _jitter_image(image, p)
    image = _blur(image, p, vectors.augment.blur_sigma[1])
    image = torch.where(_each(p["flip"], image) > 0, image.flip(3), image)
    return _normalise(torch.where(_each(p["gray"], image) > 0, _gray(image), image))


def augment_spectrogram(spectrogram: Tensor, t: Tensor, vectors: AudioVectors) -> Tensor:
    """t_a(x_a): normalised spectrogram (B, T, F), t (B, 24) -> (B, T, F)."""
    p = vectors.decode(t)
    released = vectors.augment.variant == "released"
    T, F_ = vectors.frames, vectors.mels
    if spectrogram.shape[1:] != (T, F_):
        raise ValueError(f"spectrogram is {tuple(spectrogram.shape)}, expected (B, {T}, {F_})")
    time, mel = torch.arange(T, device=t.device), torch.arange(F_, device=t.device)

    masked = (_within(time, p["t0"], p["t1"])[:, :, None]) | (_within(mel, p["f0"], p["f1"])[:, None, :])
    x = spectrogram.masked_fill(masked & (p["mask_on"] > 0)[:, None, None], 0.0)
    if not released:  # the released program rolls the channel axis of identical channels: nothing moves
        source = (time[None, :] - p["shift"].long()[:, None]) % T  # (B, T)
        x = x.gather(1, source[:, :, None].expand(-1, -1, F_))

    left, top, width, height = _box(p, T, F_)
    x = _resample(x.unsqueeze(1), _taps(left, width, T, T, T), _taps(top, height, F_, F_, F_))  # (B, 1, T, F)
    x = _jitter_spectrogram(x, p, clamp=released)
    if released:
        x = _blur(x, p, vectors.augment.blur_sigma[1], radius=p["sigma"].ceil())
        flipped = x.flip(3)  # the frequency axis: what the released program calls horizontal
    else:
        x = _blur(x, p, vectors.augment.blur_sigma[1])
        flipped = x.flip(2)
    return torch.where(_each(p["flip"], x) > 0, flipped, x).squeeze(1)


def _central_square(frames: Tensor) -> tuple[int, int, int]:
    H, W = frames.shape[2:]
    side = min(H, W)
    return (W - side) // 2, (H - side) // 2, side


def _unit_range(frames: Tensor) -> Tensor:
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 (B, 3, H, W)")
    return frames.float() / 255


def _normalise(image: Tensor) -> Tensor:
    channels = zip(image.unbind(dim=1), IMAGE_MEAN, IMAGE_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def _each(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to go beside a batch of pictures."""
    return value.view(-1, *[1] * (x.dim() - 1))


def _within(places: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """places (n,), start and stop (B,) -> (B, n)."""
    return (places >= start[:, None]) & (places < stop[:, None])


def _box(p: Parameters, width: int, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The crop; the whole picture where it is off."""
    on = p["crop_on"] > 0
    return (
        p["left"],
        p["top"],
        p["width"].where(on, torch.full_like(p["width"], width)),
        p["height"].where(on, torch.full_like(p["height"], height)),
    )


# ---- antialiased resampling of a box: bilinear, torchvision's resized_crop(antialias=True) -------------------------

Taps = tuple[Tensor, Tensor]  # which input pixels, (B, n_out, K) int64, with what weights, (B, n_out, K)


def _taps(start: Tensor, length: Tensor, longest: int, n_in: int, n_out: int) -> Taps:
    """Along one axis: n_out pixels from the stretch [start, start + length) of n_in pixels; start, length (B,), no length
    above `longest`."""
    scale = (length / n_out)[:, None]  # (B, 1) input pixels to an output pixel
    support = scale.clamp(min=1.0)  # half the triangle's base
    centre = start[:, None] + scale * (torch.arange(n_out, device=start.device) + 0.5)  # (B, n_out)
    K = math.ceil(2 * max(1.0, longest / n_out))
    pixel = (centre - support - 0.5).floor()[..., None] + 1 + torch.arange(K, device=start.device)  # (B, n_out, K)
    weight = (1 - (pixel + 0.5 - centre[..., None]).abs() / support[..., None]).clamp(min=0)
    # Pixels outside the box do not count. A box of whole pixels may have come back from its vector a hair off.
    low, high = (start + 1e-3).floor(), (start + length - 1e-3).ceil()
    weight = weight * (pixel >= low[:, None, None]) * (pixel < high[:, None, None])
    return pixel.long().clamp(0, n_in - 1), weight / weight.sum(dim=2, keepdim=True)


def _resample(x: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """x (B, C, H, W) -> (B, C, n_rows, n_columns)."""
    for dim, (index, weight) in ((3, columns), (2, rows)):
        shape, whole = [index.shape[0], 1, 1, 1], list(x.shape)
        shape[dim] = whole[dim] = index.shape[1]
        out = 0
        for k in range(index.shape[2]):  # a handful of taps
            out = out + x.gather(dim, index[..., k].view(shape).expand(whole)) * weight[..., k].view(shape)
        x = out  # type: ignore[assignment]
    return x


# ---- jitter ----------------------------------------------------------------------------------------------------------


def _gray(image: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = image.split(1, dim=1)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def _jitter_image(image: Tensor, p: Parameters) -> Tensor:
    """Brightness, contrast, saturation and hue, in each sample's own order; image in [0, 1].

    Three of the four are blends with something. Hue is the costly one, so it is computed once: the blends that a
    sample has before its hue, then every sample's hue, then the blends after it.
    """
    order = torch.stack([p[name] for name in ORDER], dim=1)  # (B, 4)
    hue_at = (order == HUE).long().argmax(dim=1)  # (B,)
    k = torch.arange(3, device=order.device)
    blends = order.gather(1, k + (k >= hue_at[:, None]))  # (B, 3): each sample's order without hue
    for k in range(3):
        image = _blend(image, blends[:, k], p, (k < hue_at) & (p["jitter_on"] > 0))
    image = torch.where(_each(p["jitter_on"], image) > 0, _shift_hue(image, _each(p["hue"], image)), image)
    for k in range(3):
        image = _blend(image, blends[:, k], p, (k >= hue_at) & (p["jitter_on"] > 0))
    return image


def _blend(image: Tensor, which: Tensor, p: Parameters, active: Tensor) -> Tensor:
    """One of brightness (blend with black), contrast (with the mean gray), saturation (with the gray image)."""
    gray = _gray(image)
    target = torch.where(_each(which == CONTRAST, image), gray.mean(dim=(2, 3), keepdim=True), gray)
    target = torch.where(_each(which == BRIGHTNESS, image), torch.zeros_like(target), target)
    factor = torch.where(which == BRIGHTNESS, p["brightness"], p["contrast"])
    factor = _each(1 + torch.where(which == SATURATION, p["saturation"], factor), image)
    return torch.where(_each(active, image), (factor * image + (1 - factor) * target).clamp(0, 1), image)


def _shift_hue(image: Tensor, shift: Tensor) -> Tensor:
    """Turns the colour circle by `shift` (B, 1, 1, 1) of it, value and saturation kept; image in [0, 1]."""
    r, g, b = image.unbind(dim=1)
    value, low = image.amax(dim=1), image.amin(dim=1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * shift.squeeze(1)  # sixths of the circle
    # Each channel is the value, less the chroma times how far the hue is from that channel's plateau.
    channels = []
    for offset in (5, 3, 1):
        k = hue + offset
        k = k - 6 * (k / 6).floor()  # modulo 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def _jitter_spectrogram(x: Tensor, p: Parameters, clamp: bool) -> Tensor:
    """Brightness (a factor) and contrast (a blend with the mean) of the normalised spectrogram, in each one's own order.

    `clamp` is the released program's: after each of its four operations values are cut to [0, 1]. There saturation and
    hue act on three equal channels; of them only the cut is kept (docs/method.md).
    """
    active = _each(p["jitter_on"], x) > 0
    for name in ORDER:
        brightness = _each((p[name] == BRIGHTNESS) * p["brightness"], x)
        contrast = _each((p[name] == CONTRAST) * p["contrast"], x)
        changed = x * (1 + brightness)
        changed = changed + contrast * (changed - x.mean(dim=(2, 3), keepdim=True))
        x = torch.where(active, changed.clamp(0, 1) if clamp else changed, x)
    return x


# ---- blur ------------------------------------------------------------------------------------------------------------


def _blur(x: Tensor, p: Parameters, largest_sigma: float, radius: Tensor | None = None) -> Tensor:
    """Gaussian blur, each sample its own sigma (B,), reflected at the edges; x (B, C, H, W).

    The kernel reaches 4 sigma of the largest blur, or `radius` (B,) pixels.
    """
    B, _, H, W = x.shape
    reach = min(math.ceil(4 * largest_sigma), H - 1, W - 1)
    places = torch.arange(-reach, reach + 1, device=x.device)  # (K,)
    sigma = torch.where(p["blur_on"] > 0, p["sigma"], torch.full_like(p["sigma"], 1e-3))[:, None]  # 1e-3: no blur
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)  # (B, K)
    if radius is not None:
        kernel = kernel * (places.abs() <= radius[:, None])
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).view(B, 1, -1, 1)
    x = x.transpose(0, 1)  # (C, B, H, W): one group of the convolution for each sample
    x = F.conv2d(F.pad(x, (0, 0, reach, reach), mode="reflect"), kernel, groups=B)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="reflect"), kernel.transpose(2, 3), groups=B)
    return x.transpose(0, 1)
