"""Each optimizer computes what its equation says, and what it keeps is saved and loaded, all of it."""

import typing
from dataclasses import replace

import numpy as np
import pytest
import torch

from equiav.config import Config, TrainConfig, from_dict
from equiav.tasks import Pretraining
from equiav.train import initial_state, steps
from equiav.train.checkpoint import Checkpoints
from equiav.train.optimizers import COEFFICIENTS, MOMENTUM, OPTIMIZERS, RMS, ROUNDS, AdamW, Keeps, Muon, orthogonal
from tests.train.ranks import TINY, batches
from tests.train.test_checkpoint import ALONE, about, anything, numbers, own

CPU = torch.device("cpu")


def test_the_settings_name_every_optimizer_and_no_other():
    assert set(typing.get_args(typing.get_type_hints(TrainConfig)["optimizer"])) == OPTIMIZERS.keys()


def test_orthogonal_has_singular_values_about_one():
    rng = np.random.default_rng(0)
    for shape in ((40, 40), (20, 60), (60, 20)):
        found = orthogonal(torch.from_numpy(rng.normal(size=shape).astype(np.float32))).double().numpy()
        assert found.shape == shape
        values = np.linalg.svd(found, compute_uv=False)
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_muon_is_its_equation_in_float64():
    """Three steps of a matrix, and of a vector, which AdamW moves."""
    rng, rate, decay = np.random.default_rng(1), 3e-3, 0.1
    matrix, vector = rng.normal(size=(12, 30)), rng.normal(size=9)
    gradients = [(rng.normal(size=matrix.shape), rng.normal(size=vector.shape)) for _ in range(3)]
    weights = [torch.nn.Parameter(torch.from_numpy(x).float()) for x in (matrix, vector)]
    given = TrainConfig(lr=rate, lr_start=rate, weight_decay=decay)
    optimizer = Muon(weights, given, CPU)
    reference = AdamW(
        [torch.nn.Parameter(weights[1].detach().clone())], TrainConfig(lr=rate, lr_start=rate, weight_decay=decay), CPU
    )
    momentum, (a, b, c) = np.zeros_like(matrix), COEFFICIENTS
    for g_matrix, g_vector in gradients:
        weights[0].grad, weights[1].grad = torch.from_numpy(g_matrix).float(), torch.from_numpy(g_vector).float()
        reference.param_groups[0]["params"][0].grad = weights[1].grad.clone()
        optimizer.step()
        reference.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g_matrix
        x = (1 - MOMENTUM) * g_matrix + MOMENTUM * momentum
        x = x / np.linalg.norm(x)
        for _ in range(ROUNDS):
            x = a * x + (b * x @ x.T + c * x @ x.T @ x @ x.T) @ x
        matrix = matrix * (1 - rate * decay) - rate * RMS * 30**0.5 * x
    assert np.abs(weights[0].detach().numpy() - matrix).max() < 1e-5
    assert torch.equal(weights[1], reference.param_groups[0]["params"][0])


def test_on_a_gpu_nothing_changes_where_the_step_is_not_to_count():
    """As the loop asks for there: by a flag on the device."""
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer, before = Muon([weight], TrainConfig(), CPU), weight.detach().clone()
    weight.grad, optimizer.found_inf = torch.full((4, 4), torch.nan), torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state[weight]["momentum"].any()


def test_the_learning_rate_reaches_all_weights():
    weights = [torch.nn.Parameter(torch.zeros(3, 3)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = Muon(weights, TrainConfig(weight_decay=0.0), CPU)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(weight.abs().max() > 0.01 for weight in weights)


def settings(optimizer, count):
    train = {"batch_size": 4, "micro_batch": 2, "steps": count, "warmup_steps": 0, "optimizer": optimizer}
    return from_dict(Config, {**TINY, "train": train}, "test")


class Momentum(torch.optim.SGD):
    """As CONTRIBUTING.md has an optimizer added."""

    def __init__(self, weights, settings, device):
        super().__init__(list(weights), lr=settings.lr_start, momentum=0.9)

    def keeps(self, p):
        return {"momentum_buffer": Keeps()}


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "momentum"])
def test_interrupted_it_goes_on_to_the_bit(optimizer, tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "momentum", Momentum)
    config = settings("adamw", 4)
    task = Pretraining(replace(config, train=replace(config.train, optimizer=optimizer)))
    whole, begun = initial_state(task, ALONE), initial_state(task, ALONE)
    for _ in steps(task, ALONE, whole, batches(4, 2, 0, 1)):
        pass
    source = batches(4, 2, 0, 1)
    for _, _ in zip(range(2), steps(task, ALONE, begun, source), strict=False):
        pass
    checkpoints = own(tmp_path / "checkpoints")
    checkpoints.save(begun, about(begun))
    assert checkpoints.finish() == ""
    again = initial_state(task, ALONE)
    assert Checkpoints(str(tmp_path / "checkpoints"), ALONE).load(again, anything)["step"] == begun.step
    for name, value in numbers(begun).items():
        assert torch.equal(numbers(again)[name], value), name
    rest = batches(4, 2, 0, 1)
    for _ in range(again.step):
        next(rest)
    for _ in steps(task, ALONE, again, rest):
        pass
    for name, value in numbers(whole).items():
        assert torch.equal(numbers(again)[name], value), name


def test_what_an_optimizer_keeps_and_does_not_name_is_an_error(tmp_path):
    """It would be gone after a resume, without a word."""
    task = Pretraining(settings("adamw", 2))
    state = initial_state(task, ALONE)
    for _ in steps(task, ALONE, state, batches(4, 2, 0, 1)):
        pass
    for kept in state.optimizer.state.values():
        kept["third"] = torch.zeros(())
    checkpoints = own(tmp_path / "checkpoints")
    with pytest.raises(RuntimeError, match="its `keeps` names others"):
        checkpoints.save(state, about(state))


def test_another_optimizer_is_another_run(tmp_path):
    task = Pretraining(settings("muon", 2))
    state = initial_state(task, ALONE)
    for _ in steps(task, ALONE, state, batches(4, 2, 0, 1)):
        pass
    checkpoints = own(tmp_path / "checkpoints")
    checkpoints.save(state, about(state))
    assert checkpoints.finish() == ""
    told = []
    other = initial_state(Pretraining(replace(task.config, train=replace(task.config.train, optimizer="adamw"))), ALONE)
    assert Checkpoints(str(tmp_path / "checkpoints"), ALONE, warn=told.append).load(other, anything) is None
    assert "which this model and its optimizer do not have" in told[0]
