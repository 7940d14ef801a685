"""`equiav pretrain` whose checkpoints lie on a disk that hangs. `python -m tests.train.hung_disk pretrain ...`

With HANGS=read it does when they are read, else when they are written."""

import os
import sys
import time

from equiav.cli import main
from streaming import Store

how = os.environ.get("HANGS", "write")
before = getattr(Store, how)


def hangs(self, name, *arguments, **more):
    if name.startswith("step-"):
        time.sleep(1000)
    return before(self, name, *arguments, **more)


setattr(Store, how, hangs)
sys.exit(main(sys.argv[1:]))
