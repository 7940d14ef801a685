"""Workers of which the first takes long to write the model: longer than a node may be silent."""

import time

import launch.agent

worker_itself = launch.agent.worker


def worker(command):
    from equiav.train import carry

    save = carry.save_model

    def slow(*arguments):
        time.sleep(12)
        save(*arguments)

    carry.save_model = slow
    worker_itself(command)
