"""What a rank of a test does: some steps over fixed clips. `python -m tests.train.ranks`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from equiav.augment import Clips
from equiav.config import Config, TuneConfig, from_dict
from equiav.data.synthetic import World
from equiav.parallel import Ranks
from equiav.tasks import Classification, Pretraining
from equiav.train import initial_state, steps
from equiav.train.loop import PhaseTimer, forward_backward
from streaming.order import share

TINY = {"model": {"size": "tiny", "depth": 2}, "data": {"audio_mean": -10.3, "audio_std": 3.9}}


def clips(count):
    """(count, 3, H, W) uint8, (count, L) int16"""
    made = [World(seconds=2.56).clip(index) for index in range(count)]
    frames = torch.from_numpy(np.stack([clip.frames[0] for clip in made])).permute(0, 3, 1, 2).contiguous()
    return frames, torch.from_numpy(np.stack([clip.audio for clip in made]))


def batches(G, micro_batch, rank, W, missing=(), of=24):
    """Batch after batch of G of the clips, this rank's rows of each; `missing` places of the global batch hold none."""
    frames, waveform = clips(of)
    first, stop = share(G, rank, W, micro_batch)
    step = 0
    while True:
        epoch, begin_at = divmod(step * G, of)
        samples = (torch.arange(G) + begin_at) % of
        valid = torch.tensor([k not in missing for k in range(G)])
        own = samples[first:stop]
        yield Clips(
            epoch, own, frames[own], waveform[own], torch.full((len(own),), waveform.shape[1]), valid[first:stop]
        )
        step += 1


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


CLASSES = 5


def targets(samples):
    """Of a clip: one class by its number, and another now and then."""
    hot = np.zeros((len(samples), CLASSES), np.float32)
    for row, sample in enumerate(samples.tolist()):
        if sample >= 0:
            hot[row, sample % CLASSES] = 1
            hot[row, sample % 3] = max(hot[row, sample % 3], sample % 4 == 0)
    return hot


def task_of(settings):
    settings = dict(settings)
    tune = settings.pop("tune", None)
    config = from_dict(Config, settings, "test")
    return Pretraining(config) if tune is None else Classification(config, TuneConfig(**tune), CLASSES, targets)


def run(ranks, settings, missing=()):
    """-> gradient of the first step by name, metrics of each step, weights after the last."""
    task = task_of(settings)
    config = task.config
    state = initial_state(task, ranks)
    source = batches(config.train.batch_size, config.train.micro_batch, ranks.rank, ranks.size, missing)
    forward_backward(task, ranks, state.model, next(source), 0, PhaseTimer(ranks.device))
    gradient = {name: whole(p.grad).clone() for name, p in state.model.named_parameters() if p.grad is not None}
    state.optimizer.zero_grad()
    source = batches(config.train.batch_size, config.train.micro_batch, ranks.rank, ranks.size, missing)
    rows = [step.read()[0] for step in steps(task, ranks, state, source)]
    return gradient, rows, {name: whole(value) for name, value in state.model.state_dict().items()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(W, cases, folder):
    """What `run` returns for each case, (settings, missing), in the processes of one group."""
    out, port = Path(folder) / f"ranks-{W}.pt", str(free_port())
    processes = []
    for rank in range(W):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(W),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(W),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(
            subprocess.Popen([sys.executable, "-m", "tests.train.ranks", json.dumps([cases, str(out)])], env=env)
        )
    assert [process.wait(400) for process in processes] == [0] * W
    return torch.load(out)


def main(cases, out):
    """Each case has its own sharding, on one group."""
    torch.set_num_threads(1)
    ranks, results = Ranks("cpu", timeout=60), []
    by_node = ranks.shard
    for settings, missing in cases:
        ranks.shard = settings["train"].get("shard") or by_node
        results.append(run(ranks, settings, missing))
    if ranks.rank == 0:
        torch.save(results, out)
    ranks.close()


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
