"""A batch of clips becomes the model's arguments: each view with the vector that made it."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from equiav.augment import (
    AudioVectors,
    Clips,
    ImageVectors,
    augment_image,
    augment_spectrogram,
    make_views,
    normalised_spectrogram,
    original_image,
    sampled_vectors,
)
from equiav.data.synthetic import World

CLIPS = [World(seconds=2.56).clip(index) for index in range(6)]


def batch(epoch=0, first=0):
    frames = torch.from_numpy(np.stack([clip.frames[0] for clip in CLIPS])).permute(0, 3, 1, 2).contiguous()
    waveform = torch.from_numpy(np.stack([clip.audio for clip in CLIPS]))
    return Clips(
        epoch,
        torch.arange(first, first + 6),
        frames,
        waveform,
        torch.full((6,), waveform.shape[1]),
        torch.ones(6, dtype=torch.bool),
    )


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_first_vector_made_the_view(make_config, variant):
    config = make_config(objective={"centroid_size": 3}, augment={"variant": variant})
    b, v = batch(), make_views(config, batch())
    assert v.t_a.shape == (6, 4, 24)
    assert v.t_v.shape == (6, 4, 18)
    spectrogram = normalised_spectrogram(b.waveform, b.lengths, config.model, config.data)
    assert torch.equal(v.audio, spectrogram)
    assert torch.equal(v.image, original_image(b.frames, 64))
    audio, image = AudioVectors(config.model, config.augment), ImageVectors(config.model, config.augment)
    assert torch.equal(v.audio_aug, augment_spectrogram(spectrogram, v.t_a[:, 0], audio))
    assert torch.equal(v.image_aug, augment_image(b.frames, v.t_v[:, 0], image))
    t_a, t_v = sampled_vectors(config, config.seed, 0, b.samples, 3)
    assert torch.equal(v.t_a[:, 1:], t_a)
    assert torch.equal(v.t_v[:, 1:], t_v)
    for vectors in (v.t_a, v.t_v):  # those of the centroid are other draws than the view's
        assert not (vectors[:, 1:] == vectors[:, :1]).all(dim=2).any()


def test_views_are_a_function_of_seed_epoch_and_sample(make_config):
    one = make_views(make_config(), batch())
    assert all(torch.equal(a, b) for a, b in zip(one, make_views(make_config(), batch()), strict=True))
    others = [make_views(make_config(), batch(epoch=1)), make_views(make_config(), batch(first=6))]
    others.append(make_views(make_config(seed=1), batch()))
    for other in others:
        assert torch.equal(other.audio, one.audio)
        assert (other.t_v[:, 0] != one.t_v[:, 0]).any(dim=1).all()
        assert (other.t_a[:, 1:] != one.t_a[:, 1:]).any(dim=2).all()


@pytest.mark.parametrize(
    ("objective", "augmented", "queries"),
    [
        ({}, True, 17),
        ({"intra": "none"}, False, 17),
        ({"intra": "none", "inter_on": "augmented"}, True, 1),
        ({"intra": "none", "inter_on": "original"}, False, 1),
        ({"inter_on": "equivariant"}, True, 1),
        ({"intra": "invariant", "inter_on": "original"}, True, 1),
    ],
)
def test_only_what_the_objective_needs_is_made(make_config, objective, augmented, queries):
    v = make_views(make_config(objective=objective), batch())
    assert (v.audio_aug is not None) == (v.image_aug is not None) == augmented
    assert v.t_a.shape[1] == v.t_v.shape[1] == queries


def test_devices_agree(config, device):
    here, there = make_views(config, batch()), make_views(config, batch().to(torch.device(device)))
    assert torch.equal(there.t_a.cpu(), here.t_a)
    assert torch.equal(there.t_v.cpu(), here.t_v)
    for a, b in zip(there[:4], here[:4], strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=5e-3, rtol=0)


def test_float32_under_autocast(config, device):
    plain = make_views(config, batch().to(torch.device(device)))
    with torch.autocast(device, torch.bfloat16):
        low = make_views(config, batch().to(torch.device(device)))
    assert all(torch.equal(a, b) for a, b in zip(plain, low, strict=True))


def test_no_value_is_read_back_and_no_shape_depends_on_data(config):
    """On tensors that hold no data: whatever made the host wait for the device would fail."""
    with FakeTensorMode() as mode:
        fake = Clips(0, *(mode.from_tensor(x) for x in batch()[1:6]))
        assert make_views(config, fake).image_aug.shape == (6, 3, 64, 64)
