"""What a checkpoint's manifest says: where every block of every tensor lies, and all that is small. It is held against what it
can be before anything else of the checkpoint is read, whoever wrote it."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

import torch
from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from equiav.config import ConfigError
from streaming import Store
from streaming.outside import HEX64, HEX128, Malformed, entry, parse, rows, table, text, whole
from streaming.store import Missing, TooLarge

MANIFEST, FORMAT = "manifest.json", 2
NAME = re.compile(r"step-([0-9]{8,15})-([0-9a-f]{8})")
FILE = r"part-[0-9]{5,9}-[0-9]{5,9}"
BLOCK, FILE_BYTES = 8 << 20, 64 << 20  # that are written together, at most, but for single rows that are larger
LARGEST = 1 << 42  # elements of a tensor, bytes of a file
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)}
SAMPLE, REASON = r"[0-9]{1,18}", r"[^\x00-\x1f\x7f]+"


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


def step_of(name: str) -> int:
    """Of a checkpoint, by its name."""
    found = NAME.fullmatch(name)
    assert found
    return int(found[1])


def digest_of(weights: dict[str, str]) -> str:
    """Of all weights, from the digest of each."""
    return xxh3_128_hexdigest(json.dumps(weights).encode())


def sealed(manifest: dict[str, Any]) -> bytes:
    content = json.dumps(manifest)
    return json.dumps({"checksum": xxh3_64_hexdigest(content.encode()), "manifest": content}).encode()


def unsealed(content: bytes) -> dict[str, Any]:
    """A manifest whose parts are what they should be; raises NotWhole."""
    try:
        outer = table(parse(content), "it")
        inner = entry(outer, "manifest")
        if type(inner) is not str or xxh3_64_hexdigest(inner.encode()) != entry(outer, "checksum"):
            raise Malformed("has not its own checksum")
        manifest = table(parse(inner), "it")
        found = entry(manifest, "format")
    except (Malformed, UnicodeEncodeError) as error:
        raise NotWhole(f"{MANIFEST} is damaged: it {error}") from None
    if type(found) is int and found != FORMAT:
        raise ConfigError(
            f"a checkpoint's {MANIFEST} has format {found}, this program reads {FORMAT}: use the program that "
            "wrote it, or another folder"
        )
    try:
        _check(manifest)
        tensors = table(entry(manifest, "tensors"), "tensors").items()
        manifest["tensors"] = {name: _kept(name, of_it) for name, of_it in tensors}
    except Malformed as error:
        raise NotWhole(f"{MANIFEST} is not as it should be: {error}") from None
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """All but the tensors."""
    whole(manifest["format"], "format", FORMAT, FORMAT)
    step = whole(entry(manifest, "step"), "step", 0, 10**15)
    whole(entry(manifest, "skipped"), "skipped", 0, step)
    weights = table(entry(manifest, "weights"), "weights")
    for name, value in weights.items():
        text(value, f"the digest of {name}", HEX64)
    if digest_of(weights) != entry(manifest, "digest"):
        raise Malformed("digest is not that of the weights' digests")
    stream = table(entry(manifest, "stream"), "stream")
    whole(entry(stream, "step"), "stream.step", step, step)
    table(entry(stream, "order"), "stream.order")
    for sample, why in table(entry(manifest, "quarantine"), "quarantine").items():
        text(sample, "a sample", SAMPLE)
        text(why, f"the reason of sample {sample}", REASON, 200)
    table(entry(manifest, "config"), "config")
    for name in ("init", "learns_from"):
        for key, value in table(manifest.get(name, {}), name).items():
            text(value, f"{name}.{key}")
    if manifest.get("log"):  # earlier releases kept none
        text(manifest["log"], "log", HEX128)


def _kept(name: str, found: Any) -> Kept:
    dtype, shape, blocks = rows(found, name, 3)
    if type(dtype) is not str or dtype not in DTYPES:
        raise Malformed(f"the type of {name} is {dtype!r}, expected one of {', '.join(DTYPES)}")
    for side in rows(shape, f"the shape of {name}"):
        whole(side, f"the shape of {name}", 0, LARGEST)
    if len(shape) > 8 or math.prod(shape) > LARGEST:
        raise Malformed(f"{name} is of shape {shape}")
    width, height = math.prod(shape[1:]) * DTYPES[dtype].itemsize, shape[0] if shape else 1
    return Kept(dtype, shape, [_block(name, of_it, width, height) for of_it in rows(blocks, f"the blocks of {name}")])


def _block(name: str, found: Any, width: int, height: int) -> Block:
    block = Block(*rows(found, f"a block of {name}", 6))
    text(block.file, f"a file of {name}", FILE)
    whole(block.rows, f"the rows of a block of {name}", 1, height)
    whole(block.first, f"the first row of a block of {name}", 0, height - block.rows)
    whole(block.bytes, f"the bytes of {block.rows} rows of {name}", block.rows * width, block.rows * width)
    if not 0 < block.bytes <= max(BLOCK, width):
        raise Malformed(f"a block of {name} has {block.bytes} bytes, expected {max(BLOCK, width)} at most")
    whole(block.offset, f"the place of a block of {name}", 0, LARGEST)
    text(block.checksum, f"a checksum of {name}", HEX64)
    return block


def manifests(store: Store) -> dict[int, dict[str, Any]]:
    """Of the checkpoints in a folder that can be read, by step."""
    found = {}
    for name in store.list():
        if NAME.fullmatch(name):
            try:
                found[step_of(name)] = unsealed(store.read(f"{name}/{MANIFEST}"))
            except (Missing, TooLarge, NotWhole):
                continue  # it was never finished, or a start will say what is wrong with it
    return found
