"""The boundary: bytes and arrays from outside become clips here, or an error that names the sample. Nothing is replaced."""

from __future__ import annotations

import io
import warnings
import wave
from typing import Any

import numpy as np
import simplejpeg
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError

from equiav.config import DataConfig

# Of all that Pillow reads. Some formats are read by a program of the machine (Ghostscript), some are hardly tried, and bytes from
# a store are what they are, whatever their name says.
FORMATS = ("JPEG", "PNG")  # of a dataset's pictures
OWN_FORMATS = (*FORMATS, "WEBP", "BMP", "GIF", "TIFF")  # of files that a user of the API has
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # how such files' names end
MOST_PIXELS = 25 << 20  # of a picture, as a camera makes it: 80 MB, and some times that while it is decoded
warnings.filterwarnings(
    "ignore", category=UserWarning, module=r"PIL\."
)  # of bytes that may be anything, without a name
LONGEST = 3600  # seconds of sound
BLOCK = 1 << 16  # samples that are decoded at a time


class BadClipError(ValueError):
    """A sample cannot be used; the message names it and says why."""

    def __init__(self, sample: str, reason: str):
        super().__init__(f"sample {sample}: {reason}")
        self.sample, self.reason = sample, reason


class IncompleteError(ValueError):
    """Some of many could not be used; the others were."""


def check_frame(frame: np.ndarray | None, sample: str) -> np.ndarray:
    """-> (H, W, 3) uint8, as given."""
    if frame is None:
        raise BadClipError(sample, "has no image")
    if frame.dtype != np.uint8:
        raise BadClipError(sample, f"image is {frame.dtype}, expected uint8")
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise BadClipError(sample, f"image has shape {frame.shape}, expected (height, width, 3): three channels, RGB")
    if min(frame.shape[:2]) < 2:
        raise BadClipError(sample, f"image is {frame.shape[1]} x {frame.shape[0]} pixels")
    return frame


def decode_frame(data: bytes | None, sample: str) -> np.ndarray:
    """JPEG or PNG -> (H, W, 3) uint8."""
    if not data:
        raise BadClipError(sample, "has no image")
    if (frame := _decode_jpeg(data)) is not None:
        return check_frame(frame, sample)
    try:
        with open_image(io.BytesIO(data), FORMATS) as image:
            if image.mode != "RGB":
                raise BadClipError(sample, f"image has mode {image.mode}, expected RGB")
            frame = np.asarray(image)
    except UnidentifiedImageError:  # its text has an address in memory
        raise BadClipError(sample, f"image cannot be decoded: neither of {' and '.join(FORMATS)}") from None
    except BadClipError:
        raise
    except Exception as error:  # whatever a decoder has to say of bytes that may be anything
        raise BadClipError(sample, f"image cannot be decoded: {_said(error)}") from None
    return check_frame(frame, sample)


def open_image(file: Any, formats: tuple[str, ...]) -> Image.Image:
    """Of these formats alone, and of a size that fits in memory; its pixels are decoded when they are asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        image = Image.open(file, formats=formats)
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise ValueError(f"{width} x {height} pixels, expected {MOST_PIXELS} at most")
    return image


def require_whole_jpeg(data: bytes, name: str) -> None:
    """Damage in its middle, over which Pillow goes without a word. What stands between two segments is none."""
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("YCbCr", "RGB"):
            simplejpeg.decode_jpeg(data)
    except ValueError as error:
        if "Corrupt JPEG data" in str(error) and "extraneous bytes" not in str(error):
            raise BadClipError(name, f"image is damaged: {error}") from None


def read_picture(given: Any, name: str) -> np.ndarray:
    """A file (its path, or opened), or an image of Pillow -> (H, W, 3) uint8, upright."""
    try:
        image = given if isinstance(given, Image.Image) else open_image(given, OWN_FORMATS)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode[0] in "IF":
            raise BadClipError(name, f"picture has mode {image.mode}, expected 8 or 16 bits a channel")
        return check_frame(np.asarray(ImageOps.exif_transpose(image).convert("RGB")), name)
    except BadClipError:
        raise
    except UnidentifiedImageError:
        raise BadClipError(name, f"no picture: none of {', '.join(OWN_FORMATS)}") from None
    except Exception as error:  # whatever a decoder has to say of a file that may be anything
        raise BadClipError(name, f"no picture: {_said(error)}") from None


def _channels(shape: tuple[int, ...]) -> str:
    return f"audio has shape {shape}, expected (samples,): one channel; packing mixes stereo down"


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """In half of Pillow's time; None for anything but a sound JPEG in colours, of which Pillow has to say what it is."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB") or int(height) * int(width) > MOST_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data)
    except Exception:  # Pillow says what is wrong
        return None


def central_square(frame: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3), resized where the square has another side."""
    H, W = frame.shape[:2]
    own = min(H, W)
    square = frame[(H - own) // 2 : (H - own) // 2 + own, (W - own) // 2 : (W - own) // 2 + own]
    if own == side:
        return square
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC))


def check_audio(audio: np.ndarray | None, rate: int, sample: str, data: DataConfig) -> np.ndarray:
    """int16, or float in [-1, 1], of shape (L,) -> (L,) int16."""
    if audio is None or audio.size == 0:
        raise BadClipError(sample, "has no audio")
    if audio.ndim != 1:
        raise BadClipError(sample, _channels(audio.shape))
    if rate != data.sample_rate:
        raise BadClipError(
            sample, f"audio is at {rate} Hz, expected data.sample_rate={data.sample_rate}; packing resamples"
        )
    if len(audio) < data.min_seconds * rate:
        raise BadClipError(
            sample, f"audio is {len(audio) / rate:.3f} s, shorter than data.min_seconds={data.min_seconds}"
        )
    if np.issubdtype(audio.dtype, np.floating):
        if not np.isfinite(audio).all():
            raise BadClipError(sample, f"audio has {int((~np.isfinite(audio)).sum())} values that are not finite")
        if np.abs(audio).max() > 1:
            raise BadClipError(sample, f"audio peaks at {np.abs(audio).max():.3g}, expected floating point in [-1, 1]")
        audio = np.round(audio * 32767).astype(np.int16)
    elif audio.dtype != np.int16:
        raise BadClipError(sample, f"audio is {audio.dtype}, expected int16 or floating point in [-1, 1]")
    low, high = int(audio.min()), int(audio.max())
    if high - low < 2 * data.silence * 32767:
        raise BadClipError(
            sample,
            f"audio is silent: it stays within {(high - low) / 2 / 32767:.1e} of its middle, "
            f"data.silence={data.silence}",
        )
    return audio


def decode_wav(content: bytes | None, sample: str, data: DataConfig) -> np.ndarray:
    """16-bit PCM WAV -> (L,) int16."""
    if not content:
        raise BadClipError(sample, "has no audio")
    try:
        with wave.open(io.BytesIO(content)) as file:
            channels, width, rate, count = (
                file.getnchannels(),
                file.getsampwidth(),
                file.getframerate(),
                file.getnframes(),
            )
            raw = file.readframes(count)
    except Exception as error:  # what damaged headers raise
        raise BadClipError(sample, f"audio is not a WAV file: {str(error) or 'its header is damaged'}") from None
    if width != 2:
        raise BadClipError(sample, f"audio has {8 * width} bits a sample, expected 16")
    if len(raw) != count * channels * width:
        raise BadClipError(sample, f"audio is truncated: {len(raw)} of {count * channels * width} bytes")
    audio = np.frombuffer(raw, dtype="<i2")
    return check_audio(audio if channels == 1 else audio.reshape(-1, channels), rate, sample, data)


def decode_flac(content: bytes | None, sample: str, data: DataConfig) -> np.ndarray:
    """FLAC -> (L,) int16. Silence of days fits into some kilobytes: its length is asked for before memory is taken."""
    if not content:
        raise BadClipError(sample, "has no audio")
    if content[:4] != b"fLaC":  # other formats of libsndfile are not tried
        raise BadClipError(sample, "audio is not a FLAC file")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            count, rate, kind = file.frames, file.samplerate, f"{file.format} {file.subtype}"
            if kind != "FLAC PCM_16":
                raise BadClipError(sample, f"audio is {kind}, expected FLAC PCM_16")
            if file.channels != 1:
                raise BadClipError(sample, _channels((count, file.channels)))
            if not 0 <= count <= LONGEST * data.sample_rate:
                raise BadClipError(sample, f"audio has {count} samples, expected {LONGEST * data.sample_rate} at most")
            audio = np.empty(count, np.int16)
            filled = 0
            while filled < count and (got := len(file.read(out=audio[filled : filled + BLOCK]))):
                filled += got
    except BadClipError:
        raise
    except Exception as error:
        raise BadClipError(sample, f"audio is not a FLAC file: {_said(error)}") from None
    if filled != count:
        raise BadClipError(sample, f"audio is truncated: {filled} of {count} samples")
    return check_audio(audio, rate, sample, data)


DECODE_AUDIO = {"wav": decode_wav, "flac": decode_flac}


def encode_frame(frame: np.ndarray, quality: int = 90) -> bytes:
    """(H, W, 3) uint8 -> JPEG."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=quality, colorsubsampling="420")


def encode_wav(audio: np.ndarray, rate: int) -> bytes:
    """(L,) int16 -> 16-bit PCM WAV."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(audio.astype("<i2").tobytes())
    return buffer.getvalue()


def encode_flac(audio: np.ndarray, rate: int) -> bytes:
    """(L,) int16 -> 16-bit FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


ENCODE_AUDIO = {"wav": encode_wav, "flac": encode_flac}
