"""What cannot be used is refused by name; nothing is put in its place."""

import io
import os
import tracemalloc
import wave
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from equiav.config import DataConfig
from equiav.data.clips import (
    DECODE_AUDIO,
    ENCODE_AUDIO,
    BadClipError,
    check_audio,
    check_frame,
    decode_frame,
    decode_wav,
    encode_frame,
    encode_wav,
)
from equiav.inputs import pictures_of

DATA = DataConfig()
RATE = 16000


def noise(seconds=1.5, channels=1):
    audio = (np.random.default_rng(0).standard_normal((int(seconds * RATE), channels)) * 3000).astype(np.int16)
    return audio[:, 0] if channels == 1 else audio


def picture(mode="RGB", kind="JPEG"):
    buffer = io.BytesIO()
    gradient = np.linspace(0, 255, 40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    Image.fromarray(gradient).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def test_good_clips_pass_unchanged():
    audio = noise()
    assert check_audio(audio, RATE, "s", DATA) is audio
    assert np.array_equal(decode_wav(encode_wav(audio, RATE), "s", DATA), audio)
    as_float = audio / 32767
    assert np.array_equal(check_audio(as_float, RATE, "s", DATA), audio)
    assert decode_frame(picture(), "s").shape == (40, 30, 3)
    frame = decode_frame(picture(kind="PNG"), "s")
    assert np.abs(decode_frame(encode_frame(frame, 95), "s").astype(int) - frame).mean() < 3


def with_nan():
    audio = noise() / 32767
    audio[7] = np.nan
    return audio


@pytest.mark.parametrize(
    ("audio", "rate", "reason"),
    [
        (None, RATE, "has no audio"),
        (noise()[:0], RATE, "has no audio"),
        (noise(channels=2), RATE, r"shape \(24000, 2\), expected \(samples,\)"),
        (noise(), 44100, "44100 Hz, expected data.sample_rate=16000"),
        (noise(0.5), RATE, "0.500 s, shorter than data.min_seconds=1.0"),
        (with_nan(), RATE, "1 values that are not finite"),
        (noise() / 100.0, RATE, r"peaks at \d+"),
        (noise().astype(np.int32), RATE, "int32, expected int16"),
        (np.zeros(RATE, np.int16), RATE, "audio is silent"),
        (np.full(RATE, 700, np.int16), RATE, "audio is silent"),
        (np.zeros(RATE, np.float32), RATE, "audio is silent"),
    ],
)
def test_bad_audio_is_named(audio, rate, reason):
    with pytest.raises(BadClipError, match=f"^sample clip-17: .*{reason}") as error:
        check_audio(audio, rate, "clip-17", DATA)
    assert error.value.sample == "clip-17"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "has no audio"),
        (b"", "has no audio"),
        (b"RIFF", "not a WAV file"),
        (b"\x00" * 500, "not a WAV file"),
        (encode_wav(noise(), RATE)[:20000], "truncated: 19956 of 48000 bytes"),
        (encode_wav(noise(), 8000), "8000 Hz"),
        (encode_wav(noise(), RATE).replace(b"\x02\x00\x10\x00", b"\x01\x00\x08\x00", 1), "8 bits a sample"),
    ],
)
def test_bad_wav_is_named(content, reason):
    with pytest.raises(BadClipError, match=f"^sample clip-17: .*{reason}"):
        decode_wav(content, "clip-17", DATA)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "has no image"),
        (b"", "has no image"),
        (b"\xff\xd8 not a picture", "cannot be decoded"),
        (picture()[: len(picture()) // 2], "cannot be decoded: .*[Tt]runcated"),
        (picture()[:-30], "cannot be decoded: .*truncated"),
        (picture("L"), "mode L, expected RGB"),
        (picture("CMYK"), "mode CMYK, expected RGB"),
        (picture("RGBA", "PNG"), "mode RGBA, expected RGB"),
    ],
)
def test_bad_images_are_named(content, reason):
    with pytest.raises(BadClipError, match=f"^sample clip-17: .*{reason}"):
        decode_frame(content, "clip-17")


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (None, "has no image"),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        (np.zeros((4, 4, 1), np.uint8), "three channels"),
        (np.zeros((4, 4, 3), np.float32), "float32, expected uint8"),
        (np.zeros((4, 1, 3), np.uint8), "1 x 4 pixels"),
    ],
)
def test_bad_frames_are_named(frame, reason):
    with pytest.raises(BadClipError, match=f"^sample clip-17: .*{reason}"):
        check_frame(frame, "clip-17")


def test_damaged_bytes_never_escape_without_the_sample():
    """Random bytes changed and cut: decoded, or refused by name; nothing else is raised."""
    rng, refused = np.random.default_rng(0), []
    good = [
        (decode_frame, picture()),
        (decode_frame, picture(kind="PNG")),
        (decode_frame, picture(kind="PPM")),
        (lambda content, name: decode_wav(content, name, DATA), encode_wav(noise(), RATE)),
    ]
    for decode, content in good:
        for _ in range(300):
            damaged = bytearray(content[: rng.integers(20, len(content) + 1)] if rng.random() < 0.3 else content)
            for place in rng.integers(0, min(len(damaged), 200), rng.integers(1, 6)):
                damaged[place] = rng.integers(0, 256)
            try:
                decode(bytes(damaged), "clip-17")
            except BadClipError as error:
                refused.append(str(error))
    assert len(refused) > 300
    assert all(message.startswith("sample clip-17: ") for message in refused)


def test_edges():
    full = np.tile([1.0, -1.0], RATE)
    assert check_audio(full, RATE, "s", DATA).max() == 32767
    check_audio(np.tile(np.int16([0, 7]), RATE), RATE, "s", DATA)  # 3.5 / 32767 from its middle: just not silent
    with pytest.raises(BadClipError, match="silent"):
        check_audio(np.tile(np.int16([0, 5]), RATE), RATE, "s", DATA)
    stereo = io.BytesIO()
    with wave.open(stereo, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(noise(channels=2).tobytes())
    with pytest.raises(BadClipError, match=r"shape \(24000, 2\)"):
        decode_wav(stereo.getvalue(), "s", DATA)
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    with pytest.raises(BadClipError, match="1 x 1 pixels"):
        decode_frame(dot.getvalue(), "s")


def test_a_picture_that_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr("equiav.data.clips.MOST_PIXELS", 100)
    with pytest.raises(BadClipError, match="30 x 40 pixels, expected 100 at most"):
        decode_frame(picture(), "s")


# ---- bytes that are what they are, whatever their name says

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"


def test_no_program_of_this_machine_runs_on_bytes_from_a_bucket(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BadClipError, match="neither of JPEG and PNG"):
        decode_frame(POSTSCRIPT, "s")
    (tmp_path / "one.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(BadClipError, match="no picture"):
        pictures_of(tmp_path / "one.jpg")[0][0]()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "kind", ["AVIF", "DDS", "BLP", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "IM"]
)
def test_other_formats_are_bad_samples(kind):
    buffer = io.BytesIO()
    Image.new("P" if kind == "BLP" else "RGB", (40, 30)).save(buffer, kind)
    with pytest.raises(BadClipError, match="neither of JPEG and PNG"):
        decode_frame(buffer.getvalue(), "s")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "wav", "flac"])
def test_whatever_happens_to_bytes_they_are_a_clip_or_a_bad_one(kind, seed):
    """By mutation; `make fuzz` does it for longer."""
    rng = np.random.default_rng(seed)
    whole = picture(kind=kind) if kind.isupper() else ENCODE_AUDIO[kind](noise(), RATE)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(len(content))] = rng.integers(256)
        content = bytes(content[: rng.integers(1, len(content))] if rng.random() < 0.3 else content)
        with suppress(BadClipError):
            decode_frame(content, "s") if kind.isupper() else DECODE_AUDIO[kind](content, "s", DATA)


def test_silence_of_days_takes_no_memory():
    """Of a FLAC its header says how long it is: ten bytes make it 36 bits of samples."""
    content = bytearray(ENCODE_AUDIO["flac"](noise(), RATE))
    content[21] |= 0x0F  # of the number of samples, the upper bits
    tracemalloc.start()
    with pytest.raises(BadClipError, match=r"audio has \d{11} samples, expected 57600000 at most"):
        DECODE_AUDIO["flac"](bytes(content), "s", DATA)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 1 << 20
