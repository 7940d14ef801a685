"""A shard: a plain WebDataset tar, and beside it the offsets file that says where each member lies and what its checksum is."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64, xxh3_64_hexdigest

CHUNK = 1 << 20


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


def scan(path: Path, name: str) -> list[Sample]:
    """Every sample of a tar, in its order. A sample is a run of members that share a path up to the first dot."""
    samples: list[Sample] = []
    seen: set[str] = set()
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            for info in tar:
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
    except tarfile.TarError as error:
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


class Offsets:
    """An offsets file in memory. A line is parsed when it is asked for: most of a shard's samples are another process's."""

    def __init__(self, content: bytes, name: str = "an offsets file"):
        self.content, self.name = content, name
        self._lines = content.splitlines()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Sample:
        try:
            key, members = json.loads(self._lines[number])
            sample = Sample(key, {extension: Member(*place) for extension, place in members.items()})
            if (
                not isinstance(key, str)
                or not members
                or any(m.offset < 0 or m.length < 0 for m in sample.members.values())
            ):
                raise ValueError
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ShardError(f"line {number + 1} of {self.name} is no sample with its members") from None
        return sample
