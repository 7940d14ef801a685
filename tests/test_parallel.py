"""What needs no other process: norms that do not depend on how gradients are cut, and who takes part."""

import math
import random

import pytest
import torch

from equiav import parallel
from equiav.parallel import Ranks, active, norm, own_addresses

ALONE = Ranks("cpu")


def gradients(seed):
    """Of very different sizes, as many as do not fit one piece."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (300, 11), (1,), (), (64, 3, 4, 4), (5000,)]
    scales = [1e-3, 1.0, 1e4, 1e-20, 3e-7, 1e-2]
    return [scale * torch.randn(shape, generator=generator) for shape, scale in zip(shapes, scales, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_the_norm_is_right_and_no_cut_shows_in_it(monkeypatch, seed):
    whole = gradients(seed)
    expected = math.sqrt(math.fsum(float(x) ** 2 for g in whole for x in g.flatten()))
    value, _ = norm(ALONE, whole)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    cut = random.Random(seed)
    for elements in (1, 17, 1000):
        monkeypatch.setattr(parallel, "ELEMENTS", elements if elements > 1 else 3)
        parts = []
        for g in whole:
            flat = g.flatten()
            while len(flat):
                k = cut.randint(1, len(flat))
                parts.append(flat[:k])
                flat = flat[k:]
        cut.shuffle(parts)
        assert norm(ALONE, parts)[0].item() == value.item()


@pytest.mark.parametrize(
    ("spoiled", "expected"), [(math.nan, math.inf), (math.inf, math.inf), (-math.inf, math.inf), (0.0, 0.0)]
)
def test_what_is_not_finite_and_what_is_nothing(spoiled, expected):
    assert norm(ALONE, [torch.zeros(5), torch.tensor([0.0, spoiled])])[0].item() == expected


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-19, 1e19, 3e38])
def test_the_norm_of_numbers_whose_squares_are_none(size):
    g = torch.tensor([size, -size, size, size])
    assert norm(ALONE, [g])[0].item() == pytest.approx(2 * g[0].item(), rel=1e-12)


def test_numbers_beside_the_norm_are_told():
    assert norm(ALONE, [torch.ones(4)], (143.0, 0.0))[1].tolist() == [143.0, 0.0]


def test_who_takes_part():
    assert [active(world, 8, 0) for world in (1, 3, 8, 9, 16)] == [1, 3, 8, 8, 8]
    assert active(24, 64, 16) == 16
    assert active(32, 64, 16) == 32
    assert active(7, 64, 16) == 7  # fewer than one group: they share the model among them
    assert active(6, 5, 2) == 4


def test_addresses_that_others_may_reach():
    found = own_addresses()
    assert not {address for address in found if address.startswith("127.")} | ({"::1"} & found.keys())
    assert "lo" not in found.values()
