"""Sounds and pictures as programs have them: files, addresses, bytes, arrays, tensors, what torchaudio and datasets give."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import fsspec
import numpy as np
import soundfile
from PIL import Image
from torch import Tensor

from equiav.config import ConfigError
from equiav.data.clips import LONGEST, BadClipError, check_frame, read_picture
from equiav.terminal import masked

Sound = Any
"""A file (path, s3://... or any other that fsspec reads, bytes, or opened), samples (L,) as int16 or floating point in [-1, 1],
(waveform, rate) as torchaudio gives it, or a dict of the datasets library. A list of these, or samples (B, L), are several."""
Picture = Any
"""A file as for a sound, a PIL image, (H, W, 3) uint8, a tensor (3, H, W) uint8, or a dict of the datasets library. A list of
these, or one more dimension in front, are several."""
CHANNELS = 32  # of one sound, at most
SOUNDS = "a file, bytes, samples (L,), (waveform, rate), or a dict of the datasets library"
PICTURES = "a file, bytes, a PIL image, (H, W, 3) uint8, or a dict of the datasets library"


class Samples(NamedTuple):
    """Of one sound."""

    values: np.ndarray  # (L,), or (channels, L)
    rate: Any
    name: str


def sounds_of(given: Sound, rate: Any, channels: str | None) -> tuple[list[Callable[[], Samples]], bool]:
    """-> what reads each, and whether several were given. channels: what the dimension of channels is, if samples have one."""
    if channels not in (None, "first", "last"):
        raise ConfigError(f"channels is {channels!r}, expected 'first' for (channels, L) or 'last' for (L, channels)")
    if isinstance(given, list) or (isinstance(given, tuple) and not _with_rate(given)):
        return [partial(_sound, one, rate, channels, f"sound {k}") for k, one in enumerate(given)], True
    if _is_array(given) and given.ndim == 2 + (channels is not None):
        return [partial(_sound, one, rate, channels, f"sound {k}") for k, one in enumerate(given)], True
    return [partial(_sound, given, rate, channels, "sound 0")], False


def _with_rate(given: Any) -> TypeGuard[Any]:
    return len(given) == 2 and _is_array(given[0]) and isinstance(given[1], int | float | np.integer | np.floating)


def _is_array(given: Any) -> TypeGuard[Any]:
    return isinstance(given, np.ndarray | Tensor)


def _sound(given: Any, rate: Any, channels: str | None, name: str) -> Samples:
    asked = rate
    if isinstance(given, tuple) and _with_rate(given):
        given, rate, channels = given[0], given[1], channels or ("first" if given[0].ndim == 2 else None)
    elif reads := getattr(given, "get_all_samples", None):  # torchcodec's, which the datasets library gives
        decoded = reads()
        given, rate, channels = decoded.data, decoded.sample_rate, "first"
    elif isinstance(given, Mapping):
        if given.get("array") is not None:
            given, rate = np.asarray(given["array"]), given.get("sampling_rate")
            channels = "first" if given.ndim == 2 else None
        else:
            given = _of_dict(given, name, SOUNDS)
    if asked is not None and rate is not asked and rate != asked:
        raise BadClipError(name, f"its rate is {rate}, and {asked} was given as well; leave one out")
    if _is_array(given):
        values = _numpy(given)
        if values.ndim != (1 if channels is None else 2):
            said = "channels='first' or 'last' says which are channels" if values.ndim == 2 else f"expected {SOUNDS}"
            raise BadClipError(name, f"has shape {tuple(values.shape)}; {said}")
        values = values.T if channels == "last" else values
        if values.ndim == 2 and len(values) > CHANNELS:
            raise BadClipError(
                name,
                f"has {len(values)} channels, expected {CHANNELS} at most; several sounds are (B, L); channels='last'?",
            )
        return Samples(values, rate, name)
    file, name = _file(given, name, SOUNDS)
    try:
        with soundfile.SoundFile(file) as opened:
            floats = opened.subtype in ("FLOAT", "DOUBLE")  # which are not scaled to whole numbers
            if opened.frames > LONGEST * opened.samplerate:
                raise ValueError(f"it has {opened.frames} samples, expected {LONGEST} s of sound at most")
            values = opened.read(dtype="float32" if floats else "int16", always_2d=True)
            found = Samples((values.clip(-1, 1) if floats else values).T, opened.samplerate, name)
    except Exception as error:  # whatever libsndfile has to say of a file that may be anything
        raise BadClipError(name, f"{error}; embed_video reads what FFmpeg does") from None
    if asked is not None and found.rate != asked:
        raise BadClipError(name, f"its rate is {found.rate}, and {asked} was given as well; leave that out")
    return found


def pictures_of(given: Picture) -> tuple[list[Callable[[], np.ndarray]], bool]:
    """-> what reads each as (H, W, 3) uint8, and whether several were given."""
    several = isinstance(given, list | tuple) or (_is_array(given) and given.ndim == 4)
    listed: Sequence[Any] = given if several else [given]
    return [partial(_picture, one, f"picture {k}") for k, one in enumerate(listed)], several


def _picture(given: Any, name: str) -> np.ndarray:
    if isinstance(given, Mapping):
        given = _of_dict(given, name, PICTURES)
    if _is_array(given):
        values = _numpy(given)
        if isinstance(given, Tensor) and values.ndim == 3 and values.shape[0] == 3 != values.shape[2]:
            values = values.transpose(1, 2, 0)
        return check_frame(values, name)
    file, name = (given, name) if isinstance(given, Image.Image) else _file(given, name, PICTURES)
    return read_picture(file, name)


def _of_dict(given: Mapping[str, Any], name: str, expected: str) -> Any:
    """As the datasets library keeps a file that it has not decoded."""
    for key in ("bytes", "path"):
        if given.get(key) is not None:
            return given[key]
    raise BadClipError(name, f"is a dict of {', '.join(map(str, given)) or 'nothing'}, expected {expected}")


def _file(given: Any, name: str, expected: str) -> tuple[Any, str]:
    """-> what can be opened, and what it is called."""
    if isinstance(given, bytes | bytearray | memoryview):
        return io.BytesIO(bytes(given)), name
    if isinstance(given, str) and "://" in given:
        try:
            with fsspec.open(given, "rb") as file:
                return io.BytesIO(file.read()), masked(given)  # type: ignore[union-attr]
        except Exception as error:  # whatever a file system has to say
            raise BadClipError(masked(given), f"cannot be read: {type(error).__name__}: {masked(str(error))}") from None
    if isinstance(given, str | Path):
        if not Path(given).expanduser().is_file():
            raise BadClipError(str(given), "is no file that exists")
        return str(Path(given).expanduser()), str(given)
    if hasattr(given, "read"):
        if getattr(given, "seekable", lambda: False)():
            given.seek(0)
        return given, str(getattr(given, "name", name))
    raise BadClipError(name, f"is {type(given).__name__}, expected {expected}")


def _numpy(given: Any) -> np.ndarray:
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        return (given.float() if given.is_floating_point() else given).numpy()
    return given
