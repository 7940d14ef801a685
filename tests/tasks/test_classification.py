"""What fine-tuning computes, held against plain formulas."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equiav.augment import Clips
from equiav.augment.logmel import normalised_spectrogram
from equiav.augment.transforms import original_image
from equiav.config import Config, TuneConfig, from_dict
from equiav.model.arithmetic import encoders
from equiav.model.classifier import Classifier
from equiav.objective import Rows
from equiav.parallel import Ranks
from equiav.tasks import Classification
from equiav.tasks.classification import Logits
from equiav.train import initial_state, steps
from tests.train.ranks import CLASSES, TINY, batches, clips, targets

CONFIG = from_dict(
    Config, {**TINY, "train": {"batch_size": 8, "micro_batch": 4, "steps": 2, "warmup_steps": 1}}, "test"
)


def task(**tune):
    return Classification(CONFIG, TuneConfig(**tune), CLASSES, targets)


def some(count=8, epoch=0, missing=()):
    frames, waveform = clips(count)
    valid = torch.tensor([k not in missing for k in range(count)])
    return Clips(epoch, torch.arange(count), frames, waveform, torch.full((count,), waveform.shape[1]), valid)


def many(count, epoch=0):
    """Numbers of clips alone."""
    nothing = torch.zeros(count, 1)
    return Clips(epoch, torch.arange(count), nothing, nothing, nothing, torch.ones(count, dtype=torch.bool))


@pytest.mark.parametrize("loss", ["one", "many"])
@pytest.mark.parametrize("missing", [(), (1, 6)])
def test_the_loss_is_torchs_over_the_clips_that_there_are(loss, missing):
    of, batch = task(loss=loss), some(8, missing=missing)
    z = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0), requires_grad=True)
    total, terms = of.loss(Logits(z), of.prepared(batch), Rows.of(batch.valid, piece=4), 0)
    right, there = torch.from_numpy(targets(np.arange(8))), batch.valid
    if loss == "one":
        expected = F.cross_entropy(z[there], right[there], reduction="sum") / there.sum()
    else:
        expected = F.binary_cross_entropy_with_logits(z[there], right[there])
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["loss"].sum().item() == pytest.approx(expected.item(), rel=1e-6)
    best = right[there][torch.arange(int(there.sum())), z[there].argmax(1)]
    assert terms["accuracy_class"].sum().item() == pytest.approx(best.mean().item())
    (gradient,) = torch.autograd.grad(total, z, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, z)
    assert torch.allclose(gradient, wanted, atol=1e-7)


def test_shares_of_mixtures_are_those_of_beta_10_10():
    mixture = task(mixup=1.0).mixture(many(20_000))
    share = mixture.share.double()
    assert share.mean().item() == pytest.approx(0.5, abs=0.003)
    assert share.var().item() == pytest.approx(100 / (20**2 * 21), rel=0.03)
    assert 0 < share.min() < share.max() < 1
    assert (mixture.partner != torch.arange(20_000)).all()
    counts = torch.bincount((mixture.partner - torch.arange(20_000)) % 20_000 * 10 // 20_000)
    assert counts.min() > 1800  # partners are anywhere in the micro-batch


def test_as_many_are_mixed_as_asked_and_none_with_nothing():
    assert task().mixture(many(8)) is None
    share = task(mixup=0.3).mixture(many(20_000)).share
    assert (share < 1).float().mean().item() == pytest.approx(0.3, abs=0.01)
    batch = some(8, missing=(0, 1, 2, 3, 4))
    mixture = task(mixup=1.0).mixture(batch)
    for row in range(8):
        mixes = bool(batch.valid[row] and batch.valid[mixture.partner[row]])
        assert (mixture.share[row] < 1) == mixes
    assert task(mixup=1.0).mixture(some(1)).share.tolist() == [1.0] or task(mixup=1.0).mixture(
        some(1)
    ).partner.tolist() == [0]


def test_sound_picture_and_labels_are_mixed_alike():
    of, batch = task(mixup=1.0, loss="one"), some(4)
    mixture = of.mixture(batch)
    audio, image = of.inputs(batch, mixture)
    wave = batch.waveform.double() / 32768
    wave = wave - wave.mean(1, keepdim=True)
    share = mixture.share.double()[:, None]
    mixed = share * wave + (1 - share) * wave[mixture.partner]
    assert torch.allclose(
        audio, normalised_spectrogram(mixed.float(), batch.lengths, CONFIG.model, CONFIG.data), atol=1e-4
    )
    plain = original_image(batch.frames, CONFIG.model.image_size)
    share = mixture.share[:, None, None, None]
    assert torch.allclose(image, share * plain + (1 - share) * plain[mixture.partner], atol=1e-6)
    z = torch.randn(4, CLASSES)
    right = torch.from_numpy(targets(np.arange(4)))
    share = mixture.share[:, None]
    wanted = share * right + (1 - share) * right[mixture.partner]
    total, _ = of.loss(Logits(z), of.prepared(batch), Rows.of(batch.valid), 0)
    assert total.item() == pytest.approx(F.cross_entropy(z, wanted).item(), rel=1e-6)


def test_a_spectrogram_is_turned_by_any_number_of_frames():
    of, batch = task(time_roll=True), some(8)
    plain, _ = of.inputs(batch)
    turned = of.rolled(plain, batch)
    by = set()
    for row in range(8):
        found = [k for k in range(plain.shape[1]) if torch.equal(plain[row].roll(k, 0), turned[row])]
        assert len(found) == 1
        by.add(found[0])
    assert len(by) > 6


def test_paths_are_left_out_as_often_as_asked_and_the_rest_is_scaled():
    of = task(drop_path=0.4)
    keep = of.kept(many(20_000))  # (B, sides, 2 x depth)
    assert keep.shape == (20_000, 2, 2 * CONFIG.model.depth)
    asked = np.repeat(np.linspace(0, 0.4, CONFIG.model.depth), 2)
    for k, share in enumerate(asked):
        assert (keep[:, :, k] == 0).float().mean().item() == pytest.approx(share, abs=0.01)
        assert keep[:, :, k].unique().tolist()[-1] == pytest.approx(1 / (1 - share), rel=1e-6)
    assert keep.mean().item() == pytest.approx(1, abs=0.01)


def test_a_block_that_is_left_out_does_nothing():
    model = Classifier(CONFIG.model, CLASSES, image=False)
    model.init_weights(0)
    audio, _ = task().inputs(some(2))
    keep = torch.zeros(2, 1, 2 * CONFIG.model.depth)
    encoder = model.audio.encoder
    tokens = encoder.patch_embed(audio.transpose(1, 2).unsqueeze(1)).flatten(2).transpose(1, 2)
    expected = model.head(encoder.norm(tokens + encoder.positions + encoder.modality).mean(1))
    assert torch.allclose(model(audio, None, keep), expected, atol=1e-6)
    assert torch.allclose(model(audio, None, torch.ones_like(keep)), model(audio, None), atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"mixup": 0.5},
        {"drop_path": 0.3},
        {"time_roll": True},
        {"modality": "audio"},
        {"modality": "image"},
        {"loss": "one"},
    ],
)
def test_each_setting_has_an_effect(change):
    def first_loss(**tune):
        of, ranks = task(**tune), Ranks("cpu")
        state = initial_state(of, ranks)
        return [step.read()[0]["loss"] for step in steps(of, ranks, state, batches(8, 4, 0, 1, of=8))]

    assert first_loss() == first_loss()
    assert first_loss(**change) != first_loss()


def test_draws_are_others_in_another_epoch():
    of = task(mixup=1.0, drop_path=0.5)
    assert not torch.equal(of.mixture(some(8)).share, of.mixture(some(8, epoch=1)).share)
    assert not torch.equal(of.kept(some(8)), of.kept(some(8, epoch=1)))


@pytest.mark.parametrize(("audio", "image"), [(True, True), (True, False), (False, True)])
def test_multiply_adds_are_torchs(audio, image):
    model = Classifier(CONFIG.model, CLASSES, audio, image)
    model.init_weights(0)
    sound, picture = task().inputs(some(2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(sound if audio else None, picture if image else None).sum().backward()
    head = 3 * CONFIG.model.width * (audio + image) * CLASSES
    assert counter.get_total_flops() == 2 * 2 * (encoders(CONFIG.model, audio, image) + head)


def test_guessing():
    assert task(loss="one").chance(0, 8)["total"] == math.log(CLASSES)
    z = torch.zeros(8, CLASSES)
    for loss in ("one", "many"):
        of, batch = task(loss=loss, mixup=1.0), some(8)
        if loss == "one":
            of.targets = lambda samples: np.eye(CLASSES, dtype=np.float32)[samples % CLASSES]
        assert of.loss(Logits(z), of.prepared(batch), Rows.of(batch.valid), 0)[0].item() == pytest.approx(
            of.chance(0, 8)["total"]
        )
