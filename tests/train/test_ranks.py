"""One run, whatever the number of processes: real ones, over gloo."""

import pytest
import torch

from tests.train.ranks import TINY, in_processes


def settings(steps=2, objective=None, **train):
    train = {
        "batch_size": 8,
        "steps": steps,
        "warmup_steps": min(10, steps // 2),
        "lr": 1e-3,
        "lr_start": 1e-6,
        **train,
    }
    return {**TINY, "train": train, "objective": {"centroid_size": 3, **(objective or {})}}


# name -> settings, places of the global batch without a clip
CASES = {
    "plain": (settings(), []),
    "uneven": (settings(batch_size=7), []),
    "clips missing": (settings(batch_size=7), [0, 4, 6]),
    "a process without clips": (settings(batch_size=4), [0, 1, 3]),
    "learned temperature": (settings(objective={"learnable_temperature": True}), []),
    "one copy each": (settings(shard=1), []),
    "micro-batches of 3": (settings(micro_batch=3), []),
    "micro-batches of 1, uneven": (settings(micro_batch=1, batch_size=7), [3]),
    "micro-batches, learned temperature": (settings(micro_batch=2, objective={"learnable_temperature": True}), []),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of one process, without micro-batches."""
    cases = {
        name: ({**case, "train": {**case["train"], "micro_batch": 0, "shard": 0}}, missing)
        for name, (case, missing) in CASES.items()
    }
    return dict(zip(CASES, in_processes(1, list(cases.values()), tmp_path_factory.mktemp("alone")), strict=True))


def compare(name, result, expected):
    (gradient, rows, weights), (own_gradient, own_rows, own_weights) = result, expected
    assert gradient.keys() == own_gradient.keys()
    difference = torch.stack([(gradient[key] - own_gradient[key]).norm() for key in gradient]).norm()
    assert difference <= 1e-6 * torch.stack([g.norm() for g in own_gradient.values()]).norm(), name
    assert len(rows) == len(own_rows)
    for row, own_row in zip(rows, own_rows, strict=True):
        assert row == pytest.approx(own_row, abs=1e-5, rel=1e-5), name
    for key, value in own_weights.items():
        assert (weights[key] - value).abs().max() <= 1e-5, (name, key)


@pytest.mark.parametrize("W", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_gradient_curve_and_weights_are_those_of_one_process(alone, tmp_path, W):
    for name, result in zip(CASES, in_processes(W, list(CASES.values()), tmp_path), strict=True):
        compare(name, result, alone[name])


@pytest.mark.slow
def test_copies_of_half_the_processes_each(alone, tmp_path):
    cases = [(settings(shard=2), []), (settings(shard=2, micro_batch=1, batch_size=7), [3])]
    results = in_processes(4, cases, tmp_path)
    compare("plain", results[0], alone["plain"])
    compare("uneven", results[1], alone["micro-batches of 1, uneven"])


@pytest.mark.slow
def test_sixty_steps_are_the_same_for_one_to_four_processes(tmp_path):
    cases = [(settings(60), [])]
    (expected,) = in_processes(1, cases, tmp_path)
    assert expected[1][-1]["loss"] < 0.5 * expected[1][0]["loss"]
    for W in (2, 3, 4):
        compare(f"{W} processes", in_processes(W, cases, tmp_path)[0], expected)
    micro = [(settings(60, micro_batch=1), [])]  # an eighth of the batch
    compare("micro-batches", in_processes(1, micro, tmp_path)[0], expected)
