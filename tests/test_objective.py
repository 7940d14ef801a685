"""Every loss against the equations written as plain loops in float64."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from equiav import objective
from equiav.config import ObjectiveConfig
from equiav.objective import Embeddings, Rows, crowding, equiav_loss, info_nce, normalised, nt_xent, weights_at

N, d, TAU = 7, 5, 0.07


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sim(x, y):
    return (x @ y) / (x.norm() * y.norm())


def plain_nt_xent(z_hat, z_aug, tau, with_positive):
    def one_way(p, q):
        total = 0.0
        for i in range(N):
            top = torch.exp(sim(p[i], q[i]) / tau)
            bottom = 0.0
            for j in range(N):
                if j != i or with_positive:
                    bottom = bottom + torch.exp(sim(p[i], q[j]) / tau)
                if j != i:
                    bottom = bottom + torch.exp(sim(p[i], p[j]) / tau)
            total = total - torch.log(top / bottom)
        return total / N

    return (one_way(z_hat, z_aug) + one_way(z_aug, z_hat)) / 2


def plain_info_nce(a, v, tau):
    total = 0.0
    for i in range(N):
        for p, q in ((a, v), (v, a)):
            bottom = sum(torch.exp(sim(p[i], q[j]) / tau) for j in range(N))
            total = total - torch.log(torch.exp(sim(p[i], q[i]) / tau) / bottom) / 2
    return total / N


def same_value_and_gradients(ours, plain, *inputs):
    assert abs(ours - plain) < 1e-10 * max(1, abs(plain))
    for g, g_plain in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert (g - g_plain).abs().max() < 1e-10


@pytest.fixture(autouse=True, params=[3, 4096])
def columns(request, monkeypatch):
    """Candidates at a time."""
    monkeypatch.setattr(objective, "COLUMNS", request.param)


def all_of(z):
    return Rows.of(torch.ones(len(z), dtype=torch.bool, device=z.device))


def of_rows(tau, x):
    return torch.as_tensor(tau, dtype=x.dtype).expand(len(x))


def unit(x, y):
    return normalised(torch.stack((x, y), dim=1))


def intra(x, y, tau, with_positive=True):
    return nt_xent(unit(x, y), all_of(x), of_rows(tau, x), with_positive)


def inter(x, y, tau):
    return info_nce(unit(x, y), all_of(x), of_rows(tau, x))


@pytest.mark.parametrize("with_positive", [True, False])
def test_nt_xent(with_positive):
    x, y = random(N, d), random(N, d, seed=1)
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    same_value_and_gradients(intra(x, y, tau, with_positive)[0], plain_nt_xent(x, y, tau, with_positive), x, y, tau)


def test_info_nce():
    x, y = random(N, d), random(N, d, seed=1)
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    same_value_and_gradients(inter(x, y, tau)[0], plain_info_nce(x, y, tau), x, y, tau)


def test_gradcheck():
    x, y = random(4, 3), random(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x, y: intra(x, y, 0.5)[0], (x, y))
    assert torch.autograd.gradcheck(lambda x, y: intra(x, y, 0.5, False)[0], (x, y))
    assert torch.autograd.gradcheck(lambda x, y: inter(x, y, 0.5)[0], (x, y))


def embeddings(**replaced):
    values: dict = {name: random(N, d, seed=k) for k, name in enumerate(Embeddings._fields) if name != "temperature"}
    values |= {name: random(N, seed=k) for k, name in enumerate(("spread_a", "spread_v"))}
    return Embeddings(**{**values, **replaced})


def test_total_is_the_weighted_sum():
    e, config = embeddings(), ObjectiveConfig(weight_inter=0.5, weight_intra_audio=2, weight_intra_image=3)
    loss, terms = equiav_loss(e, weights_at(0, 1, config), config)
    plain = (
        0.5 * plain_info_nce(e.inter_a, e.inter_v, TAU)
        + 2 * plain_nt_xent(e.intra_a, e.aug_a, TAU, True)
        + 3 * plain_nt_xent(e.intra_v, e.aug_v, TAU, True)
    )
    same_value_and_gradients(loss, plain, e.inter_a, e.inter_v, e.intra_a, e.aug_a, e.intra_v, e.aug_v)
    cosines = torch.stack([sim(p, q) for p, q in zip(e.intra_a, e.aug_a, strict=True)])
    unpredicted = torch.stack([sim(p, q) for p, q in zip(e.plain_a, e.aug_a, strict=True)])
    assert terms["similarity_audio"].sum() == pytest.approx(cosines.mean().item())
    assert terms["gain_audio"].sum() == pytest.approx((cosines - unpredicted).mean().item())
    another = torch.stack([sim(p, q) for p, q in zip(e.other_a, e.aug_a, strict=True)])
    assert terms["sensitivity_audio"].sum() == pytest.approx((cosines - another).mean().item())
    assert terms["spread_image"].sum() == pytest.approx(e.spread_v.mean().item())
    squares = torch.stack([sim(p, q) ** 2 for p in e.inter_v for q in e.inter_v])
    assert terms["crowding_image"].sum() == pytest.approx(squares.mean().item())
    assert all(value.shape == (N,) and not value.requires_grad for value in terms.values())
    assert terms["loss"].sum() == pytest.approx(loss.item(), rel=1e-12)


class Together:
    """Processes as threads: a gather waits for all of them."""

    def __init__(self, size):
        self.barrier, self.rows, self.calls = threading.Barrier(size, timeout=60), [None] * size, []

    def gather(self, rank, x):
        self.rows[rank] = x
        self.barrier.wait()
        everyone = torch.cat(self.rows)
        self.barrier.wait()
        if rank == 0:
            self.calls.append(tuple(x.shape))
        return everyone


def in_parts(e, shares, config, weights, piece=0):
    """Each process's loss, terms and gradients by its own rows; `shares`: rows of each, -1: nothing."""
    size, b = len(shares), max(len(share) for share in shares)
    together = Together(size)

    def process(rank):
        index = torch.tensor(shares[rank], dtype=torch.int64)
        leaves = {}
        for name, z in e._asdict().items():
            if z is not None:
                filling = z.new_ones(b - len(index), *z.shape[1:])
                own = torch.cat([z[index.clamp(min=0)], filling])
                leaves[name] = own.detach().clone().requires_grad_()
        valid = torch.cat([index >= 0, torch.zeros(b - len(index), dtype=torch.bool)])
        rows = Rows.of(valid, lambda x: together.gather(rank, x), rank * b, piece)
        loss, terms = equiav_loss(Embeddings(**{**dict.fromkeys(Embeddings._fields), **leaves}), weights, config, rows)
        loss.backward()
        return loss.detach(), terms, {name: z.grad for name, z in leaves.items()}, index

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(process, range(size))), together.calls


@pytest.mark.parametrize(
    "settings", [{}, {"intra_positive_in_denominator": False}, {"intra": "none"}, {"learnable_temperature": True}]
)
@pytest.mark.parametrize("piece", [0, 2])
@pytest.mark.parametrize(
    "shares",
    [
        [[0, 1, 2], [3, 4], [5, 6]],
        [[0, 1, 2, 3, 4, 5, 6]],
        [[0, 1, 2, 3], [4, 5, 6]],
        [[0, -1, 1], [-1, -1], [2, 3, 4], [5, 6, -1]],  # quarantined, or beyond the end
        [[k] for k in range(7)],
        [[], [0, 1, 2, 3, 4, 5], [6]],
    ],
)
def test_processes_add_up_to_one(settings, shares, piece):
    """Losses and terms sum to the single process's; each has the gradient of the whole loss by its own rows."""
    config = ObjectiveConfig(weight_intra_audio=2.0, weight_inter=0.5, **settings)
    weights = weights_at(0, 1, config)
    e = embeddings()
    if config.intra == "none":
        e = Embeddings(**dict.fromkeys(Embeddings._fields) | {"inter_a": e.inter_a, "inter_v": e.inter_v})
    if config.learnable_temperature:
        e = e._replace(temperature=torch.full((N,), 0.3, dtype=torch.float64))
    tau = TAU if e.temperature is None else torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    plain = 0.5 * plain_info_nce(e.inter_a, e.inter_v, tau)
    if config.intra != "none":
        plain = plain + 2 * plain_nt_xent(e.intra_a, e.aug_a, tau, config.intra_positive_in_denominator)
        plain = plain + plain_nt_xent(e.intra_v, e.aug_v, tau, config.intra_positive_in_denominator)
    compared = ("plain", "other", "spread")
    names = [name for name, z in e._asdict().items() if z is not None and not name.startswith(compared)]
    inputs = [tau if name == "temperature" else getattr(e, name) for name in names]
    expected = dict(zip(names, torch.autograd.grad(plain, inputs), strict=True))
    parts, calls = in_parts(e, shares, config, weights, piece)
    assert sum(loss for loss, *_ in parts).item() == pytest.approx(plain.item(), rel=1e-10)
    for name in names:
        if name == "temperature":
            assert sum(gradients[name].sum() for _, _, gradients, _ in parts).item() == pytest.approx(
                expected[name].item(), rel=1e-9
            )
            continue
        for _, _, gradients, index in parts:
            for row in range(len(gradients[name])):
                sample = int(index[row]) if row < len(index) else -1
                right = expected[name][sample] if sample >= 0 else torch.zeros(d)
                assert (gradients[name][row] - right).abs().max() < 1e-10
    whole = equiav_loss(e, weights, config)[1]
    for name, value in whole.items():
        by_row = {int(s): terms[name][row] for _, terms, _, index in parts for row, s in enumerate(index) if s >= 0}
        assert torch.stack([by_row[k] for k in range(N)]).numpy() == pytest.approx(value.numpy(), abs=1e-9), name
        assert sum(terms[name].sum() for _, terms, _, _ in parts).item() == pytest.approx(value.sum().item()), name
    b = max(map(len, shares))
    intra = [(b, 2, d), (b, 2)] * (0 if config.intra == "none" else 2)
    assert calls == [(b,), (b, 2, d), (b, 2), (b, 2, d), *intra]  # and none in backward


@pytest.mark.parametrize("rows", [[], [3]])
def test_without_two_clips_there_is_no_gradient(rows):
    for settings in ({}, {"intra_positive_in_denominator": False}):
        config = ObjectiveConfig(**settings)
        parts, _ = in_parts(embeddings(), [[-1, *rows], [-1, -1]], config, weights_at(0, 1, config))
        for loss, _, gradients, _ in parts:
            assert torch.isfinite(loss)
            if config.intra_positive_in_denominator:
                assert all(g is None or g.abs().max() < 1e-12 for g in gradients.values())


def test_learned_temperature_is_used_and_trained():
    config = ObjectiveConfig(learnable_temperature=True)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    e = embeddings(temperature=tau.expand(N))
    loss, _ = equiav_loss(e, weights_at(0, 1, config), config)
    assert loss.dim() == 0
    plain = (
        plain_info_nce(e.inter_a, e.inter_v, tau)
        + plain_nt_xent(e.intra_a, e.aug_a, tau, True)
        + plain_nt_xent(e.intra_v, e.aug_v, tau, True)
    )
    same_value_and_gradients(loss, plain, tau)


def test_invariant_learning_gains_nothing():
    e = embeddings()
    e = e._replace(plain_a=e.intra_a.detach())
    assert equiav_loss(e, weights_at(0, 1, ObjectiveConfig()), ObjectiveConfig())[1]["gain_audio"].abs().max() < 1e-12


def test_crowding_counts_directions():
    """All alike: 1. So many directions, each as often: one in that many."""
    for r in range(1, d + 1):
        z = torch.eye(d, dtype=torch.float64)[torch.arange(4 * r) % r]
        own, valid = torch.stack((z, z.flip(0)), dim=1), torch.ones(4 * r, dtype=torch.bool)
        assert crowding(own, Rows.of(valid)).mean(0).tolist() == pytest.approx([1 / r, 1 / r])


def test_devices_agree(device):
    e = Embeddings(*(None if z is None else z.detach().float() for z in embeddings()))
    there = Embeddings(*(None if z is None else z.to(device) for z in e))
    config = ObjectiveConfig()
    here, away = (equiav_loss(x, weights_at(0, 1, config), config) for x in (e, there))
    assert away[0].item() == pytest.approx(here[0].item(), rel=1e-4)
    assert {k: v.sum().item() for k, v in away[1].items()} == pytest.approx(
        {k: v.sum().item() for k, v in here[1].items()}, abs=1e-4
    )


def test_accuracy_counts_anchors_that_find_their_positive():
    z = torch.eye(4)
    assert inter(z, z, TAU)[2].sum() == 8
    assert inter(z, z.roll(1, 0), TAU)[2].sum() == 0
    assert intra(z, z + 0.01, TAU)[2].sum() == 8
    assert intra(z, z.roll(1, 0), TAU)[2].sum() == 0


def test_accuracy_of_collapsed_embeddings_is_zero_for_the_intra_loss():
    z = torch.ones(4, 3)
    assert intra(z, z, TAU)[2].sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_not_of_low_precision_under_autocast(dtype):
    e = Embeddings(*(None if z is None else z.detach().to(dtype) for z in embeddings()))
    config = ObjectiveConfig()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = equiav_loss(e, weights_at(0, 1, config), config)
    x = [z.double() for z in e[:6]]
    plain = (
        plain_nt_xent(x[0], x[1], TAU, True) + plain_nt_xent(x[2], x[3], TAU, True) + plain_info_nce(x[4], x[5], TAU)
    )
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)


def test_schedules():
    def series(**settings):
        return [weights_at(step, 4, ObjectiveConfig(**settings)) for step in range(4)]

    assert series() == [(1, 1, 1)] * 4
    assert series(schedule="two_stage") == [(0, 1, 1)] * 2 + [(1, 0, 0)] * 2
    assert series(schedule="two_stage", two_stage_split=0.25) == [(0, 1, 1)] + [(1, 0, 0)] * 3
    assert series(schedule="alternating") == [(0, 1, 1), (1, 0, 0)] * 2
    assert series(intra="none") == [(1, 0, 0)] * 4


def test_the_loss_of_chance_is_the_log_of_the_candidates():
    """Equal similarities everywhere: -log 1/N between modalities, -log 1/(2N - 1) within one."""
    z = torch.ones(N, d, dtype=torch.float64)
    assert inter(z, z, TAU)[0] == pytest.approx(math.log(N))
    assert intra(z, z, TAU)[0] == pytest.approx(math.log(2 * N - 1))
    assert intra(z, z, TAU, with_positive=False)[0] == pytest.approx(math.log(2 * N - 2))


def test_an_anchors_own_kind_counts_against_it():
    """The two p are nearer to each other than to their partners; the two q are not."""
    p = torch.tensor([[1.0, 0.1, 0.0], [1.0, -0.1, 0.0]])
    q = torch.tensor([[0.2, 1.0, 0.0], [0.2, -1.0, 0.0]])
    assert intra(p, q, 0.1)[2].sum() == 2


def test_image_side_of_the_report_and_the_denominator_switch():
    e, config = embeddings(), ObjectiveConfig(intra_positive_in_denominator=False, temperature=0.3)
    loss, terms = equiav_loss(e, weights_at(0, 1, config), config)
    plain = (
        plain_info_nce(e.inter_a, e.inter_v, 0.3)
        + plain_nt_xent(e.intra_a, e.aug_a, 0.3, False)
        + plain_nt_xent(e.intra_v, e.aug_v, 0.3, False)
    )
    assert loss.item() == pytest.approx(plain.item(), rel=1e-9)
    cosine = torch.nn.functional.cosine_similarity
    similarity = cosine(e.intra_v, e.aug_v).mean().item()
    assert terms["similarity_image"].sum().item() == pytest.approx(similarity)
    assert terms["gain_image"].sum().item() == pytest.approx(similarity - cosine(e.plain_v, e.aug_v).mean().item())
