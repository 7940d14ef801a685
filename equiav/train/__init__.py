"""The training loop. One process so far; the same loop is to carry many."""

from equiav.train.loop import train

__all__ = ["train"]
