"""A shard: a plain WebDataset tar, and beside it the offsets file that says where each member lies and what its checksum is."""

from __future__ import annotations

import errno
import json
import tarfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64, xxh3_64_hexdigest

from streaming.outside import HEX64, Malformed, parse, rows, table, text, whole

CHUNK = 1 << 20
LONGEST_KEY, LONGEST_HEADER = 1 << 16, 1 << 20  # characters; bytes of what describes a member
NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class ShardError(ValueError):
    """A tar cannot serve as a shard; the message names it, the member and the reason."""


class Member(NamedTuple):
    offset: int  # of the content, in the tar
    length: int
    checksum: str  # XXH3-64, hex


class Sample(NamedTuple):
    key: str
    members: dict[str, Member]  # by extension: `0.jpg`, `wav`, `json`

    @property
    def span(self) -> tuple[int, int]:
        """First byte and the one after the last, of all its members."""
        places = self.members.values()
        return min(m.offset for m in places), max(m.offset + m.length for m in places)


class _Info(tarfile.TarInfo):
    """Sizes below zero send Python's own reader back to where it came from, for ever (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.HeaderError("a size below zero")
        return super()._block(count)  # type: ignore[misc]

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """What describes the next member is read at once, whatever it says of its size."""
        describes = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *NAMES)
        if self.type in describes and self.size > LONGEST_HEADER:
            raise tarfile.HeaderError(f"a description of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def scan(path: Path, name: str) -> list[Sample]:
    """Every sample of a tar, in its order. A sample is a run of members that share a path up to the first dot."""
    samples: list[Sample] = []
    seen: set[str] = set()
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:", tarinfo=_Info) as tar, path.open("rb") as raw:
            for info in tar:
                if info.size < 0:
                    raise ShardError(f"shard {name}: member {info.name!a} has a size of {info.size} bytes")
                if not info.isfile():
                    continue
                if any("\ud800" <= letter <= "\udfff" for letter in info.name):
                    raise ShardError(f"shard {name}: member {info.name!a}: its name is not UTF-8")
                if info.offset_data + info.size > size:
                    raise ShardError(
                        f"shard {name}: truncated in member {info.name}: it ends at byte "
                        f"{info.offset_data + info.size}, the file at {size}"
                    )
                folder, _, base = info.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not dot or not stem:
                    continue  # as webdataset does: not part of a sample
                key = f"{folder}/{stem}" if folder else stem
                if max(len(key), len(extension)) > LONGEST_KEY:
                    raise ShardError(f"shard {name}: member {key[:60]}... has a name of {len(info.name)} characters")
                if not samples or samples[-1].key != key:
                    if key in seen:
                        raise ShardError(f"shard {name}: sample {key} comes twice, or its members are not side by side")
                    seen.add(key)
                    samples.append(Sample(key, {}))
                if extension in samples[-1].members:
                    raise ShardError(f"shard {name}: member {info.name} comes twice")
                raw.seek(info.offset_data)
                checksum = xxh3_64_hexdigest(raw.read(info.size))
                samples[-1].members[extension] = Member(info.offset_data, info.size, checksum)
            raw.seek(tar.offset)  # tarfile takes a damaged header, and the end of the file, for the end of the tar
            if raw.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise ShardError(
                    f"shard {name}: truncated or damaged at byte {tar.offset}: there is neither a member nor the "
                    "two empty blocks that end a tar"
                )
    except ShardError:
        raise
    except Exception as error:  # whatever damaged headers raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ShardError(f"shard {name}: not a plain tar file ({error})") from None
    if not samples:
        raise ShardError(f"shard {name}: holds no samples")
    return samples


def file_checksum(path: Path) -> str:
    state = xxh3_64()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            state.update(block)
    return state.hexdigest()


def encode_offsets(samples: Iterable[Sample]) -> bytes:
    lines = (json.dumps([s.key, s.members], separators=(",", ":"), ensure_ascii=False) for s in samples)
    return "".join(line + "\n" for line in lines).encode()


def offsets_limit(size: int) -> int:
    """Bytes that the offsets file of a tar of `size` bytes can have: of a member there it has less than its header here."""
    return 4096 + 2 * size


class Offsets:
    """An offsets file in memory. A line is parsed when it is asked for: most of a shard's samples are another process's."""

    def __init__(self, content: bytes, name: str, size: int):
        """size: bytes of the tar."""
        self.content, self.name, self.size = content, name, size

    @cached_property
    def _lines(self) -> list[bytes]:
        return self.content.splitlines()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Sample:
        """Raises ShardError where the file has no such line, or what is in it cannot be."""
        try:
            if not 0 <= number < len(self):
                raise Malformed(f"is not there: it has {len(self)} lines")
            key, members = rows(parse(self._lines[number]), "a sample", 2)
            found = {}
            for extension, place in table(members, "its members").items():
                offset, length, checksum = rows(place, f"member {extension}", 3)
                whole(length, "a length", 0, self.size)
                whole(offset, "an offset", 0, self.size - length)
                found[text(extension, "a name", longest=LONGEST_KEY)] = Member(
                    offset, length, text(checksum, "a checksum", HEX64)
                )
            if not found:
                raise Malformed("has no members")
            return Sample(text(key, "a key", longest=LONGEST_KEY), found)
        except Malformed as error:
            raise ShardError(f"line {number + 1} of {self.name} is no sample with its members: {error}") from None
