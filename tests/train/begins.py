"""A rank of a run that begins with weights from elsewhere: rank 0 keeps what all hold.

python -m tests.train.begins CONFIG OUT
"""

import sys
from pathlib import Path

import torch
import yaml

from equiav.config import RunConfig, from_dict
from equiav.parallel import Ranks
from equiav.tasks import Pretraining
from equiav.train import initial_state
from equiav.train.run import begin_with
from equiav.train.watch import Watch
from tests.train.ranks import whole

if __name__ == "__main__":
    config = from_dict(RunConfig, yaml.safe_load(Path(sys.argv[1]).read_text()), "test")
    ranks = Ranks("cpu", config.train.micro_batches, timeout=60)
    state = initial_state(Pretraining(config), ranks)
    with Watch(ranks, Path("stalls"), 0.0, 0.0, print) as watch:
        begin_with(config, ranks, state, print, watch)
    weights = {name: whole(x) for name, x in state.model.state_dict().items()}
    if ranks.rank == 0:
        torch.save(weights, sys.argv[2])
