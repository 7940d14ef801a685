"""What the loss of a large batch takes, measured from outside."""

import os
import subprocess
import sys

import pytest

from tests.forks import APART

MEMORY = """
import sys, torch
from tests.memory import peak
from equiav.config import ObjectiveConfig
from equiav.objective import Embeddings, Rows, equiav_loss, weights_at

torch.set_num_threads(2)
b, d, W, config = 1024, 512, int(sys.argv[1]), ObjectiveConfig()
e = Embeddings(*(torch.randn(b, d).requires_grad_() for _ in range(8)))
torch.randn(512, 512) @ torch.randn(512, 512)  # what the library takes for itself
before = peak()
rows = Rows.of(torch.ones(b, dtype=torch.bool), lambda x: x.repeat(W, *[1] * (x.dim() - 1)), piece=256)
equiav_loss(e, weights_at(0, 1, config), config, rows)[0].backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize(("W", "limit"), [(8, 0.2e9), (64, 0.5e9)])
def test_the_loss_takes_little_memory_however_large_the_batch(W, limit):
    """N = 8,192 and 65,536, of which this process has 1,024 in micro-batches of 256: a gathered pair, and some blocks."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(W)], env={**os.environ, **APART}, capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) <= limit


STEP = """
import sys, torch
from tests.memory import peak
from equiav.parallel import Ranks
from equiav.tasks import Pretraining
from equiav.train import initial_state
from equiav.train.loop import PhaseTimer, forward_backward
from equiav.config import Config, from_dict
from tests.train.ranks import TINY, batches

torch.set_num_threads(2)
G, ranks = int(sys.argv[1]), Ranks("cpu")
small, config = (from_dict(Config, {**TINY, "train": {"batch_size": rows, "micro_batch": 8,
                                                      "recompute": sys.argv[2] == "recompute"}}, "test") for rows in (8, G))
model = initial_state(Pretraining(config), ranks).model
source = batches(8, 8, 0, 1, of=8)
one = next(source)
forward_backward(Pretraining(small), ranks, model, one, 0, PhaseTimer(ranks.device))  # what the libraries take for themselves
before = peak()
whole = type(one)(0, *(x.repeat(G // 8, *[1] * (x.dim() - 1)) for x in one[1:6]))
forward_backward(Pretraining(config), ranks, model, whole, 0, PhaseTimer(ranks.device))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_recomputing_takes_memory_for_one_micro_batch():
    """Of 96 rows, twelve micro-batches."""
    taken = {}
    for how in ("keep", "recompute"):
        done = subprocess.run(
            [sys.executable, "-c", STEP, "96", how],
            env={**os.environ, **APART},
            capture_output=True,
            text=True,
            check=True,
        )
        taken[how] = int(done.stdout)
    assert 0 < taken["recompute"] < taken["keep"] / 4, taken
