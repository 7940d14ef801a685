"""Eq. 8-16: what the embeddings are asked for. Pure functions; float32 (or float64, if they come so) under any autocast.

N is the global batch. Each process holds b of its rows, computes the terms of its own anchors, and is given a `gather`:
(k, b, d) -> (k, N, d), the rows of all processes in order, and the index of its own first row. Losses and reported terms
are shares: summed over the processes they are the global ones. For the gradient to be the single-process one, the
gather's backward must sum over the processes what they say of a row, and gradients of parameters must be summed, not
averaged.
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
    temperature: Tensor | None = None  # (1,) where it is learned

    def only(self, valid: Tensor) -> Embeddings:
        """Those of the rows where valid (B,), on the host, is true: the others are neither anchors nor negatives."""
        if valid.all():
            return self
        rows = valid.nonzero()[:, 0].to(self.inter_a.device, non_blocking=True)
        kept: dict[str, Tensor] = {
            name: z[rows] for name, z in self._asdict().items() if z is not None and name != "temperature"
        }
        return self._replace(**kept)


def alone(z: Tensor) -> tuple[Tensor, int]:
    """The gather of a single process."""
    return z, 0


def unit(*z: Tensor) -> Tensor:
    """k embeddings (b, d) -> (k, b, d), each row of length 1, so that a product is the cosine sim()."""
    stacked = torch.stack(z)
    return F.normalize(stacked if stacked.dtype == torch.float64 else stacked.float(), dim=-1)


def nt_xent(
    own: Tensor, everyone: Tensor, first: int, temperature: Tensor | float, positive_in_denominator: bool = True
) -> tuple[Tensor, Tensor]:
    """Intra-modal loss (Eq. 8-10) of z_hat with z', unit vectors: own (2, b, d) of everyone (2, N, d), from row `first`
    -> loss, and how many anchors are nearer to their positive than to any negative.

    With s(x, y) = exp(sim(x, y) / tau), over the 2N embeddings of all processes:

        l(p, q) = -1/N sum_i log  s(p_i, q_i) / (sum_j s(p_i, q_j) + sum_{j != i} s(p_i, p_j))
        loss    = 1/2 (l(z_hat, z') + l(z', z_hat))

    Without the positive in the denominator (Eq. A) the first sum also leaves out j = i.
    """
    b, N = own.shape[1], everyone.shape[1]
    rows = torch.arange(first, first + b, device=own.device)
    is_self = rows[:, None] == torch.arange(N, device=own.device)  # (b, N)
    loss, correct = own.new_zeros(()), torch.zeros((), dtype=torch.int64, device=own.device)
    for k in (0, 1):
        anchors, same, other = own[k], everyone[k], everyone[1 - k]
        positive = (anchors * other[first : first + b]).sum(dim=1) / temperature  # (b,)
        both = torch.stack([anchors @ other.T, anchors @ same.T], dim=1) / temperature  # (b, 2, N)
        negatives = both.masked_fill(is_self[:, None], -torch.inf).flatten(1)  # (b, 2N)
        denominator = negatives.logsumexp(dim=1)
        if positive_in_denominator:
            denominator = torch.logaddexp(positive, denominator)
        loss = loss + (denominator - positive).sum() / (2 * N)
        correct += (positive.detach() > negatives.detach().amax(dim=1)).sum()
    return loss, correct


def info_nce(own: Tensor, everyone: Tensor, first: int, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """Inter-modal loss (Eq. 14-15) of z_a with z_v, unit vectors: own (2, b, d) of everyone (2, N, d), from row `first`
    -> loss, and how many anchors are nearer to their positive than to any other.

        l(p, q) = -1/N sum_i log  s(p_i, q_i) / sum_j s(p_i, q_j)
        loss    = 1/2 (l(z_a, z_v) + l(z_v, z_a))
    """
    b, N = own.shape[1], everyone.shape[1]
    rows = torch.arange(first, first + b, device=own.device)
    loss, correct = own.new_zeros(()), torch.zeros((), dtype=torch.int64, device=own.device)
    for k in (0, 1):
        logits = own[k] @ everyone[1 - k].T / temperature  # (b, N)
        loss = loss + F.cross_entropy(logits, rows, reduction="sum") / (2 * N)
        correct += (logits.detach().argmax(dim=1) == rows).sum()
    return loss, correct


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
    e: Embeddings, weights: Weights, config: ObjectiveConfig, gather: Gather = alone
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 16 -> L = inter * L_inter + intra_a * L_intra_a + intra_v * L_intra_v, and what the run reports, as scalars.

    Accuracies are shares of anchors nearer to their positive than to any other embedding. `similarity` is
    sim(z_hat, z') (Table 7). A predictor can reach 1 there as the identity on an invariant encoder, so `gain` says how
    much nearer to z' the prediction is than the unpredicted embedding.
    """
    with torch.autocast(e.inter_a.device.type, enabled=False):
        temperature = config.temperature if e.temperature is None else e.temperature.squeeze()
        possible = (
            ("inter", e.inter_a, e.inter_v, None, weights.inter),
            ("intra_audio", e.intra_a, e.aug_a, e.plain_a, weights.intra_a),
            ("intra_image", e.intra_v, e.aug_v, e.plain_v, weights.intra_v),
        )
        pairs = [(name, p, q, plain, w) for name, p, q, plain, w in possible if p is not None and q is not None]
        own = unit(*(z for _, p, q, _, _ in pairs for z in (p, q)))  # (2 or 6, b, d)
        everyone, first = gather(own)  # (2 or 6, N, d)
        N, loss, terms = everyone.shape[1], own.new_zeros(()), {}
        for k, (name, _, _, plain, weight) in enumerate(pairs):
            mine, all_of_it = own[2 * k : 2 * k + 2], everyone[2 * k : 2 * k + 2]
            if name == "inter":
                part, correct = info_nce(mine, all_of_it, first, temperature)
            else:
                part, correct = nt_xent(mine, all_of_it, first, temperature, config.intra_positive_in_denominator)
            loss = loss + weight * part
            terms[f"loss_{name}"], terms[f"accuracy_{name}"] = part.detach(), correct / (2 * N)
            if plain is not None:
                side = name.removeprefix("intra_")
                with torch.no_grad():
                    terms[f"similarity_{side}"] = (mine[0] * mine[1]).sum() / N
                    terms[f"gain_{side}"] = terms[f"similarity_{side}"] - (unit(plain)[0] * mine[1]).sum() / N
    return loss, {"loss": loss.detach(), **terms}
