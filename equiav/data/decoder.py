"""What the loader's processes do with a sample: one frame and the sound, as arrays. No torch here: they start fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equiav.config import DataConfig, ModelConfig
from equiav.data.clips import DECODE_AUDIO, BadClipError, central_square, decode_frame
from streaming import BadSample

IMAGES = ("jpg", "jpeg", "png")


class ClipDecoder:
    """A `streaming.Decoder`: `K.jpg` (one of them, by the draw) and `wav` or `flac`."""

    def __init__(self, model: ModelConfig, data: DataConfig):
        self.data = data
        window, hop = int(data.sample_rate * 0.025), int(data.sample_rate * 0.010)
        self.length = (model.spectrogram_frames - 1) * hop + window  # samples that the model hears
        self.fields = {
            "frames": ((data.frame_size, data.frame_size, 3), "uint8"),
            "waveform": ((self.length,), "int16"),
            "lengths": ((), "int64"),
        }

    def members(self, names: Sequence[str], draw: float) -> Sequence[str]:
        frames = [name for name in names if name.rpartition(".")[2] in IMAGES]
        sounds = [name for name in names if name in DECODE_AUDIO]
        if not frames or not sounds:
            raise BadSample(
                "member missing", f"has {', '.join(names)}; expected K.jpg and one of {', '.join(DECODE_AUDIO)}"
            )
        frames.sort(key=lambda name: (len(name), name))  # 9.jpg before 10.jpg
        return frames[int(draw * len(frames))], sounds[0]

    def decode(self, key: str, members: dict[str, bytes], out: dict[str, np.ndarray]) -> None:
        image, sound = members
        try:
            out["frames"][...] = central_square(decode_frame(members[image], key), self.data.frame_size)
        except BadClipError as error:
            raise BadSample("image", f"{image}: {error.reason}") from None
        try:
            audio = DECODE_AUDIO[sound](members[sound], key, self.data)[: self.length]
        except BadClipError as error:
            raise BadSample("audio", f"{sound}: {error.reason}") from None
        out["waveform"][: len(audio)] = audio
        out["waveform"][len(audio) :] = 0
        out["lengths"][...] = len(audio)
