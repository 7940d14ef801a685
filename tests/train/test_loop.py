"""The loop learns, follows the schedule, is a function of config and seed, and stops at what is not finite."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from equiav.augment import Clips
from equiav.config import TrainConfig
from equiav.data.synthetic import World
from equiav.parallel import Ranks
from equiav.tasks import Pretraining, pretraining
from equiav.train import initial_state, loop, optimizers, steps
from equiav.train.schedule import learning_rate

CLIPS = [World(seconds=2.56).clip(index) for index in range(8)]


def batches(size=8, epochs=1000):
    frames = torch.from_numpy(np.stack([clip.frames[0] for clip in CLIPS[:size]])).permute(0, 3, 1, 2).contiguous()
    waveform = torch.from_numpy(np.stack([clip.audio for clip in CLIPS[:size]]))
    for epoch in range(epochs):
        yield Clips(
            epoch,
            torch.arange(size),
            frames,
            waveform,
            torch.full((size,), waveform.shape[1]),
            torch.ones(size, dtype=torch.bool),
        )


def run(config, source=None):
    ranks = Ranks(config.device)
    state = initial_state(Pretraining(config), ranks)
    return state.model, [step.read()[0] for step in steps(Pretraining(config), ranks, state, source or batches())]


def settings(make_config, steps=4, **sections):
    values = {"batch_size": 8, "steps": steps, "warmup_steps": 1, "lr": 1e-3, "lr_start": 1e-5}
    return make_config(
        train={**values, **sections.pop("train", {})},
        objective={"centroid_size": 2, **sections.pop("objective", {})},
        **sections,
    )


def test_learning_rate():
    config = TrainConfig(steps=101, warmup_steps=20, lr=1.0, lr_start=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.55)
    assert rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    no_warmup = TrainConfig(steps=1, warmup_steps=0)
    assert learning_rate(0, no_warmup) == no_warmup.lr


@pytest.mark.slow
def test_one_batch_can_be_learned_by_heart(make_config, device):
    config = settings(make_config, steps=60, device=device, train={"lr": 2e-3}, data={"audio_mean": -10.3})
    _, rows = run(config)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["loss_inter"] < 0.6 * math.log(8)
    assert set(rows[0]) >= {
        "loss",
        "loss_inter",
        "loss_intra_audio",
        "loss_intra_image",
        "accuracy_inter",
        "similarity_audio",
        "gain_image",
        "gradient_norm",
        "lr",
    }


def test_a_run_is_a_function_of_config_and_seed(make_config):
    config = settings(make_config)
    torch.manual_seed(1)
    (one, rows), _ = run(config), torch.rand(5)
    (two, rows_2), other_rows = run(config), run(settings(make_config, seed=1))[1]
    assert rows == rows_2
    assert rows != other_rows
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


@pytest.mark.parametrize(
    "objective",
    [
        {"intra": "invariant", "inter_on": "original"},
        {"intra": "none", "inter_on": "augmented"},
        {"inter_on": "equivariant"},
        {"schedule": "two_stage"},
        {"schedule": "alternating"},
        {"intra_positive_in_denominator": False},
        {"learnable_temperature": True},
    ],
)
def test_every_ablation_trains(make_config, objective):
    model, rows = run(settings(make_config, steps=2, objective=objective))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    if objective.get("learnable_temperature"):
        assert model.log_temperature.exp().item() != pytest.approx(0.07, rel=1e-6)


@pytest.mark.parametrize("predictor", ["linear", "hypernet"])
def test_every_predictor_trains(make_config, predictor):
    _, rows = run(settings(make_config, steps=2, model={"predictor": predictor}))
    assert math.isfinite(rows[-1]["loss"])


def test_data_that_ends_early_is_no_finished_run(make_config):
    with pytest.raises(RuntimeError, match=r"the data ended after 2 batches, expected train\.steps=4"):
        run(settings(make_config), batches(epochs=2))


def test_gradients_are_clipped(make_config, monkeypatch):
    """The norm is reported as it came, and is at most `train.clip` when the optimizer sees it."""
    seen = []

    class Watched(optimizers.AdamW):
        def step(self, *args, **kwargs):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(torch.stack([g.norm() for g in gradients]).norm().item())
            return super().step(*args, **kwargs)

    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw", Watched)
    _, rows = run(settings(make_config, steps=2, train={"clip": 0.25}))
    assert all(row["gradient_norm"] > 1 for row in rows)
    assert seen == pytest.approx([0.25, 0.25], rel=1e-3)


@pytest.mark.parametrize("what", ["not finite", "one clip"])
def test_a_step_that_cannot_be_taken_changes_nothing(make_config, monkeypatch, what):
    """Weights, moments and their step count after steps 0, bad, 2 are those after steps 0, 2."""
    config = settings(make_config, steps=3, train={"lr": 1e-3, "warmup_steps": 0, "lr_start": 1e-3})
    monkeypatch.setattr(loop, "learning_rate", lambda step, settings: 1e-3)
    ranks, state, rows = Ranks("cpu"), initial_state(Pretraining(config), Ranks("cpu")), []
    good = list(itertools.islice(batches(), 3))
    bad = good[1]._replace(valid=torch.arange(8) == 3)
    if what == "not finite":
        bad = good[1]

    def step_of(source, state, stop):
        until = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=stop))
        rows.extend(step.read() for step in steps(Pretraining(until), ranks, state, source))

    step_of([good[0]], state, 1)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    moments = [{k: v.clone() for k, v in s.items()} for s in state.optimizer.state.values()]
    if what == "not finite":
        real_loss = pretraining.equiav_loss

        def spoiled(*arguments):
            loss, terms = real_loss(*arguments)
            return loss * math.nan, terms

        with monkeypatch.context() as patch:
            patch.setattr(pretraining, "equiav_loss", spoiled)
            step_of([bad], state, 2)
    else:
        step_of([bad], state, 2)
    assert state.step == 2
    metrics, finite, _ = rows[-1]
    assert finite == (what != "not finite")
    assert (metrics["clips"], metrics["bad"]) == ((8, 0) if what == "not finite" else (1, 7))
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    for now, then in zip(state.optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(now[k], then[k]) for k in then)
    step_of([good[2]], state, 3)
    assert any(not torch.equal(value, before[name]) for name, value in state.model.state_dict().items())


def test_every_step_has_its_views_weights_and_rate(make_config, monkeypatch):
    config = settings(
        make_config,
        objective={"schedule": "alternating"},
        train={"betas": [0.8, 0.9], "weight_decay": 0.3, "warmup_steps": 2},
    )
    weights, epochs, rates, options = [], [], [], []
    real_loss, real_views, real_optimizer = pretraining.equiav_loss, pretraining.make_views, optimizers.AdamW

    def loss(e, w, *rest):
        weights.append(w)
        return real_loss(e, w, *rest)

    def views(c, batch):
        epochs.append(batch.epoch)
        return real_views(c, batch)

    class Watched(real_optimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            options.append(self.param_groups[0])

        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(pretraining, "equiav_loss", loss)
    monkeypatch.setattr(pretraining, "make_views", views)
    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw", Watched)
    _, rows = run(config)
    assert weights == [(0, 1, 1), (1, 0, 0)] * 2
    assert epochs == [0, 1, 2, 3]
    assert rates == [row["lr"] for row in rows] == [learning_rate(step, config.train) for step in range(4)]
    assert options[0]["betas"] == (0.8, 0.9)
    assert options[0]["weight_decay"] == 0.3


def test_precision(make_config):
    first = {
        p: run(settings(make_config, train={"precision": p, "steps": 1}))[1][0]["loss"]
        for p in ("auto", "float32", "bfloat16")
    }
    assert first["auto"] == first["float32"]
    assert first["bfloat16"] != first["float32"]
    assert first["bfloat16"] == pytest.approx(first["float32"], rel=0.02)


def test_gradients_do_not_accumulate(make_config):
    """With no learning rate to speak of, the same batch gives the same gradient again."""
    config = settings(make_config, steps=2, train={"lr": 1e-30, "lr_start": 1e-30})
    batch = next(batches())
    _, rows = run(config, [batch, batch])
    assert rows[1]["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=1e-3)
