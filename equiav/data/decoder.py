"""What the loader's processes do with a sample: one frame and the sound, or one of both, as arrays. No torch here: they start
fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equiav.config import DataConfig, ModelConfig
from equiav.data.clips import DECODE_AUDIO, BadClipError, central_square, decode_frame
from streaming import BadSample

IMAGES = ("jpg", "jpeg", "png")


class ClipDecoder:
    """A `streaming.Decoder`: `K.jpg` (one of them, by the draw) and `wav` or `flac`, or what is asked for of these."""

    def __init__(self, model: ModelConfig, data: DataConfig, hears: bool = True, sees: bool = True):
        self.data, self.hears, self.sees = data, hears, sees
        window, hop = int(data.sample_rate * 0.025), int(data.sample_rate * 0.010)
        self.length = (model.spectrogram_frames - 1) * hop + window  # samples that the model hears
        self.fields: dict[str, tuple[tuple[int, ...], str]] = {}
        if sees:
            self.fields["frames"] = ((data.frame_size, data.frame_size, 3), "uint8")
        if hears:
            self.fields |= {"waveform": ((self.length,), "int16"), "lengths": ((), "int64")}

    def members(self, names: Sequence[str], draw: float) -> Sequence[str]:
        frames = [name for name in names if name.rpartition(".")[2] in IMAGES]
        sounds = [name for name in names if name in DECODE_AUDIO]
        if (self.sees and not frames) or (self.hears and not sounds):
            wanted = ["K.jpg"] * self.sees + [f"one of {', '.join(DECODE_AUDIO)}"] * self.hears
            raise BadSample("member missing", f"has {', '.join(names)}; expected {' and '.join(wanted)}")
        frames.sort(key=lambda name: (len(name), name))  # 9.jpg before 10.jpg
        image = [frames[int(draw * len(frames))]] if self.sees else []
        return image + (sounds[:1] if self.hears else [])

    def decode(self, key: str, members: dict[str, bytes], out: dict[str, np.ndarray]) -> None:
        *images, last = members
        if self.sees:
            image = images[0] if self.hears else last
            try:
                out["frames"][...] = central_square(decode_frame(members[image], key), self.data.frame_size)
            except BadClipError as error:
                raise BadSample("image", f"{image}: {error.reason}") from None
        if self.hears:
            self._hear(key, last, members[last], out)

    def _hear(self, key: str, sound: str, content: bytes, out: dict[str, np.ndarray]) -> None:
        try:
            audio = DECODE_AUDIO[sound](content, key, self.data)[: self.length]
        except BadClipError as error:
            raise BadSample("audio", f"{sound}: {error.reason}") from None
        out["waveform"][: len(audio)] = audio
        out["waveform"][len(audio) :] = 0
        out["lengths"][...] = len(audio)
