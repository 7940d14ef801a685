"""The network: two encoders, a transformation predictor for each, projection heads. Knows no ranks, devices or files."""

from equiav.model.equiav import Embeddings, EquiAV

__all__ = ["Embeddings", "EquiAV"]
