"""Batched transforms against torchvision, one sample at a time, from the numbers that the vector holds."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from equiav.augment import AudioVectors, ImageVectors, augment_image, augment_spectrogram, original_image
from equiav.augment.draws import Purpose
from equiav.augment.transforms import IMAGE_MEAN, IMAGE_STD

B = 24


def natural_frames(height, width, n=B):
    """Smooth structure plus noise, uint8."""
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, 3, 6, 8, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return ((smooth + 0.1 * torch.randn(n, 3, height, width, generator=g)).clamp(0, 1) * 255).to(torch.uint8)


def unnormalised(image):
    return image * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(IMAGE_MEAN).view(3, 1, 1)


def close_enough(ours, reference, tolerance=1 / 255, share=0.999):
    difference = (ours - reference).abs()
    assert (difference <= tolerance).float().mean() >= share, f"worst {difference.max():.4f}"


def number(parameters, name, sample):
    return parameters[name][sample].item()


def square(frame):
    side = min(frame.shape[-2:])
    return tv.center_crop(frame, [side, side]).float() / 255


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 340), (97, 60), (40, 40), (480, 270)])
def test_original_image_is_the_resized_central_square(height, width):
    frames = natural_frames(height, width, 3)
    ours = original_image(frames, 64)
    for k in range(3):
        close_enough(unnormalised(ours[k]), tv.resize(square(frames[k]), [64, 64], antialias=True))


@pytest.mark.parametrize("source", [224, 256])
def test_crop_matches_torchvision(make_config, source):
    """At the resolution of the grid, and with larger frames where a box of whole grid pixels is not whole in the frame."""
    config = make_config(model={"size": "vit_b16"}, augment={"jitter_p": 0, "blur_p": 0, "flip_p": 0, "gray_p": 0})
    vectors = ImageVectors(config.model, config.augment)
    frames = natural_frames(source, source)
    t = vectors.draw(0, 0, torch.arange(B), Purpose.VIEW_IMAGE)[:, 0]
    views, p = augment_image(frames, t, vectors), vectors.decode(t)
    for k in range(B):
        box = [number(p, name, k) * source / 224 for name in ("top", "left", "height", "width")]
        if all(value == int(value) for value in box):
            reference = tv.resized_crop(square(frames[k]), *map(int, box), [224, 224], antialias=True)
            close_enough(unnormalised(views[k]), reference)
    if source == 256:  # exact boxes are rare there: place some by hand, whole in both (multiples of 7 and of 8)
        for k, (top, left, height, width) in enumerate([(0, 0, 224, 224), (28, 56, 112, 84), (7, 14, 210, 203)]):
            for name, value in zip(("top", "left", "height", "width"), (top, left, height, width), strict=True):
                p[name][k] = value
            view = augment_image(frames[k : k + 1], vectors.encode(p)[k : k + 1], vectors)[0]
            box = [value * 8 // 7 for value in (top, left, height, width)]
            close_enough(unnormalised(view), tv.resized_crop(square(frames[k]), *box, [224, 224], antialias=True))


def reapplied_image(frame, p, k, size):
    """The view of sample k, made again with torchvision from its decoded vector."""
    box = [int(number(p, name, k)) for name in ("top", "left", "height", "width")]
    image = tv.resized_crop(square(frame), *box, [size, size], antialias=True)
    if number(p, "jitter_on", k):
        adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation]
        for name in ("first", "second", "third", "fourth"):
            which = int(number(p, name, k))
            if which == 3:
                image = tv.adjust_hue(image, number(p, "hue", k))
            else:
                factor = 1 + number(p, ("brightness", "contrast", "saturation")[which], k)
                image = adjust[which](image, factor)
    if number(p, "blur_on", k):
        image = tv.gaussian_blur(image, [17, 17], [number(p, "sigma", k)] * 2)
    if number(p, "flip", k):
        image = tv.horizontal_flip(image)
    return tv.rgb_to_grayscale(image, 3) if number(p, "gray", k) else image


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_image_view_is_what_its_vector_says(make_config, variant, device):
    config = make_config(model={"size": "vit_s16", "image_size": 96}, augment={"variant": variant})
    vectors = ImageVectors(config.model, config.augment)
    frames = natural_frames(96, 96)
    t = vectors.draw(0, 0, torch.arange(B), Purpose.VIEW_IMAGE)[:, 0]
    views, p = augment_image(frames.to(device), t.to(device), vectors).cpu(), vectors.decode(t)
    for k in range(B):
        close_enough(unnormalised(views[k]), reapplied_image(frames[k], p, k, 96), tolerance=1e-3)
    assert len({tuple(order) for order in torch.stack([p[n] for n in ("first", "second", "third")], 1).tolist()}) > 6


def test_identity_vector_gives_the_original(make_config):
    config = make_config()
    vectors = ImageVectors(config.model, config.augment)
    frames = natural_frames(80, 120, 4)
    view = augment_image(frames, vectors.identity().expand(4, -1), vectors)
    torch.testing.assert_close(view, original_image(frames, 64), atol=1e-5, rtol=0)
    audio = AudioVectors(config.model, config.augment)
    spectrogram = torch.randn(4, 256, 64)
    same = augment_spectrogram(spectrogram, audio.identity().expand(4, -1), audio)
    torch.testing.assert_close(same, spectrogram, atol=1e-5, rtol=0)


def test_a_view_does_not_depend_on_its_neighbours(make_config):
    config = make_config()
    image, audio = (kind(config.model, config.augment) for kind in (ImageVectors, AudioVectors))
    frames, spectrogram = natural_frames(64, 64), torch.randn(B, 256, 64)
    t_v = image.draw(0, 0, torch.arange(B), Purpose.VIEW_IMAGE)[:, 0]
    t_a = audio.draw(0, 0, torch.arange(B), Purpose.VIEW_AUDIO)[:, 0]
    together = augment_image(frames, t_v, image), augment_spectrogram(spectrogram, t_a, audio)
    for k in (0, 7):
        one = slice(k, k + 1)
        torch.testing.assert_close(augment_image(frames[one], t_v[one], image)[0], together[0][k], atol=1e-5, rtol=0)
        alone = augment_spectrogram(spectrogram[one], t_a[one], audio)[0]
        torch.testing.assert_close(alone, together[1][k], atol=1e-5, rtol=0)


def reapplied_spectrogram(x, p, k, variant):
    """x (T, F)."""
    T, F = x.shape
    x = x.clone()
    x[int(number(p, "t0", k)) : int(number(p, "t1", k))] = 0
    x[:, int(number(p, "f0", k)) : int(number(p, "f1", k))] = 0
    if variant == "paper":
        x = x.roll(int(number(p, "shift", k)), 0)
    box = [int(number(p, name, k)) for name in ("left", "top", "width", "height")]  # time is torchvision's height
    x = tv.resized_crop(x[None], *box, [T, F], antialias=True)
    if number(p, "jitter_on", k):
        for name in ("first", "second", "third", "fourth"):
            which = int(number(p, name, k))
            if which == 0:
                x = x * (1 + number(p, "brightness", k))
            elif which == 1:
                factor = 1 + number(p, "contrast", k)
                x = factor * x + (1 - factor) * x.mean()
            if variant == "released":
                x = x.clamp(0, 1)
    if number(p, "blur_on", k):
        sigma = number(p, "sigma", k)
        reach = 8 if variant == "paper" else int(-(-sigma // 1))
        x = tv.gaussian_blur(x, [2 * reach + 1] * 2, [sigma] * 2)
    if number(p, "flip", k):
        x = x.flip(1 if variant == "paper" else 2)
    return x[0]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("size", ["tiny", "vit_b16"])
def test_spectrogram_view_is_what_its_vector_says(make_config, variant, size, device, rng):
    config = make_config(model={"size": size}, augment={"variant": variant})
    vectors = AudioVectors(config.model, config.augment)
    spectrogram = torch.randn(B, config.model.spectrogram_frames, config.model.spectrogram_mels, generator=rng)
    t = vectors.draw(0, 0, torch.arange(B), Purpose.VIEW_AUDIO)[:, 0]
    views = augment_spectrogram(spectrogram.to(device), t.to(device), vectors).cpu()
    p = vectors.decode(t)
    for k in range(B):
        torch.testing.assert_close(views[k], reapplied_spectrogram(spectrogram[k], p, k, variant), atol=2e-4, rtol=0)


def test_time_shift_moves_what_is_heard(make_config):
    """The released program says shift and shifts nothing; ours does what it says."""
    for variant, moved in (("paper", True), ("released", False)):
        config = make_config(augment={"variant": variant})
        vectors = AudioVectors(config.model, config.augment)
        p = vectors.decode(vectors.identity())
        p["shift_on"], p["shift"] = torch.tensor(1.0), torch.tensor(-40.0)
        click = torch.zeros(1, 256, 64)
        click[:, 100] = 1
        view = augment_spectrogram(click, vectors.encode(p)[None], vectors)
        assert view[0, 60 if moved else 100].min() > 0.99


def test_flips(make_config):
    for variant, dim in (("paper", 1), ("released", 2)):
        config = make_config(augment={"variant": variant})
        vectors = AudioVectors(config.model, config.augment)
        p = vectors.decode(vectors.identity())
        p["flip"] = torch.tensor(1.0)
        x = torch.randn(1, 256, 64)
        view = augment_spectrogram(x, vectors.encode(p)[None], vectors)
        torch.testing.assert_close(view, x.flip(dim), atol=1e-5, rtol=0)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"frames are torch.float32 \(1, 3, 64, 64\), expected uint8"):
        original_image(torch.zeros(1, 3, 64, 64), 64)
    with pytest.raises(ValueError, match="expected uint8"):
        original_image(torch.zeros(1, 1, 64, 64, dtype=torch.uint8), 64)


def test_a_spectrogram_of_another_size_is_named(make_config):
    config = make_config()
    vectors = AudioVectors(config.model, config.augment)
    with pytest.raises(ValueError, match=r"spectrogram is \(2, 100, 64\), expected \(B, 256, 64\)"):
        augment_spectrogram(torch.zeros(2, 100, 64), vectors.identity().expand(2, -1), vectors)


def test_normalisation_is_imagenets():
    assert (IMAGE_MEAN, IMAGE_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    red, white = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    red[:, 0] = 255
    torch.testing.assert_close(
        original_image(red, 64)[0, :, 5, 5], torch.tensor([0.515 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    )
    torch.testing.assert_close(
        original_image(white, 64)[0, :, 5, 5], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    )


def test_identity_of_a_portrait_frame(make_config):
    config = make_config()
    vectors = ImageVectors(config.model, config.augment)
    frames = natural_frames(120, 80, 4)
    view = augment_image(frames, vectors.identity().expand(4, -1), vectors)
    torch.testing.assert_close(view, original_image(frames, 64), atol=1e-5, rtol=0)


def test_a_blur_wider_than_the_picture(make_config):
    config = make_config(augment={"blur_sigma": [0.1, 20.0]})
    vectors = ImageVectors(config.model, config.augment)
    t = vectors.draw(0, 0, torch.arange(4), Purpose.VIEW_IMAGE)[:, 0]
    assert augment_image(natural_frames(64, 64, 4), t, vectors).isfinite().all()
