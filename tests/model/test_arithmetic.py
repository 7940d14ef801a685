"""The arithmetic is what torch counts, whatever the sizes and the ablation."""

import typing
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equiav.config import ModelConfig
from equiav.model import EquiAV
from equiav.model.arithmetic import count, forward_backward
from equiav.model.predictor import PREDICTORS, MultiplyAdds


def counted(config):
    """Of the forward pass, of both."""
    m, Q = config.model, 1 + config.objective.sampled
    audio, image = (1, m.spectrogram_frames, m.spectrogram_mels), (1, 3, m.image_size, m.image_size)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model, flops = EquiAV(m, config.objective), FlopCounterMode(display=False)
        augmented = config.objective.needs_augmented
        views = [torch.empty(shape) if there else None for there in (True, augmented) for shape in (audio, image)]
        with flops:
            embeddings = model(*views, torch.empty(1, Q, 24), torch.empty(1, Q, 18))
            forward = flops.get_total_flops() // 2
            sum(z.sum() for z in embeddings[:6] if z is not None).backward()
    return forward, flops.get_total_flops() // 2


def test_the_settings_name_every_predictor_and_no_other():
    assert set(typing.get_args(typing.get_type_hints(ModelConfig)["predictor"])) == PREDICTORS.keys()


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_sizes_and_predictors(make_config, depth, predictor):
    check(make_config(model={"depth": depth, "predictor": predictor, "aug_width": 48, "head_width": 40}))


class Shift(torch.nn.Module):
    """As CONTRIBUTING.md has a predictor added: MeanPool(h) + W t."""

    def __init__(self, d_t, config):
        super().__init__()
        self.shift = torch.nn.Linear(d_t, config.width)

    @staticmethod
    def multiply_adds(config, N, d_t):
        return MultiplyAdds(0, d_t * config.width)

    def forward(self, h, t):
        return h.mean(dim=1, keepdim=True) + self.shift(t)


def test_a_predictor_that_is_added(make_config, monkeypatch):
    monkeypatch.setitem(PREDICTORS, "shift", Shift)
    config = make_config(model={"depth": 1})
    check(replace(config, model=replace(config.model, predictor="shift")))


@pytest.mark.parametrize("inter_on", ["original", "augmented", "equivariant", "centroid"])
@pytest.mark.parametrize("intra", ["equivariant", "invariant", "none"])
def test_ablations(make_config, intra, inter_on):
    check(make_config(objective={"intra": intra, "inter_on": inter_on, "centroid_size": 5}))


def check(config):
    forward, both = counted(config)
    assert sum(side.forward for side in count(config.model, config.objective)) == forward
    assert forward_backward(config.model, config.objective) == both
