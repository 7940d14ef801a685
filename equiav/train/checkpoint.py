"""Checkpoints: whole or absent, every byte checked before anything of it is used, loaded at any number of processes.

A checkpoint is a folder `step-00001000-TOKEN` (the token is of the start that wrote it): files of blocks of tensors, from
each rank those that it holds, and `manifest.json`, written last, with the place and checksum of every block and all that is
small. There is no code in it, and no name in it is used as a path before it is known to be a plain one.
"""

from __future__ import annotations

import json
import math
import os
import platform
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
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest, xxh3_128_hexdigest

from equiav.config import ConfigError
from equiav.ending import Superseded
from equiav.parallel import Ranks, slab, whole_bytes
from equiav.train.log import step_of
from equiav.train.loop import TrainState
from streaming import Store, StoreError
from streaming.store import Missing, NoAnswer, Short

MANIFEST, FORMAT = "manifest.json", 2
NAME = re.compile(r"step-(\d{8,})-[0-9a-f]{8}")
DAMAGED = "damaged-"  # what a checkpoint is called that could not be used
LINES = re.compile(r"lines-\d{8,}-\d{8,}\.jsonl")
FILE = re.compile(r"part-\d{5,}-\d{5,}")
BLOCK, FILE_BYTES = 8 << 20, 64 << 20
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)}
OWNER, LOOK = "owner", 5.0  # seconds
KINDS = {"step": int, "skipped": int, "digest": str} | dict.fromkeys(
    ("weights", "config", "stream", "quarantine"), dict
)
AGAIN = (1.0, 5.0)  # seconds, after which what was read wrong is read again
READERS = 8


class NotWhole(ValueError):  # noqa: N818
    """What is wrong with a checkpoint."""


class Block(NamedTuple):
    """Some rows of a tensor, in a file."""

    file: str
    offset: int
    bytes: int
    first: int  # row
    rows: int
    checksum: str  # XXH3-64


class Kept(NamedTuple):
    """A tensor, as a manifest describes it."""

    dtype: str
    shape: list[int]
    blocks: list[Block]


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
        self.superseded = ""  # by whom; known to rank 0 within some seconds, of a store that answers
        self._owner = b""  # what this start has written
        self._passed_over: dict[str, str] = {}  # name -> what is wrong with it
        self._uploading: Future[Written] | None = None  # on every rank
        self._publishing: Future[None] | None = None  # on rank 0, when all have uploaded
        self._about: dict[str, Any] = {}
        self._lines = (0, b"")
        self._closed = threading.Event()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    # ---- whose they are

    def take_over(self, state: TrainState) -> None:
        """From any earlier start of the run: of two that both believe to be this run, the one that started last goes on.

        Called when this start is known to be good. Finds out, before the first step, whether checkpoints can be kept here.
        """
        owner = {"start": self.token, "host": platform.node(), "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        owner["submission"] = os.environ.get("EQUIAV_SUBMISSION", "")  # the job that this start is of (launch/ended.py)
        self._owner = self.ranks.objects(json.dumps(owner).encode())[0]
        self.ranks.first(lambda: self._require_room(state))
        problem: Exception | None = None
        try:
            self.ranks.first(lambda: self.store.write(OWNER, self._owner))
            self.ranks.first(self._check_owner)
            self._twice(self._see_owner)
        except (StoreError, Superseded, NotWhole) as error:
            problem = error
        problems = self.ranks.objects(problem)
        for passing in problems:
            if isinstance(passing, NoAnswer) or (isinstance(passing, Superseded) and passing is problems[0]):
                raise passing
        for rank, p in enumerate(problems):
            if p is not None:
                who = "" if isinstance(p, StoreError) else f"rank {rank} does not see what rank 0 wrote there: "
                raise ConfigError(
                    f"checkpoints cannot be kept at {self.store.url}: {who}{p}. It has to be a folder that all processes "
                    "read and write (checkpoint.url)"
                )
        if self.ranks.rank == 0:
            threading.Thread(target=self._look, daemon=True, name="owner").start()
            for name, why in self._passed_over.items():
                self._set_aside(name, why)

    def _see_owner(self) -> None:
        if self.store.read(OWNER) != self._owner:
            raise NotWhole("there is another content")

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

    def _look(self) -> None:
        """A start that was cut off and comes back must not train on until its next save."""
        while not self.superseded and not self._closed.wait(LOOK):
            try:
                self._check_owner()
            except Superseded:
                pass  # the loop asks for it at its next step
            except StoreError:
                continue  # a save will tell

    def _check_owner(self) -> None:
        """Another start has taken over only if the store says so twice. A file that cannot be read, or that somebody removed,
        says nothing."""
        seen = ""
        for pause in (*AGAIN, None):
            try:
                start, host, since = (
                    str(json.loads(self.store.read(OWNER))[name]) for name in ("start", "host", "time")
                )
            except (ValueError, KeyError, TypeError, Missing):
                start = host = since = ""
            if start == self.token:
                return
            if start and start == seen:
                self.superseded = (
                    f"{self.store.url}: start {start} of this run, on host {host}, has taken over at {since} from this one, "
                    f"{self.token}; this one ends and saves nothing"
                )
                raise Superseded(self.superseded)
            seen = start
            if pause is not None:
                time.sleep(pause)

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

        def bring() -> None:
            self.store.write(f"{folder}/part-{self.ranks.rank:05d}-{file:05d}", bytes(content))
            self.moved()

        for tensor in staged:
            kept = written.tensors.setdefault(tensor.name, Kept(tensor.dtype, tensor.shape, []))
            if tensor.name.startswith("weight/"):
                written.digests[tensor.name.removeprefix("weight/")] = _digest(tensor)
            height = max(1, BLOCK // max(1, tensor.rows.shape[1]))  # rows of a block
            for begin in range(0, len(tensor.rows), height):
                rows = tensor.rows[begin : begin + height]
                data = rows.numpy().tobytes()
                if content and len(content) + len(data) > FILE_BYTES:
                    bring()
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
            bring()
        return written

    def _publish(self, about: dict[str, Any], written: list[Written], lines: tuple[int, bytes]) -> None:
        """On rank 0, when all have uploaded. The manifest makes it a checkpoint."""
        tensors: dict[str, Kept] = {}
        digests: dict[str, int] = {}
        for of_rank in written:
            for name, kept in of_rank.tensors.items():
                tensors.setdefault(name, Kept(kept.dtype, kept.shape, [])).blocks.extend(kept.blocks)
            for name, value in of_rank.digests.items():
                digests[name] = (digests.get(name, 0) + value) % 2**64
        weights = {name: f"{value:016x}" for name, value in sorted(digests.items())}
        self._check_owner()
        step = about["step"]
        about = {
            "format": FORMAT,
            **about,
            "digest": xxh3_128_hexdigest(json.dumps(weights).encode()),
            "weights": weights,
        }
        manifest = {**about, "tensors": tensors}
        if lines[1]:
            self.store.write(f"lines-{lines[0]:08d}-{step:08d}.jsonl", lines[1])
        self.store.write(f"step-{step:08d}-{self.token}/{MANIFEST}", _sealed(manifest))
        self.saved_bytes = sum(block.bytes for kept in tensors.values() for block in kept.blocks)
        self.saved_step = step
        try:
            self._retire()
        except StoreError as error:
            self.warn(f"older checkpoints could not be removed: {error}")

    def _retire(self) -> None:
        """Removes what is not to be kept; its manifest first, so that what a crash leaves of it is no checkpoint. Those of
        later steps are left alone: a start that has gone on from an earlier one does not judge them."""
        names = [name for name in self._names() if _step(name) <= self.saved_step]
        complete = self._complete(names)
        time.sleep(
            AGAIN[0] if len(complete) < len(names) else 0
        )  # a store may say for a moment that a manifest is missing
        complete = sorted({*complete, *self._complete(names)}, key=lambda name: (_step(name), name))
        kept = set(complete[-self.keep :])
        if self.keep_every:
            kept |= {name for name in complete if _step(name) % self.keep_every == 0}
        for name in names:
            if name not in kept and _step(name) < self.saved_step:
                if name in complete:
                    self.store.remove(f"{name}/{MANIFEST}")
                self.store.remove(name)

    def _names(self) -> list[str]:
        names = [name for name in self.store.list() if NAME.fullmatch(name)]
        return sorted(names, key=lambda name: (_step(name), name))

    def _complete(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.store.exists(f"{name}/{MANIFEST}")]

    # ---- loading

    def load(self, state: TrainState, accept: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, into `state` -> its manifest; None where there is none. All ranks together.

        accept: raises where the run of a manifest is not this one; called before anything of its tensors is read. What is
        not whole is passed over, and set aside by `take_over`.
        """
        for name in reversed(self.ranks.first(self._names)):
            manifest = self.ranks.first(lambda name=name: self._read_manifest(name))
            if manifest is None or name in self._passed_over:
                continue
            if not isinstance(manifest, str):
                accept(manifest)
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
        return [f"{name}: {why}" for name, why in self._passed_over.items()] + aside

    def newest(self) -> int:
        """The step of the newest that is complete and was not passed over; -1: there is none."""
        names = self.ranks.first(lambda: self._complete(self._names()))
        return max((_step(name) for name in names if name not in self._passed_over), default=-1)

    def lines(self) -> dict[int, str]:
        """Of the log, as the checkpoints have it: step -> line."""
        found = {}
        for name in self.store.list():
            if LINES.fullmatch(name):
                for line in self.store.read(name).decode(errors="replace").splitlines(keepends=True):
                    if (step := step_of(line)) is not None:
                        found[step] = line
        return found

    def _read_manifest(self, name: str) -> dict[str, Any] | str | None:
        """None: it was never finished."""
        there = MANIFEST in self.store.list(name)
        if not there:
            time.sleep(AGAIN[0])  # a store may say so for a moment
        try:
            manifest = self._twice(lambda: _unsealed(self.store.read(f"{name}/{MANIFEST}")), missing=there)
        except Missing as error:
            return f"{MANIFEST} cannot be read ({error})" if there else None
        except NotWhole as error:
            return str(error)
        if manifest["step"] != _step(name):
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
        read = {}
        try:
            with ThreadPoolExecutor(READERS) as pool:
                wanted = dict(_wanted(state, self.ranks, manifest["tensors"]))
                rows = pool.map(lambda item: self._rows(name, manifest["tensors"], *item), wanted.items())
                read = dict(zip(wanted, rows, strict=True))
        except (NotWhole, StoreError) as error:
            problem = error
        problems = [p for p in self.ranks.objects(problem) if p]
        for p in problems:
            if not isinstance(p, NotWhole | Missing | Short):
                raise p
        if problems:
            return str(problems[0])
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
        for moment, x in sorted(state.optimizer.state.get(p, {}).items()):
            yield f"{moment}/{name}", x


def _stage(state: TrainState, ranks: Ranks) -> Iterator[Staged]:
    """What this rank saves: of tensors that several ranks hold, they take turns."""
    for k, (name, x) in enumerate(_named(state)):
        own = slab(x, ranks)
        if k % own.copies == own.copy and own.local.numel():
            rows = own.local.to("cpu", copy=True).contiguous().view(len(own.local) if x.dim() else 1, -1)
            yield Staged(name, str(x.dtype), list(x.shape), own.first, rows.view(torch.uint8))


def _digest(tensor: Staged) -> int:
    """The sum over rows of their hashes, each seeded by its row's number: rows may lie on any rank."""
    rows = tensor.rows.numpy()
    return sum(xxh3_64_intdigest(row.data, tensor.first + k) for k, row in enumerate(rows)) % 2**64


def _wanted(state: TrainState, ranks: Ranks, tensors: dict[str, Kept]) -> Iterator[tuple[str, Wanted]]:
    """What this rank needs of a checkpoint."""
    possible = [(f"weight/{name}", x) for name, x in state.model.state_dict().items()]
    trained = [(name, p) for name, p in state.model.named_parameters() if f"exp_avg/{name}" in tensors]
    possible += [(f"{moment}/{name}", p) for name, p in trained for moment in ("exp_avg", "exp_avg_sq")]
    for name, x in possible:
        if name not in tensors:
            raise NotWhole(f"{name} is not in it")
        found, expected = (tensors[name].dtype, tensors[name].shape), (str(x.dtype), list(x.shape))
        if found != expected:
            raise NotWhole(f"{name} is {found}, expected {expected}")
        own = slab(x, ranks)
        yield name, Wanted(own.first, len(own.local) if x.dim() else 1)
    for name, _ in trained:
        if f"step/{name}" not in tensors:
            raise NotWhole(f"step/{name} is not in it")
        yield f"step/{name}", Wanted(0, 1)


def _restore(state: TrainState, ranks: Ranks, read: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, x in state.model.state_dict().items():
            own = slab(x, ranks).local
            own.copy_(read[f"weight/{name}"].view(own.shape))
        state.optimizer.state.clear()
        for name, p in state.model.named_parameters():
            if f"exp_avg/{name}" not in read:
                continue
            steps = read[f"step/{name}"].view(())
            kept: dict[str, Tensor] = {"step": steps.to(p.device) if state.optimizer.defaults["fused"] else steps}
            for moment in ("exp_avg", "exp_avg_sq"):
                kept[moment] = torch.zeros_like(p)
                own = slab(kept[moment], ranks).local
                own.copy_(read[f"{moment}/{name}"].view(own.shape))
            state.optimizer.state[p] = kept


# ---- manifests ----------------------------------------------------------------------------------------------------------


def _step(name: str) -> int:
    found = NAME.fullmatch(name)
    assert found
    return int(found[1])


def _sealed(manifest: dict[str, Any]) -> bytes:
    text = json.dumps(manifest)
    return json.dumps({"checksum": xxh3_64_hexdigest(text.encode()), "manifest": text}).encode()


def _unsealed(content: bytes) -> dict[str, Any]:
    """A manifest whose parts are what they should be, whoever wrote it."""
    try:
        sealed = json.loads(content)
        text = sealed["manifest"]
        if xxh3_64_hexdigest(text.encode()) != sealed["checksum"]:
            raise ValueError
        manifest = json.loads(text)
        found = manifest["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotWhole(f"{MANIFEST} is damaged") from None
    if found != FORMAT:
        raise ConfigError(
            f"a checkpoint's {MANIFEST} has format {found}, this program reads {FORMAT}: use the program that "
            "wrote it, or another folder"
        )
    try:
        manifest["tensors"] = {str(name): _kept(of_it) for name, of_it in manifest["tensors"].items()}
        for name, kind in KINDS.items():
            if type(manifest[name]) is not kind:
                raise ValueError(f"{name} is {manifest[name]!r}")
        if type(manifest["stream"]["order"]) is not dict or type(manifest["stream"]["step"]) is not int:
            raise ValueError("stream has no order or no step")
        if not all(sample.isdigit() and type(why) is str for sample, why in manifest["quarantine"].items()):
            raise ValueError("quarantine is no list of samples")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotWhole(f"{MANIFEST} is not as it should be ({type(error).__name__}: {error})") from None
    return manifest


def _kept(found: Any) -> Kept:
    dtype, shape, blocks = found
    blocks = [Block(*block) for block in blocks]
    width = math.prod(shape[1:]) * DTYPES[dtype].itemsize
    for number in (*shape, *(n for b in blocks for n in b[1:5])):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no size")
    for block in blocks:
        if not FILE.fullmatch(block.file):
            raise ValueError(f"{block.file!r} is no name of a file of a checkpoint")
        if block.bytes != block.rows * width:
            raise ValueError(f"{block.bytes} bytes are not {block.rows} rows")
    return Kept(dtype, shape, blocks)


def manifests(store: Store) -> dict[int, dict[str, Any]]:
    """Of the checkpoints in a folder that can be read, by step."""
    found = {}
    for name in store.list():
        if NAME.fullmatch(name):
            try:
                found[_step(name)] = _unsealed(store.read(f"{name}/{MANIFEST}"))
            except (Missing, NotWhole):
                continue  # it was never finished, or a start will say what is wrong with it
    return found


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
