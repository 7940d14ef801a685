"""Learning rate by step."""

from __future__ import annotations

import math

from equiav.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up from lr_start to lr, then half a cosine back to lr_start (Table D); step counts from 0."""
    low, high = config.lr_start, config.lr
    if step < config.warmup_steps:
        return low + (high - low) * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
