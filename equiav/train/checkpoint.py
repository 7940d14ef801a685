"""Checkpoints: whole or absent, checked to the last byte before anything of them is used, loaded at any number of processes.

A checkpoint is a folder `step-00001000-TOKEN` (the token is of the start that wrote it): files of
torch.distributed.checkpoint, from each rank its shards of model and optimizer, and `manifest.json`, written last, with the
size and checksum of every file and all that is small.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture
from xxhash import xxh3_64

from equiav.config import ConfigError
from equiav.ending import Superseded
from equiav.parallel import Ranks, own_and_whole_bytes
from equiav.train.loop import TrainState
from streaming import Store, StoreError
from streaming.store import Missing, Short

MANIFEST, FORMAT = "manifest.json", 1
NAME = re.compile(r"step-(\d{8,})-[0-9a-f]{8}$")
PIECE = 64 << 20
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of a run in one process


OWNER, LOOK = "owner", 5.0  # seconds


class Written(NamedTuple):
    """A file that a rank has brought to the store."""

    name: str
    size: int
    checksum: str  # XXH3-64


class Writer(FileSystemWriter):
    """Writes to a folder on this machine, then brings what it wrote to the store."""

    def __init__(self, scratch: Path, store: Store, folder: str, about: dict[str, Any], token: str):
        super().__init__(scratch, single_file_per_rank=True, sync_files=False)
        self.scratch, self.store, self.folder, self.about, self.token = scratch, store, folder, about, token

    def write_data(self, plan: Any, planner: Any) -> TorchFuture[list[Any]]:
        """On every rank."""
        results: list[Any] = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in results})
        done: TorchFuture[list[Any]] = TorchFuture()
        done.set_result(results + [self._bring(name) for name in names])
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On rank 0, when all have written. The manifest makes it a checkpoint."""
        files = [item for of_rank in results for item in of_rank if isinstance(item, Written)]
        super().finish(metadata, [[item for item in of_rank if isinstance(item, WriteResult)] for of_rank in results])
        files.append(self._bring(".metadata"))
        _check_owner(self.store, self.token)
        manifest = {"format": FORMAT, **self.about, "files": {file.name: [file.size, file.checksum] for file in files}}
        self.store.write(f"{self.folder}/{MANIFEST}", _sealed(manifest))

    def _bring(self, name: str) -> Written:
        path = self.scratch / name
        written = Written(name, path.stat().st_size, file_checksum(path))
        self.store.upload(f"{self.folder}/{name}", path)
        return written


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
    ):
        """Takes the folder over from any earlier start of the run, and finds out whether it can be written and read by all."""
        self.ranks, self.keep, self.keep_every, self.warn = ranks, keep, keep_every, warn
        self.store = Store(url, patience, options)
        self.failures = 0  # saves that came to nothing
        self.saved_step = 0  # of the last that is durable
        self.seconds = 0.0  # that the last one held up the run
        self._saving: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self.token = str(ranks.objects(secrets.token_hex(4))[0])
        self.superseded = False  # known to rank 0 within some seconds, of a store that answers
        self._closed = threading.Event()
        problem = ""
        try:
            if ranks.rank == 0:
                self.store.write(OWNER, self.token.encode())
        except StoreError as error:
            problem = str(error)
        ranks.objects(None)  # nobody reads before it is written
        try:
            if not problem:
                _check_owner(self.store, self.token)
        except (StoreError, Superseded) as error:
            problem = f"rank {ranks.rank} does not see what rank 0 wrote there ({error})"
        problems = [p for p in ranks.objects(problem) if p]
        if problems:
            raise ConfigError(
                f"checkpoints cannot be kept at {self.store.url}: {problems[0]}. It has to be a folder that "
                "all processes read and write (checkpoint.url)"
            )
        if ranks.rank == 0:
            threading.Thread(target=self._look, daemon=True, name="owner").start()

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> None:
        """A start that was cut off and comes back must not train on until its next save."""
        while not self.superseded and not self._closed.wait(LOOK):
            try:
                _check_owner(self.store, self.token)
            except Superseded:
                self.superseded = True
            except StoreError:
                pass  # a save will tell

    def require_room(self, state: TrainState) -> None:
        """For one checkpoint, before the first step: where ranks write it first, and where it is kept, if that is a disk."""
        own, whole = (3 * size for size in own_and_whole_bytes(state.model))  # weights and both moments
        places = [(tempfile.gettempdir(), own * self.ranks.local_size, "TMPDIR")]
        if self.store.local and self.ranks.rank == 0:
            places.append((self.store.root, whole, "checkpoint.url"))
        problems = [
            f"{place} has room for {free / 2**20:,.1f} MiB, a checkpoint takes {needed / 2**20:,.1f} there ({setting})"
            for place, needed, setting in places
            if (free := shutil.disk_usage(place).free) < needed
        ]
        everyones = self.ranks.objects(problems)
        if any(everyones):
            raise ConfigError(next(of_rank[0] for of_rank in everyones if of_rank))

    # ---- saving

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Copies the state to host memory, and writes it in the background. `about`: what is small, for the manifest."""
        begun = time.perf_counter()
        self.wait()
        scratch = tempfile.TemporaryDirectory(prefix="equiav-checkpoint-")
        about = {"step": state.step, "skipped": state.skipped, "ranks": self.ranks.size, **about}
        writer = Writer(Path(scratch.name), self.store, f"step-{state.step:08d}-{self.token}", about, self.token)
        staged = writer.stage(_tensors(state))
        self._saving = self._thread.submit(self._write, staged, writer, scratch)
        self.seconds = time.perf_counter() - begun

    def _write(self, staged: dict[str, Any], writer: Writer, scratch: tempfile.TemporaryDirectory[str]) -> None:
        with scratch:
            save(staged, storage_writer=writer, process_group=self.ranks.storing, no_dist=self.ranks.size == 1)
        self.saved_step = writer.about["step"]
        if self.ranks.rank == 0:
            self._retire()

    def wait(self) -> None:
        """Until the save that is under way is durable, or has failed; a failure is told and counted, and the run goes on."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            cause = _cause(error)
            if isinstance(cause, Superseded):
                raise cause from None
            self.failures += 1
            self.warn(f"a checkpoint could not be saved, the run goes on without it: {cause}")

    @property
    def saving(self) -> bool:
        return self._saving is not None and not self._saving.done()

    def _retire(self) -> None:
        """Removes what is not to be kept; its manifest first, so that what a crash leaves of it is no checkpoint."""
        names = self._names()
        complete = [name for name in names if self.store.exists(f"{name}/{MANIFEST}")]
        kept = set(complete[-self.keep :])
        if self.keep_every:
            kept |= {name for name in complete if _step(name) % self.keep_every == 0}
        newest = _step(complete[-1]) if complete else -1
        for name in names:
            if name not in kept and _step(name) < newest:
                if name in complete:
                    self.store.remove(f"{name}/{MANIFEST}")
                self.store.remove(name)

    def _names(self) -> list[str]:
        return sorted((name for name in self.store.list() if NAME.match(name)), key=lambda name: (_step(name), name))

    # ---- loading

    def load(self, state: TrainState) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, into `state` -> its manifest; None where there is none. All ranks together."""
        for name in reversed(self.ranks.objects(self._names() if self.ranks.rank == 0 else None)[0]):
            with tempfile.TemporaryDirectory(prefix="equiav-checkpoint-") as scratch:
                leader = self.ranks.local_rank == 0  # it fetches for its node
                fetched = self._fetch(name, Path(scratch)) if leader else None
                everyones = self.ranks.objects(fetched)
                problems = [str(f) for f in everyones if isinstance(f, NotWhole)]
                if problems:
                    if self.ranks.rank == 0:
                        self.warn(f"checkpoint {self.store.url}/{name} is passed over: {problems[0]}")
                    continue
                manifest, folder = everyones[self.ranks.rank - self.ranks.local_rank]
                tensors = _tensors(state)
                reader = FileSystemReader(folder)
                load(tensors, storage_reader=reader, process_group=self.ranks.storing, no_dist=self.ranks.size == 1)
                set_state_dict(
                    state.model,
                    state.optimizer,
                    model_state_dict=tensors["model"],
                    optim_state_dict=tensors["optimizer"],
                )
                self.ranks.objects(None)  # nobody removes what another still reads
                state.step, state.skipped = manifest["step"], manifest["skipped"]
                self.saved_step = state.step
                return manifest
        return None

    def _fetch(self, name: str, scratch: Path) -> tuple[dict[str, Any], str] | NotWhole:
        """Every file of a checkpoint, its bytes checked, in a folder of this machine."""
        try:
            manifest = _unsealed(self.store.read(f"{name}/{MANIFEST}"))
            for file, (size, checksum) in manifest["files"].items():
                with (scratch / file).open("wb") as copy:
                    for begin in range(0, size, PIECE):
                        copy.write(self.store.read(f"{name}/{file}", begin, min(begin + PIECE, size)))
                if self.store.size(f"{name}/{file}") != size or file_checksum(scratch / file) != checksum:
                    return NotWhole(f"{file} is not the one that was saved")
        except (Missing, Short) as error:
            return NotWhole(str(error))
        except NotWhole as error:
            return error
        return manifest, str(scratch)


class NotWhole(ValueError):  # noqa: N818
    """What is wrong with a checkpoint."""


def _tensors(state: TrainState) -> dict[str, Any]:
    model, optimizer = get_state_dict(state.model, state.optimizer)
    return {"model": model, "optimizer": optimizer}


def _check_owner(store: Store, token: str) -> None:
    """Of two that both believe to be this run, the one that started last goes on."""
    owner = store.read(OWNER).decode()
    if owner != token:
        raise Superseded(f"{store.url}: start {owner} of this run has taken over from this one, {token}; this one ends")


def _step(name: str) -> int:
    found = NAME.match(name)
    assert found
    return int(found[1])


def _sealed(manifest: dict[str, Any]) -> bytes:
    text = json.dumps(manifest)
    return json.dumps({"checksum": xxh3_64(text.encode()).hexdigest(), "manifest": text}).encode()


def _unsealed(content: bytes) -> dict[str, Any]:
    try:
        sealed = json.loads(content)
        text = sealed["manifest"]
        if xxh3_64(text.encode()).hexdigest() != sealed["checksum"]:
            raise ValueError
        manifest = json.loads(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NotWhole(f"{MANIFEST} is damaged") from None
    if manifest["format"] != FORMAT:
        raise NotWhole(f"{MANIFEST} has format {manifest['format']}, this program reads {FORMAT}")
    return manifest


def file_checksum(path: Path) -> str:
    state = xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def _cause(error: BaseException) -> BaseException:
    """What happened, of an error that torch.distributed.checkpoint wraps for all ranks."""
    if isinstance(error, CheckpointException):
        return _cause(next(iter(error.failures.values()))[0])
    return error
