"""A sample's members -> one frame and the sound as arrays: the frame that the draw says, the sound as long as the model hears."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from equiav.config import DataConfig, ModelConfig
from equiav.data.clips import encode_flac, encode_frame, encode_wav
from equiav.data.decoder import ClipDecoder
from streaming import BadSample

DATA = DataConfig(frame_size=32)
MODEL = ModelConfig(spectrogram_frames=256)
LENGTH = 255 * 160 + 400  # 256 windows of 25 ms, every 10 ms, at 16 kHz


@pytest.fixture
def decoder():
    return ClipDecoder(MODEL, DATA)


def blank(decoder):
    """As the loader hands it over: full of what was there before."""
    return {name: np.full(shape, 77, dtype) for name, (shape, dtype) in decoder.fields.items()}


def noise(length):
    return np.random.default_rng(0).integers(-9000, 9000, length).astype(np.int16)


def picture(width=32, height=32):
    """PNG, to be compared without loss."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue(), pixels


def decoded(decoder, image, sound, name="wav"):
    out = blank(decoder)
    decoder.decode("key", {"0.png": image, name: sound}, out)
    return out


def test_the_fields_are_what_the_model_takes(decoder):
    assert decoder.fields == {
        "frames": ((32, 32, 3), "uint8"),
        "waveform": ((LENGTH,), "int16"),
        "lengths": ((), "int64"),
    }
    assert ClipDecoder(ModelConfig(), DataConfig()).fields["waveform"] == ((1023 * 160 + 400,), "int16")


def test_what_a_run_does_not_use_is_neither_asked_for_nor_read():
    image, pixels = picture()
    sound = encode_wav(noise(LENGTH), 16000)
    for hears, sees, names, members in [
        (True, False, ["wav"], {"wav": sound}),
        (False, True, ["0.png"], {"0.png": image}),
    ]:
        decoder = ClipDecoder(MODEL, DATA, hears, sees)
        assert decoder.members(["0.png", "wav", "json"], 0.5) == names
        assert decoder.members([*names, "json"], 0.5) == names
        out = blank(decoder)
        decoder.decode("key", members, out)
        assert set(out) == ({"waveform", "lengths"} if hears else {"frames"})
        if sees:
            assert np.array_equal(out["frames"], pixels)
        else:
            assert out["lengths"] == LENGTH
        with pytest.raises(BadSample, match=r"has json; expected (K\.jpg|one of wav, flac)$"):
            decoder.members(["json"], 0.5)


@pytest.mark.parametrize("count", [1, 2, 10, 12, 101])
def test_the_draw_goes_over_all_frames_in_the_order_of_their_numbers(decoder, count):
    names = [*(f"{k}.jpg" for k in range(count)), "wav", "json", "9.txt"]
    random.Random(count).shuffle(names)
    for k in range(count):
        for draw in (k / count + 1e-9, (k + 0.5) / count, (k + 1) / count - 1e-9):
            assert list(decoder.members(names, draw)) == [f"{k}.jpg", "wav"]
    assert list(decoder.members(names, 1 - 2**-53)) == [f"{count - 1}.jpg", "wav"]
    assert list(decoder.members(names, 0.0)) == ["0.jpg", "wav"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["0.png", "1.png", "flac"], ["1.png", "flac"]),
        (["jpg", "json", "wav"], ["jpg", "wav"]),
        (["0.jpeg", "3.jpeg", "wav", "flac"], ["3.jpeg", "wav"]),
    ],
)
def test_other_images_and_sounds_are_taken_too(decoder, names, chosen):
    assert list(decoder.members(names, 0.9)) == chosen


@pytest.mark.parametrize("names", [["0.jpg", "json"], ["wav", "json"], ["0.gif", "wav"], ["0.jpg", "mp3"], []])
def test_a_sample_without_image_or_sound_is_refused_with_what_it_has(decoder, names):
    with pytest.raises(BadSample) as error:
        decoder.members(names, 0.5)
    assert error.value.reason == "member missing"
    assert all(name in error.value.detail for name in names)


def test_a_short_sound_is_followed_by_silence(decoder):
    audio = noise(20_000)
    out = decoded(decoder, picture()[0], encode_wav(audio, 16000))
    assert np.array_equal(out["waveform"][:20_000], audio)
    assert not out["waveform"][20_000:].any()
    assert out["lengths"] == 20_000


@pytest.mark.parametrize("length", [LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH])
def test_a_long_sound_is_cut_to_what_the_model_hears(decoder, length):
    audio = noise(length)
    out = decoded(decoder, picture()[0], encode_wav(audio, 16000))
    kept = min(length, LENGTH)
    assert np.array_equal(out["waveform"][:kept], audio[:kept])
    assert out["lengths"] == kept


def test_flac_and_wav_give_the_same(decoder):
    audio = noise(30_000)
    wav = decoded(decoder, picture()[0], encode_wav(audio, 16000))
    flac = decoded(decoder, picture()[0], encode_flac(audio, 16000), "flac")
    assert all(np.array_equal(wav[name], flac[name]) for name in wav)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (50, 32), (32, 47)])
def test_the_central_square_is_taken_as_it_is_where_its_side_fits(decoder, width, height):
    image, pixels = picture(width, height)
    left, top = (width - 32) // 2, (height - 32) // 2
    out = decoded(decoder, image, encode_wav(noise(20_000), 16000))
    assert np.array_equal(out["frames"], pixels[top : top + 32, left : left + 32])


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 64), (20, 31)])
def test_a_square_of_another_side_is_resized(decoder, width, height):
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    buffer = io.BytesIO()
    Image.fromarray(ramp.round().astype(np.uint8)).save(buffer, "PNG")
    out = decoded(decoder, buffer.getvalue(), encode_wav(noise(20_000), 16000))["frames"].astype(float)
    side = min(width, height)
    places = (width - side) // 2 + (np.arange(32) + 0.5) * side / 32 - 0.5  # of each pixel, in the picture
    assert np.abs(out[:, 2:-2] - (places * 255 / (width - 1))[None, 2:-2, None]).max() < 3


@pytest.mark.parametrize(
    ("image", "sound", "name", "reason", "detail"),
    [
        (b"\xff\xd8 no picture", encode_wav(noise(20_000), 16000), "wav", "image", "0.png: image cannot be decoded"),
        (b"", encode_wav(noise(20_000), 16000), "wav", "image", "0.png: has no image"),
        (picture()[0], b"RIFF", "wav", "audio", "wav: audio is not a WAV file"),
        (picture()[0], b"fLaC", "flac", "audio", "flac: audio is not a FLAC file"),
        (picture()[0], encode_wav(noise(20_000), 8000), "wav", "audio", "wav: audio is at 8000 Hz"),
        (picture()[0], encode_wav(noise(8_000), 16000), "wav", "audio", "wav: audio is 0.500 s, shorter"),
        (picture()[0], encode_wav(noise(20_000) * 0, 16000), "wav", "audio", "wav: audio is silent"),
    ],
)
def test_what_cannot_be_decoded_is_refused_with_its_member(decoder, image, sound, name, reason, detail):
    with pytest.raises(BadSample) as error:
        decoded(decoder, image, sound, name)
    assert error.value.reason == reason
    assert error.value.detail.startswith(detail)


def test_jpegs_are_decoded_as_pillow_does(decoder):
    image = encode_frame(picture()[1], 95)
    out = decoded(decoder, image, encode_wav(noise(20_000), 16000))
    assert np.abs(out["frames"].astype(int) - np.asarray(Image.open(io.BytesIO(image)))).max() <= 3
