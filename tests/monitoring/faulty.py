"""`equiav pretrain` with a fault in it, named by FAULT. `FAULT=identity python -m tests.monitoring.faulty pretrain ...`"""

import os
import sys
import time

from equiav.cli import main
from equiav.model.head import ProjectionHead
from equiav.model.predictor import AttentionPredictor
from equiav.tasks import pretraining

make_views = pretraining.make_views


def identity(self, h, t):
    """Predicts what it is given, whatever the vectors."""
    return h.mean(dim=1, keepdim=True) + 0 * self.mlp(
        self.norm(self.out(self.query(self.norm_query(self.encode_t(t)))))
    )


def collapse(self, h):
    """Of two layers and a constant."""
    return 1e-3 * self.layers(h) + 1


def slow_views(*arguments):
    time.sleep(0.1)
    return make_views(*arguments)


FAULTS = {"identity": (AttentionPredictor, "forward", identity), "collapse": (ProjectionHead, "forward", collapse)}
if os.environ.get("RANK") == "1":
    FAULTS["straggler"] = (pretraining, "make_views", slow_views)
if os.environ["FAULT"] in FAULTS:
    setattr(*FAULTS[os.environ["FAULT"]])
sys.exit(main(sys.argv[1:]))
