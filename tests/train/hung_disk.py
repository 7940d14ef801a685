"""`equiav pretrain` whose checkpoints lie on a disk that hangs. `python -m tests.train.hung_disk pretrain ...`"""

import sys
import time

from equiav.cli import main
from streaming import Store

write = Store.write


def hangs(self, name, content):
    if name.startswith("step-"):
        time.sleep(1000)
    return write(self, name, content)


Store.write = hangs
sys.exit(main(sys.argv[1:]))
