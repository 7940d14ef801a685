"""u_a and u_v: what a transformation t does to the representation h (Eq. 4-5), and the two rivals of Table 7.

Every predictor maps h (B, N, D) and t (B, Q, d_t) to one representation per query, (B, Q, D). The intra-modal query and
the S queries of the centroid go in together, so whatever depends on h alone is computed once.

To add a predictor, write a class with `forward` and `multiply_adds`, add it to PREDICTORS, and its name to `model.predictor`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equiav.config import ModelConfig
from equiav.model.encoder import LayerNorm


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class MultiplyAdds(NamedTuple):
    """Of one sample's predictions, forward."""

    once: int  # however many vectors there are
    each: int  # for each vector


def augmentation_encoder(d_t: int, width: int) -> nn.Sequential:
    """f_t: t (..., d_t) -> (..., width)."""
    return nn.Sequential(
        nn.Linear(d_t, width), QuickGELU(), nn.Linear(width, width), QuickGELU(), nn.Linear(width, width)
    )


def _of_encoder(d_t: int, width: int) -> int:
    """Its multiply-adds."""
    return d_t * width + 2 * width * width


class AttentionPredictor(nn.Module):
    """FFN(MHA(f_t(t), h, h) + MeanPool(h))."""

    def __init__(self, d_t: int, config: ModelConfig):
        super().__init__()
        D, inner = config.width, config.predictor_width or 64 * config.predictor_heads
        self.heads = config.predictor_heads
        self.encode_t = augmentation_encoder(d_t, config.aug_width)
        self.norm_query = LayerNorm(config.aug_width)
        self.query = nn.Linear(config.aug_width, inner)
        self.key = nn.Linear(D, inner)
        self.key.bias.requires_grad_(False)  # it has no effect: see `encoder.QueryKeyValue`
        self.value = nn.Linear(D, inner)
        self.out = nn.Linear(inner, D, bias=False)
        self.norm = LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    @staticmethod
    def multiply_adds(config: ModelConfig, N: int, d_t: int) -> MultiplyAdds:
        D, A, inner = config.width, config.aug_width, config.predictor_width or 64 * config.predictor_heads
        return MultiplyAdds(2 * N * D * inner, _of_encoder(d_t, A) + A * inner + 2 * N * inner + inner * D + 8 * D * D)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or Q, d_H)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        q = self._split(self.query(self.norm_query(self.encode_t(t))))
        k, v = self._split(self.key(h)), self._split(self.value(h))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, Q, inner)
        predicted = h.mean(dim=1, keepdim=True) + self.out(attended)  # (B, Q, D)
        return predicted + self.mlp(self.norm(predicted))

    def attention(self, h: Tensor, t: Tensor) -> Tensor:
        """What each query looks at: (B, heads, Q, N), summing to 1 over the N tokens."""
        q = self._split(self.query(self.norm_query(self.encode_t(t))))
        k = self._split(self.key(h))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(dim=-1)


class LinearPredictor(nn.Module):
    """EquiMod's: linear in [MeanPool(h), f_t(t)], through `width` channels so that its size can be chosen."""

    def __init__(self, d_t: int, config: ModelConfig):
        super().__init__()
        width = self.width(config)
        self.encode_t = augmentation_encoder(d_t, config.aug_width)
        self.inner = nn.Linear(config.width + config.aug_width, width)
        self.out = nn.Linear(width, config.width)

    @staticmethod
    def width(config: ModelConfig) -> int:
        """By default, so many that it has about as many parameters as the attention predictor: (D + A + 1) and D for each."""
        D, A = config.width, config.aug_width
        return config.predictor_width or max(1, round((_parameters(config) - D) / (2 * D + A + 1)))

    @classmethod
    def multiply_adds(cls, config: ModelConfig, N: int, d_t: int) -> MultiplyAdds:
        D, A, width = config.width, config.aug_width, cls.width(config)
        return MultiplyAdds(0, _of_encoder(d_t, A) + (D + A) * width + width * D)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        pooled = h.mean(dim=1, keepdim=True).expand(-1, t.shape[1], -1)  # (B, Q, D)
        return self.out(self.inner(torch.cat([pooled, self.encode_t(t)], dim=-1)))


class HypernetPredictor(nn.Module):
    """SIE's: a hypernetwork turns t into the weights of a linear map of rank `width`, added to MeanPool(h)."""

    def __init__(self, d_t: int, config: ModelConfig):
        super().__init__()
        self.rank = self.width(config)
        self.encode_t = augmentation_encoder(d_t, config.aug_width)
        self.weights = nn.Linear(config.aug_width, 2 * config.width * self.rank)

    @staticmethod
    def width(config: ModelConfig) -> int:
        """By default, so many that it has about as many parameters as the attention predictor."""
        return config.predictor_width or max(
            1, round(_parameters(config) / ((config.aug_width + 1) * 2 * config.width))
        )

    @classmethod
    def multiply_adds(cls, config: ModelConfig, N: int, d_t: int) -> MultiplyAdds:
        D, A, width = config.width, config.aug_width, cls.width(config)
        return MultiplyAdds(0, _of_encoder(d_t, A) + A * 2 * D * width + 2 * D * width)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        pooled = h.mean(dim=1)  # (B, D)
        down, up = self.weights(self.encode_t(t)).unflatten(-1, (2, -1, self.rank)).unbind(2)  # (B, Q, D, rank) each
        displacement = torch.einsum("bd,bqdr,bqer->bqe", pooled, down, up)
        return pooled.unsqueeze(1) + displacement


PREDICTORS = {"attention": AttentionPredictor, "linear": LinearPredictor, "hypernet": HypernetPredictor}


def _parameters(config: ModelConfig) -> int:
    """Of the attention predictor, without f_t."""
    D, A, inner = config.width, config.aug_width, 64 * config.predictor_heads
    return 2 * A + (A + 1) * inner + 2 * (D + 1) * inner + inner * D + 2 * D + 8 * D * D + 5 * D
