"""A small audio-visual world: clips with real correspondence to learn, from (seed, index) alone, without any file.

Two objects move before a background, and each sounds. What is seen decides what is heard:

    shape -> timbre      size -> pitch (large is low)      brightness -> loudness
    x     -> onset (left is early)      hue -> decay      motion -> tremolo
    light and tint of the scene -> level and colour of the ambient noise

so that single augmentations really break the pairing: a flip against the order of onsets, a crop against pitch, jitter
against loudness, a hue shift against decay. Gradients, grain, phase and height are nuisance on both sides.

That is the `mixture`, in which a scene's light, which no augmentation hides, tells most. In a `bound` world only what
augmentations change is heard of what is seen (place, size, hue, brightness), in a `free` world only what none changes (shape).
Objects may be silent, others are heard and not seen, so that a clip's classes can only be told from both.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

SHAPES = ("disc", "square", "triangle", "ring")
CLASSES = tuple(f"{left} and {right}" for left in SHAPES for right in SHAPES)
COLOURS = ("red", "green", "blue", "violet")  # quarters of the hues that there are
ATTRIBUTES = ("shape", "size", "brightness", "x", "hue", "motion")  # of each object, all but shape in [0, 1]
SCENE = ("light", "tint")  # of the whole clip, in [0, 1]
TABLE = 2048
HEARD = {  # of ATTRIBUTES + SCENE, what is heard as it is seen
    "mixture": (*ATTRIBUTES, *SCENE),
    "bound": ("size", "brightness", "x", "hue"),
    "free": ("shape",),
}


class SyntheticClip(NamedTuple):
    frames: np.ndarray  # (K, size, size, 3) uint8
    audio: np.ndarray  # (L,) int16
    label: int  # index into CLASSES
    attributes: np.ndarray  # (2, 6) float32: ATTRIBUTES of the left and the right object, as they are seen
    scene: np.ndarray  # (2,) float32: SCENE, as it is seen
    seen: np.ndarray  # (2,) bool, objects
    heard: np.ndarray  # (2,) bool


@dataclass(frozen=True)
class Rules:
    """How sight and sound of the synthetic world belong together (equiav/data/synthetic.py)."""

    correspondence: Literal["mixture", "bound", "free"] = "mixture"
    """What is heard of what is seen. bound: only what augmentations change: place, size, hue, brightness. free: only what none
    changes: the shape. mixture: all of it, and the scene's light."""
    silent: float = 0.0
    """Share of the objects that are seen and make no sound."""
    unseen: float = 0.0
    """Share of the objects that are heard and out of sight."""
    skew: float = 0.0
    """How much rarer each shape is than the one before; 0: all are as frequent."""
    classes: Literal["pairs", "shapes", "things"] = "pairs"
    """A clip's labels: its pair of shapes (one of 16), each shape that is there (one or two of 4), or each shape and each colour
    (two to four of 8): shapes are told from the sound rather, colours from the picture."""


@dataclass(frozen=True)
class World:
    seed: int = 0
    size: int = 64
    """Side of a frame, pixels."""
    frames: int = 10
    """Frames of a clip, spread evenly over it."""
    seconds: float = 10.0
    sample_rate: int = 16000
    rules: Rules = Rules()

    def clip(self, index: int) -> SyntheticClip:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        attributes, scene = self._attributes(rng), rng.random(2, dtype=np.float32)
        seen, heard = self.there(index)
        frames, _ = self._frames(attributes, scene, seen, rng)
        audio = self._audio(*self._as_heard(attributes, scene, index), heard, rng)
        label = int(attributes[0, 0] * len(SHAPES) + attributes[1, 0])
        return SyntheticClip(frames, audio, label, attributes, scene, seen, heard)

    def labels(self, index: int) -> list[str]:
        """Of that clip, without making it."""
        attributes = self._attributes(np.random.Generator(np.random.Philox(key=[self.seed, index])))
        left, right = attributes[:, 0].astype(int)
        if self.rules.classes == "pairs":
            return [CLASSES[left * len(SHAPES) + right]]
        colours = (
            {COLOURS[int(hue * len(COLOURS))] for hue in attributes[:, 4]} if self.rules.classes == "things" else set()
        )
        return sorted({SHAPES[left], SHAPES[right]} | colours)

    def masks(self, index: int) -> np.ndarray:
        """(K, size, size) bool: where something is seen that sounds."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        attributes, scene = self._attributes(rng), rng.random(2, dtype=np.float32)
        seen, heard = self.there(index)
        _, covers = self._frames(attributes, scene, seen, rng)
        shown = np.zeros((2, self.frames, self.size, self.size), np.float32)
        for k, (near, cover) in enumerate(covers):
            if seen[k]:
                shown[:k, ..., near] *= 1 - cover[:, 0]  # the right object lies over the left one
                shown[k, ..., near] = cover[:, 0]
        return shown[heard].sum(axis=0) > 0.5

    def _attributes(self, rng: np.random.Generator) -> np.ndarray:
        attributes = rng.random((2, 6), dtype=np.float32)
        attributes[:, 0] = np.floor(attributes[:, 0] ** np.float32(1 + self.rules.skew) * len(SHAPES))
        attributes[:, 3] = 0.5 * attributes[:, 3] + [0.0, 0.5]  # the first object is the left one
        return attributes

    def _beside(self, index: int) -> np.random.Generator:
        """Draws that a world without rules of its own does not have."""
        return np.random.Generator(np.random.Philox(key=[self.seed, index], counter=[0, 0, 0, 1]))

    def there(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """-> which of the two objects are seen, and which are heard."""
        draw = self._beside(index).random(2)
        silent, unseen = self.rules.silent, self.rules.unseen
        return (draw < silent) | (draw >= silent + unseen), draw >= silent

    def _as_heard(self, attributes: np.ndarray, scene: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Attributes and scene of the sound: those of the picture, or others."""
        if self.rules.correspondence == "mixture":
            return attributes, scene
        rng = self._beside(index)
        rng.random(2)  # what is there
        other = self._attributes(rng)
        if rng.random() < 0.5:
            other = other[::-1]  # which of them is early says nothing of which is left
        kept = np.array([name in HEARD[self.rules.correspondence] for name in ATTRIBUTES])
        return np.where(kept, attributes, other), rng.random(2, dtype=np.float32)

    # ---- sight

    @cached_property
    def _grid(self) -> np.ndarray:
        return ((np.arange(self.size, dtype=np.float32) + 0.5) / self.size).astype(np.float32)

    def _frames(
        self, attributes: np.ndarray, scene: np.ndarray, seen: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, list[tuple[slice, np.ndarray]]]:
        """-> (K, size, size, 3) uint8; and of each object the columns that it lies in, and how much it covers there
        (K, 1, size, columns)."""
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
        covers = []
        for there, (shape, size, brightness, place, hue, motion) in zip(seen, attributes, strict=True):
            radius = np.float32(0.07 + 0.17 * size)
            centre_x = np.float32(0.16 + 0.68 * place)
            height = rng.uniform(0.35, 0.65) + 0.12 * np.sin(2 * np.pi * (rng.random() + (1 + 3 * motion) * time))
            edges = (centre_x + side * (radius + 1 / self.size) for side in (-1, 1))
            near = slice(*(max(0, round(edge * self.size)) for edge in edges))  # columns
            u = (x[:, near] - centre_x) / radius  # (1, columns)
            v = (y[None] - height[:, None, None]) / radius  # (K, size, 1)
            inside = _signed_distance(SHAPES[int(shape)], u[None], v.astype(np.float32)) * (radius * self.size) + 0.5
            cover = np.clip(inside, 0, 1)[:, None]  # (K, 1, size, columns)
            covers.append((near, cover))
            if not there:
                continue
            colour = np.array(colorsys.hsv_to_rgb(float(hue) * 0.8, 0.85, 0.35 + 0.65 * float(brightness)), np.float32)
            picture[..., near] += cover * (colour[:, None, None] - picture[..., near])
        picture = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(picture.transpose(0, 2, 3, 1)), covers

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

    def _audio(
        self, attributes: np.ndarray, scene: np.ndarray, heard: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        time = self._time
        light, tint = (float(value) for value in scene)
        white = rng.standard_normal(len(time) + 8, dtype=np.float32)
        running = np.cumsum(white, dtype=np.float32)
        dull = (running[8:] - running[:-8]) * np.float32(8**-0.5)  # its mean over 8 samples: little above 2 kHz
        sound = np.float32(10 ** (-4.2 + 1.2 * light)) * ((1 - tint) * white[8:] + tint * dull).astype(np.float32)
        for there, (shape, size, brightness, place, hue, motion) in zip(heard, attributes, strict=True):
            start = int(0.75 * float(place) * len(time))
            since = time[: len(time) - start]  # seconds from the onset
            pitch = 160 * 2 ** (3 * (1 - float(size)) + rng.normal(0, 0.01))
            position = ((since * np.float32(pitch) + np.float32(rng.random())) * TABLE).astype(np.int32) % TABLE
            if not there:
                continue
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
