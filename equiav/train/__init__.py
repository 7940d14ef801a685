"""The training loop. One process so far; the same loop is to carry many."""

from equiav.train.loop import Batch, train

__all__ = ["Batch", "train"]
