"""The only file that knows ranks: the group of processes, its mesh, sharding, gathers and sums."""

from __future__ import annotations

import fcntl
import math
import os
import secrets
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

ELEMENTS = 1 << 24  # of gradients, looked at together


class Ranks:
    """The processes of this run. Alone, it knows no group, and every collective is the identity."""

    def __init__(self, device: str, most: int = 1 << 30, shard: int = 0, timeout: float = 600.0):
        """Joins the group that torchrun's environment describes, where there is one.

        most: processes that can share the work. shard: those that hold one copy of the model together; 0: as many as
        divide every node's processes, so that only sums cross from node to node. Processes that are too many are spares:
        they wait, and have a place when the launcher starts all again with fewer.
        """
        self.rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.size = active(world, most, shard)
        self.spares = world - self.size
        self.spare = self.rank >= self.size
        first_of_node = self.rank - self.local_rank
        self.local_size = min(local_world, self.size - first_of_node)  # of a spare without any, below 1
        self.device = torch.device(device, self.local_rank) if device == "cuda" else torch.device(device)
        self.store: Store | None = None
        self.shard = 1
        if world == 1:
            if device == "cuda":
                torch.cuda.set_device(self.device)
            return
        wait = timedelta(seconds=timeout)
        if world > local_world:
            _name_interface()
        self.store = _meet(self.rank, world, wait)
        if self.spare:
            return
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that the flight recorder keeps
            device_id = self.device if device == "cuda" else None
            dist.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.size, timeout=wait, device_id=device_id
            )
            by_node = Counter(self.objects(first_of_node))
            self.shard = min(shard, self.size) or math.gcd(*by_node.values())

    def flights(self) -> bytes | None:
        """What NCCL's flight recorder has of the last collectives, where there is one: a pickle."""
        if self.size == 1 or self.device.type != "cuda":
            return None
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # of torch for GPUs only

        return _dump_nccl_trace()

    def wait_as_spare(self) -> tuple[int, str]:
        """Until the run has ended -> how, as rank 0 told it to `close`. Signals are for the others: they finish and say so."""
        assert self.store is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while not self.store.check(["ended"]):
            time.sleep(1)
        status, _, how = self.store.get("ended").decode().partition(" ")
        self.store.set(f"left/{self.rank}", "")
        return int(status), how

    def close(self, how: str = "", status: int = 0) -> None:
        """how: what went wrong, for the spares; empty: nothing did. status: with which they end, too."""
        if self.store is not None and self.rank == 0 and self.spares:
            self.store.set("ended", f"{status} {how}")
            left, deadline = [f"left/{self.size + k}" for k in range(self.spares)], time.monotonic() + 5
            while not self.store.check(left) and time.monotonic() < deadline:  # the store ends with this process
                time.sleep(0.05)
        if dist.is_initialized() and not how:  # others may still be in a collective
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

    def greatest(self, x: Tensor) -> Tensor:
        """The maximum over all ranks, of each element."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def objects(self, value: object) -> list:
        """What each rank has, on every rank."""
        if self.size == 1:
            return [value]
        everyone: list = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def first(self, find: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank; or its error."""
        found, error = None, None
        if self.rank == 0:
            try:
                found = find()
            except Exception as raised:
                error = raised
        found, error = self.objects((found, error))[0]
        if error is not None:
            raise error
        return found

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights, on every rank."""
        return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}

    def mesh(self) -> DeviceMesh:
        """(replicate, shard): `shard` neighbouring ranks hold a model together, and that is held W / shard times."""
        shape = (self.size // self.shard, self.shard)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))


def active(world: int, most: int, shard: int) -> int:
    """How many of `world` processes take part: no more than can share the work, in whole groups of `shard`."""
    size = min(world, most)
    return size - size % shard if 0 < shard < size else size


# ---- meeting ------------------------------------------------------------------------------------------------------------


def _meet(rank: int, world: int, wait: timedelta) -> Store:
    """A store of this attempt alone, on rank 0.

    torchrun's own store outlives its workers, and has the addresses of those that are gone: workers that are started again
    would connect to them. It serves to find rank 0: the others leave a word that nobody has used before, and rank 0 answers
    to it with all its addresses, of which each takes the first that it reaches.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return TCPStore(host, port, world, is_master=rank == 0, timeout=wait)
    agents = TCPStore(host, port, is_master=False, timeout=wait)
    if rank:
        word = secrets.token_hex(8)
        agents.set(f"equiav/word/{rank}", word)
        ports, *addresses = agents.get(f"equiav/answer/{word}").decode().split()  # waits for it
        store = TCPStore(_reachable(addresses, int(ports)), int(ports), is_master=False, timeout=wait)
        store.set(f"joined/{rank}", "")
        return store
    addresses = [*own_addresses(), "127.0.0.1", "::1"]
    store = TCPStore("localhost", 0, is_master=True, timeout=wait, wait_for_workers=False)
    answer = " ".join([str(store.port), *addresses])
    answered: dict[int, bytes] = {}
    missing, deadline = set(range(1, world)), time.monotonic() + wait.total_seconds()
    while missing:
        for other in missing:
            if agents.check([f"equiav/word/{other}"]):
                word = agents.get(f"equiav/word/{other}")
                if answered.get(other) != word:
                    answered[other] = word
                    agents.set(f"equiav/answer/{word.decode()}", answer)
        missing = {other for other in missing if not store.check([f"joined/{other}"])}
        if missing and time.monotonic() > deadline:
            raise TimeoutError(
                f"rank 0 waited {wait.total_seconds():.0f} s at {', '.join(addresses)}, port {store.port}, for rank(s) "
                f"{sorted(missing)}"
            )
        time.sleep(0.01)
    return store


def _reachable(addresses: Sequence[str], port: int) -> str:
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=3).close()
        except OSError:
            continue
        return address
    raise ConnectionError(
        f"rank 0 is at none of its addresses {', '.join(addresses)}, port {port}, seen from this host"
    )


def own_addresses() -> dict[str, str]:
    """address -> interface, those that another host may reach; the interface of the default route first."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request, get_address = struct.pack("256s", name.encode()[:15]), 0x8915  # SIOCGIFADDR
            try:
                found[socket.inet_ntoa(fcntl.ioctl(asking.fileno(), get_address, request)[20:24])] = name
            except OSError:
                continue  # it has no IPv4 address
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        address, _, _, scope, _, name = line.split()
        if scope == "00":  # global: neither of the link nor of the host alone
            found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))] = name
    default = _default_interfaces()
    usable = {address: name for address, name in found.items() if not address.startswith("127.") and address != "::1"}
    return dict(sorted(usable.items(), key=lambda item: item[1] not in default))


def _default_interfaces() -> set[str]:
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    table = Path("/proc/net/ipv6_route")
    routes6 = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    names = {route[0] for route in routes if route[1] == "00000000"}
    return (names | {route[-1] for route in routes6 if set(route[0]) == {"0"} and route[1] == "00"}) - {"lo"}


def _name_interface() -> None:
    """gloo takes the address that this host's own name has, which on many is 127.0.1.1: others cannot reach it."""
    if interfaces := list(own_addresses().values()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interfaces[0])


# ---- gradients ----------------------------------------------------------------------------------------------------------


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


def norm(ranks: Ranks, gradients: Iterable[Tensor], beside: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """The norm of all gradients, float64, and the maxima over all ranks of the numbers `beside`.

    The same to the last bit, however the gradients are cut: squares are rounded to multiples of one number and added as
    whole numbers, whose sum has no order. Not finite where a gradient is not.
    """
    parts = [slab(gradient, ranks) for gradient in gradients]
    copies = parts[0].copies if parts else 1
    pieces = list(_together([part.local.flatten() for part in parts]))
    zero = torch.zeros((), device=ranks.device)
    highest = torch.stack([zero, *(piece.abs().max() for piece in pieces if len(piece))]).max().double()
    highest = highest.where(highest.isfinite(), torch.inf)  # a maximum over ranks may drop what is not a number
    own = torch.tensor(beside, dtype=torch.float64, pin_memory=ranks.device.type == "cuda")
    everyones = ranks.greatest(torch.cat([highest[None], own.to(ranks.device, non_blocking=True)]))
    highest = everyones[0]
    scale = 2.0 ** torch.frexp(highest.where(highest.isfinite(), 1.0)).exponent.double()
    coarse, fine = torch.zeros(2, dtype=torch.int64, device=ranks.device).unbind()
    for piece in pieces:
        squares = (piece.double() / scale).square_().mul_(2.0**26)  # at most 2^26, and exact
        whole = squares.round()
        coarse = coarse + whole.sum().long()  # sums of whole numbers below 2^53 are exact
        fine = fine + squares.sub_(whole).mul_(2.0**26).round_().sum().long()
    coarse, fine = ranks.total(torch.stack([coarse, fine])).div(copies, rounding_mode="trunc").double().unbind()
    value = torch.sqrt(coarse * 2.0**-26 + fine * 2.0**-52) * scale
    return value.where(highest.isfinite(), highest), everyones[1:]


def _together(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Flat tensors, joined or cut to pieces of at most ELEMENTS: worth a kernel each, and bounded in memory."""
    held, size = [], 0
    for x in (piece for tensor in tensors for piece in tensor.split(ELEMENTS)):
        if size + len(x) > ELEMENTS:
            yield torch.cat(held)
            held, size = [], 0
        held.append(x)
        size += len(x)
    if held:
        yield torch.cat(held)


# ---- sharding -----------------------------------------------------------------------------------------------------------


class Slab(NamedTuple):
    """What a rank holds of a tensor: some neighbouring rows, or all."""

    local: Tensor
    first: int  # row
    copy: int  # of `copies` ranks that hold these rows
    copies: int


def slab(x: Tensor, ranks: Ranks) -> Slab:
    if not isinstance(x, DTensor):  # every rank has all of it
        return Slab(x.detach(), 0, ranks.rank, ranks.size)
    mesh = x.device_mesh
    return Slab(x.to_local().detach(), first_row(x), mesh.get_local_rank("replicate"), mesh.size(0))


def first_row(x: DTensor) -> int:
    """Of those that this rank holds."""
    rows = -(-x.shape[0] // x.device_mesh.size(1))  # as torch.chunk cuts
    first = min(x.shape[0], rows * x.device_mesh.get_local_rank("shard"))
    assert len(x.to_local()) == min(rows, x.shape[0] - first), "rows are cut otherwise"
    return first


def whole_bytes(model: nn.Module) -> int:
    """Of all weights."""
    return sum(math.prod(p.shape) * p.element_size() for p in model.parameters())


def fully_sharded(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> nn.Module:
    """FSDP2 by block. Gradients are summed over the ranks, not averaged: each rank's loss is its share."""
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model
