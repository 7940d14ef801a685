"""Vectors: distributions as configured, layouts as documented, nothing lost on the way through."""

import pytest
import torch

from equiav.augment.draws import Purpose
from equiav.augment.vectors import ORDER, AudioVectors, ImageVectors

SAMPLES = torch.arange(20_000)


def draw(config, kind, samples=SAMPLES, **kwargs):
    vectors = kind(config.model, config.augment)
    t = vectors.draw(0, 0, samples, Purpose.VIEW_IMAGE, **kwargs)
    return vectors, t, vectors.decode(t)


@pytest.fixture(params=["paper", "released"])
def variant(request):
    return request.param


@pytest.fixture(params=["tiny", "vit_b16"])
def both(request, make_config, variant):
    return make_config(model={"size": request.param}, augment={"variant": variant})


def test_shapes(both):
    for kind, d in ((ImageVectors, 18), (AudioVectors, 24)):
        vectors, t, _ = draw(both, kind, torch.arange(5), queries=3)
        assert t.shape == (5, 3, d)
        assert t.dtype == torch.float32
        assert vectors.identity().shape == (d,)
        with pytest.raises(ValueError, match="expected"):
            vectors.decode(t[..., :-1])


def test_decode_undoes_encode(both):
    for kind in (ImageVectors, AudioVectors):
        vectors, t, parameters = draw(both, kind)
        torch.testing.assert_close(vectors.encode(parameters), t, rtol=3e-7, atol=0)


def test_queries_differ_and_do_not_depend_on_the_batch(both):
    vectors, t, _ = draw(both, ImageVectors, torch.arange(6), queries=4)
    assert len(t.flatten(0, 1).unique(dim=0)) == 24
    alone = vectors.draw(0, 0, torch.tensor([3]), Purpose.VIEW_IMAGE, 4)
    assert torch.equal(alone[0], t[3])


def test_same_on_every_device(both, device):
    for kind in (ImageVectors, AudioVectors):
        vectors = kind(both.model, both.augment)
        here = vectors.draw(3, 1, SAMPLES, Purpose.CENTROID_AUDIO, 2)
        there = vectors.draw(3, 1, SAMPLES.to(device), Purpose.CENTROID_AUDIO, 2).cpu()
        assert torch.equal(here, there)


@pytest.mark.parametrize("kind", [ImageVectors, AudioVectors])
def test_distributions(both, kind):
    _, _, p = draw(both, kind)
    a, (x_size, y_size) = (
        both.augment,
        (
            (both.model.image_size,) * 2
            if kind is ImageVectors
            else (both.model.spectrogram_frames, both.model.spectrogram_mels)
        ),
    )
    n = p["left"].numel()

    def near(share, expected):
        return abs(share - expected) < 5 * (expected * (1 - expected) / n) ** 0.5 + 1e-9

    assert (p["crop_on"] == 1).all()
    for start, length, size in (("left", "width", x_size), ("top", "height", y_size)):
        assert (p[start] >= 0).all()
        assert (p[length] >= 1).all()
        assert (p[start] + p[length] <= size).all()
        assert (p[start] == 0).any()
        assert (p[start] + p[length] == size).any()
    area = p["width"] * p["height"] / (x_size * y_size)
    assert 0.07 < area.min() < 0.1
    assert 0.95 < area.max() <= 1
    ratio = (p["width"] / x_size) / (p["height"] / y_size)
    low, high = a.image_crop_ratio if kind is ImageVectors else [1 / r for r in reversed(a.audio_crop_ratio)]
    rounding = 2.5 / min(x_size, y_size)
    assert low * (1 - rounding) < ratio.min() < low * 1.1
    assert high * 0.9 < ratio.max() < high * (1 + rounding)

    assert near(p["jitter_on"].mean(), a.jitter_p)
    assert near(p["blur_on"].mean(), a.blur_p)
    assert near(p["flip"].mean(), a.flip_p)
    on = p["jitter_on"] > 0
    for name in ("brightness", "contrast"):
        assert p[name][on].abs().max() == pytest.approx(a.jitter_factor, rel=0.01)
        assert p[name][on].mean().abs() < 0.01
        assert (p[name][~on] == 0).all()
    assert p["sigma"][p["blur_on"] > 0].min() == pytest.approx(a.blur_sigma[0], abs=0.01)
    assert p["sigma"].max() == pytest.approx(a.blur_sigma[1], abs=0.01)
    assert (p["sigma"][p["blur_on"] == 0] == 0).all()

    order = torch.stack([p[name] for name in ORDER], dim=-1)
    assert (order[~on] == torch.arange(4.0)).all()
    kinds, counts = order[on].unique(dim=0, return_counts=True)
    orders = 2 if kind is AudioVectors and a.variant == "paper" else 24
    assert len(kinds) == orders
    assert counts.min() > 0.8 * on.sum() / orders
    if kind is ImageVectors:
        assert near(p["gray"].mean(), a.gray_p)
    colour = [p[name].abs().max() for name in ("saturation", "hue")]
    if orders == 2:
        assert colour == [0, 0]
    else:
        assert colour == [pytest.approx(a.jitter_factor, rel=0.01), pytest.approx(a.jitter_hue, rel=0.01)]


def test_spectrogram_masks_and_shift(both):
    _, _, p = draw(both, AudioVectors)
    T, F = both.model.spectrogram_frames, both.model.spectrogram_mels
    on = p["mask_on"] > 0
    assert abs(on.float().mean() - both.augment.mask_p) < 0.02
    assert torch.equal(p["mask_on"], p["shift_on"])
    for low, high, size, longest in (
        ("t0", "t1", T, both.augment.max_mask_frames),
        ("f0", "f1", F, both.augment.max_mask_mels),
    ):
        assert (p[low] >= 0).all()
        assert (p[high] <= size).all()
        length = (p[high] - p[low])[on]
        assert length.min() == 0
        assert longest - 2 <= length.max() < longest
        assert (p[high][~on] == 0).all()
    assert p["shift"].min() == -T
    assert p["shift"].max() == T - 1
    assert (p["shift"][~on] == 0).all()


@pytest.mark.parametrize("kind", [ImageVectors, AudioVectors])
def test_paper_vectors_are_within_one(make_config, kind):
    _, t, _ = draw(make_config(), kind)
    assert t.abs().max() <= 1
    unused = 4 if kind is AudioVectors else 0  # two of the four order slots, saturation, hue
    assert (t.abs().amax(dim=(0, 1)) > 0.6).sum() == t.shape[-1] - unused


def test_layout_of_the_image_vector(make_config):
    values = {
        "crop_on": 1.0,
        "left": 8,
        "top": 16,
        "width": 24,
        "height": 32,
        "jitter_on": 1,
        "first": 2,
        "second": 1,
        "third": 3,
        "fourth": 0,
        "brightness": 0.2,
        "contrast": -0.4,
        "saturation": 0.1,
        "hue": 0.05,
        "blur_on": 1,
        "sigma": 0.5,
        "flip": 1,
        "gray": 0,
    }
    parameters = {name: torch.tensor(float(value)) for name, value in values.items()}
    config = make_config()
    t = ImageVectors(config.model, config.augment).encode(parameters)
    torch.testing.assert_close(
        t,
        torch.tensor([1, 8 / 64, 16 / 64, 24 / 64, 32 / 64, 1, 2 / 3, 1 / 3, 1, 0, 0.5, -1, 0.25, 0.5, 1, 0.25, 1, 0]),
    )
    config = make_config(augment={"variant": "released"})
    t = ImageVectors(config.model, config.augment).encode(parameters)
    torch.testing.assert_close(
        t, torch.tensor([1, 16 / 64, 8 / 64, 32 / 64, 24 / 64, 1, 2, 1, 3, 0, 0.2, -0.4, 0.1, 0.05, 1, 0.5, 1, 0])
    )


def test_layout_of_the_audio_vector(make_config):
    values = {
        "mask_on": 1,
        "t0": 100,
        "t1": 164,
        "f0": 32,
        "f1": 48,
        "shift_on": 1,
        "shift": -256,
        "crop_on": 1,
        "left": 512,
        "top": 64,
        "width": 256,
        "height": 32,
        "jitter_on": 1,
        "first": 1,
        "second": 0,
        "third": 2,
        "fourth": 3,
        "brightness": 0.2,
        "contrast": 0.4,
        "saturation": 0,
        "hue": 0,
        "blur_on": 1,
        "sigma": 2.0,
        "flip": 1,
    }
    parameters = {name: torch.tensor(float(value)) for name, value in values.items()}
    config = make_config(model={"size": "vit_b16"})
    t = AudioVectors(config.model, config.augment).encode(parameters)
    torch.testing.assert_close(
        t,
        torch.tensor(
            [
                1,
                100 / 1024,
                164 / 1024,
                32 / 128,
                48 / 128,
                1,
                -0.25,
                1,
                0.5,
                0.5,
                0.25,
                0.25,
                1,
                1 / 3,
                0,
                2 / 3,
                1,
                0.5,
                1,
                0,
                0,
                1,
                1,
                1,
            ]
        ),
    )
    config = make_config(model={"size": "vit_b16"}, augment={"variant": "released"})
    t = AudioVectors(config.model, config.augment).encode(parameters)
    torch.testing.assert_close(
        t,
        torch.tensor(  # the other axis's length: 512 / 128, 64 / 1024, ...
            [1, 100, 164, 32, 48, 1, -0.25, 1, 4, 0.0625, 2, 0.03125, 1, 1, 0, 2, 3, 0.2, 0.4, 0, 0, 1, 2, 1]
        ),
    )


@pytest.mark.parametrize("kind", [ImageVectors, AudioVectors])
def test_a_crop_of_the_whole_is_the_whole(make_config, kind):
    """No try fits where the area is all of it and the shape another: then the largest box of an allowed shape, as torchvision."""
    _, _, p = draw(make_config(augment={"crop_scale": [1.0, 1.0]}), kind)
    for name, size in (("width", p["width"].max()), ("height", p["height"].max())):
        assert (p[name] > 0.96 * size).all()  # a shape within rounding of the whole still fits
        assert (p[name] == size).float().mean() > 0.7


def test_sample_ids_of_another_type_are_named(make_config):
    with pytest.raises(ValueError, match=r"sample ids are torch.int32 \(3,\), expected int64 \(B,\)"):
        draw(make_config(), ImageVectors, torch.arange(3, dtype=torch.int32))


def correlation(*rows):
    return torch.corrcoef(torch.stack([row.double().flatten() for row in rows])) - torch.eye(len(rows))


def test_crops_are_placed_uniformly_and_drawn_again_where_they_do_not_fit(make_config):
    _, _, p = draw(make_config(model={"size": "vit_b16"}), ImageVectors)
    x, y, width, height = (p[name].double().flatten() for name in ("left", "top", "width", "height"))
    small = (width < 112) & (height < 112)
    share = x[small] / (224 - width[small]), y[small] / (224 - height[small])
    assert correlation(*share)[0, 1].abs() < 0.05
    for place in share:
        assert abs(place.mean() - 0.5) < 0.02
    assert ((x + width == 224) & (width < 200)).any()
    assert ((y + height == 224) & (height < 200)).any()
    compact = width * height / 224**2 < 0.4  # every shape fits: log-uniform, as often wide as tall
    assert (width / height)[compact].log().mean().abs() < 0.01
    assert (width == 224).float().mean() < 0.02  # clamping in place of drawing again would pile up here


def test_switches_are_independent(make_config):
    _, _, p = draw(make_config(), ImageVectors)
    assert correlation(p["flip"], p["gray"], p["jitter_on"], p["blur_on"]).abs().max() < 0.05
    on = p["blur_on"] > 0
    assert abs(p["sigma"][on].mean() - 1.05) < 0.03
    assert correlation(p["brightness"], p["contrast"], p["saturation"], p["hue"]).abs().max() < 0.05


def test_masks_reach_both_ends(make_config):
    _, _, p = draw(make_config(model={"size": "vit_b16"}), AudioVectors)
    on = p["mask_on"] > 0
    for low, high, size in (("t0", "t1", 1024), ("f0", "f1", 128)):
        assert p[low][on].min() == 0
        assert p[high][on].max() >= size - 2
