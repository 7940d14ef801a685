"""What a step computes, handed to the loop. Whatever else a run is (sharding, checkpoints, resume, the watch) is in train/."""

from equiav.tasks.classification import Classification
from equiav.tasks.pretraining import Pretraining
from equiav.tasks.task import Outputs, Task, joined

__all__ = ["Classification", "Outputs", "Pretraining", "Task", "joined"]
