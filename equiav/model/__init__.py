"""The network: two encoders, a transformation predictor for each, projection heads. Knows no ranks, devices or files."""

from equiav.model.equiav import EquiAV

__all__ = ["EquiAV"]
