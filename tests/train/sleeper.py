"""`equiav pretrain` whose rank 1 sleeps in step 5, the first time. `torchrun -m tests.train.sleeper pretrain ...`"""

import os
import sys
import time
from pathlib import Path

from equiav.cli import main
from equiav.tasks import pretraining

views, calls = pretraining.make_views, iter(range(10**6))


def sleeps(config, batch):
    marker = Path(config.out, "has-slept")
    if next(calls) == 5 * 2 and os.environ["RANK"] == "1" and not marker.exists():  # two micro-batches a step
        marker.touch()
        time.sleep(1000)
    return views(config, batch)


pretraining.make_views = sleeps
sys.exit(main(sys.argv[1:]))
