"""Costs counted from the model agree with what can be counted by hand, and with the paper's Table B."""

import pytest
import torch

from equiav.commands.plan import PlanConfig, make_plan
from equiav.config import ConfigError, from_dict
from equiav.model import EquiAV


def plan(size="vit_b16", world_size=8, **sections):
    sections.setdefault("model", {})["size"] = size
    return make_plan(from_dict(PlanConfig, {"world_size": world_size, **sections}, "test"))


@pytest.fixture(scope="module")
def vit_b():
    return plan()


def test_table_b(vit_b):
    """What the centroid adds is the paper's to the digit. Its baselines (97.80, 35.20) are 0.5% and 0.2% above ours:
    it feeds the spectrogram as three channels (0.40) and counts norms and activations."""
    added = {1: (0.41, 0.16), 4: (0.43, 0.18), 8: (0.45, 0.20), 16: (0.50, 0.24)}
    for S, (audio, image) in added.items():
        assert round(vit_b.audio.separate[S] / 1e9, 2) == audio
        assert round(vit_b.image.separate[S] / 1e9, 2) == image
    assert vit_b.audio.baseline / 1e9 == pytest.approx(97.80, rel=0.006)
    assert vit_b.image.baseline / 1e9 == pytest.approx(35.20, rel=0.003)


def test_sharing_key_and_value_leaves_only_the_queries(vit_b):
    D, A, inner, N = 768, 256, 512, 512
    f_t = 24 * A + 2 * A * A
    query = f_t + A * inner + 2 * N * inner + inner * D + 8 * D * D
    assert vit_b.audio.centroid[16] == 16 * query
    assert vit_b.audio.separate[16] - vit_b.audio.centroid[16] == 2 * N * D * inner


def test_counts_by_hand(vit_b):
    D = 768
    block = lambda N: N * 12 * D * D + 2 * N * N * D  # noqa: E731
    assert vit_b.audio.encoder == 2 * (12 * block(512) + 512 * 256 * D)
    assert vit_b.image.encoder == 2 * (12 * block(196) + 196 * 768 * D)
    head = D * 2048 + 2048 * 2048 + 2048 * 512
    assert vit_b.audio.heads == 5 * head  # prediction, augmented, inter, and two to compare with: `gain`, `sensitivity`
    sides = (vit_b.audio, vit_b.image)
    assert vit_b.forward == sum(side.encoder + side.predictor + side.heads for side in sides)
    assert 2.98 < vit_b.forward_backward / vit_b.forward < 3.0  # no gradient goes to the input
    assert sum(vit_b.parameters.values()) == 210_570_752


def test_other_sizes_predictors_and_ablations():
    for kind in ("linear", "hypernet"):
        assert plan("tiny", model={"predictor": kind}).audio.predictor > 0
    one_view = plan("tiny", objective={"intra": "none", "inter_on": "original"})
    two_views = plan("tiny")
    assert 2 * one_view.audio.encoder == two_views.audio.encoder
    assert plan("tiny", objective={"centroid_size": 5}).audio.centroid[5] > 0


def test_traffic_and_memory():
    tiny = plan("tiny", world_size=4)
    total = sum(tiny.parameters.values())
    assert tiny.local_batch == 64
    assert tiny.state_bytes == 16 * total
    assert tiny.embedding_bytes == 6 * (256 - 64) * 64 * 4
    assert tiny.weight_bytes == total * (2 * 2 * 4 + 8) * 3 // 4  # two micro-batches, gathered twice each
    assert tiny.kept_batch == 64
    recomputed = plan("tiny", world_size=4, train={"recompute": True})
    assert (recomputed.local_batch, recomputed.kept_batch) == (64, 32)
    assert recomputed.weight_bytes == total * (2 * 3 * 4 + 8) * 3 // 4
    assert plan("tiny", world_size=1).weight_bytes == 0
    assert plan("tiny", world_size=0, train={"micro_batch": 128}).local_batch == 128  # two can share it
    uneven = plan("tiny", world_size=3)
    assert uneven.local_batch == 3 * 32
    assert uneven.embedding_bytes == 6 * (256 - 2 * 32) * 64 * 4


def test_activations_are_what_autograd_really_keeps():
    """Two real forward passes on CPU, counted the same way."""
    config = from_dict(PlanConfig, {"model": {"size": "tiny"}}, "test")
    model = EquiAV(config.model, config.objective)
    model.init_weights(0)

    def kept(batch):
        storages, m, Q = {}, config.model, 1 + config.objective.sampled
        x = [torch.randn(batch, *shape) for shape in ((256, 64), (3, m.image_size, m.image_size)) * 2]

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            held = model(*x, torch.randn(batch, Q, 24), torch.randn(batch, Q, 18))
        assert held
        return sum(storages.values())

    assert make_plan(config).activation_bytes == pytest.approx(kept(9) - kept(8), rel=0.02)


@pytest.mark.parametrize("world_size", [-1, 9])
def test_more_processes_than_micro_batches_are_refused(world_size):
    with pytest.raises(ConfigError, match=f"world_size is {world_size}, expected 1 to 8, the micro-batches in a step"):
        plan("tiny", world_size=world_size)


def test_the_baseline_has_one_query(vit_b):
    for side in (vit_b.audio, vit_b.image):
        assert (
            side.baseline == side.encoder + 3 * side.heads // 5 + side.predictor - side.centroid[16]
        )  # the rest: metrics


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth_extends_what_two_blocks_take(depth):
    config = from_dict(PlanConfig, {"model": {"size": "tiny", "depth": depth}}, "test")
    model = EquiAV(config.model, config.objective)
    assert sum(make_plan(config).parameters.values()) == sum(p.numel() for p in model.parameters())
