"""g: from a representation to an embedding in the intra-modal or the inter-modal latent space."""

from __future__ import annotations

from torch import Tensor, nn

from equiav.model.encoder import LayerNorm


class ProjectionHead(nn.Module):
    """h (..., D) -> z (..., out): three linear layers, LayerNorm after each, ReLU after the first two."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out),
            LayerNorm(out),
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)
