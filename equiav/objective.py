"""Eq. 8-16: what the embeddings are asked for. Pure functions; float32 (or float64, if they come so) under any autocast.

N is the global batch. Each process calls with its own rows and a `gather` that returns the rows of all processes, in
order and with gradient, and the index of its own first row. The losses of all processes add up to the global loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.config import ObjectiveConfig

Gather = Callable[[Tensor], tuple[Tensor, int]]


class Embeddings(NamedTuple):
    """What a batch of B clips contributes to the loss: what `EquiAV.forward` returns. d is `model.head_width`."""

    intra_a: Tensor | None  # (B, d) predicted (equivariant) or original (invariant) embedding of the audio
    aug_a: Tensor | None  # (B, d) embedding of the augmented audio, z'_a
    intra_v: Tensor | None
    aug_v: Tensor | None
    inter_a: Tensor  # (B, d) what represents the audio in inter-modal learning: by default the centroid's
    inter_v: Tensor
    plain_a: Tensor | None  # (B, d) g_intra(MeanPool(h)), without gradient: what predicting nothing would give
    plain_v: Tensor | None


def alone(z: Tensor) -> tuple[Tensor, int]:
    """The gather of a single process."""
    return z, 0


def similarities(z: Tensor, others: Tensor) -> Tensor:
    """sim(z_i, o_j), cosine: z (b, d), others (N, d) -> (b, N)."""
    return _unit(z) @ _unit(others).T


def nt_xent(
    z_hat: Tensor, z_aug: Tensor, temperature: Tensor | float, positive_in_denominator: bool = True,
    gather: Gather = alone,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Intra-modal loss (Eq. 8-10) of z_hat (b, d) with z_aug (b, d) -> loss, and how many anchors chose their positive.

    With s(x, y) = exp(sim(x, y) / tau), over the 2N embeddings of all processes:

        l(p, q) = -1/N sum_i log  s(p_i, q_i) / (sum_j s(p_i, q_j) + sum_{j != i} s(p_i, p_j))
        loss    = 1/2 (l(z_hat, z_aug) + l(z_aug, z_hat))

    Without the positive in the denominator (Eq. A) the first sum also leaves out j = i.
    """
    with _float32(z_hat):
        (all_hat, first), (all_aug, _) = gather(_unit(z_hat)), gather(_unit(z_aug))
        N, own = len(all_hat), torch.arange(first, first + len(z_hat), device=z_hat.device)
        loss = correct = 0.0
        for anchors, same, other in ((z_hat, all_hat, all_aug), (z_aug, all_aug, all_hat)):
            anchors = _unit(anchors)
            positive = (anchors * other[own]).sum(dim=1) / temperature  # (b,)
            to_other = anchors @ other.T / temperature  # (b, N)
            is_self = own[:, None] == torch.arange(N, device=own.device)  # (b, N)
            to_same = (anchors @ same.T / temperature).masked_fill(is_self, -torch.inf)
            negatives = torch.cat([to_other.masked_fill(is_self, -torch.inf), to_same], dim=1).logsumexp(dim=1)  # (b,)
            denominator = torch.logaddexp(positive, negatives) if positive_in_denominator else negatives
            loss = loss + (denominator - positive).sum() / (2 * N)
            hardest = torch.maximum(to_other.masked_fill(is_self, -torch.inf).amax(dim=1), to_same.amax(dim=1))
            correct = correct + (positive > hardest).sum()
    return loss, correct  # type: ignore[return-value]


def info_nce(z_a: Tensor, z_v: Tensor, temperature: Tensor | float, gather: Gather = alone) -> tuple[Tensor, Tensor]:
    """Inter-modal loss (Eq. 14-15) of z_a (b, d) with z_v (b, d) -> loss, and how many anchors chose their positive.

    l(p, q) = -1/N sum_i log  s(p_i, q_i) / sum_j s(p_i, q_j)
    loss    = 1/2 (l(z_a, z_v) + l(z_v, z_a))
    """
    with _float32(z_a):
        (all_a, first), (all_v, _) = gather(_unit(z_a)), gather(_unit(z_v))
        N, own = len(all_a), torch.arange(first, first + len(z_a), device=z_a.device)
        loss = correct = 0.0
        for anchors, others in ((z_a, all_v), (z_v, all_a)):
            logits = _unit(anchors) @ others.T / temperature  # (b, N)
            loss = loss + F.cross_entropy(logits, own, reduction="sum") / (2 * N)
            correct = correct + (logits.argmax(dim=1) == own).sum()
    return loss, correct  # type: ignore[return-value]


class Weights(NamedTuple):
    """The lambdas of Eq. 16 at one step."""

    inter: float
    intra_a: float
    intra_v: float


def weights_at(step: int, steps: int, config: ObjectiveConfig) -> Weights:
    """Table 8: joint uses both losses at every step; two_stage the intra-modal one for the first share of the run and the
    inter-modal one after; alternating the intra-modal one at even, the inter-modal one at odd steps."""
    inter, intra_a, intra_v = config.weight_inter, config.weight_intra_audio, config.weight_intra_image
    if config.intra == "none":
        intra_a = intra_v = 0.0
    if config.schedule == "joint":
        return Weights(inter, intra_a, intra_v)
    first = step < config.two_stage_split * steps if config.schedule == "two_stage" else step % 2 == 0
    return Weights(0.0, intra_a, intra_v) if first else Weights(inter, 0.0, 0.0)


def equiav_loss(
    e: Embeddings, weights: Weights, temperature: Tensor | float, config: ObjectiveConfig, gather: Gather = alone
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 16 -> L = inter * L_inter + intra_a * L_intra_a + intra_v * L_intra_v, and what the run reports, as scalars.

    Accuracies are shares of anchors nearer to their positive than to any other embedding. `similarity` is
    sim(z_hat, z') (Table 7). A predictor can reach 1 there as the identity on an invariant encoder, so `gain` says how
    much nearer to z' the prediction is than the unpredicted embedding.
    """
    terms: dict[str, Tensor] = {}
    inter, correct = info_nce(e.inter_a, e.inter_v, temperature, gather)
    N = len(gather(e.inter_a.detach())[0])
    terms["loss_inter"], terms["accuracy_inter"] = inter.detach(), correct / (2 * N)
    loss = weights.inter * inter
    sides = (("audio", e.intra_a, e.aug_a, e.plain_a, weights.intra_a),
             ("image", e.intra_v, e.aug_v, e.plain_v, weights.intra_v))  # fmt: skip
    for name, z, z_aug, plain, weight in sides:
        if z is None or z_aug is None:
            continue
        intra, correct = nt_xent(z, z_aug, temperature, config.intra_positive_in_denominator, gather)
        loss = loss + weight * intra
        terms[f"loss_intra_{name}"], terms[f"accuracy_intra_{name}"] = intra.detach(), correct / (2 * N)
        with torch.no_grad(), _float32(z):
            similarity = (_unit(z) * _unit(z_aug)).sum() / N
            terms[f"similarity_{name}"] = similarity
            if plain is not None:
                terms[f"gain_{name}"] = similarity - (_unit(plain) * _unit(z_aug)).sum() / N
    return loss, {"loss": loss.detach(), **terms}


def _unit(z: Tensor) -> Tensor:
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


def _float32(z: Tensor) -> torch.autocast:
    return torch.autocast(z.device.type, enabled=False)
