"""Encoders with a linear layer on their mean tokens: what fine-tuning trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equiav.config import ModelConfig
from equiav.model.encoder import Encoder
from equiav.model.equiav import as_picture, fill


class DropPath(nn.Module):
    """Leaves out a block's part for some clips. Which, is drawn outside: a draw of its own would be another at each number of
    processes."""

    keep: Tensor | None = None  # (B,) 0, or 1 / the share that is kept

    def forward(self, x: Tensor) -> Tensor:
        return x if self.keep is None else x * self.keep[:, None, None].to(x.dtype)


class Side(nn.Module):
    """One modality."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        for block in encoder.blocks:
            block.drop_path1, block.drop_path2 = DropPath(), DropPath()  # type: ignore[assignment]

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x (B, C, H, W), keep (B, 2 x depth) or None -> (B, D)."""
        paths = [path for block in self.encoder.blocks for path in (block.drop_path1, block.drop_path2)]
        for k, path in enumerate(paths):
            path.keep = None if keep is None else keep[:, k]  # type: ignore[assignment]
        return self.encoder(x)[0].mean(dim=1)


class Classifier(nn.Module):
    """Of the paper: the encoders' mean tokens, side by side where there are two, and a linear layer."""

    def __init__(self, model: ModelConfig, classes: int, audio: bool = True, image: bool = True):
        super().__init__()

        def side(channels: int, grid: tuple[int, int], patch: int) -> Side:
            return Side(Encoder(channels, grid, patch, model.width, model.depth, model.heads, augmented=False))

        self.audio = side(1, model.audio_grid, model.audio_patch) if audio else None
        self.image = side(3, model.image_grid, model.image_patch) if image else None
        self.head = nn.Linear(model.width * (audio + image), classes)

    @property
    def sides(self) -> list[Side]:
        return [side for side in (self.audio, self.image) if side is not None]

    def forward(self, audio: Tensor | None, image: Tensor | None, keep: Tensor | None = None) -> Tensor:
        """audio (B, T, F), image (B, 3, H, W), keep (B, sides, 2 x depth) or None -> logits (B, classes)."""
        return self.head(self.pooled(audio, image, keep))

    def pooled(self, audio: Tensor | None, image: Tensor | None, keep: Tensor | None = None) -> Tensor:
        """-> (B, D), of both sides (B, 2 D)."""
        pictures = [None if audio is None else as_picture(audio), image]
        given = [(side, x) for side, x in zip((self.audio, self.image), pictures, strict=True) if side is not None]
        return torch.cat([side(x, None if keep is None else keep[:, k]) for k, (side, x) in enumerate(given)], dim=1)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """As `EquiAV.init_weights`."""
        fill(self, seed)
        for side in self.sides:
            side.encoder.reset_positions()
