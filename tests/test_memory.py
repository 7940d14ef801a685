"""What the loss of a large batch takes, measured from outside."""

import subprocess
import sys

import pytest

MEMORY = """
import resource, sys, torch
from equiav.config import ObjectiveConfig
from equiav.objective import Embeddings, Rows, equiav_loss, weights_at

torch.set_num_threads(2)
b, d, W, config = 1024, 512, int(sys.argv[1]), ObjectiveConfig()
e = Embeddings(*(torch.randn(b, d).requires_grad_() for _ in range(8)))
torch.randn(512, 512) @ torch.randn(512, 512)  # what the library takes for itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = Rows.of(torch.ones(b, dtype=torch.bool), lambda x: x.repeat(W, *[1] * (x.dim() - 1)))
equiav_loss(e, weights_at(0, 1, config), config, rows)[0].backward()
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kilobytes")
@pytest.mark.parametrize(("W", "limit"), [(8, 0.35e9), pytest.param(64, 0.5e9, marks=pytest.mark.slow)])
def test_the_loss_takes_little_memory_however_large_the_batch(W, limit):
    """N = 8,192 and 65,536, of which this process has 1,024: gathered embeddings of one pair, and some blocks."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(W)], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= limit
