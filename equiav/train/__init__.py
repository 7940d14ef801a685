"""The training loop: the same for one process and for many."""

from equiav.train.loop import NotFinite, TrainState, begin, train

__all__ = ["NotFinite", "TrainState", "begin", "train"]
