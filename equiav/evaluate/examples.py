"""Clips that one can look at and listen to: what is found beside them, and what of the picture belongs to the sound."""

from __future__ import annotations

import base64
import io

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor
from torchaudio.functional import resample

from equiav.evaluate.pictures import LEVELS
from equiav.evaluate.retrieval import ranks

NEAREST = 3  # that are shown of each direction
POINTS = 1000  # of the map, of each modality
THUMB, LARGEST = 64, 224  # pixels
RATE = 16000  # of sounds


def evenly(chosen: np.ndarray, count: int) -> np.ndarray:
    """chosen (samples,) bool -> so many of them, from everywhere, likewise."""
    there = np.flatnonzero(chosen)
    found = np.zeros_like(chosen)
    found[there[np.unique(np.linspace(0, len(there) - 1, min(count, len(there))).round().astype(int))]] = True
    return found


def nearest(one: Tensor, other: Tensor, rows: np.ndarray) -> np.ndarray:
    """one, other (N, d) -> (rows, NEAREST), numbers of the others, the nearest first."""
    similarity = one[rows].double() @ other.double().T
    return similarity.topk(min(NEAREST, len(other)), dim=1).indices.numpy()


def placed(audio: Tensor, image: Tensor, rows: np.ndarray) -> dict[str, list[list[float]]]:
    """audio, image (N, d) -> both in the plane of their two main directions, each modality about its own middle."""
    both = torch.cat([x.double() - x.double().mean(dim=0) for x in (audio, image)])
    main = torch.linalg.eigh(both.T @ both).eigenvectors[:, -2:].flip(1)
    main = main * torch.where(main.abs().max(dim=0).values == main.max(dim=0).values, 1.0, -1.0)  # one sign of two
    a, v = (both @ main).float().numpy().reshape(2, len(audio), 2)
    return {"audio": a[rows].round(4).tolist(), "image": v[rows].round(4).tolist()}


def places(audio: Tensor, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """-> (N,) of each picture among all, asked with its sound, and the other way round."""
    return ranks(audio, image).numpy(), ranks(image, audio).numpy()


def picture(pixels: np.ndarray, side: int = LARGEST) -> str:
    """(H, W, 3) uint8 -> JPEG, as the address that a page can show."""
    image = Image.fromarray(pixels)
    if max(image.size) > side:
        image.thumbnail((side, side))
    found = io.BytesIO()
    image.save(found, "JPEG", quality=80)
    return address("image/jpeg", found.getvalue())


def sound(wave: np.ndarray, rate: int) -> str:
    """(L,) int16 -> MP3 likewise."""
    if rate != RATE:  # MP3 knows a few rates only
        wave = resample(torch.from_numpy(wave.astype(np.float32)), rate, RATE).clamp(-32768, 32767).short().numpy()
    found = io.BytesIO()
    soundfile.write(found, wave, RATE, format="MP3", subtype="MPEG_LAYER_III")
    return address("audio/mpeg", found.getvalue())


def warm(heat: np.ndarray) -> str:
    """(rows, columns) -> PNG to lie over the picture: what adds to the score shines, the rest is clear."""
    added = heat.clip(min=0)
    levels = added / added.max() if added.max() > 0 else added
    colours = np.stack([np.interp(levels, np.linspace(0, 1, len(LEVELS)), LEVELS[:, c]) for c in range(3)], axis=2)
    pixels = np.concatenate([colours, 235 * levels[..., None] ** 0.7], axis=2).astype(np.uint8)
    found = io.BytesIO()
    Image.fromarray(pixels, "RGBA").resize((4 * heat.shape[1], 4 * heat.shape[0]), Image.Resampling.BICUBIC).save(
        found, "PNG", optimize=True
    )
    return address("image/png", found.getvalue())


def address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
