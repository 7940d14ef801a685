"""A small dataset whose samples say who they are, and a decoder that believes them only if every byte is right."""

import hashlib
import json

import numpy as np

from streaming import BadSample, Dataset, Loader, Order, Store
from streaming.pack import pack

FRAMES, FRAME = 3, 700


def content(key, part):
    """Bytes that belong to this member of this sample and to no other."""
    seed = hashlib.sha256(f"{key}/{part}".encode()).digest()
    return (seed * (FRAME // 32 + 1))[:FRAME]


def encode(number):
    if number % 1000 == 999:
        raise BadSample("toy reason", f"{number} is refused")
    key = f"s{number:05d}"
    return {f"{k}.bin": content(key, k) for k in range(FRAMES)} | {"json": json.dumps({"number": number}).encode()}


class ToyDecoder:
    fields = {"number": ((), "int64"), "frame": ((), "int64"), "bytes": ((FRAME,), "uint8")}  # noqa: RUF012

    def members(self, names, draw):
        if "json" not in names:
            raise BadSample("member missing", "json")
        return [f"{int(draw * FRAMES)}.bin", "json"]

    def decode(self, key, members, out):
        name = next(n for n in members if n.endswith(".bin"))
        if members[name] != content(key, int(name[0])):
            raise BadSample("wrong content", key)
        out["number"][...] = json.loads(members["json"])["number"]
        out["frame"][...] = int(name[0])
        out["bytes"][...] = np.frombuffer(members[name], np.uint8)


def toy_draw(epoch, samples):
    return (samples * 7 + epoch) % 10 / 10


def make_dataset(url, count, part_items=10, **options):
    """Shards of `part_items` samples each."""
    items = [(f"s{k:05d}", k) for k in range(count)]
    store = Store(url, patience=20, options=options)
    pack(items, encode, store, processes=0, part_items=part_items)
    return store


def open_loader(
    url,
    cache=None,
    *,
    batch=8,
    seed=1,
    lanes=2,
    window=2,
    patience=20.0,
    options=None,
    cache_bytes=1 << 30,
    **arguments,
):
    dataset = Dataset(Store(url, patience=patience, options=options), cache)
    order = Order(dataset.fingerprint, seed, batch, lanes, window)
    arguments.setdefault("workers", 0)
    return Loader(dataset, order, ToyDecoder(), cache=cache, cache_bytes=cache_bytes, draw=toy_draw, **arguments)


def take(loader, count, start=0):
    batches = loader.batches(start)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken
