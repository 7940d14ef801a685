"""A run: its state and steps (loop.py), what happens beside them (checkpoint.py, watch.py, log.py), told once (run.py)."""

from equiav.train.loop import Step, TrainState, initial_state, steps
from equiav.train.run import NotFinite, launched, run

__all__ = ["NotFinite", "Step", "TrainState", "initial_state", "launched", "run", "steps"]
