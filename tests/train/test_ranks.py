"""One run, to the last bit, whatever the number of processes: real ones, over gloo."""

import pytest
import torch

from tests.train.ranks import TINY, in_processes


def settings(steps=2, objective=None, **train):
    train = {
        "batch_size": 8,
        "micro_batch": 2,
        "steps": steps,
        "warmup_steps": min(10, steps // 2),
        "lr": 1e-3,
        "lr_start": 1e-6,
        **train,
    }
    return {**TINY, "train": train, "objective": {"centroid_size": 3, **(objective or {})}}


def tuned(tune=None, **train):
    everything = {"mixup": 0.5, "drop_path": 0.3, "time_roll": True}
    return {**settings(**train), "tune": {**everything, **(tune or {})}}


# name -> settings, places of the global batch without a clip
CASES = {
    "plain": (settings(), []),
    "last micro-batch not full": (settings(batch_size=7), []),
    "clips missing": (settings(batch_size=7, micro_batch=1), [0, 4, 6]),
    "a process without clips": (settings(batch_size=4, micro_batch=1), [0, 1, 3]),
    "learned temperature": (settings(objective={"learnable_temperature": True}), []),
    "one copy each": (settings(shard=1), []),
    "rows of odd width": (
        {**settings(batch_size=11, micro_batch=3), "model": {**TINY["model"], "head_width": 37}, "seed": 77},
        [],
    ),
    "recomputed": (settings(recompute=True), []),
    "Muon": (settings(4, optimizer="muon", batch_size=7), [5]),
    "labels": (tuned(), []),
    "one label, from sound, clips missing": (
        tuned({"loss": "one", "modality": "audio"}, batch_size=7, micro_batch=2),
        [0, 4, 5],
    ),
    "labels from pictures, recomputed": (
        tuned({"modality": "image"}, recompute=True, batch_size=7, micro_batch=3),
        [3],
    ),
    "recomputed, learned temperature": (
        settings(recompute=True, batch_size=7, objective={"learnable_temperature": True}),
        [3],
    ),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of one process that keeps everything."""
    cases = {
        name: ({**case, "train": {**case["train"], "recompute": False, "shard": 0}}, missing)
        for name, (case, missing) in CASES.items()
    }
    return dict(zip(CASES, in_processes(1, list(cases.values()), tmp_path_factory.mktemp("alone")), strict=True))


def same(name, result, expected):
    (gradient, rows, weights), (own_gradient, own_rows, own_weights) = result, expected
    assert gradient.keys() == own_gradient.keys()
    for key, value in own_gradient.items():
        assert torch.equal(gradient[key], value), (name, key)
    assert len(rows) == len(own_rows)
    for row, own_row in zip(rows, own_rows, strict=True):
        assert row == own_row, name
    for key, value in own_weights.items():
        assert torch.equal(weights[key], value), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("W", [1, 2, 3])
def test_gradient_curve_and_weights_are_those_of_one_process(alone, tmp_path, W):
    for name, result in zip(CASES, in_processes(W, list(CASES.values()), tmp_path), strict=True):
        same(name, result, alone[name])


@pytest.mark.slow
def test_micro_batches_of_any_size_have_the_gradient_of_the_whole_batch(alone, tmp_path):
    """Other shapes are rounded otherwise."""
    sizes = (1, 3, 8)
    cases = [(settings(batch_size=7, micro_batch=size), []) for size in sizes]
    expected = alone["last micro-batch not full"][0]
    for size, (gradient, _, _) in zip(sizes, in_processes(1, cases, tmp_path), strict=True):
        difference = torch.stack([(gradient[key] - expected[key]).norm() for key in expected]).norm()
        assert difference <= 1e-6 * torch.stack([g.norm() for g in expected.values()]).norm(), size


@pytest.mark.slow
def test_copies_of_half_the_processes_each(alone, tmp_path):
    cases = [(settings(shard=2), []), (settings(shard=2, recompute=True), [])]
    for result in in_processes(4, cases, tmp_path):
        same("copies", result, alone["plain"])


@pytest.mark.slow
def test_compiled_blocks(alone, tmp_path):
    cases = [(settings(compile=True), [])]
    (one,), (two,) = in_processes(1, cases, tmp_path), in_processes(2, cases, tmp_path)
    same("compiled", two, one)
    expected = alone["plain"][0]
    difference = torch.stack([(one[0][key] - expected[key]).norm() for key in expected]).norm()
    assert difference <= 1e-6 * torch.stack([g.norm() for g in expected.values()]).norm()


@pytest.mark.slow
def test_sixty_steps_are_the_same_for_one_to_four_processes(tmp_path):
    cases = [(settings(60, micro_batch=1), [])]  # an eighth of the batch
    (expected,) = in_processes(1, [(settings(60, micro_batch=1, recompute=True), [])], tmp_path)
    assert expected[1][-1]["loss"] < 0.5 * expected[1][0]["loss"]
    for W in (2, 3, 4):
        same(f"{W} processes", in_processes(W, cases, tmp_path)[0], expected)
