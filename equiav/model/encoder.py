"""f_a and f_v: ViT encoders without class token, with fixed 2-D sin-cos positions."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """With eps 1e-5 in every norm, also where timm would take 1e-6."""

    def __init__(self, width: int, **kwargs: Any):
        super().__init__(width, eps=1e-5, **kwargs)


class QueryKeyValue(nn.Linear):
    """Of timm's attention, without a gradient for the key's bias: the softmax cancels it, so its gradient is rounding noise,
    which Adam would scale up to steps of the full learning rate."""

    def forward(self, input: Tensor) -> Tensor:
        query, key, value = self.bias.chunk(3)
        return F.linear(input, self.weight, torch.cat([query, key.detach(), value]))


class Encoder(nn.Module):
    """A picture (B, C, rows, columns) -> tokens (B, N, D), one for each patch, row by row.

    The two views of a clip share everything but the last LayerNorm, so they go through the blocks as one batch.
    """

    positions: Tensor

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        augmented: bool = True,
    ):
        """augmented: it is given augmented views, too, which have a norm of their own."""
        super().__init__()
        self.picture = (channels, grid[0] * patch, grid[1] * patch)
        self.patch_embed = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.grid = grid
        # Kept with the weights: a checkpoint that was trained with other positions keeps them.
        self.register_buffer("positions", torch.empty(grid[0] * grid[1], width))  # (N, D)
        self.modality = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=LayerNorm, act_layer=nn.GELU)
            for _ in range(depth)
        )
        for block in self.blocks:
            block.attn.qkv = QueryKeyValue(width, 3 * width)  # type: ignore[assignment]
        self.norm = LayerNorm(width)
        self.norm_aug = LayerNorm(width) if augmented else None

    def reset_positions(self) -> None:
        self.positions.copy_(sincos_positions(self.positions.shape[1], *self.grid))

    def forward(self, x: Tensor, x_aug: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """-> h (B, N, D) of the original, h' (B, N, D) of the augmented picture where there is one."""
        for picture in (x, x_aug):
            if picture is not None and tuple(picture.shape[1:]) != self.picture:
                raise ValueError(f"encoder input is {tuple(picture.shape)}, expected (B, {self.picture})")
        tokens = self.patch_embed(x if x_aug is None else torch.cat([x, x_aug]))  # (2B, D, rows, columns)
        # Under autocast this sum is float32, and so is the residual stream from here on, as in timm's ViT.
        tokens = tokens.flatten(2).transpose(1, 2) + (self.positions + self.modality)  # (2B, N, D)
        for block in self.blocks:
            tokens = block(tokens)
        if x_aug is None:
            return self.norm(tokens), None
        assert self.norm_aug is not None
        h, h_aug = tokens.chunk(2)
        return self.norm(h), self.norm_aug(h_aug)


def sincos_positions(width: int, rows: int, columns: int) -> Tensor:
    """MAE's fixed positions -> (rows * columns, width): the column in the first half of the channels, the row in the
    second; each half sine then cosine, base 10,000."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))  # (D/4,)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]  # (N, D/4) each
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()
