"""Frames and spectrograms as pictures, for people: in a file, or in a terminal's blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.color import Color
from rich.style import Style
from rich.text import Text
from torch import Tensor

from equiav.augment.transforms import IMAGE_MEAN, IMAGE_STD
from equiav.terminal import plain

Titled = tuple[str, np.ndarray]  # what is written above, and (H, W, 3) uint8
GAP, LINE, INK, PAPER = 6, 14, (30, 30, 30), (250, 250, 250)  # pixels, colours
LEVELS = np.array([[8, 12, 48], [72, 24, 120], [184, 56, 92], [248, 150, 60], [252, 250, 190]])  # quiet to loud


def sheet(rows: Sequence[Sequence[Titled]], height: int) -> Image.Image:
    """Rows of pictures of one height, each with its title above it."""
    drawn = [[(title, Image.fromarray(scaled(picture, height))) for title, picture in row] for row in rows]
    widths = [sum(picture.width + GAP for _, picture in row) + GAP for row in drawn]
    whole = Image.new("RGB", (max(widths), (height + LINE + GAP) * len(rows) + GAP), PAPER)
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(11)
    for k, row in enumerate(drawn):
        left, top = GAP, GAP + k * (height + LINE + GAP)
        for title, picture in row:
            draw.text((left, top), _fitting(plain(title), draw, font, picture.width), INK, font)
            whole.paste(picture, (left, top + LINE))
            left += picture.width + GAP
    return whole


def blocks(picture: Image.Image, columns: int) -> Text:
    """In a terminal: two pixels a character, one above the other."""
    rows = max(2, 2 * round(picture.height * columns / picture.width / 2))
    pixels = np.asarray(picture.resize((columns, rows), Image.Resampling.BOX))
    text = Text(no_wrap=True)
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        text.append("\n")
    return text


def coloured(spectrogram: Tensor) -> np.ndarray:
    """(T, F) normalised -> (F, 2 F, 3) uint8: low tones below, quiet ones dark; without the padding at its end."""
    sounds = torch.nonzero(spectrogram.amax(dim=1) > spectrogram.amin(dim=1))
    spectrogram = spectrogram[: int(sounds[-1]) + 1 if len(sounds) else None]
    levels = np.clip((spectrogram.float().cpu().numpy().T[::-1] + 2) / 4, 0, 1) * (len(LEVELS) - 1)
    colours = np.stack([np.interp(levels, range(len(LEVELS)), LEVELS[:, c]) for c in range(3)], 2).astype(np.uint8)
    return np.asarray(Image.fromarray(colours).resize((2 * len(levels), len(levels)), Image.Resampling.BOX))


def seen(image: Tensor) -> np.ndarray:
    """(3, H, W) normalised -> (H, W, 3) uint8."""
    picture = image.float().cpu().permute(1, 2, 0).numpy() * IMAGE_STD + IMAGE_MEAN
    return np.clip(255 * picture + 0.5, 0, 255).astype(np.uint8)


def overlaid(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, (rows, columns) -> (H, W, 3): what is above nothing shines, the rest stays dark."""
    H, W = picture.shape[:2]
    added = heat.clip(min=0)
    levels = (255 * added / added.max() if added.max() > 0 else added).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(levels).resize((W, H), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    glow = np.stack([np.interp(smooth[..., 0], np.linspace(0, 1, len(LEVELS)), LEVELS[:, c]) for c in range(3)], axis=2)
    return (
        (picture * (0.45 * (1 - smooth)) + glow * smooth * 0.6 + picture * 0.4 * smooth).clip(0, 255).astype(np.uint8)
    )


def scaled(picture: np.ndarray, height: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, w, 3), of its shape as far as that is a picture's."""
    width = min(max(1, round(picture.shape[1] * height / picture.shape[0])), 4 * height)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def _fitting(title: str, draw: ImageDraw.ImageDraw, font: object, width: int) -> str:
    """The end of a name says more than its beginning."""
    if len(title) <= width and draw.textlength(title, font) <= width:  # type: ignore[arg-type]
        return title
    title = title[-width:]
    while title and draw.textlength("…" + title, font) > width:  # type: ignore[arg-type]
        title = title[1:]
    return "…" + title
