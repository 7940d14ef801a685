"""EquiAV: audio-visual contrastive pretraining that leverages equivariance (ICML 2024)."""

__version__ = "0.1.0"
