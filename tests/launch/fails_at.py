"""A worker that the kernel kills at step 10 of whatever start, as one that needs more memory there than there is."""

import os
import signal

from launch import agent

own = agent.worker


def worker(command):
    from equiav.train.log import Log

    before = Log.write

    def write(log, step, metrics, timing):
        before(log, step, metrics, timing)
        if step == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    Log.write = write
    own(command)
