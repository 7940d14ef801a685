"""Eq. 8-16: what the embeddings are asked for. Pure functions; float32 (or float64, if they come so) under any autocast.

N is the number of rows of the global batch. Each process holds some of them and computes the terms of its own anchors;
a `gather` brings the rows of all processes. The loss is this process's share. Reported terms are shares of single rows, in
float64: summed over the rows of all processes they are the global ones. The gradient is that of the global loss by the own
rows, formed without a collective: an embedding is an anchor, with its own denominator, and a candidate of all other anchors,
with theirs. Gradients of parameters must therefore be summed over the processes, not averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from equiav.config import ObjectiveConfig

Gather = Callable[[Tensor], Tensor]
"""(b, ...) -> (M, ...): the rows of all processes in order."""

COLUMNS = 4096  # candidates at a time: what the loss keeps besides the embeddings is some blocks of `Rows.piece` x this


def alone(x: Tensor) -> Tensor:
    """The gather of a single process."""
    return x


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
    other_a: Tensor | None = None  # (B, d) as intra_a, of another augmentation's vector, without gradient
    other_v: Tensor | None = None
    spread_a: Tensor | None = None  # (B,) mean distance of the predictions from their centroid, without gradient
    spread_v: Tensor | None = None
    temperature: Tensor | None = None  # (B,) where it is learned, the same in every row


class Rows(NamedTuple):
    """Which rows of the global batch this process holds, and how to get at the others."""

    own: Tensor  # (b,) bool: a clip, or nothing
    everyone: Tensor  # (M,) bool
    first: int  # of the own ones among everyone's
    N: Tensor  # clips in all, at least 1
    gather: Gather
    piece: int  # own rows at a time: products of the same shapes, however many rows a process has

    @classmethod
    def of(cls, valid: Tensor, gather: Gather = alone, first: int = 0, piece: int = 0) -> Rows:
        """valid (b,) bool, b the same in every process. piece 0: all own rows at a time."""
        everyone = gather(valid)
        return cls(valid, everyone, first, everyone.sum().clamp(min=1), gather, piece or len(valid))

    @property
    def pieces(self) -> list[slice]:
        b = len(self.own)
        return [slice(begin, min(begin + self.piece, b)) for begin in range(0, b, self.piece)]

    def by_piece(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f of x, a piece at a time."""
        return torch.cat([f(aligned(x[piece])) for piece in self.pieces])


def aligned(part: Tensor) -> Tensor:
    """A part of a tensor, in memory of its own. Where it begins in the whole depends on which process holds it, and products
    of operands that lie otherwise are rounded otherwise."""
    return part.clone(memory_format=torch.contiguous_format)


def normalised(z: Tensor) -> Tensor:
    """Embeddings (..., d) of length 1, so that a product is the cosine sim()."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)


class _Contrast(torch.autograd.Function):
    """`contrast`, with the gradient formed in the forward pass: all that is gathered is needed only there."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, temperature: Tensor, rows: Rows, intra: bool, positive: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = 1 / temperature
        pair = _Pair(own, rows.gather(own), scale, rows.by_piece(_inner, own) * scale, rows, intra, positive)
        D, correct = denominators(pair)
        loss = (D.sum(dim=1) - 2 * pair.s_positive).where(rows.own, 0).double() * pair.weight.double()  # (b,)
        ctx.mark_non_differentiable(loss, correct)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*gradient(pair, D, ctx.needs_input_grad[1]))
        return loss.sum(), loss, correct

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        by_own, by_temperature = ctx.saved_tensors
        return by_own * upstream[0], by_temperature * upstream[0], None, None, None


class _Pair(NamedTuple):
    """Two embeddings of each clip, to be contrasted."""

    own: Tensor  # (b, 2, d), unit vectors
    everyone: Tensor  # (M, 2, d)
    scale: Tensor  # (b,) 1 / tau
    s_positive: Tensor  # (b,) sim(p_i, q_i) / tau
    rows: Rows
    intra: bool  # the other embeddings of the anchor's own side are candidates, too
    positive: bool  # the positive stands in the denominator

    @property
    def weight(self) -> Tensor:
        """(b,) of an anchor's term in the loss."""
        return self.rows.own.to(self.own.dtype) / (2 * self.rows.N)

    def candidates(self, piece: slice, k: int) -> Iterator[tuple[int, slice, Tensor]]:
        """Of the anchors of side k: a side, columns of it, and s (piece, columns), the logits of the anchors with these
        candidates, -inf where there is none or it is the positive. The caller may write over s."""
        for side in (1 - k, k) if self.intra else (1 - k,):
            for begin in range(0, len(self.everyone), COLUMNS):
                columns = slice(begin, min(begin + COLUMNS, len(self.everyone)))
                s = (aligned(self.own[piece, k]) @ self.everyone[columns, side].T).mul_(self.scale[piece, None])
                s.masked_fill_(~self.rows.everyone[columns], -torch.inf)
                itself = self.rows.first + piece.start - begin  # the column of the piece's first row
                if -len(s) < itself < s.shape[1]:
                    s.diagonal(itself).fill_(-torch.inf)
                yield side, columns, s


def denominators(pair: _Pair) -> tuple[Tensor, Tensor]:
    """(b, 2) logarithms of the denominators of both anchors of a row, and (b,) how many of the two are nearer to their
    positive than to any other candidate."""
    D, correct = pair.own.new_empty(len(pair.own), 2), torch.zeros_like(pair.rows.own, dtype=torch.int64)
    s_positive = pair.s_positive
    for piece, k in product(pair.rows.pieces, (0, 1)):
        log_sum, nearest = (torch.full_like(s_positive[piece], -torch.inf) for _ in (0, 1))
        for _, _, s in pair.candidates(piece, k):
            nearest = torch.maximum(nearest, s.amax(dim=1))
            log_sum = torch.logaddexp(log_sum, s.logsumexp(dim=1))
        D[piece, k] = torch.logaddexp(log_sum, s_positive[piece]) if pair.positive else log_sum
        correct[piece] += pair.rows.own[piece] & (s_positive[piece] > nearest)
    return D.masked_fill_(torch.isneginf(D), 0), correct  # an anchor without candidates says nothing


def gradient(pair: _Pair, D: Tensor, of_temperature: bool) -> tuple[Tensor, Tensor]:
    """(b, 2, d) of the global loss by the own embeddings, (b,) by the own temperatures (zero unless asked for)."""
    rows, weight, s_positive = pair.rows, pair.weight, pair.s_positive
    everyones_D, everyones_weight = rows.gather(D), rows.everyone.to(D.dtype) / (2 * rows.N)  # (M, 2), (M,)
    by_own, slope = torch.empty_like(pair.own), torch.zeros_like(s_positive)
    for piece in rows.pieces:
        # To its positive, of both anchors of a row.
        in_denominators = (s_positive[piece, None] - D[piece]).exp().sum(dim=1) if pair.positive else 0
        pull = weight[piece] * (in_denominators - 2)
        slope[piece] = pull * s_positive[piece]
        for k in (0, 1):
            by_own[piece, k] = pull[:, None] * pair.own[piece, 1 - k]
            for side, columns, s in pair.candidates(piece, k):
                as_anchor = (s - D[piece, k, None]).exp_().mul_(weight[piece, None])  # (piece, columns)
                if of_temperature:
                    slope[piece] += (as_anchor * s.masked_fill(torch.isneginf(s), 0)).sum(dim=1)
                as_candidate = s.sub_(everyones_D[columns, side]).exp_().mul_(everyones_weight[columns])
                by_own[piece, k] += as_candidate.add_(as_anchor) @ pair.everyone[columns, side]
    return by_own * (rows.own * pair.scale)[:, None, None], -slope * pair.scale


def _inner(z: Tensor) -> Tensor:
    """(b, 2, d) -> (b,) cosine of both embeddings of a row."""
    return (z[:, 0] * z[:, 1]).sum(dim=1)


def nt_xent(
    own: Tensor, rows: Rows, temperature: Tensor, positive_in_denominator: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Intra-modal loss (Eq. 8-10) of z_hat with z', unit vectors: own (b, 2, d) -> this process's share of the loss; of each
    row (b,) its share; how many of a row's two anchors (b,) are nearer to their positive than to any negative.

    With s(x, y) = exp(sim(x, y) / tau), over the 2N embeddings of all processes:

        l(p, q) = -1/N sum_i log  s(p_i, q_i) / (sum_j s(p_i, q_j) + sum_{j != i} s(p_i, p_j))
        loss    = 1/2 (l(z_hat, z') + l(z', z_hat))

    Without the positive in the denominator (Eq. A) the first sum also leaves out j = i.
    """
    return _Contrast.apply(own, temperature, rows, True, positive_in_denominator)  # type: ignore[return-value]


def info_nce(own: Tensor, rows: Rows, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inter-modal loss (Eq. 14-15) of z_a with z_v, unit vectors: own (b, 2, d) -> this process's share of the loss; of each
    row (b,) its share; how many of a row's two anchors (b,) are nearer to their positive than to any other.

        l(p, q) = -1/N sum_i log  s(p_i, q_i) / sum_j s(p_i, q_j)
        loss    = 1/2 (l(z_a, z_v) + l(z_v, z_a))
    """
    return _Contrast.apply(own, temperature, rows, False, True)  # type: ignore[return-value]


@torch.no_grad()
def crowding(own: Tensor, rows: Rows) -> Tensor:
    """Unit vectors own (b, 2, d) -> (b, 2) float64, the mean squared cosine of an embedding with all of its side. Its mean over
    the rows is 1 where all clips have one direction, and 1 / r where they fill r directions alike."""
    everyone, crowded = rows.gather(own), own.new_zeros(own.shape[:2], dtype=torch.float64)
    for piece, k in product(rows.pieces, (0, 1)):
        for begin in range(0, len(everyone), COLUMNS):
            columns = slice(begin, begin + COLUMNS)
            cosine = aligned(own[piece, k]) @ everyone[columns, k].T
            crowded[piece, k] += cosine.masked_fill_(~rows.everyone[columns], 0).square_().sum(dim=1)
    return crowded / rows.N


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
    e: Embeddings, weights: Weights, config: ObjectiveConfig, rows: Rows | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 16 -> this process's share of L = inter * L_inter + intra_a * L_intra_a + intra_v * L_intra_v, and of each row
    what it contributes to what the run reports: name -> (b,) float64.

    Accuracies are shares of anchors nearer to their positive than to any other embedding. `similarity` is
    sim(z_hat, z') (Table 7). A predictor can reach 1 there as the identity on an invariant encoder, so `gain` says how
    much nearer to z' the prediction is than the unpredicted embedding, `sensitivity` how much nearer than the prediction for
    another vector, and `spread` how far predictions for different vectors lie apart. `crowding`: see there.
    """
    if rows is None:
        rows = Rows.of(torch.ones(len(e.inter_a), dtype=torch.bool, device=e.inter_a.device))
    with torch.autocast(e.inter_a.device.type, enabled=False):
        possible = (
            ("inter", e.inter_a, e.inter_v, (), weights.inter),
            ("intra_audio", e.intra_a, e.aug_a, (e.plain_a, e.other_a, e.spread_a), weights.intra_a),
            ("intra_image", e.intra_v, e.aug_v, (e.plain_v, e.other_v, e.spread_v), weights.intra_v),
        )
        terms, losses, shares = {}, [], []
        counted = rows.own.double() / rows.N  # (b,)
        for name, p, q, compared, weight in possible:
            if p is None or q is None:
                continue
            own = rows.by_piece(normalised, torch.stack((p, q), dim=1))  # (b, 2, d)
            tau = (
                own.new_full((len(own),), config.temperature) if e.temperature is None else e.temperature.to(own.dtype)
            )
            if name == "inter":
                loss, of_rows, correct = info_nce(own, rows, tau)
                crowded = crowding(own, rows) * counted[:, None]
                terms["crowding_audio"], terms["crowding_image"] = crowded.unbind(dim=1)
            else:
                loss, of_rows, correct = nt_xent(own, rows, tau, config.intra_positive_in_denominator)
            losses.append(weight * loss)
            shares.append(weight * of_rows)
            terms[f"loss_{name}"], terms[f"accuracy_{name}"] = of_rows, correct.double() / (2 * rows.N)
            if compared:
                measured = _compare(own, *compared, rows)
                terms |= {f"{what}_{name.removeprefix('intra_')}": of * counted for what, of in measured.items()}
    return torch.stack(losses).sum(), {"loss": torch.stack(shares).sum(dim=0), **terms}


@torch.no_grad()
def _compare(
    own: Tensor, plain: Tensor | None, other: Tensor | None, spread: Tensor | None, rows: Rows
) -> dict[str, Tensor]:
    """What the prediction own[:, 0] is worth, by row (b,), beside what else could stand in its place."""

    def reaches(z: Tensor) -> Tensor:
        return rows.by_piece(_inner, torch.stack((rows.by_piece(normalised, z), own[:, 1]), dim=1))

    measured, reached = {}, rows.by_piece(_inner, own)
    if plain is not None:
        measured |= {"similarity": reached, "gain": reached - reaches(plain)}
    if other is not None:
        measured["sensitivity"] = reached - reaches(other)
    if spread is not None:
        measured["spread"] = spread.detach()
    return measured
