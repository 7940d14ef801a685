"""A small audio-visual world: clips with real correspondence to learn, from (seed, index) alone, without any file.

Two objects move before a background, and each sounds. What is seen decides what is heard:

    shape -> timbre      size -> pitch (large is low)      brightness -> loudness
    x     -> onset (left is early)      hue -> decay      motion -> tremolo
    light and tint of the scene -> level and colour of the ambient noise

so that single augmentations really break the pairing: a flip against the order of onsets, a crop against pitch, jitter
against loudness, a hue shift against decay. Gradients, grain, phase and height are nuisance on both sides.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

SHAPES = ("disc", "square", "triangle", "ring")
CLASSES = tuple(f"{left} and {right}" for left in SHAPES for right in SHAPES)
ATTRIBUTES = ("shape", "size", "brightness", "x", "hue", "motion")  # of each object, all but shape in [0, 1]
SCENE = ("light", "tint")  # of the whole clip, in [0, 1]
TABLE = 2048


class SyntheticClip(NamedTuple):
    frames: np.ndarray  # (K, size, size, 3) uint8
    audio: np.ndarray  # (L,) int16
    label: int  # index into CLASSES
    attributes: np.ndarray  # (2, 6) float32: ATTRIBUTES of the left and the right object
    scene: np.ndarray  # (2,) float32: SCENE


@dataclass(frozen=True)
class World:
    seed: int = 0
    size: int = 64
    """Side of a frame, pixels."""
    frames: int = 10
    """Frames of a clip, spread evenly over it."""
    seconds: float = 10.0
    sample_rate: int = 16000

    def clip(self, index: int) -> SyntheticClip:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        attributes = rng.random((2, 6), dtype=np.float32)
        attributes[:, 0] = np.floor(attributes[:, 0] * len(SHAPES))
        attributes[:, 3] = 0.5 * attributes[:, 3] + [0.0, 0.5]  # the first object is the left one
        scene = rng.random(2, dtype=np.float32)
        frames, audio = self._frames(attributes, scene, rng), self._audio(attributes, scene, rng)
        return SyntheticClip(frames, audio, int(attributes[0, 0] * len(SHAPES) + attributes[1, 0]), attributes, scene)

    def label(self, index: int) -> int:
        """Of that clip, without making it."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        left, right = np.floor(rng.random((2, 6), dtype=np.float32)[:, 0] * len(SHAPES)).astype(int)
        return int(left * len(SHAPES) + right)

    # ---- sight

    @cached_property
    def _grid(self) -> np.ndarray:
        return ((np.arange(self.size, dtype=np.float32) + 0.5) / self.size).astype(np.float32)

    def _frames(self, attributes: np.ndarray, scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        x, y = self._grid[None, :], self._grid[:, None]
        light, tint = scene
        colour = (0.08 + 0.32 * light) * np.array([0.4 + 0.6 * tint, 0.6, 1.0 - 0.6 * tint], np.float32)  # cold to warm
        corner = colour[:, None, None] + rng.uniform(-0.06, 0.06, (4, 3, 1, 1)).astype(
            np.float32
        )  # a bilinear gradient
        background = (
            corner[0] * ((1 - x) * (1 - y))
            + corner[1] * (x * (1 - y))
            + corner[2] * ((1 - x) * y)
            + corner[3] * (x * y)
        )
        background += np.float32(0.03) * rng.standard_normal((self.size, self.size), dtype=np.float32)
        picture = np.repeat(background[None], self.frames, axis=0)  # (K, 3, size, size)
        time = np.arange(self.frames, dtype=np.float32) / self.frames
        for shape, size, brightness, place, hue, motion in attributes:
            radius = np.float32(0.07 + 0.17 * size)
            centre_x = np.float32(0.16 + 0.68 * place)
            height = rng.uniform(0.35, 0.65) + 0.12 * np.sin(2 * np.pi * (rng.random() + (1 + 3 * motion) * time))
            edges = (centre_x + side * (radius + 1 / self.size) for side in (-1, 1))
            near = slice(*(max(0, round(edge * self.size)) for edge in edges))  # columns
            u = (x[:, near] - centre_x) / radius  # (1, columns)
            v = (y[None] - height[:, None, None]) / radius  # (K, size, 1)
            inside = _signed_distance(SHAPES[int(shape)], u[None], v.astype(np.float32)) * (radius * self.size) + 0.5
            cover = np.clip(inside, 0, 1)[:, None]  # (K, 1, size, columns)
            colour = np.array(colorsys.hsv_to_rgb(float(hue) * 0.8, 0.85, 0.35 + 0.65 * float(brightness)), np.float32)
            picture[..., near] += cover * (colour[:, None, None] - picture[..., near])
        picture = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(picture.transpose(0, 2, 3, 1))

    # ---- sound

    @cached_property
    def _time(self) -> np.ndarray:
        return np.arange(round(self.seconds * self.sample_rate), dtype=np.float32) / self.sample_rate

    @cached_property
    def _tables(self) -> np.ndarray:
        """One period of each timbre, (shapes, TABLE)."""
        recipes = (
            {1: 1.0},
            {1: 1.0, 3: 0.6, 5: 0.4, 7: 0.3},
            {n: 1 / n**0.5 for n in range(1, 7)},
            {1: 0.5, 2: 0.2, 4: 1.0, 8: 0.6},
        )
        phase = 2 * np.pi * np.arange(TABLE) / TABLE
        waves = [sum(level * np.sin(n * phase) for n, level in recipe.items()) for recipe in recipes]
        return np.stack([w / np.sqrt(np.mean(w**2)) for w in waves]).astype(np.float32)

    def _audio(self, attributes: np.ndarray, scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        time = self._time
        light, tint = (float(value) for value in scene)
        white = rng.standard_normal(len(time) + 8, dtype=np.float32)
        running = np.cumsum(white, dtype=np.float32)
        dull = (running[8:] - running[:-8]) * np.float32(8**-0.5)  # its mean over 8 samples: little above 2 kHz
        sound = np.float32(10 ** (-4.2 + 1.2 * light)) * ((1 - tint) * white[8:] + tint * dull).astype(np.float32)
        for shape, size, brightness, place, hue, motion in attributes:
            start = int(0.75 * float(place) * len(time))
            since = time[: len(time) - start]  # seconds from the onset
            pitch = 160 * 2 ** (3 * (1 - float(size)) + rng.normal(0, 0.01))
            position = ((since * np.float32(pitch) + np.float32(rng.random())) * TABLE).astype(np.int32) % TABLE
            loudness = 10 ** (-1.8 + 0.9 * float(brightness))
            decay = self.seconds * (0.03 + 0.4 * float(hue) ** 2)
            envelope = np.minimum(since / np.float32(0.01), 1) * np.exp(-since / np.float32(decay))
            tremolo = 1 + 0.4 * np.sin(np.float32(2 * np.pi * (2 + 6 * float(motion))) * since)
            sound[start:] += np.float32(loudness) * envelope * tremolo * self._tables[int(shape)][position]
        return (np.clip(sound, -1, 1) * 32767).astype(np.int16)


def _signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How far inside the shape of radius 1 a point is; negative outside."""
    if shape == "square":
        return 0.85 - np.maximum(np.abs(u), np.abs(v))
    if shape == "triangle":
        return np.minimum(0.7 - v, (v + 1.0 - 1.8 * np.abs(u)) / 2.06)
    distance = np.sqrt(u * u + v * v)
    return 1 - distance if shape == "disc" else 0.22 - np.abs(distance - 0.78)
