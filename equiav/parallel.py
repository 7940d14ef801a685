"""The only file that knows ranks: the group of processes, its mesh, sharding, gathers and sums."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


class Ranks:
    """The processes of this run. Alone, it knows no group, and every collective is the identity."""

    def __init__(self, device: str, timeout: float = 600.0):
        """Joins the group that torchrun's environment describes, where there is one."""
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank, self.local_size = (
            int(os.environ.get("LOCAL_RANK", 0)),
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )
        self.device = torch.device(device, self.local_rank) if device == "cuda" else torch.device(device)
        self.storing: dist.ProcessGroup | None = None
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            wait = timedelta(seconds=timeout)
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=wait, device_id=self.device if device == "cuda" else None)
            self.storing = dist.new_group(backend="gloo", timeout=wait)  # of the thread that writes checkpoints

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def gather(self, x: Tensor) -> Tensor:
        """(b, ...) -> (W b, ...), the rows of all ranks in order; b is the same everywhere. No gradient."""
        if self.size == 1:
            return x
        everyone = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(everyone, x.contiguous())
        return everyone

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def objects(self, value: object) -> list:
        """What each rank has, on every rank."""
        if self.size == 1:
            return [value]
        everyone: list = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def mesh(self, shard: int) -> DeviceMesh:
        """(replicate, shard): `shard` neighbouring ranks hold a model together, and that is held W / shard times."""
        shape = (self.size // shard, shard)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))


def sum_gradients_when(model: nn.Module, last: bool) -> None:
    """Between the parts of a step, ranks keep their gradients; with the last they are summed."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def fully_sharded(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> nn.Module:
    """FSDP2 by block. Gradients are summed over the ranks, not averaged: each rank's loss is its share."""
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model
