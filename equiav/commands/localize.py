"""`equiav localize`: what of a video's pictures sounds, as a video of its own."""

from __future__ import annotations

from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from equiav.api import Embedder, load, require_av
from equiav.commands.settings import LocalizeConfig
from equiav.config import ConfigError, NotHere
from equiav.data.clips import BadClipError, central_square
from equiav.evaluate.pictures import Titled, overlaid, sheet
from equiav.files import temporary_sibling
from equiav.terminal import say

SMALLEST = 256  # pixels: side of what is drawn, so that it can be looked at
ROWS = 60  # of a sheet
CLOCK, RATE = 90_000, 48_000  # of a film: ticks a second, samples a second


def run_localize(config: LocalizeConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("device is cuda, expected cpu: this torch sees no GPU")
    require_av()
    model = load(config.weights, config.device)
    if not isinstance(model, Embedder):
        raise ConfigError(f"weights: {config.weights} was fine-tuned and compares no sounds with pictures")
    others = sounds_of(config.others, model) if config.others else None
    film = config.out.suffix.lower() == ".mp4"
    part = temporary_sibling(config.out)
    side = max(SMALLEST, model.data.frame_size // 2 * 2)  # pixels, even
    rows: list[list[Titled]] = []
    parts = 0
    try:
        with Film(part, side, config.fps, model.data.sample_rate) if film else nullcontext() as writer:
            for begin, end, wave, pictures in model.windows(config.file, per_second=config.fps if film else 0.0):
                if wave is None or not pictures:
                    raise BadClipError(config.file, f"has no {'sound' if wave is None else 'picture'}, expected both")
                maps = model.localize(wave, pictures, model.data.sample_rate, others)
                for k, (picture, heat) in enumerate(zip(pictures, maps, strict=True)):
                    frame, time = square(picture, side), begin + (end - begin) * (k + 0.5) / len(pictures)
                    if writer:
                        writer.show(time, overlaid(frame, heat))
                    elif len(rows) < ROWS:
                        rows.append([(f"{time:.1f} s", frame), ("what sounds", overlaid(frame, heat))])
                if writer:
                    writer.hear(wave)
                parts += 1
        if rows:
            sheet(rows, SMALLEST).save(part)
        part.replace(config.out)
    finally:
        part.unlink(missing_ok=True)
    say(f"{config.out}: {parts} part(s) of {config.file}" + (f", {len(rows)} shown" if rows else ""))


def sounds_of(path: Path, model: Embedder) -> np.ndarray:
    """-> (n, d)"""
    try:
        with np.load(path, allow_pickle=False) as file:
            rows = file["audio"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"others: {path} holds no embeddings ({error}); `equiav embed` writes them") from None
    width = model.settings.model.head_width
    if rows.ndim != 2 or rows.shape[1] != width or rows.dtype.kind != "f":
        raise ConfigError(
            f"others: {path} has rows of {rows.shape[1:]} {rows.dtype}, this model's have {width} numbers"
        )
    rows = rows[np.isfinite(rows).all(axis=1)]
    if not len(rows):
        raise ConfigError(f"others: no file of {path} has sound")
    return rows


def square(picture: np.ndarray, side: int) -> np.ndarray:
    """-> (side, side, 3): what the model sees of it."""
    whole = central_square(picture, min(picture.shape[:2]))
    return np.asarray(Image.fromarray(whole).resize((side, side), Image.Resampling.BICUBIC))


class Film:
    """An .mp4 that is being written."""

    def __init__(self, path: Path, side: int, fps: float, rate: int):
        import av

        self.av, self.file = av, av.open(str(path), "w", format="mp4")
        self.pictures: Any = self.file.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "20"}
        )
        self.pictures.width = self.pictures.height = side
        self.pictures.pix_fmt, self.pictures.codec_context.time_base = "yuv420p", Fraction(1, CLOCK)
        self.sounds: Any = self.file.add_stream("aac", rate=RATE, layout="mono")
        self.resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)  # AAC knows a few rates only
        self.rate, self.heard = rate, 0

    def __enter__(self) -> Film:
        return self

    def show(self, time: float, picture: np.ndarray) -> None:
        frame = self.av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = round(CLOCK * time), Fraction(1, CLOCK)
        self.file.mux(self.pictures.encode(frame))

    def hear(self, wave: np.ndarray) -> None:
        for k in range(0, len(wave), 1024):
            frame = self.av.AudioFrame.from_ndarray(wave[None, k : k + 1024].copy(), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = self.rate, self.heard, Fraction(1, self.rate)
            self._encode(self.resampler.resample(frame))
            self.heard += frame.samples

    def _encode(self, frames: list[Any]) -> None:
        for frame in frames:
            self.file.mux(self.sounds.encode(frame))

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._encode(self.resampler.resample(None))
            self.file.mux(self.pictures.encode())
            self.file.mux(self.sounds.encode())
        self.file.close()
