"""What somebody else's program uses: `equiav.load(...)`, then sounds, pictures and videos as they come."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample
from xxhash import xxh3_64

from equiav.augment import normalised_spectrogram, original_image, sampled_vectors
from equiav.augment.logmel import window_and_hop
from equiav.config import ConfigError, ModelSettings, NotHere
from equiav.data.clips import PICTURES, BadClipError, central_square, check_audio, read_picture
from equiav.data.media import Shape, length_of, opened, picture_of
from equiav.evaluate.localize import heat
from equiav.inputs import Picture, Samples, Sound, pictures_of, sounds_of
from equiav.known import model_folder
from equiav.model import EquiAV
from equiav.model.classifier import Classifier
from equiav.weights import CLASSES, Classes, download, load_classifier, load_model
from streaming import BadSample

BATCH = 16  # clips that are computed together
ODDEST = 2000  # samples of the one rate, after which both rates' samples meet again
ENDED = ("lengths differ", "too short")  # why a later part cannot be read: the sound or the picture is shorter
SHORTEST = 0.5  # of a window, below which the rest of a video is left out


class Windows(NamedTuple):
    """Of a video or a sound file, from its beginning to its end."""

    begin: np.ndarray  # (n,) seconds
    end: np.ndarray  # (n,)
    audio: np.ndarray | None  # (n, d); None: it has no sound
    image: np.ndarray | None  # (n, d); None: no picture


def load(where: str | Path, device: str | torch.device = "cpu") -> Embedder | Labeller:
    """A model folder (of `equiav import`, or of a run, or the run's folder or store): s3://..., any that fsspec reads, or a path.
    A pretrained model embeds; a fine-tuned one names classes."""
    device = device_of(device)
    if isinstance(where, Path) and re.match(r"[a-z0-9]+:/", str(where)):
        raise ConfigError(f"{where} is a Path, which takes a slash from an address; give it as text")
    with tempfile.TemporaryDirectory(prefix="equiav-") as temporary:
        path = Path(where).expanduser() if "://" not in str(where) else download(str(where), Path(temporary))
        path = model_folder(path)
        if (path / CLASSES).is_file():
            network, settings, classes = load_classifier(path)
            return Labeller(network, settings, classes, device)
        return Embedder(*load_model(path), device)


def device_of(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device is {device!r}, expected a device of torch, such as cpu or cuda:0") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device}, expected cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise NotHere(f"device is {device}, expected cpu: this torch sees no GPU")
    return found


class Reader:
    """Sounds and pictures become what the model was trained on."""

    network: Any

    def __init__(self, settings: ModelSettings, device: str | torch.device):
        self.settings, self.device = settings, torch.device(device)
        window, hop = window_and_hop(settings.data.sample_rate)
        self.length = (settings.model.spectrogram_frames - 1) * hop + window  # samples that the model hears
        self.data = replace(settings.data, min_seconds=0.025, silence=0.0)

    def to(self, device: str | torch.device) -> Self:
        self.device = device_of(device)
        self.network.to(self.device)
        return self

    @property
    def sample_rate(self) -> int:
        """Of sounds, as the model hears them; others are resampled."""
        return self.settings.data.sample_rate

    @property
    def seconds(self) -> float:
        """That the model hears of a sound; the rest is not heard."""
        return self.length / self.settings.data.sample_rate

    def spectrograms(self, sounds: Sequence[Callable[[], Samples]]) -> Tensor:
        """-> (b, T, F)"""
        waveform = torch.zeros(len(sounds), self.length, dtype=torch.int16)
        lengths = torch.zeros(len(sounds), dtype=torch.int64)
        for k, sound in enumerate(sounds):
            wave = self._wave(sound())[: self.length].copy()
            waveform[k, : len(wave)], lengths[k] = torch.from_numpy(wave), len(wave)
        inputs = waveform.to(self.device), lengths.to(self.device)
        return normalised_spectrogram(*inputs, self.settings.model, self.settings.data)

    def pictures(self, frames: Sequence[Callable[[], np.ndarray]]) -> Tensor:
        """-> (b, 3, H, W)"""
        squares = [central_square(frame(), self.settings.data.frame_size) for frame in frames]
        stacked = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        return original_image(stacked.to(self.device), self.settings.model.image_size)

    def preprocess(self, picture: Picture) -> Tensor:
        """A picture -> (3, H, W), or several -> (b, 3, H, W): what `encode_image` takes."""
        frames, several = pictures_of(picture)
        found = self.pictures(frames)
        return found if several else found[0]

    def preprocess_audio(self, sound: Sound, rate: float | None = None, channels: str | None = None) -> Tensor:
        """A sound -> (T, F), or several -> (b, T, F): what `encode_audio` takes."""
        sounds, several = sounds_of(sound, rate, channels)
        found = self.spectrograms(sounds)
        return found if several else found[0]

    def _wave(self, sound: Samples) -> np.ndarray:
        """-> (L,) int16, mono, at the model's rate."""
        wave, rate, name = sound
        if not isinstance(rate, int | float | np.integer | np.floating) or not 1 <= rate < 1e6 or rate != int(rate):
            raise BadClipError(name, f"its rate is {rate}, expected samples a second, a whole number")
        ours, theirs = self.data.sample_rate, int(rate)
        if theirs // math.gcd(theirs, ours) > ODDEST:
            raise BadClipError(
                name, f"its rate is {theirs}, which {ours} has too little in common with; resample it before"
            )
        whole = wave.dtype.kind == "i" and wave.dtype.itemsize == 2
        if not whole and wave.dtype.kind != "f":
            raise BadClipError(name, f"audio is {wave.dtype}, expected int16 or floating point in [-1, 1]")
        wave = wave.astype(np.int16 if whole else np.float32)  # of any order of bytes
        if wave.ndim == 2:
            channels, wave = wave, wave.mean(axis=0, dtype=np.float32)
            if wave.size and np.ptp(wave) <= 1e-4 * np.ptp(channels) and np.ptp(channels[0]) > 0:
                raise BadClipError(name, "its channels cancel each other when they become one; give one of them")
            wave = np.round(wave).astype(np.int16) if whole else wave
        checked = check_audio(wave, theirs, name, replace(self.data, sample_rate=theirs))
        if theirs == ours:
            return checked
        checked = checked[: math.ceil((self.length + 1) * theirs / ours)]  # what is heard
        other = resample(torch.from_numpy(checked.astype(np.float32) / 32768), theirs, ours)
        return check_audio((other.clamp(-1, 32767 / 32768) * 32768).round().short().numpy(), ours, name, self.data)

    def windows(
        self,
        path: str | Path,
        frames: int = 1,
        hears: bool = True,
        sees: bool = True,
        per_second: float = 0.0,
        lost: list[str] | None = None,
    ) -> Iterator[tuple[float, float, np.ndarray | None, list[Any]]]:
        """Of a video, a sound file or a picture: begin, end, sound (L,) int16 or None, and `frames` pictures or none, of each
        part that is as long as the model hears, as far as it has all that is wanted: hears, sees.
        per_second: pictures, in place of `frames` of each part. lost: is told of parts that cannot be read, which are an error
        without it."""
        if not isinstance(frames, int) or frames < 1:
            raise ConfigError(f"frames is {frames!r}, expected 1 or more")
        if not isinstance(path, str | Path):
            raise BadClipError("video", f"is {type(path).__name__}, expected a path")
        name = str(Path(path).absolute())
        if name.lower().endswith(PICTURES):
            if not sees:
                raise BadClipError(str(path), "has picture only")
            yield 0.0, 0.0, None, [read_picture(name, str(path))] * frames
            return
        sound, picture = _streams(name)
        hears, sees = hears and sound, sees and picture
        if not hears and not sees:
            raise BadClipError(
                str(path), f"has {'sound' if sound else 'picture' if picture else 'neither sound nor picture'} only"
            )
        length, step = length_of(name), self.settings.model.spectrogram_frames / 100

        def shape(seconds: float) -> Shape:
            count = max(1, round(per_second * seconds)) if per_second else frames
            return Shape(count, self.settings.data.frame_size, 90, "wav", math.inf, True, self.data, hears, sees)

        try:
            with opened(name) as media:
                if length <= step * (1 + SHORTEST):
                    whole = media.pictures(shape(length or step)) if sees else ([], [], 0.0)
                    heard = media.sound(shape(step)) if hears else None
                    yield 0.0, length or whole[2], heard, whole[0]
                    return
                for k in range(int(length / step - SHORTEST) + 1):
                    begin, end = k * step, min((k + 1) * step, length)
                    try:
                        heard = media.sound(shape(step), begin, end) if hears else None
                        seen = media.pictures(shape(end - begin), begin, end)[0] if sees else []
                    except BadSample as error:
                        if k and error.reason in ENDED:
                            return
                        if lost is None:
                            raise
                        lost.append(f"{path}, {begin:.1f} to {end:.1f} s: {error.reason}: {error.detail}")
                        continue
                    yield begin, end, heard, seen
        except BadSample as error:
            raise BadClipError(str(path), f"{error.reason}: {error.detail}") from None


class Embedder(Reader):
    """A pretrained model."""

    def __init__(self, network: EquiAV, settings: ModelSettings, device: str | torch.device = "cpu"):
        super().__init__(settings, device)
        self.network = network.to(self.device).eval()
        count = settings.objective.sampled_in_evaluation
        one = torch.zeros(1, dtype=torch.int64, device=self.device)
        # The centroid's vectors: the same for every clip, as in retrieval with seed 0.
        self.vectors = sampled_vectors(settings, 0, 0, one, count) if count else (None, None)

    def to(self, device: str | torch.device) -> Self:
        super().to(device)
        audio, image = (None if one is None else one.to(self.device) for one in self.vectors)
        self.vectors = audio, image
        return self

    def __repr__(self) -> str:
        return (
            f"Embedder({self.settings.model.size}, dim={self.dim}, hears {self.seconds:.2f} s at {self.sample_rate} Hz, "
            f"sees {self.settings.model.image_size} x {self.settings.model.image_size}, on {self.device})"
        )

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return self.settings.model.head_width

    def encode_audio(self, spectrograms: Tensor) -> Tensor:
        """(b, T, F) of `preprocess_audio` -> (b, d), L2-normalised, with gradients where they are on."""
        _tensors(spectrograms, 3, "(b, T, F) of preprocess_audio")
        return self.network.embed_audio(spectrograms.to(self.device), self.vectors[0])

    def encode_image(self, pictures: Tensor) -> Tensor:
        """(b, 3, H, W) of `preprocess` -> (b, d), L2-normalised, with gradients where they are on."""
        _tensors(pictures, 4, "(b, 3, H, W) of preprocess")
        return self.network.embed_image(pictures.to(self.device), self.vectors[1])

    def embed_audio(self, sound: Sound, rate: float | None = None, channels: str | None = None) -> np.ndarray:
        """A sound, or several -> (d,), or (b, d): L2-normalised. rate: samples a second of arrays. Samples (B, L) are B sounds;
        channels: "first" for (channels, L), "last" for (L, channels). What comes after `seconds` is not heard: `embed_video`
        cuts."""
        return self._embed(*sounds_of(sound, rate, channels), lambda some: self.encode_audio(self.spectrograms(some)))

    def embed_image(self, picture: Picture) -> np.ndarray:
        """A picture, or several -> (d,), or (b, d): L2-normalised. Its central square is seen."""
        return self._embed(*pictures_of(picture), lambda some: self.encode_image(self.pictures(some)))

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], several: bool, embed: Callable[[Sequence[Any]], Tensor]) -> np.ndarray:
        found = np.concatenate([embed(some).float().cpu().numpy() for some in _batches(items)])
        return found if several else found[0]

    def embed_video(self, path: str | Path, frames: int = 1) -> Windows:
        """A video or sound file, in parts as long as the model hears; a rest that is shorter than half of that is left out.
        frames: of each part, whose mean embedding, normalised, is the part's."""
        return self.of_windows(list(self.windows(path, frames)), frames)

    def of_windows(self, parts: Sequence[tuple[float, float, np.ndarray | None, list[Any]]], frames: int) -> Windows:
        """Of what `windows` has read."""
        begin, end, sounds, pictures = (list(of) for of in zip(*parts, strict=True))
        audio = None if sounds[0] is None else self.embed_audio(sounds, self.data.sample_rate)
        image = None
        if pictures[0]:
            each = self.embed_image([one for of in pictures for one in of]).reshape(len(parts), frames, -1).mean(axis=1)
            image = each / np.linalg.norm(each, axis=1, keepdims=True)
        return Windows(np.array(begin), np.array(end), audio, image)

    def digest(self) -> str:
        """Of all that embeddings depend on."""
        found = xxh3_64()
        for name, value in sorted(self.network.state_dict().items()):
            found.update(name.encode())
            found.update(np.ascontiguousarray(value.cpu().numpy()).tobytes())
        found.update(repr(self.settings).encode())
        return found.hexdigest()

    @torch.no_grad()
    def localize(
        self, sound: Sound, picture: Picture, rate: float | None = None, others: np.ndarray | None = None
    ) -> np.ndarray:
        """What of a picture belongs to a sound -> (rows, columns), of a list of pictures (b, rows, columns), with a sound for all
        or as many: what each patch of the central square adds to the score. All together add, within some percent, what the
        picture's score is above that of its mean colour. others (n, d): embeddings of other sounds, such as those of a dataset;
        what the sound has of its own beside them is looked for, which points better (docs/downstream.md)."""
        pictures, listed = pictures_of(picture)
        own = torch.from_numpy(self.embed_audio(sound, rate))
        own = own.expand(len(pictures), -1) if own.dim() == 1 else own
        if len(own) != len(pictures):
            raise ConfigError(f"{len(own)} sounds and {len(pictures)} pictures, expected one sound, or as many")
        if others is not None:
            own = own - torch.from_numpy(np.asarray(others, np.float32)).reshape(-1, own.shape[1]).mean(dim=0)
        self.network.requires_grad_(False)
        parts = [
            heat(self.network, self.pictures(some), z.to(self.device), self.vectors[1]).float().cpu().numpy()
            for some, z in zip(_batches(pictures), own.split(BATCH), strict=True)
        ]
        return np.concatenate(parts) if listed else parts[0][0]

    def score(self, sound: Sound, picture: Picture, rate: float | None = None) -> Any:
        """How well a sound and a picture belong together: the cosine of their embeddings, -1 to 1, or (b,) of as many of both.
        What is high is a matter of the model; compare with pairs that do not belong together."""
        audio, image = self.embed_audio(sound, rate), self.embed_image(picture)
        if audio.shape != image.shape:
            raise ConfigError(f"{_count(audio)} and {_count(image, 'picture')}, expected as many")
        found = (audio * image).sum(axis=-1)
        return found if found.ndim else float(found)


class Labeller(Reader):
    """A fine-tuned model."""

    def __init__(
        self, network: Classifier, settings: ModelSettings, classes: Classes, device: str | torch.device = "cpu"
    ):
        super().__init__(settings, device)
        self.network, self.classes, self.one = network.to(self.device).eval(), classes.names, classes.one

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:3]) + ", ..." * (len(self.classes) > 3)
        return f"Labeller({self.settings.model.size}, {len(self.classes)} classes: {names}, on {self.device})"

    def probabilities(
        self, sound: Sound | None = None, picture: Picture | None = None, rate: float | None = None
    ) -> np.ndarray:
        """-> (classes,), of several (b, classes)."""

        def compute(audio: Tensor | None, image: Tensor | None) -> Tensor:
            z = self.network(audio, image).double()
            return z.softmax(dim=1) if self.one else z.sigmoid()

        return self._each(sound, picture, rate, compute)

    def features(
        self, sound: Sound | None = None, picture: Picture | None = None, rate: float | None = None
    ) -> np.ndarray:
        """What the classes are told from -> (D,), of several (b, D)."""
        return self._each(sound, picture, rate, self.network.pooled)

    @torch.no_grad()
    def _each(self, sound: Any, picture: Any, rate: Any, compute: Callable[..., Tensor]) -> np.ndarray:
        for what, given, needed in (("sound", sound, self.network.audio), ("picture", picture, self.network.image)):
            if (given is None) != (needed is None):
                raise ConfigError(f"{what}: this model {'needs one' if given is None else 'was trained without'}")
        sounds, several = (None, False) if sound is None else sounds_of(sound, rate, None)
        pictures, several = (None, several) if picture is None else pictures_of(picture)
        count = len(sounds if sounds is not None else pictures or [])
        if sounds is not None and pictures is not None and len(sounds) != len(pictures):
            raise ConfigError(f"{len(sounds)} sounds and {len(pictures)} pictures, expected as many")
        if not count:
            raise ConfigError("nothing was given to name")
        parts = []
        for k in range(0, count, BATCH):
            audio = None if sounds is None else self.spectrograms(sounds[k : k + BATCH])
            image = None if pictures is None else self.pictures(pictures[k : k + BATCH])
            parts.append(compute(audio, image).cpu().numpy())
        found = np.concatenate(parts)
        return found if several else found[0]

    def predict(
        self, sound: Sound | None = None, picture: Picture | None = None, rate: float | None = None, top: int = 5
    ) -> Any:
        """The likeliest classes, with their probabilities: [(class, probability), ...]; of several a list of such lists."""
        found = self.probabilities(sound, picture, rate)
        return self._named(found, top) if found.ndim == 1 else [self._named(one, top) for one in found]

    def _named(self, probabilities: np.ndarray, top: int) -> list[tuple[str, float]]:
        return [(self.classes[k], float(probabilities[k])) for k in np.argsort(-probabilities, kind="stable")[:top]]

    def predict_video(self, path: str | Path, frames: int = 1, top: int = 5) -> list[tuple[str, float]]:
        """Of a file: the mean of the probabilities over its parts, and `frames` frames of each."""
        hears, sees = self.network.audio is not None, self.network.image is not None
        has = _streams(str(Path(path).absolute()))
        for what, needed, there in (("sound", hears, has[0]), ("picture", sees, has[1])):
            if needed and not there:
                raise BadClipError(str(path), f"has no {what}, which this model needs")
        found = []
        for _, _, sound, pictures in self.windows(path, frames, hears, sees):
            count = max(1, len(pictures))
            sounds: list[Any] | None = [sound] * count if hears else None
            found.append(self.probabilities(sounds, pictures if sees else None, self.data.sample_rate).mean(axis=0))
        return self._named(np.mean(found, axis=0), top)


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    if not len(items):
        raise ConfigError("nothing was given to embed")
    for k in range(0, len(items), BATCH):
        yield items[k : k + BATCH]


def _tensors(given: Any, dimensions: int, expected: str) -> None:
    if not isinstance(given, Tensor) or given.dim() != dimensions or given.dtype != torch.float32:
        found = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ConfigError(f"{found} was given, expected float32 {expected}")


def _count(embeddings: np.ndarray, what: str = "sound") -> str:
    return f"{len(embeddings)} {what}s" if embeddings.ndim == 2 else f"one {what}"


def require_av() -> None:
    try:
        __import__("av")
    except ModuleNotFoundError:
        raise NotHere("av is not installed, which reads videos; `pip install 'equiav[prep]'` brings it") from None


def _streams(path: str) -> tuple[bool, bool]:
    """Whether a file has sound, and a picture."""
    require_av()
    import av
    import av.error

    try:
        with av.open(path) as file:
            return bool(file.streams.audio), picture_of(file) is not None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadClipError(path, f"cannot be read: {error}") from None


__all__ = ["Embedder", "Labeller", "Windows", "load"]
