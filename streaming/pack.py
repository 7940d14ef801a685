"""Items -> shards, in several processes. Killed and started again, it goes on: what is finished is kept, nothing is half-written.

Items are divided into parts of a fixed number; a part becomes one shard, or more where it exceeds the size limit, so that a
shard's content depends on the items and not on which process was faster. A part's record is written after its shards, and the
index after all records.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from streaming.dataset import INDEX, Dataset, DatasetError, Shard, describe, write_index
from streaming.outside import HEX64, Malformed, entry, parse, rows, table, text, whole
from streaming.processes import Child, ChildDied, stop
from streaming.quarantine import BadSample
from streaming.store import TEMPORARY, Missing, NoStore, Store

RECORDS = "packing"  # folder of what is finished, removed at the end
REJECTED = "rejected.jsonl"
LISTED = 1 << 32  # bytes of a list of items, at most
PACKED = "packed.json"  # of what it was made
BLOCK = tarfile.BLOCKSIZE

Item = tuple[str, Any]  # the sample's key, and whatever `encode` makes its members of
Encode = Callable[[Any], dict[str, bytes]]


class Progress(NamedTuple):
    items: int  # looked at
    rejected: Counter[str]  # by reason
    shards: int  # finished
    bytes: int  # in them


class Settings(NamedTuple):
    address: str  # of the store, with its password
    patience: float
    options: dict[str, Any]
    max_shard_bytes: int


class Record(NamedTuple):
    """A finished part."""

    shards: list[Shard]
    rejected: list[dict[str, str]]
    items: int
    stamp: str  # of its items, as they were

    @classmethod
    def decode(cls, content: bytes) -> Record:
        record = table(parse(content), "it")
        shards = [Shard(*rows(shard, "a shard", 5)) for shard in rows(entry(record, "shards"), "shards")]
        for shard in shards:
            text(shard.name, "a name")
            for number in (shard.samples, shard.bytes):
                whole(number, "a number")
            for checksum in (shard.checksum, shard.offsets):
                text(checksum, "a checksum", HEX64)
        rejected = [_rejected(line) for line in rows(entry(record, "rejected"), "rejected")]
        return cls(shards, rejected, whole(entry(record, "items"), "items"), text(entry(record, "stamp"), "stamp"))


def _rejected(line: Any) -> dict[str, str]:
    return {
        name: text(entry(table(line, "a line"), name), name, longest=1 << 20) for name in ("key", "reason", "detail")
    }


def _written(store: Store, name: str, read: Callable[[bytes], Any]) -> Any:
    """What an earlier call has left; None where it has not."""
    try:
        return read(store.read(name, most=LISTED))
    except Missing:
        return None
    except Malformed as error:
        raise DatasetError(
            f"{store.url}/{name} is not what packing writes: {error}; remove the folder, or pack into another"
        ) from None


def pack(
    items: Sequence[Item],
    encode: Encode,
    store: Store,
    *,
    processes: int,
    max_shard_bytes: int = 256 << 20,
    part_items: int = 512,
    settings: str = "",
    stamps: Sequence[str] = (),
    timeout: float = 600.0,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Writes a dataset into an empty place, or goes on with what an earlier call with the same items and `settings` began.

    stamps: what each item was when it was looked at, such as a file's size and time. Of what was begun, a part with an item
    that is another now is packed again.

    `encode` raises BadSample for what cannot be used. An item over which its process dies, or that takes longer than
    `timeout` seconds, is rejected as such. processes=0: in a thread of this process.
    """
    _check_keys(items)
    digest = hashlib.sha256(
        json.dumps([part_items, max_shard_bytes, settings, [repr(item) for item in items]]).encode()
    ).hexdigest()
    parts = -(-len(items) // part_items)
    stamp = [
        hashlib.sha256(json.dumps(list(stamps[k * part_items : (k + 1) * part_items])).encode()).hexdigest()
        for k in range(parts)
    ]
    made_of = {"items": len(items), "digest": digest, "stamp": hashlib.sha256("".join(stamp).encode()).hexdigest()}
    plan = f"{RECORDS}/plan.json"
    begun = _written(store, plan, lambda content: table(parse(content), "it"))
    if store.exists(INDEX):
        if _written(store, PACKED, parse) != made_of:
            raise DatasetError(
                f"{store.url} already holds a dataset, of other items or settings, or of files that have changed since; remove "
                "it, or pack into another folder"
            )
        return _clear_up(store, len(items))  # it was killed after the index, or is finished
    if begun and begun != {"items": len(items), "digest": digest}:
        raise DatasetError(
            f"{store.url} was begun with {begun.get('items')} items or settings other than these {len(items)}; go on with those, "
            "or remove the folder"
        )
    if not begun:
        if shards := [name for name in store.list() if name.endswith((".tar", ".offsets"))]:
            raise DatasetError(
                f"{store.url} holds files that this call did not write, such as {shards[0]}; pack into another folder, or make a "
                "dataset of what is there with `equiav index`"
            )
        try:
            store.write(plan, json.dumps({"items": len(items), "digest": digest}).encode())
        except Missing as error:
            raise NoStore(f"{error}; make the bucket first, or correct its name") from None

    finished = {int(name[:-5]) for name in store.list(RECORDS) if name[:-5].isdigit()}
    records = {k: _written(store, f"{RECORDS}/{k:06d}.json", Record.decode) for k in finished}
    records = {k: record for k, record in records.items() if record.stamp == stamp[k]}
    todo = [k for k in range(parts) if k not in records]
    destination = Settings(store.address, store.patience, store.options, max_shard_bytes)
    packers = [_Packer(k, encode, destination, not processes) for k in range(min(max(1, processes), len(todo)))]
    try:
        while todo or any(packer.part is not None for packer in packers):
            for packer in packers:
                if packer.part is None and todo:
                    k = todo.pop(0)
                    packer.start(k, list(items[k * part_items : (k + 1) * part_items]), stamp[k])
            for packer in packers:
                packer.check(timeout)
            for connection in wait([packer.child.connection for packer in packers], timeout=1.0):
                packer = next(p for p in packers if p.child.connection is connection)
                if record := packer.receive():
                    records[record[0]] = record[1]
            report(_progress(records, sum(packer.done for packer in packers)))
    finally:
        stop([packer.child for packer in packers], patience=1.0)  # a part that is cut short is packed again

    shards = [shard for record in records.values() for shard in record.shards]
    rejected = [line for k in sorted(records) for line in records[k].rejected]
    store.write(REJECTED, "".join(json.dumps(line) + "\n" for line in rejected).encode())
    if not shards:
        first = f", such as {rejected[0]['key']}: {rejected[0]['reason']}: {rejected[0]['detail']}" if rejected else ""
        raise DatasetError(
            f"{store.url}: all of {len(items)} items were rejected{first}; {REJECTED} there says why of each"
        )
    wanted = {name for shard in shards for name in (shard.name, shard.offsets_name)}
    for name in store.list():
        if re.match(r"\d{6}-\d{2,}\.tar", name) and name not in wanted:  # of a part that was killed, or packed again
            store.remove(name)
    store.write(PACKED, json.dumps(made_of).encode())
    write_index(store, shards)
    return _clear_up(store, len(items))


def _clear_up(store: Store, items: int) -> Progress:
    """Of a whole dataset, removes what only packing needed, and what a killed one was writing."""
    store.remove(RECORDS)
    for name in store.list():
        if TEMPORARY.search(name):
            store.remove(name)
    dataset = Dataset(store)
    rejected = _written(store, REJECTED, lambda content: [_rejected(parse(line)) for line in content.splitlines()])
    return Progress(items, Counter(line["reason"] for line in rejected or ()), len(dataset), dataset.bytes)


def _progress(records: dict[int, Record], under_way: int) -> Progress:
    shards = [shard for record in records.values() for shard in record.shards]
    rejected = Counter(line["reason"] for record in records.values() for line in record.rejected)
    return Progress(
        sum(r.items for r in records.values()) + under_way, rejected, len(shards), sum(s.bytes for s in shards)
    )


def _check_keys(items: Sequence[Item]) -> None:
    if not items:
        raise DatasetError("there is nothing to pack")
    seen: dict[str, Any] = {}
    twice: list[str] = []
    for key, content in items:
        if "." in key.rpartition("/")[2] or not key.rpartition("/")[2]:
            raise DatasetError(f"key {key!r} cannot name a sample: its last part is empty or has a dot")
        if key in seen:
            twice.append(f"{key!r} for {seen[key]} and for {content}")
        seen[key] = content
    if twice:
        more = f", and {len(twice) - 10} more" if len(twice) > 10 else ""
        raise DatasetError(
            f"{len(twice)} key(s) come twice: {'; '.join(twice[:10])}{more}. Give each clip a name of its own"
        )


class _Packer:
    """A packing process, replaced when it dies."""

    def __init__(self, number: int, encode: Encode, settings: Settings, threads: bool):
        self.number, self.encode, self.settings, self.threads = number, encode, settings, threads
        self.part: int | None = None
        self.done = 0  # items of the part
        self.current: int | None = None  # the one that is being encoded
        self._spawn()

    def _spawn(self) -> None:
        self.child = Child(f"packing process {self.number}", run_packer, (self.encode, self.settings), self.threads)

    def start(self, part: int, items: list[Item], stamp: str, fatal: dict[int, tuple[str, str]] | None = None) -> None:
        self.part, self.items, self.stamp, self.fatal = part, items, stamp, fatal or {}
        self.done, self.current, self.since = 0, None, time.monotonic()
        self.child.send((part, items, stamp, self.fatal))

    def receive(self) -> tuple[int, Record] | None:
        """A finished part, where the message is that."""
        try:
            kind, value = self.child.receive()
        except ChildDied as error:
            self._replace("kills the decoder", str(error))
            return None
        if kind == "encode":
            self.current, self.done, self.since = value, value, time.monotonic()
            return None
        if kind == "write":
            self.current, self.done = None, value
            return None
        part, self.part, self.done = self.part, None, 0
        assert part is not None
        return part, value

    def check(self, timeout: float) -> None:
        if self.child.process and self.current is not None and time.monotonic() - self.since > timeout:
            self.child.process.kill()
            self._replace("takes too long", f"more than {timeout:g} s")

    def _replace(self, reason: str, detail: str) -> None:
        """A new process takes the part from its beginning, without the item that ended the old one."""
        if self.part is None or self.current is None:
            raise ChildDied(f"packing process {self.number} ended outside any item: {detail}")
        self.child.stop()
        self._spawn()
        self.start(self.part, self.items, self.stamp, {**self.fatal, self.current: (reason, detail)})


# ---- in a packing process -----------------------------------------------------------------------------------------------


def run_packer(connection: Connection, encode: Encode, settings: Settings) -> None:
    store = Store(settings.address, settings.patience, settings.options)
    while True:
        part, items, stamp, fatal = connection.recv()
        connection.send(("done", _pack_part(connection, encode, store, settings, part, items, stamp, fatal)))


def _pack_part(
    connection: Connection,
    encode: Encode,
    store: Store,
    settings: Settings,
    part: int,
    items: list[Item],
    stamp: str,
    fatal: dict[int, tuple[str, str]],
) -> Record:
    shards: list[Shard] = []
    rejected: list[dict[str, str]] = []
    writer = None
    for k, (key, content) in enumerate(items):
        try:
            if k in fatal:
                raise BadSample(*fatal[k])
            connection.send(("encode", k))
            members = encode(content)
        except BadSample as error:
            rejected.append({"key": key, "reason": error.reason, "detail": error.detail})
            continue
        finally:
            connection.send(("write", k + 1))
        size = sum(
            len(tarfile.TarInfo(f"{key}.{name}").tobuf()) + -(-len(data) // BLOCK) * BLOCK
            for name, data in members.items()
        )
        if writer and _padded(writer.size + size) > settings.max_shard_bytes:
            shards.append(writer.finish(store))
            writer = None
        writer = writer or _ShardWriter(f"{part:06d}-{len(shards):02d}.tar")
        writer.add(key, members, size)
    if writer:
        shards.append(writer.finish(store))
    record = Record(shards, rejected, len(items), stamp)
    store.write(f"{RECORDS}/{part:06d}.json", json.dumps(record._asdict()).encode())
    return record


def _padded(size: int) -> int:
    """Bytes of a whole tar: two empty blocks end it, and then more of them, to a full record."""
    return -(-(size + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


class _ShardWriter:
    def __init__(self, name: str):
        self.name, self.size = name, 0
        import webdataset  # it imports torch: seconds that only the process which writes should spend

        self.file = tempfile.NamedTemporaryFile(prefix="shard-")  # noqa: SIM115
        self.tar = webdataset.TarWriter(self.file, encoder=False, mtime=0)  # type: ignore[attr-defined]

    def add(self, key: str, members: dict[str, bytes], size: int) -> None:
        self.tar.write({"__key__": key, **members})
        self.size += size

    def finish(self, store: Store) -> Shard:
        """The shard, then its offsets, in the store."""
        self.tar.close()
        self.file.flush()
        os.chmod(self.file.name, 0o644)
        shard, offsets = describe(Path(self.file.name), self.name)
        store.upload(self.name, Path(self.file.name))
        store.write(shard.offsets_name, offsets)
        self.file.close()
        return shard
