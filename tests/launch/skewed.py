"""`python tests/launch/skewed.py SECONDS FILE ...`: launch.node whose clock is ahead by so much, while FILE is there."""

import datetime
import sys
import time
from pathlib import Path

from torch.distributed.elastic.rendezvous import dynamic_rendezvous

SKEW, FILE, REAL = float(sys.argv[1]), Path(sys.argv[2]), time.time
time.time = lambda: REAL() + SKEW * FILE.exists()


class Skewed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return datetime.datetime.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)


dynamic_rendezvous.datetime = Skewed

if __name__ == "__main__":
    from launch import node

    sys.exit(node.main(sys.argv[3:]))
