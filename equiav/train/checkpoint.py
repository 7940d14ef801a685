"""Checkpoints: whole or absent, every byte checked before anything of it is used, loaded at any number of processes.

A checkpoint is a folder `step-00001000-TOKEN` (the token is of the start that wrote it): files of blocks of tensors, from
each rank those that it holds, and `manifest.json`, written last, with the place and checksum of every block and all that is
small. There is no code in it, and no name in it is used as a path before it is known to be a plain one.
"""

from __future__ import annotations

import math
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from equiav.config import ConfigError
from equiav.ending import Superseded
from equiav.parallel import Ranks, slab, whole_bytes
from equiav.train import log
from equiav.train.loop import TrainState
from equiav.train.manifest import (
    BLOCK,
    DTYPES,
    FILE_BYTES,
    FORMAT,
    MANIFEST,
    NAME,
    Block,
    Kept,
    NotWhole,
    digest_of,
    sealed,
    step_of,
    unsealed,
)
from equiav.train.optimizers import Keeps
from equiav.train.owner import Owner
from streaming import Store, StoreError
from streaming.store import Missing, Short, TooLarge

DAMAGED = "damaged-"  # what a checkpoint is called that could not be used
LINES = re.compile(r"lines-([0-9]{8,15})-([0-9]{8,15})(?:-([0-9a-f]{16}))?[.]jsonl")
LINES_BYTES = 1 << 30  # of the log between two checkpoints, at most
AGAIN = (1.0, 5.0)  # seconds, after which what was read wrong is read again
READERS = 8


class Staged(NamedTuple):
    """Rows of a tensor that this rank saves, in host memory."""

    name: str
    dtype: str
    shape: list[int]
    first: int
    rows: Tensor  # (rows, bytes of a row) uint8


class Written(NamedTuple):
    """What a rank has brought to the store."""

    tensors: dict[str, Kept]
    digests: dict[str, int]  # of the rows of each weight that it wrote, to be added up


class Checkpoints:
    """Of one run, in one folder of a store that all ranks reach."""

    def __init__(
        self,
        url: str,
        ranks: Ranks,
        keep: int = 3,
        keep_every: int = 0,
        patience: float = 600.0,
        options: dict[str, Any] | None = None,
        warn: Callable[[str], None] = print,
        moved: Callable[[], None] = lambda: None,
    ):
        """moved: called when a part of a save has reached the store."""
        self.ranks, self.keep, self.keep_every, self.warn, self.moved = ranks, keep, keep_every, warn, moved
        self.store = Store(url, patience, options)
        self.failures, self._last_failure = 0, ""  # saves that came to nothing
        self.saved_step = 0  # of the last that is durable, known to rank 0
        self.saved_bytes = 0  # of that one, as its manifest counts them
        self.seconds = 0.0  # that the last one held up the run
        self.token = str(ranks.objects(secrets.token_hex(4))[0])
        self.owner = Owner(self.store, ranks, self.token)
        self._passed_over: dict[str, str] = {}  # name -> what is wrong with it
        self._uploading: Future[Written] | None = None  # on every rank
        self._publishing: Future[None] | None = None  # on rank 0, when all have uploaded
        self._about: dict[str, Any] = {}
        self._lines = (0, b"")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.owner.close()

    # ---- whose they are

    @property
    def superseded(self) -> str:
        return self.owner.superseded

    def take_over(self, state: TrainState) -> None:
        """Called when this start is known to be good. Finds out, before the first step, whether checkpoints can be kept here."""
        self.ranks.first(lambda: self._require_room(state))
        self.owner.take_over()
        if self.ranks.rank == 0:
            for name, why in self._passed_over.items():
                self._set_aside(name, why)

    def _set_aside(self, name: str, why: str) -> None:
        """Under a name that is none of a checkpoint. Where that fails, it is passed over again next time."""
        try:
            taken = set(self.store.list())
            new = next(n for k in count() if (n := f"{DAMAGED}{name}" + (f"-{k}" if k else "")) not in taken)
            self.store.rename(name, new)
        except OSError as error:
            self.warn(f"checkpoint {self.store.url}/{name} could not be set aside: {error}")
            return
        self.warn(f"checkpoint {self.store.url}/{name} is kept as {new}, and is not used: {why}")

    def superseded_for_all(self) -> str:
        """By whom, on all ranks together."""
        return self.ranks.first(lambda: self.superseded)

    def _require_room(self, state: TrainState) -> None:
        """On a disk, for as many checkpoints as are kept, and the next before one of them goes."""
        if not self.store.local:
            return
        whole = 3 * whole_bytes(state.model)  # weights and both moments
        there = min(len(self._complete(self._names())), self.keep)
        needed, place = (self.keep + 1 - there) * whole, self.store.root
        size, _, free = shutil.disk_usage(_existing(place))
        if free >= needed or not size:  # of no size: not a disk
            return
        raise ConfigError(
            f"{place} has room for {free / 2**20:,.1f} MiB, checkpoints take {needed / 2**20:,.1f} there: "
            f"checkpoint.keep={self.keep} and one more, of {whole / 2**20:,.1f} each, {there} of which are there already. "
            "Free the disk, keep fewer, or set checkpoint.url"
        )

    # ---- saving

    @property
    def busy(self) -> bool:
        """Whether something of a save is under way on this rank."""
        return any(future is not None and not future.done() for future in (self._uploading, self._publishing))

    def save(self, state: TrainState, about: dict[str, Any], lines: tuple[int, bytes] = (0, b"")) -> None:
        """On all ranks at the same step, when none is busy: copies the state to host memory, and begins to write it.
        `about`: what is small, for the manifest. `lines`: of the log, since the last checkpoint, and of which step the first
        is: where rank 0 runs next, its disk may be another."""
        begun, self._lines = time.perf_counter(), lines
        self._about = {"step": state.step, "skipped": state.skipped, "ranks": self.ranks.size, **about}
        staged = list(_stage(state, self.ranks))
        folder = f"step-{state.step:08d}-{self.token}"
        self._uploading = _in_thread(self._upload, folder, staged)
        self.seconds = time.perf_counter() - begun

    def advance(self) -> None:
        """On all ranks at the same step, when none is busy: what all have uploaded becomes a checkpoint; what came to
        nothing is told and counted, and the run goes on."""
        if self._publishing is not None and self._publishing.done():
            publishing, self._publishing = self._publishing, None
            if isinstance(problem := _outcome(publishing), str) and not self.superseded:
                self._failed(problem)
        if self._uploading is not None:
            uploading, self._uploading = self._uploading, None
            outcomes = self.ranks.objects(_outcome(uploading))
            failed = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
            if failed:
                self._failed(failed[0])
            elif self.ranks.rank == 0:
                self._publishing = _in_thread(self._publish, dict(self._about), outcomes, self._lines)

    def finish(self) -> str:
        """On all ranks: until the save that is under way is a checkpoint -> what is wrong if it is none."""
        self._last_failure = ""
        for _ in range(2):  # uploading, publishing
            for future in (self._uploading, self._publishing):
                if future is not None:
                    _outcome(future)
            self.advance()
        return self.ranks.first(lambda: self.superseded or self._last_failure)

    def _failed(self, problem: str) -> None:
        self.failures, self._last_failure = self.failures + 1, problem
        if self.ranks.rank == 0:
            self.warn(f"a checkpoint could not be saved, the run goes on without it: {problem}")

    def _upload(self, folder: str, staged: list[Staged]) -> Written:
        """What this rank holds, in files of some blocks."""
        written = Written({}, {})
        file, content = 0, bytearray()

        def upload() -> None:
            self.store.write(f"{folder}/part-{self.ranks.rank:05d}-{file:05d}", bytes(content))
            self.moved()

        for tensor in staged:
            kept = written.tensors.setdefault(tensor.name, Kept(tensor.dtype, tensor.shape, []))
            if tensor.name.startswith("weight/"):
                written.digests[tensor.name.removeprefix("weight/")] = _digest(tensor.rows, tensor.first)
            height = max(1, BLOCK // max(1, tensor.rows.shape[1]))  # rows of a block
            for begin in range(0, len(tensor.rows), height):
                rows = tensor.rows[begin : begin + height]
                data = rows.numpy().tobytes()
                if content and len(content) + len(data) > FILE_BYTES:
                    upload()
                    file, content = file + 1, bytearray()
                kept.blocks.append(
                    Block(
                        f"part-{self.ranks.rank:05d}-{file:05d}",
                        len(content),
                        len(data),
                        tensor.first + begin,
                        len(rows),
                        xxh3_64_hexdigest(data),
                    )
                )
                content += data
        if content:
            upload()
        return written

    def _publish(self, about: dict[str, Any], written: list[Written], lines: tuple[int, bytes]) -> None:
        """On rank 0, when all have uploaded. The manifest makes it a checkpoint."""
        tensors: dict[str, Kept] = {}
        for of_rank in written:
            for name, kept in of_rank.tensors.items():
                tensors.setdefault(name, Kept(kept.dtype, kept.shape, [])).blocks.extend(kept.blocks)
        weights = _added(of_rank.digests for of_rank in written)
        self.owner.check()
        step = about["step"]
        about = {"format": FORMAT, **about, "digest": digest_of(weights), "weights": weights}
        manifest = {**about, "tensors": tensors}
        if lines[1]:
            name = f"lines-{lines[0]:08d}-{step:08d}-{xxh3_64_hexdigest(lines[1])}.jsonl"
            self.store.write(name, lines[1])
        self.store.write(f"step-{step:08d}-{self.token}/{MANIFEST}", sealed(manifest))
        self.saved_bytes = sum(block.bytes for kept in tensors.values() for block in kept.blocks)
        self.saved_step = step
        try:
            self._retire()
        except StoreError as error:
            self.warn(f"older checkpoints could not be removed: {error}")

    def _retire(self) -> None:
        """Removes what is not to be kept; its manifest first, so that what a crash leaves of it is no checkpoint. Those of
        later steps are left alone: a start that has gone on from an earlier one does not judge them."""
        names = [name for name in self._names() if step_of(name) <= self.saved_step]
        complete = self._complete(names)
        time.sleep(
            AGAIN[0] if len(complete) < len(names) else 0
        )  # a store may say for a moment that a manifest is missing
        complete = sorted({*complete, *self._complete(names)}, key=lambda name: (step_of(name), name))
        kept = set(complete[-self.keep :])
        if self.keep_every:
            kept |= {name for name in complete if step_of(name) % self.keep_every == 0}
        for name in names:
            if name not in kept and step_of(name) < self.saved_step:
                if name in complete:
                    self.store.remove(f"{name}/{MANIFEST}")
                self.store.remove(name)

    def _names(self) -> list[str]:
        names = [name for name in self.store.list() if NAME.fullmatch(name)]
        return sorted(names, key=lambda name: (step_of(name), name))

    def _complete(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.store.exists(f"{name}/{MANIFEST}")]

    # ---- loading

    def load(self, state: TrainState, accept: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, into `state` -> its manifest; None where there is none. All ranks together.

        accept: raises where the run of a manifest is not this one, NotWhole where it cannot be of any; called before anything of
        its tensors is read. What is not whole is passed over, and set aside by `take_over`.
        """
        for name in reversed(self.ranks.first(self._names)):
            manifest = self.ranks.first(lambda name=name: self._read_manifest(name))
            if manifest is None or name in self._passed_over:
                continue
            if not isinstance(manifest, str):
                try:
                    accept(manifest)
                except NotWhole as error:
                    manifest = str(error)
            if not isinstance(manifest, str):
                manifest = self._into(state, name, manifest)
            if not isinstance(manifest, str):
                self.saved_step = state.step
                return manifest
            self._passed_over[name] = manifest
            if self.ranks.rank == 0:
                self.warn(f"checkpoint {self.store.url}/{name} is passed over: {manifest}")
        return None

    def unusable(self) -> list[str]:
        """Those that this folder holds, or held at an earlier start, and that cannot be used."""
        aside = self.ranks.first(lambda: [name for name in self.store.list() if name.startswith(DAMAGED)])
        there = self.ranks.first(self._names)  # a live start may have retired some
        return [f"{name}: {why}" for name, why in self._passed_over.items() if name in there] + aside

    def newest(self) -> int:
        """The step of the newest that is complete and was not passed over; -1: there is none."""
        names = self.ranks.first(lambda: self._complete(self._names()))
        return max((step_of(name) for name in names if name not in self._passed_over), default=-1)

    def lines(self) -> dict[int, str]:
        """Of the log, as the checkpoints have it: step -> line. A file that has not the checksum of its name is none of them."""
        found: dict[int, str] = {}
        for name in self.store.list():
            if (named := LINES.fullmatch(name)) is None:
                continue
            try:
                content = self._twice(lambda name=name, named=named: self._lines_of(name, named[3]))
            except (NotWhole, Missing, TooLarge) as error:
                self.warn(f"{name} at {self.store.url} is passed over: {error}")
                continue
            for line in content.decode(errors="replace").splitlines(keepends=True):
                step = log.step_of(line)
                if step is not None and int(named[1]) <= step < int(named[2]):
                    found[step] = line
        return found

    def _lines_of(self, name: str, checksum: str | None) -> bytes:
        content = self.store.read(name, most=LINES_BYTES)
        if checksum and xxh3_64_hexdigest(content) != checksum:  # those of earlier releases have none
            raise NotWhole("its lines are not those that were saved")
        return content

    def _read_manifest(self, name: str) -> dict[str, Any] | str | None:
        """None: it was never finished."""
        there = MANIFEST in self.store.list(name)
        if not there:
            time.sleep(AGAIN[0])  # a store may say so for a moment
        try:
            manifest = self._twice(lambda: unsealed(self.store.read(f"{name}/{MANIFEST}")), missing=there)
        except Missing as error:
            return f"{MANIFEST} cannot be read ({error})" if there else None
        except (NotWhole, TooLarge) as error:
            return str(error)
        if manifest["step"] != step_of(name):
            return f"{MANIFEST} is of step {manifest['step']}"
        return manifest

    def _twice(self, read: Callable[[], Any], missing: bool = True) -> Any:
        """What is wrong, or missing, may have become so on its way: it is read again before it counts."""
        for pause in (*AGAIN, None):
            try:
                return read()
            except (NotWhole, Short, Missing) as error:
                if pause is None or (isinstance(error, Missing) and not missing):
                    raise
                time.sleep(pause)

    def _into(self, state: TrainState, name: str, manifest: dict[str, Any]) -> dict[str, Any] | str:
        """Every row that this rank holds, read and checked; when all ranks have theirs, into the state. -> the manifest, or
        what is wrong."""
        problem: Exception | None = None
        read: dict[str, Tensor] = {}
        digests: dict[str, int] = {}
        try:
            with ThreadPoolExecutor(READERS) as pool:
                wanted = dict(_wanted(state, self.ranks, manifest["tensors"]))
                rows = pool.map(lambda item: self._rows(name, manifest["tensors"], *item), wanted.items())
                read = dict(zip(wanted, rows, strict=True))
            _require_possible(state, self.ranks, manifest, read)
            digests = dict(_digests(state, self.ranks, read))
        except (NotWhole, StoreError) as error:
            problem = error
        problems, sums = zip(*self.ranks.objects((problem, digests)), strict=True)
        for p in filter(None, problems):
            if not isinstance(p, NotWhole | Missing | Short):
                raise p
        if any(problems):
            return str(next(filter(None, problems)))
        if (said := _added(sums)) != manifest["weights"]:
            other = sorted(
                key for key in said.keys() | manifest["weights"] if said.get(key) != manifest["weights"].get(key)
            )
            return f"{len(other)} weights have not the digests that {MANIFEST} says, the first is {other[0]}"
        _restore(state, self.ranks, read)
        state.step, state.skipped = manifest["step"], manifest["skipped"]
        return manifest

    def _rows(self, folder: str, tensors: dict[str, Kept], name: str, wanted: Wanted) -> Tensor:
        """(rows, ...) of a tensor, from the blocks that have them."""
        kept = tensors[name]
        dtype, width = DTYPES[kept.dtype], math.prod(kept.shape[1:]) * DTYPES[kept.dtype].itemsize
        rows = torch.empty(wanted.rows, width, dtype=torch.uint8)
        found, stop = torch.zeros(wanted.rows, dtype=torch.bool), wanted.first + wanted.rows
        for block in kept.blocks:
            first, last = max(wanted.first, block.first), min(stop, block.first + block.rows)
            if first >= last:
                continue
            data = self._twice(lambda block=block: self._block(folder, name, block))
            self.moved()
            there = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(block.rows, width)
            rows[first - wanted.first : last - wanted.first] = there[first - block.first : last - block.first]
            found[first - wanted.first : last - wanted.first] = True
        if not found.all():
            raise NotWhole(f"{name} lacks rows")
        return rows.view(dtype).view(wanted.rows, *kept.shape[1:])

    def _block(self, folder: str, name: str, block: Block) -> bytes:
        data = self.store.read(f"{folder}/{block.file}", block.offset, block.offset + block.bytes)
        if xxh3_64_hexdigest(data) != block.checksum:
            raise NotWhole(
                f"{block.file}, bytes {block.offset} to {block.offset + block.bytes} ({name}) are not those saved"
            )
        return data


# ---- tensors ------------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """Rows of a tensor that a rank needs."""

    first: int
    rows: int


def _named(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a state, in one order on every rank."""
    for name, x in state.model.state_dict().items():
        yield f"weight/{name}", x
    for name, p in state.model.named_parameters():
        kept = state.optimizer.state.get(p, {})
        if kept and kept.keys() != state.optimizer.keeps(p).keys():
            raise RuntimeError(f"the optimizer has {', '.join(kept)} of {name}, and its `keeps` names others")
        for kind, x in sorted(kept.items()):
            yield f"{kind}/{name}", x


def _stage(state: TrainState, ranks: Ranks) -> Iterator[Staged]:
    """What this rank saves: of tensors that several ranks hold, they take turns."""
    for k, (name, x) in enumerate(_named(state)):
        own = slab(x, ranks)
        if k % own.copies == own.copy and own.local.numel():
            rows = own.local.to("cpu", copy=True).contiguous().view(len(own.local) if x.dim() else 1, -1)
            yield Staged(name, str(x.dtype), list(x.shape), own.first, rows.view(torch.uint8))


def _digest(rows: Tensor, first: int) -> int:
    """(rows, bytes) uint8 -> the sum of the rows' hashes, each seeded by its row's number: rows may lie on any rank."""
    return sum(xxh3_64_intdigest(row.data, first + k) for k, row in enumerate(rows.numpy())) % 2**64


def _digests(state: TrainState, ranks: Ranks, read: dict[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Of the weights that were read, as `_stage` shares them out: each row counts once."""
    for k, (name, x) in enumerate(state.model.state_dict().items()):
        own = slab(x, ranks)
        if k % own.copies == own.copy and own.local.numel():
            rows = read[f"weight/{name}"]
            yield name, _digest(rows.contiguous().view(torch.uint8).view(len(rows), -1), own.first)


def _added(digests: Iterable[dict[str, int]]) -> dict[str, str]:
    """Of all ranks."""
    sums: dict[str, int] = {}
    for of_rank in digests:
        for name, value in of_rank.items():
            sums[name] = (sums.get(name, 0) + value) % 2**64
    return {name: f"{value:016x}" for name, value in sorted(sums.items())}


def _wanted(state: TrainState, ranks: Ranks, tensors: dict[str, Kept]) -> Iterator[tuple[str, Wanted]]:
    """What this rank needs of a checkpoint."""
    possible = [(f"weight/{name}", x, Keeps()) for name, x in state.model.state_dict().items()]
    for name, p in state.model.named_parameters():
        keeps = state.optimizer.keeps(p)
        if any(f"{kind}/{name}" in tensors for kind in keeps):  # it was trained
            possible += [(f"{kind}/{name}", p, how) for kind, how in keeps.items()]
    if unknown := sorted(tensors.keys() - {name for name, _, _ in possible}):
        raise NotWhole(f"{unknown[0]} is in it, which this model and its optimizer do not have")
    for name, x, how in possible:
        if name not in tensors:
            raise NotWhole(f"{name} is not in it")
        expected = (str(torch.float32), []) if how.scalar else (str(x.dtype), list(x.shape))
        if (found := (tensors[name].dtype, tensors[name].shape)) != expected:
            raise NotWhole(f"{name} is {found}, expected {expected}")
        own = slab(x, ranks)
        yield name, Wanted(0, 1) if how.scalar else Wanted(own.first, len(own.local) if x.dim() else 1)


def _require_possible(state: TrainState, ranks: Ranks, manifest: dict[str, Any], read: dict[str, Tensor]) -> None:
    """A state that training can reach: finite, and what the optimizer keeps nothing of is as it was drawn."""
    for name, x in read.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise NotWhole(f"{name} is not finite")
    for name, p in state.model.named_parameters():
        for kind, how in state.optimizer.keeps(p).items():
            x = read.get(f"{kind}/{name}")
            if x is not None and how.positive and bool((x < 0).any()):
                raise NotWhole(f"{kind}/{name} is below zero")
            if x is not None and how.counts and not 0 < float(x) <= manifest["step"]:
                raise NotWhole(f"{kind}/{name} is {float(x)}, at step {manifest['step']}")
    if manifest.get("init"):
        return  # where weights were brought, they are not known here
    for name, p in state.model.named_parameters():
        own = slab(p, ranks).local
        first = next(iter(state.optimizer.keeps(p)))
        if f"{first}/{name}" not in read and not torch.equal(read[f"weight/{name}"].view(own.shape), own.cpu()):
            raise NotWhole(f"{first}/{name} is not in it, and {name} was trained")


def _restore(state: TrainState, ranks: Ranks, read: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, x in state.model.state_dict().items():
            own = slab(x, ranks).local
            own.copy_(read[f"weight/{name}"].view(own.shape))
        state.optimizer.state.clear()
        for name, p in state.model.named_parameters():
            for kind, how in state.optimizer.keeps(p).items():
                if f"{kind}/{name}" not in read:
                    continue
                saved = read[f"{kind}/{name}"]
                x = saved.view(()).to(how.device) if how.scalar else torch.zeros_like(p)
                if not how.scalar:
                    own = slab(x, ranks).local
                    own.copy_(saved.view(own.shape))
                state.optimizer.state[p][kind] = x


def _in_thread(call: Callable[..., Any], *args: Any) -> Future[Any]:
    """Under way in a thread that no end of the process waits for: a disk may hang."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _outcome(future: Future[Any]) -> Any:
    """What came of it; the problem, as text, where nothing did."""
    try:
        return future.result()
    except Exception as error:
        return f"{error}" if isinstance(error, StoreError | Superseded) else f"{type(error).__name__}: {error}"


def _existing(path: str) -> Path:
    """The folder, or the one above it that is there already."""
    return next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
