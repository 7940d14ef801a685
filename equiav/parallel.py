"""The only file that knows ranks: the group of processes, its mesh, sharding, gathers and sums."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


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
        self.storing: Any = None  # the group of the threads that write checkpoints
        self.store: Store | None = None
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            wait = timedelta(seconds=timeout)
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that the flight recorder keeps
            self.store = _meet(self.rank, self.size, wait)
            dist.init_process_group(
                backend,
                store=self.store,
                rank=self.rank,
                world_size=self.size,
                timeout=wait,
                device_id=self.device if device == "cuda" else None,
            )
            self.storing = dist.new_group(backend="gloo", timeout=wait)

    def flights(self) -> bytes | None:
        """What NCCL's flight recorder has of the last collectives, where there is one: a pickle."""
        if self.size == 1 or self.device.type != "cuda":
            return None
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # of torch for GPUs only

        return _dump_nccl_trace()

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

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights, on every rank."""
        return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}

    def mesh(self, shard: int) -> DeviceMesh:
        """(replicate, shard): `shard` neighbouring ranks hold a model together, and that is held W / shard times."""
        shape = (self.size // shard, shard)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _meet(rank: int, size: int, wait: timedelta) -> Store:
    """A store of this attempt alone, on rank 0.

    torchrun's own store outlives its workers, and has the addresses of those that are gone: workers that are started again would
    connect to them. It serves to find rank 0: the others leave a word that nobody has used before, and rank 0 answers to it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return TCPStore(host, port, size, is_master=rank == 0, timeout=wait)
    agents = TCPStore(host, port, is_master=False, timeout=wait)
    if rank:
        word = secrets.token_hex(8)
        agents.set(f"equiav/word/{rank}", word)
        at, _, port = agents.get(f"equiav/answer/{word}").decode().rpartition(":")  # waits for it
        store = TCPStore(at, int(port), is_master=False, timeout=wait)
        store.set(f"joined/{rank}", "")
        return store
    with socket.socket(
        socket.AF_INET, socket.SOCK_DGRAM
    ) as probe:  # sends nothing; says which address the others can reach
        probe.connect((host, port))
        at = probe.getsockname()[0]
    store = TCPStore(at, 0, is_master=True, timeout=wait, wait_for_workers=False)
    answered: dict[int, bytes] = {}
    missing, deadline = set(range(1, size)), time.monotonic() + wait.total_seconds()
    while missing:
        for other in missing:
            if agents.check([f"equiav/word/{other}"]):
                word = agents.get(f"equiav/word/{other}")
                if answered.get(other) != word:
                    answered[other] = word
                    agents.set(f"equiav/answer/{word.decode()}", f"{at}:{store.port}")
        missing = {other for other in missing if not store.check([f"joined/{other}"])}
        if missing and time.monotonic() > deadline:
            raise TimeoutError(
                f"rank 0 waited {wait.total_seconds():.0f} s at {at}:{store.port} for rank(s) {sorted(missing)}"
            )
        time.sleep(0.01)
    return store


def add_gradients(model: nn.Module, backwards: Sequence[Callable[[], None]]) -> None:
    """Runs the backward passes of a step's parts, as many on every rank. What they give is added, over parts and ranks, in
    float64 and rounded once: the sum is the same to the last bit, whichever rank has which parts."""
    sums: dict[nn.Parameter, Tensor] = {}
    for k, backward in enumerate(backwards):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(k == len(backwards) - 1)
        backward()
        if isinstance(model, FSDPModule) or len(backwards) == 1:
            continue
        for p in model.parameters():
            if p.grad is not None:
                sums[p] = sums[p].add_(p.grad) if p in sums else p.grad.double()
                p.grad = None
    for p, total in sums.items():
        p.grad = total.to(p.dtype)


def own_and_whole_bytes(model: nn.Module) -> tuple[int, int]:
    """Of the weights: what this rank holds, and all."""
    weights = [p.detach() for p in model.parameters()]
    own = sum(x.to_local().nbytes if isinstance(x, DTensor) else x.nbytes for x in weights)
    return own, sum(x.nbytes for x in weights)


def squared_norm(gradients: Iterable[Tensor]) -> Tensor:
    """This rank's share of the square of their norm, float64."""
    own, copies = [], 1
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            copies = gradient.device_mesh.size(0)
            gradient = gradient.to_local()
        own.append(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return torch.stack(own).square().sum() / copies


def fully_sharded(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> nn.Module:
    """FSDP2 by block. Gradients are summed over the ranks, not averaged: each rank's loss is its share."""
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model
