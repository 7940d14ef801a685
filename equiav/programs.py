"""A trained model as programs that run without this package: from samples and pixels to embeddings or classes."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from equiav.api import Embedder, Labeller
from equiav.augment import normalised_spectrogram, original_image
from equiav.config import ConfigError, NotHere

MOST = 4096  # clips of a batch
NEAR = (
    1e-4  # by which a reloaded program may be off: other programs round otherwise, and the logarithm of little is large
)
ONNX = ("onnx", "onnxscript", "onnxruntime")


class Sound(nn.Module):
    """waveform (b, L) float32 in [-1, 1], mono, at the model's rate, filled up with zeros to what the model hears; lengths (b,)
    int64, of which samples count -> embedding (b, d)."""

    t: Tensor | None

    def __init__(self, model: Embedder):
        super().__init__()
        self.network, self.settings = model.network, model.settings
        self.register_buffer("t", model.vectors[0], persistent=False)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        spectrogram = normalised_spectrogram(waveform, lengths, self.settings.model, self.settings.data)
        return self.network.embed_audio(spectrogram, self.t)


class Picture(nn.Module):
    """frames (b, 3, H, H) uint8, the central square of a picture -> embedding (b, d)."""

    t: Tensor | None

    def __init__(self, model: Embedder):
        super().__init__()
        self.network, self.size = model.network, model.settings.model.image_size
        self.register_buffer("t", model.vectors[1], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        return self.network.embed_image(original_image(frames, self.size), self.t)


class Classes(nn.Module):
    """What of waveform, lengths and frames the model needs, in this order -> probabilities (b, classes)."""

    def __init__(self, model: Labeller):
        super().__init__()
        self.network, self.settings, self.one = model.network, model.settings, model.one

    def forward(self, *given: Tensor) -> Tensor:
        hears, sees = self.network.audio is not None, self.network.image is not None
        audio = normalised_spectrogram(given[0], given[1], self.settings.model, self.settings.data) if hears else None
        image = original_image(given[-1], self.settings.model.image_size) if sees else None
        z = self.network(audio, image)
        return z.softmax(dim=1) if self.one else z.sigmoid()


class Program(NamedTuple):
    module: nn.Module
    inputs: dict[str, Tensor]  # something to try it with
    output: str


def programs(model: Embedder | Labeller) -> dict[str, Program]:
    """File name -> program."""
    g = torch.Generator().manual_seed(0)
    side = model.settings.data.frame_size
    wave = 0.1 * torch.randn(3, model.length, generator=g)
    # A tone leaves most of a spectrogram to what rounding does, which the logarithm makes large.
    wave[1] = 0.5 * torch.sin(torch.arange(model.length) * (2 * math.pi * 1000 / model.sample_rate))
    wave[1, model.length // 2 :] = 0
    sound = {"waveform": wave, "lengths": torch.tensor([model.length, model.length // 2, model.length])}
    picture = {"frames": torch.randint(0, 256, (3, 3, side, side), generator=g, dtype=torch.uint8)}
    if isinstance(model, Embedder):
        return {
            "audio": Program(Sound(model), sound, "embedding"),
            "image": Program(Picture(model), picture, "embedding"),
        }
    given = (sound if model.network.audio is not None else {}) | (picture if model.network.image is not None else {})
    return {"classes": Program(Classes(model), given, "probabilities")}


@torch.no_grad()
def write(program: Program, path: Path, kinds: tuple[str, ...]) -> dict[str, float]:
    """path: without its ending -> file name: by how much the reloaded program is off, at most."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporters, about themselves
        return _write(program, path, kinds)


def _write(program: Program, path: Path, kinds: tuple[str, ...]) -> dict[str, float]:
    module, inputs = program.module.eval(), tuple(program.inputs.values())
    right = module(*inputs)  # before it is traced: it makes its constants
    every = {0: torch.export.Dim("batch", min=1, max=MOST)}
    shapes: Any = tuple(every for _ in inputs)
    traced = torch.export.export(module, inputs, dynamic_shapes=(shapes,) if isinstance(module, Classes) else shapes)
    off = {}
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # which tells how it folds constants
    if "torch" in kinds:
        file = path.with_suffix(".pt2")
        torch.export.save(traced, file)
        off[file.name] = _apart(torch.export.load(file).module(), inputs, right)
    if "onnx" in kinds:
        file = path.with_suffix(".onnx")
        torch.onnx.export(traced, args=inputs, f=file, dynamo=True, input_names=list(program.inputs), verbose=False,
                          output_names=[program.output], external_data=file_size(module) > 1 << 30)  # fmt: skip
        off[file.name] = _apart(_onnx(file), inputs, right)
    for name, worst in off.items():
        if not worst <= NEAR:
            raise ConfigError(f"{path.parent / name}: reloaded, it is off by {worst:.1e}, expected at most {NEAR:g}")
    return off


def file_size(module: nn.Module) -> int:
    """Bytes of its weights. ONNX's own files end at 2 GB."""
    return sum(x.numel() * x.element_size() for x in module.parameters())


def require_onnx() -> None:
    for name in ONNX:
        try:
            __import__(name)
        except ModuleNotFoundError:
            raise NotHere(f"{name} is not installed; `pip install 'equiav[export]'` brings it") from None


def _onnx(file: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        names = [one.name for one in session.get_inputs()]
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(np.asarray(session.run(None, given)[0]))

    return run


def _apart(run: Any, inputs: tuple[Tensor, ...], right: Tensor) -> float:
    """At the batch that it was made with, at one clip, and at more."""
    more = tuple(torch.cat([x, x.flip(0)]) for x in inputs)
    found = [
        (run(*inputs), right),
        (run(*(x[1:2] for x in inputs)), right[1:2]),
        (run(*more), torch.cat([right, right.flip(0)])),
    ]
    return max(float((one - other).abs().max()) for one, other in found)
