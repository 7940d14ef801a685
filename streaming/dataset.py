"""A dataset is a folder of shards with one index. The index is written last: a dataset is whole, or absent."""

from __future__ import annotations

import hashlib
import json
import mmap
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from streaming.outside import Malformed, entry, parse, table, whole
from streaming.quarantine import Bad, BadSample, decode
from streaming.shards import Offsets, ShardError, encode_offsets, file_checksum, offsets_limit, scan
from streaming.store import Missing, Short, Store, TooLarge

if TYPE_CHECKING:
    from streaming.loader import Decoder

INDEX, FORMAT = "index", 1
COLUMNS = {"samples": 10, "bytes": 13, "checksum": 16, "offsets": 16}  # widths, characters
LONGEST_NAME, LONGEST_HEAD = 120, 4096
AGAIN = (0.2, 1.0)  # seconds, after which an index that is wrong is read again
PIECE = 16 << 20
MOST_SAMPLES = 1 << 22  # of a shard
LEAST_BYTES = tarfile.BLOCKSIZE  # of a sample in a tar: the header of its only, empty member


class DatasetError(ValueError):
    """A dataset cannot be used as it is; the message names it and says what to do."""


class NoDataset(DatasetError):  # noqa: N818
    """There is none at that place."""


class Shard(NamedTuple):
    """A line of the index."""

    name: str
    samples: int
    bytes: int
    checksum: str  # of the tar
    offsets: str  # checksum of the offsets file

    @property
    def offsets_name(self) -> str:
        return f"{self.name}.offsets"


def encode_index(shards: list[Shard]) -> bytes:
    shards = sorted(shards)
    width = max(len(s.name.encode()) for s in shards)
    if width > LONGEST_NAME:
        raise DatasetError(
            f"shard name {max(shards, key=lambda s: len(s.name)).name} is longer than {LONGEST_NAME} characters"
        )
    lines = b"".join(
        b" ".join(
            [
                s.name.encode().ljust(width),
                *(str(value).encode().rjust(COLUMNS[column]) for column, value in zip(COLUMNS, s[1:], strict=True)),
            ]
        )
        + b"\n"
        for s in shards
    )
    head = _head(len(shards), sum(s.samples for s in shards), sum(s.bytes for s in shards), width, lines)
    return json.dumps(head).encode() + b"\n" + lines


def _head(shards: int, samples: int, size: int, width: int, lines: bytes | memoryview) -> dict[str, Any]:
    """What the first line says: all of it follows from the others, and is checked against them."""
    return {
        "format": FORMAT,
        "shards": shards,
        "samples": samples,
        "bytes": size,
        "name_width": width,
        "fingerprint": hashlib.sha256(lines).hexdigest(),
    }


class Dataset:
    """An index, opened. It lies in a mapped file that has no name, so it costs address space and leaves nothing behind."""

    def __init__(self, store: Store, scratch: Path | None = None):
        self.store = store
        for pause in (*(() if store.local else AGAIN), None):
            try:
                self._open(scratch)
                break
            except (DatasetError, Short):  # what is wrong may have become so on its way
                if pause is None:
                    raise
                time.sleep(pause)

    def _open(self, scratch: Path | None) -> None:
        store, url = self.store, self.store.url
        if scratch:
            scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as file:
            try:
                size = store.size(INDEX)
                for start in range(0, size, PIECE):
                    file.write(store.read(INDEX, start, min(start + PIECE, size)))
            except Missing as error:
                raise NoDataset(
                    f"{url} holds no dataset: {error}. `equiav pack` writes one; `equiav index` makes "
                    "the index of shards that are there already"
                ) from None
            file.flush()
            if not size:
                raise DatasetError(f"{url}/{INDEX} is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        end = self._map.find(b"\n") + 1
        try:
            if end > LONGEST_HEAD:
                raise Malformed(f"has {end} bytes")
            head = table(parse(self._map[:end]), "it")
            written = whole(entry(head, "format"), "format")
            if written != FORMAT:
                raise DatasetError(f"{url}/{INDEX} has format {written}, this program reads {FORMAT}")
            width = whole(entry(head, "name_width"), "name_width", 1, LONGEST_NAME)
        except Malformed as error:
            raise DatasetError(
                f"{url}/{INDEX} is not an index of shards: its first line is no JSON object with format and name_width "
                f"({error})"
            ) from None
        fields: list[tuple[str, str]] = [("name", f"S{width}")]
        for column, characters in COLUMNS.items():
            fields += [(f"_{column}", "S1"), (column, f"S{characters}")]
        row = np.dtype([*fields, ("_end", "S1")])
        rows, rest = divmod(len(self._map) - end, row.itemsize)
        self._rows = np.frombuffer(self._map, row, rows, end) if rows else np.empty(0, row)
        self.samples, self.bytes = int(self._numbers("samples").sum()), int(self._numbers("bytes").sum())
        if rest or head != _head(rows, self.samples, self.bytes, width, memoryview(self._map)[end:]):
            raise DatasetError(
                f"{url}/{INDEX} is damaged: its lines are not those that its first line says; `equiav index` "
                "makes it anew"
            )
        self._check_names()
        self._check_numbers()
        self.fingerprint: str = head["fingerprint"]
        if not self.samples:
            raise DatasetError(f"{url} has no samples")

    def _check_names(self) -> None:
        """An index is somebody's word: what it calls a shard must be a file of this folder."""
        for start in range(0, len(self), 1 << 16):
            names = np.ascontiguousarray(self._rows["name"][start : start + (1 << 16)])
            letters = names.view(np.uint8).reshape(len(names), -1)
            wrong = (letters < 32) | (letters == 127) | (letters == ord("/")) | (letters == ord("\\"))
            rows = wrong.any(axis=1) | (letters[:, 0] == ord(".")) | (letters == ord(" ")).all(axis=1)
            if rows.any():
                name = bytes(letters[rows.argmax()]).decode(errors="replace").rstrip()
                raise DatasetError(
                    f"{self.store.url}/{INDEX} names a shard {name!r}, expected the plain name of a file in this folder: "
                    "without slashes or control characters, and not beginning with a dot"
                )

    def _check_numbers(self) -> None:
        """Nor is a number believed that its own shard cannot have: memory is taken by it."""
        for start in range(0, len(self), 1 << 16):
            part = self._rows[start : start + (1 << 16)]
            right = np.ones(len(part), bool)
            for column, width in COLUMNS.items():
                letters = np.ascontiguousarray(part[column]).view(np.uint8).reshape(len(part), width)
                digit = (letters >= ord("0")) & (letters <= ord("9"))
                if column in ("samples", "bytes"):  # blanks, then digits
                    blank = letters == ord(" ")
                    right &= (digit | blank).all(axis=1) & digit[:, -1] & ~(blank[:, 1:] & ~blank[:, :-1]).any(axis=1)
                else:
                    right &= (digit | (letters >= ord("a")) & (letters <= ord("f"))).all(axis=1)
            samples, size = (self._column(part, column) for column in ("samples", "bytes"))
            right &= (samples > 0) & (samples <= size // LEAST_BYTES) & (samples <= MOST_SAMPLES)
            if not right.all():
                shard = self[start + int((~right).argmax())]
                raise DatasetError(
                    f"{self.store.url}/{INDEX} says of shard {shard.name} what cannot be: {shard.samples} samples in "
                    f"{shard.bytes} bytes, checksums {shard.checksum!r} and {shard.offsets!r}; `equiav index` makes it anew"
                )

    def __len__(self) -> int:
        """Shards."""
        return len(self._rows)

    def __getitem__(self, number: int) -> Shard:
        row, part = self._rows[number], self._rows[number : number + 1]
        samples, size = (int(self._column(part, column)[0]) for column in ("samples", "bytes"))
        checksums = (row[column].decode("ascii", "replace") for column in ("checksum", "offsets"))
        return Shard(row["name"].decode(errors="replace").rstrip(), samples, size, *checksums)

    def __iter__(self) -> Iterator[Shard]:
        return (self[k] for k in range(len(self)))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(shards,) int32, samples of each."""
        return self._numbers("samples").astype(np.int32)

    @cached_property
    def starts(self) -> np.ndarray:
        """(shards,) int64: sample ids count through the shards in the order of the index."""
        starts = np.zeros(len(self), np.int64)
        np.cumsum(self.sizes[:-1], out=starts[1:])
        return starts

    def place(self, shard: int, place: int) -> str:
        """Of a sample, for people."""
        return f"{self.store.url}/{self[shard].name}, sample {place}"

    def place_of(self, sample: int) -> str:
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.place(shard, sample - int(self.starts[shard]))

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest shard."""
        return int(self._numbers("bytes").max())

    def _numbers(self, column: str) -> np.ndarray:
        """A column of right-aligned decimals -> int64, in parts: the characters of all rows at once would be large."""
        numbers = np.empty(len(self), np.int64)
        for start in range(0, len(self), 1 << 16):
            part = self._rows[start : start + (1 << 16)]
            numbers[start : start + len(part)] = self._column(part, column)
        return numbers

    def _column(self, rows: np.ndarray, column: str) -> np.ndarray:
        letters = np.ascontiguousarray(rows[column]).view(np.uint8).reshape(len(rows), COLUMNS[column])
        digits = letters.astype(np.int64) - ord("0")
        return np.maximum(digits, 0) @ 10 ** np.arange(COLUMNS[column] - 1, -1, -1)  # a blank is below zero


def read_offsets(store: Store, shard: Shard) -> Offsets:
    try:
        content = store.read(shard.offsets_name, most=offsets_limit(shard.bytes))
    except TooLarge as error:
        raise DatasetError(f"shard {shard.name}: its offsets file is too large: {error}") from None
    except Missing:
        raise DatasetError(f"shard {shard.name}: its offsets file is missing") from None
    if xxh3_64_hexdigest(content) != shard.offsets:
        raise DatasetError(f"shard {shard.name}: its offsets file is not the one that the index was made with")
    offsets = Offsets(content, shard.offsets_name, shard.bytes)
    if len(offsets) != shard.samples:
        raise DatasetError(
            f"shard {shard.name}: its offsets file has {len(offsets)} samples, the index says {shard.samples}"
        )
    return offsets


# ---- making and checking ------------------------------------------------------------------------------------------------


def describe(path: Path, name: str) -> tuple[Shard, bytes]:
    """A tar on local disk -> its line in the index, its offsets file."""
    samples = scan(path, name)
    if len(samples) > MOST_SAMPLES:
        raise ShardError(f"shard {name} has {len(samples)} samples, expected {MOST_SAMPLES} at most")
    offsets = encode_offsets(samples)
    return Shard(name, len(samples), path.stat().st_size, file_checksum(path), xxh3_64_hexdigest(offsets)), offsets


def require_plain(store: Store, name: str) -> None:
    """What `Dataset` asks of a shard's name, said while it can still be mended."""
    plain = all(ord(c) >= 32 and ord(c) != 127 and c not in "/\\" and not "\ud800" <= c <= "\udfff" for c in name)
    if not plain or name.startswith(".") or not name.strip():
        raise DatasetError(
            f"{store.url}: {name!a} cannot be a shard's name: rename it, in UTF-8, without control characters or slashes"
        )


def write_index(store: Store, shards: Iterable[Shard]) -> None:
    shards = list(shards)
    if not shards:
        raise DatasetError(f"{store.url}: there are no shards to make an index of")
    store.write(INDEX, encode_index(shards))


def index_shard(store: Store, name: str) -> tuple[Shard, np.ndarray]:
    """Writes the offsets file of a shard that is in the store already -> its line, and the hashes of its keys."""
    with local_copy(store, name) as path:
        shard, offsets = describe(path, name)
    store.write(shard.offsets_name, offsets)
    read = Offsets(offsets, shard.offsets_name, shard.bytes)
    return shard, np.array([xxh3_64_intdigest(read[k].key.encode()) for k in range(len(read))], np.uint64)


def keys_that_come_again(hashes: list[np.ndarray]) -> list[tuple[int, int]]:
    """Hashes of keys, by shard -> of each key that stands in more than one: the number of a later shard, its place there."""
    if not hashes:
        return []
    everyone, starts = np.concatenate(hashes), np.cumsum([0, *map(len, hashes)])
    order = np.argsort(everyone, kind="stable")
    again = np.sort(order[1:][everyone[order][1:] == everyone[order][:-1]])
    shards = np.searchsorted(starts, again, side="right") - 1
    return list(zip(shards.tolist(), (again - starts[shards]).tolist(), strict=True))


def verify_shard(store: Store, shard: Shard) -> list[dict[str, Any]]:
    """What is wrong with a shard, down to its samples; nothing, if every byte is as the index says."""

    def problem(reason: str, key: str = "") -> dict[str, Any]:
        return {"shard": shard.name, "key": key, "reason": reason}

    try:
        offsets = read_offsets(store, shard)
    except DatasetError as error:
        return [problem(str(error).removeprefix(f"shard {shard.name}: "))]
    try:
        with local_copy(store, shard.name) as path:
            if path.stat().st_size == shard.bytes and file_checksum(path) == shard.checksum:
                fits = encode_offsets(scan(path, shard.name)) == offsets.content
                return (
                    []
                    if fits
                    else [problem("its offsets file says otherwise than the shard; `equiav index` makes it anew")]
                )
            found = [
                problem(
                    f"has {path.stat().st_size} bytes, expected {shard.bytes}, or other content than it was indexed with"
                )
            ]
            with path.open("rb") as file:
                for k in range(len(offsets)):
                    try:
                        members = offsets[k].members
                    except ShardError as error:
                        found.append(problem(str(error)))
                        continue
                    for extension, member in members.items():
                        file.seek(member.offset)
                        data = file.read(member.length)
                        if len(data) < member.length or xxh3_64_hexdigest(data) != member.checksum:
                            found.append(problem(f"member {extension} is damaged", offsets[k].key))
            return found
    except Missing:
        return [problem("is missing")]


def unusable(store: Store, shard: Shard, decoder: Decoder, most: int | None = None) -> tuple[int, list[Bad]]:
    """Of the samples of a shard, or of the first `most`: how many were tried, and those that a run could not use."""
    offsets, bad = read_offsets(store, shard), []
    count = min(len(offsets), most or len(offsets))
    with local_copy(store, shard.name) as path, path.open("rb") as file:
        for k in range(count):
            try:
                sample = offsets[k]
            except ShardError as error:
                bad.append(Bad(k, "offsets", f"{shard.name}, sample {k}", str(error)))
                continue
            out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in decoder.fields.items()}
            try:
                contents = {}
                for name in decoder.members(list(sample.members), 0.0):
                    file.seek(sample.members[name].offset)
                    contents[name] = file.read(sample.members[name].length)
                decode(decoder, sample.key, contents, out)
            except BadSample as error:
                bad.append(Bad(k, error.reason, f"{shard.name}, sample {k} ({sample.key})", error.detail))
    return count, bad


@contextmanager
def local_copy(store: Store, name: str) -> Iterator[Path]:
    """The path of an object on local disk while inside: itself where the store is local, else a copy that is removed after."""
    size = store.size(name)
    if store.local:
        yield Path(store.path(name))
        return
    with tempfile.NamedTemporaryFile(prefix="shard-") as copy:
        for start in range(0, size, PIECE):
            copy.write(store.read(name, start, min(start + PIECE, size)))
        copy.flush()
        yield Path(copy.name)
