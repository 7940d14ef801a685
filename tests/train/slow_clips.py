"""`equiav pretrain` whose clips take long to decode. `python -m tests.train.slow_clips pretrain ...`"""

import sys
import time

from equiav.cli import main
from equiav.data.decoder import ClipDecoder

decode = ClipDecoder.decode


def slowly(self, *arguments):
    time.sleep(0.8)
    return decode(self, *arguments)


ClipDecoder.decode = slowly
sys.exit(main(sys.argv[1:]))
