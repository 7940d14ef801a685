"""`python -m tests.fuzz --minutes 3 --seed 0`: whatever bytes a store answers with, a parser reads them or names what is wrong.

An input is a folder of files, computed from (seed, parser, number): valid ones of which some are spoiled, and whose checksums
are then put right, so that a parser goes deep. Each is parsed in a child process, which says where a parser raises what is no
named error, does not end, starts a program, writes outside its folder, or takes more memory than it may. The first input of
each kind is kept below runs/fuzz.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import faulthandler
import io
import itertools
import json
import os
import re
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import wave
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import fsspec
import numpy as np
import soundfile
import torch
from PIL import Image
from xxhash import xxh3_64_hexdigest

from equiav.api import Embedder
from equiav.config import ConfigError, ModelSettings, RunConfig, from_dict, to_dict
from equiav.data import clips, decoder, labels, survey
from equiav.evaluate.page import page
from equiav.evaluate.report import gather
from equiav.model.classifier import Classifier
from equiav.model.importers import CheckpointError
from equiav.parallel import Ranks
from equiav.tasks import Pretraining
from equiav.train import checkpoint, initial_state
from equiav.train.log import Log
from equiav.train.run import find
from equiav.weights import from_checkpoint, initial_model, initial_weights, load_classifier, load_model, save_model
from launch.ended import Ended, Record
from monitoring.board import started
from monitoring.exporter import Exporter
from monitoring.metrics import METRICS, by_key
from streaming import CacheError, Dataset, DatasetError, Loader, Order, ShardError, Store, StoreError, TooManyBadSamples
from streaming.dataset import index_shard, read_offsets, unusable, verify_shard
from streaming.labels import read_labels
from streaming.pack import pack
from streaming.quarantine import Bad, BadSample, Quarantine
from streaming.shards import scan

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "runs" / "fuzz"
LIMIT = 20  # seconds for an input
MEDIA, OTHERS = 600 << 20, 64 << 20  # bytes that a parser may take; of the others, 4 times the input's besides
SPACE = 4 << 30  # bytes of address space beyond what a child begins with: this machine is not to suffer
VALID = 4  # inputs that are not spoiled, first of all: they warm a child up, and nothing may be wrong with them
SIZES = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    256,
    65535,
    65536,
    10**6,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
    -512,
    2**64,
]
KEYS = ["", "²", "-1", "1.5", "0", "a.b", "../x", "/etc/passwd", "\0", "\ud800", "x" * 200_000, "9" * 5000]
STRANGE = [*map(str, SIZES), "null", "true", "1.5", "NaN", "Infinity", "-Infinity", "1e308", "1e999", "9" * 5000]
STRANGE += [
    *map(json.dumps, KEYS),
    "[]",
    "{}",
    "[[]]",
    "[null]",
    '{"a": 1}',
    "[" * 100_000,
    '{"a":' * 900 + "1" + "}" * 900,
]
STRANGE += ["[" * 900 + "]" * 900, "[1,2,3,4,5,6]"]
SMALL = {"size": "tiny", "width": 16, "depth": 1, "heads": 2, "image_size": 32, "image_patch": 16, "predictor_heads": 2,
         "spectrogram_frames": 32, "spectrogram_mels": 32, "head_hidden": 16, "head_width": 8, "aug_width": 8}  # fmt: skip
SMALL = {
    "model": SMALL,
    "data": {"frame_size": 32, "min_seconds": 0.1},
    "augment": {"max_mask_frames": 8, "max_mask_mels": 8},
}
Files = dict[str, bytes | None]  # by name; None: a folder


# ---- spoiling -------------------------------------------------------------------------------------------------------


def mutate(r: Random, data: bytes, donor: bytes) -> bytes:
    """Bits, bytes, numbers and pieces, most often near the beginning."""
    for _ in range(r.choice((1, 1, 1, 2, 4, 16))):
        place, length = r.randrange(min(len(data), r.choice((64, 1024, 1 << 30))) + 1), r.choice((1, 4, 64, 4096))
        numbers = list(itertools.islice(re.finditer(rb"\d+", data), 500))
        match r.randrange(8):
            case 0 if data:
                at = min(place, len(data) - 1)
                new = data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :]
            case 1:
                new = data[:place] + r.randbytes(length) + data[place + r.choice((0, length)) :]
            case 2:
                new = data[:place] + data[place + length :]
            case 3:
                new = data[: r.randrange(len(data) + 1)]
            case 4:
                new = data[:place] + donor[r.randrange(len(donor) + 1) :]
            case 5:
                new = data[:place] + data[place : place + length] * r.choice((2, 9, 1000)) + data[place:]
            case 6 if numbers:
                one = r.choice(numbers)
                new = data[: one.start()] + r.choice(STRANGE[: len(SIZES) + 8]).encode() + data[one.end() :]
            case _:
                width = r.choice((1, 2, 4, 8))
                number = (r.choice(SIZES) % (1 << 8 * width)).to_bytes(width, r.choice(("little", "big")))
                new = data[:place] + number + data[place + width :]
        data = new if len(new) < 8 << 20 else data
    return data


def warp(r: Random, data: bytes, donor: bytes = b"") -> bytes:
    """A value of a line of JSON becomes another, goes, comes twice, or has another name; those near the root most often."""
    lines = data.split(b"\n")
    at = r.choice([k for k, line in enumerate(lines) if line[:1] in (b"{", b"[")])
    try:
        root = [json.loads(lines[at])]
    except (ValueError, RecursionError):
        return mutate(r, data, donor)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        holder: Any = root
        key: Any = 0
        while isinstance(holder[key], dict | list) and holder[key] and r.random() < 0.7:
            holder = holder[key]
            key = r.choice(list(holder)) if isinstance(holder, dict) else r.randrange(len(holder))
        match r.randrange(6):
            case 0 if holder is not root:
                del holder[key]
                continue
            case 1 if isinstance(holder, dict):
                holder[r.choice([*KEYS, *holder])] = holder.pop(key)
            case 2 if isinstance(holder, list) and holder is not root:
                holder[key:key] = [holder[key]] * r.choice((1, 2, 1000))
            case 3 if isinstance(holder, dict):
                holder[key] = json.loads(json.dumps(r.choice(list(holder.values()))))
            case _:
                holder[key] = f"@{r.randrange(len(STRANGE))}@"
    text = re.sub(
        r'"@(\d+)@"', lambda found: STRANGE[int(found[1])], json.dumps(root[0], ensure_ascii=r.random() < 0.9)
    )
    if text.startswith('{"') and r.random() < 0.1:  # a name that comes twice
        text = f"{text[:-1]}, {json.dumps(json.loads(text[1 : text.index(':')]))}: {r.choice(STRANGE)}}}"
    lines[at] = text.encode(errors="surrogatepass")
    return b"\n".join(lines)


def spoil_tar(r: Random, data: bytes, donor: bytes) -> bytes:
    """A field of a header, with the header's own checksum."""
    fields = ((0, 100), (100, 8), (108, 8), (124, 12), (124, 12), (124, 12), (156, 1), (156, 1), (157, 100), (257, 8), (345, 155),
              (386, 24), (482, 13))  # fmt: skip
    heads = [k for k in range(0, len(data) - 511, 512) if data[k + 257 : k + 262] == b"ustar"]
    for _ in range(r.choice((1, 1, 2))):
        at, (place, width), number = r.choice(heads), r.choice(fields), r.choice(SIZES)
        text = r.choice((b"%o" % abs(number), b"-%o" % abs(number), b"%d" % number, r.randbytes(width), b"\xff" * width, b"a/.b",
                         b"\xb2" * 4, (number % 256 ** (width - 1)).to_bytes(width, "big")))  # fmt: skip
        if place == 124 and r.random() < 0.5:  # base-256
            text = (b"\xff" if number < 0 else b"\x80") + (number % 256**11).to_bytes(11, "big")
        text = bytes([r.choice(b"\x00012345567LKxxggSSVDMNA")]) if place == 156 else text[:width].ljust(width, b"\0")
        head = data[at : at + place] + text + data[at + place + width : at + 512]
        head = head[:148] + b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:])) + head[156:]
        data = data[:at] + head + data[at + 512 :]
    return data


def spoil_png(r: Random, data: bytes, donor: bytes) -> bytes:
    """With the checksums of its chunks."""
    data, out, at = mutate(r, data, donor), bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


def spoil_safetensors(r: Random, data: bytes, donor: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    head = warp(r, data[8:end].rstrip())
    return len(head).to_bytes(8, "little") + head + data[end:]


def spoil_zip(r: Random, data: bytes, donor: bytes) -> bytes:
    """A member, in a sound archive; or one that is compressed, and large."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = {name: old.read(name) for name in old.namelist()}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError):  # spoiled before
        return mutate(r, data, donor)
    chosen = (
        next((name for name in members if name.endswith("data.pkl")), min(members))
        if r.random() < 0.7
        else r.choice(list(members))
    )
    large = r.random() < 0.02
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if large else zipfile.ZIP_STORED) as new:
        for name, content in members.items():
            if name == chosen:
                content = content + bytes(300 << 20) if large else mutate(r, content, donor)
            new.writestr(name, content)
    return out.getvalue()


KINDS = (
    (lambda data: data[:1] in (b"{", b"["), warp),
    (lambda data: data[257:262] == b"ustar", spoil_tar),
    (lambda data: data[:4] == b"\x89PNG", spoil_png),
    (lambda data: data[:2] == b"PK" and zipfile.is_zipfile(io.BytesIO(data)), spoil_zip),
    (lambda data: data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data), spoil_safetensors),
)


def spoil(r: Random, files: Files, donors: Files, folders: bool) -> Files:
    """A file or two, the small ones most often; now and then the folder itself."""
    for _ in range(r.choice((1, 1, 1, 2))):
        name = min(
            r.sample(sorted(files), min(2, len(files))),
            key=lambda name: ((files[name] or b"")[:1] not in (b"{", b"["), r.random()),
        )
        data, donor = files[name], donors.get(name) or b""
        if data is None:
            continue
        if r.random() < 0.05 and len(files) > 1:
            other = r.choice(sorted(files))
            numbered = re.sub(r"\d+", lambda found: r.choice((found[0], "9" * 30, "0" * 8)), name)
            change: Any = r.choice(
                ({name: None} if folders else {}, {name: files[other], other: data}, {numbered: data}, {})
            )
            files = {k: v for k, v in files.items() if k != name} | change
        else:
            how = next((how for fits, how in KINDS if r.random() < 0.75 and fits(data)), mutate)
            files = files | {name: how(r, data, donor)}
    return files


# ---- valid files --------------------------------------------------------------------------------------------------------

MAGIC = [
    b"BLP1", b"BLP2", b"8BPS\0\1", b"FTEX", b"FTUC", b"SIMPLE  =" + b" " * 20 + b"T", b"\x59\xa6\x6a\x95", b"/* XPM */",
    b"P7 332\n4 4 255\n", b"P6 4 4 ", b"PF\n4 4\n-1\n", b"\xd7\xcd\xc6\x9a\0\0", b"\1\0\0\0" + bytes(36) + b" EMF",
    b"GRIB\0\0\0\1", b"BUFR", b"\x89HDF\r\n\x1a\n", b"\0\0\2\0\1\0", b"\0\0\0\0\x11\xaf\1\0", bytes(2048) + b"PCD_",
    b"\xb1\x68\xde\x3a", b"\x80\xe8\0\0", b"\x1c\1\5\0", b"\0\0\0\0\0\0\0\4", b"DDS \x7c\0\0\0", b"\0\0\0\0GIMP\0\0\0\1",
    b"\0\0\1\xb3", b"Image type: RGB\r\n", b"farbfeld",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
]  # fmt: skip


def picture(r: Random) -> bytes:
    if r.random() < 0.1:
        return (
            r.choice(MAGIC)
            + b"".join(struct.pack("<i", r.choice((0, 1, 4, 8, 16, 32))) for _ in range(40))
            + r.randbytes(400)
        )
    large = r.random() < 0.02
    kind = r.choice(
        ["PNG", "PNG", "GIF", "TIFF", "JPEG", "PPM"] if large else [*Image.SAVE, *["JPEG", "PNG", "TIFF"] * 3]
    )
    mode = r.choice(("RGB", "RGB", "RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "F", "YCbCr", "LA"))
    side = (20000 if mode == "1" else r.choice((4000, 9000))) if large else r.choice((1, 2, 3, 16, 40))
    options: dict[str, Any] = {
        "compression": r.choice(("raw", "tiff_deflate", "tiff_lzw", "packbits", "jpeg", "group4"))
    }
    options = options if kind == "TIFF" else {"progressive": r.random() < 0.3} if kind == "JPEG" else {}
    noise = Image.frombytes("RGB", (min(side, 40), min(side, 40)), r.randbytes(3 * min(side, 40) ** 2))
    out = io.BytesIO()
    try:
        noise.resize((side, side)).convert(mode).save(out, kind, **options) if not large else Image.new(
            mode, (side, r.choice((side, 2)))
        ).save(out, kind, **options)
        return out.getvalue()
    except (OSError, ValueError, KeyError, RuntimeError, SystemError):  # not every kind has every mode
        noise.save(out := io.BytesIO(), "JPEG")
        return out.getvalue()


@cache
def flac_of_silence(blocks: int) -> bytes:
    """65535 samples in 15 bytes or so."""

    def crc(data: bytes, width: int, polynomial: int) -> bytes:
        value = 0
        for byte in data:
            value ^= byte << width - 8
            for _ in range(8):
                value = (value << 1 ^ (polynomial if value >> width - 1 else 0)) & (1 << width) - 1
        return value.to_bytes(width // 8, "big")

    def frame(number: int) -> bytes:
        head = b"\xff\xf8\x75\x08" + chr(number).encode(errors="surrogatepass") + struct.pack(">H", 65534)
        whole = head + crc(head, 8, 0x07) + bytes(3)  # one constant
        return whole + crc(whole, 16, 0x8005)

    of_all = 16000 << 44 | 15 << 36 | 65535 * blocks
    info = struct.pack(">HHHI", 65535, 65535, 0, 0) + of_all.to_bytes(8, "big") + bytes(16)
    return b"fLaC\x80\0\0\x22" + info + b"".join(map(frame, range(blocks)))


def noise(r: Random, length: int) -> np.ndarray:
    return np.frombuffer(r.randbytes(2 * length), np.int16)


def wav(r: Random, length: int = 0) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams(
            (1 if length else r.choice((1, 2)), 2 if length else r.choice((1, 2, 3, 4)), 16000, 0, "NONE", "")
        )
        file.writeframes(noise(r, length or 16000).tobytes())
    return out.getvalue()


def sound(r: Random) -> bytes:
    if r.random() < 0.03:
        return flac_of_silence(r.choice((100, 3000, 20000)))
    kind = r.choice([*soundfile.available_formats(), *["FLAC"] * 20, *["WAV"] * 5])
    out = io.BytesIO()
    try:
        soundfile.write(out, noise(r, 16000), 16000, r.choice(list(soundfile.available_subtypes(kind))), format=kind)
    except (RuntimeError, ValueError, TypeError):
        soundfile.write(out := io.BytesIO(), noise(r, 16000), 16000, "PCM_16", format="FLAC")
    return out.getvalue()


def tar(r: Random, members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    kind = r.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=kind) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if r.random() < 0.2:
                sparse = (f"GNU.sparse.{what}" for what in ("map", "size", "major", "minor", "realsize", "name"))
                names = ("size", "path", "linkpath", "mtime", "hdrcharset", "uid", *sparse)
                values = ("0,1,5,2", "1", "0", "1.5", "nan", "²", "BINARY", "a/b.0.jpg", *map(str, SIZES))
                info.pax_headers = {name: r.choice(values) for name in r.sample(names, 3)}
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def tar_files(r: Random) -> Files:
    long = "x" * r.choice((5, 90))
    long = f"{long}/{long}"
    return {
        "x": tar(r, {f"{stem}.{end}": r.randbytes(20) for stem in ("a", "b", f"d/{long}") for end in ("0.jpg", "wav")})
    }


@cache
def clip() -> tuple[bytes, bytes]:
    r, out = Random(0), io.BytesIO()
    Image.frombytes("RGB", (32, 32), r.randbytes(3072)).save(out, "JPEG")
    return out.getvalue(), wav(r, 8000)


def dataset_files(r: Random) -> Files:
    """Two shards, and of the index what `seal_dataset` makes one of."""
    files: Files = {}
    for name in ("a.tar", "b.tar"):
        picture, sound = clip()
        plain = Random(1)  # without what `tar` has to say of pax
        plain.random = lambda: 1.0
        members = {
            f"{name[0]}{k}.{end}": one
            for k in range(3)
            for end, one in (("0.jpg", picture), ("wav", sound), ("json", b"{}"))
        }
        content = tar(plain, members)
        samples: dict[str, dict[str, tuple[int, int, str]]] = {}
        for info in tarfile.open(fileobj=io.BytesIO(content)):  # noqa: SIM115
            key, _, end = info.name.partition(".")
            data = content[info.offset_data : info.offset_data + info.size]
            samples.setdefault(key, {})[end] = (info.offset_data, info.size, xxh3_64_hexdigest(data))
        files[name] = content
        files[f"{name}.offsets"] = b"".join(json.dumps(one).encode() + b"\n" for one in samples.items())
    files["index"] = b"".join(
        json.dumps([name, 3, len(files[name] or b""), "=", "="]).encode() + b"\n" for name in ("a.tar", "b.tar")
    )
    lines = b"0|0\n1|\n|0\n0 1|0\n1|\n0|0\n"
    head = {"format": 2, "dataset": "=dataset", "classes": ["x", "y"], "parts": ["p"], "checksum": "=checksum"}
    return files | {"labels": json.dumps(head).encode() + b"\n" + lines}


def seal_dataset(r: Random, files: Files) -> Files:
    """An index with the right checksums and sums, of whatever it says."""
    rows = []
    for line in (files.get("index") or b"").splitlines():
        try:
            name, *values = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        for k, of in enumerate((str(name), f"{name}.offsets"), 2):
            if len(values) > k and values[k] == "=":
                values[k] = xxh3_64_hexdigest(files.get(of) or b"")
        texts = [
            str(value).encode(errors="replace")[:width].rjust(width)
            for value, width in zip(values, (10, 13, 16, 16), strict=False)
        ]
        rows.append((str(name).encode(errors="replace"), texts))
    width = max((len(name) for name, _ in rows), default=1)
    lines = b"".join(b" ".join([name.ljust(width), *texts]) + b"\n" for name, texts in rows)

    def total(k: int) -> int:
        return sum(int(texts[k]) for _, texts in rows if len(texts) > k and re.fullmatch(rb" *-?\d+", texts[k]))

    fingerprint = sha256(lines).hexdigest()
    head = {
        "format": 1,
        "shards": len(rows),
        "samples": total(0),
        "bytes": total(1),
        "name_width": width,
        "fingerprint": fingerprint,
    }
    files = files | {"index": json.dumps(head).encode() + b"\n" + lines}
    first, _, rest = (files.get("labels") or b"").partition(b"\n")
    first = first.replace(b"=dataset", fingerprint.encode()).replace(b"=checksum", sha256(rest).hexdigest().encode())
    return files | {"labels": first + b"\n" + rest} if files.get("labels") else files


def only_index(r: Random) -> Files:
    return seal_dataset(r, dataset_files(r))


def folder_files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@cache
def settings() -> Any:
    return from_dict(ModelSettings, SMALL, "fuzz")


@cache
def run_of() -> tuple[RunConfig, Pretraining]:
    config = from_dict(RunConfig, {**SMALL, "out": "out"}, "fuzz")
    return config, Pretraining(config)


@cache
def saved() -> Files:
    """Checkpoints of two steps; of a manifest, what `seal_manifests` seals."""
    config, task = run_of()
    checkpoint.AGAIN = (0, 0)
    order = asdict(loader().order)
    about = {"quarantine": {"3": "audio"}, "config": to_dict(config), "init": {"from": ""},
             "learns_from": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.Checkpoints(folder, Ranks("cpu"), warn=str) as ours:
            state = initial_state(task, Ranks("cpu"))
            ours.take_over(state)
            for state.step in (1, 2):
                about["stream"] = {"step": state.step, "order": order}
                ours.save(state, about, (state.step - 1, b'{"step": %d, "loss": 1.5}\n' % (state.step - 1)))
                ours.finish()
        files = {name.replace(ours.token, "0" * 8): data for name, data in folder_files(Path(folder)).items()}
    files["owner"] = b'{"start": "00000000", "host": "h", "time": "t", "submission": "s"}'
    return {
        name: json.loads(data or b"")["manifest"].encode() if "json" in name[-4:] else data
        for name, data in files.items()
    }


@cache
def new_state() -> Any:
    return initial_state(run_of()[1], Ranks("cpu"))


def seal_manifests(r: Random, files: Files) -> Files:
    def sealed(data: bytes) -> bytes:
        return json.dumps({"checksum": xxh3_64_hexdigest(data), "manifest": data.decode()}).encode()

    def is_text(name: str, data: bytes | None) -> bool:
        return name.endswith("manifest.json") and data is not None and data.decode(errors="ignore").encode() == data

    return {name: sealed(data or b"") if is_text(name, data) else data for name, data in files.items()}


@cache
def model_files(classifier: bool) -> Files:
    model = Classifier(settings().model, 2) if classifier else initial_model(settings(), 0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), model.state_dict(), settings())
        files = folder_files(Path(folder))
    return files | (
        {"classes.json": b'{"classes": ["a", "b"], "modality": "both", "loss": "one"}'} if classifier else {}
    )


@cache
def torch_files(old: bool, kind: str) -> Files:
    ours, state = initial_model(settings(), 0).state_dict(), {}
    for name, value in ours.items():
        if name.startswith("image.encoder.") and re.search(r"blocks|patch_embed|\.norm\.", name):
            name = name.removeprefix("image.encoder.").replace("patch_embed.", "patch_embed.proj.")
            state[name] = value
    out = io.BytesIO()
    content = {"mae": {"model": state | {"cls_token": torch.zeros(1, 1, 16)}, "epoch": 3}, "own": dict(ours)}[kind]
    torch.save({**content, "args": argparse.Namespace(lr=0.1)}, out, _use_new_zipfile_serialization=not old)
    return {"x.pth": out.getvalue()}


LABELS = [
    b'# Segments\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\na0, 0.0, 10.0, "/m/1,/m/2"\n',
    b'a0,000030,playing drums,train\nb1,000040,"bark, dog",test\n',
    b"filename,fold,category\na0.wav,1,dog\nb1.wav,2,cat\n",
    b'fname,labels,mids,split\n1,"Dog,Bark","/m/1,/m/2",train\n',
    b"label,youtube_id,time_start,time_end,split\nrun,a0,1,11,val\n",
    b"ApplyEyeMakeup/a0.avi 1\nB/b1.avi 2\n",
    b"path,label\na0,dog;cat\nb1,cat\n",
    b'index,mid,display_name\n0,/m/1,"Dog"\n1,/m/2,Cat\n',
    b'{"data": [{"video_id": "a0", "wav": "x", "labels": "/m/1,/m/2"}, {"video_id": "b1", "labels": []}]}',
    b"1 Dog\n2 Cat\n",
    b"\xef\xbb\xbfDog\nCat\n",
]


def board_files(r: Random) -> Files:
    values = [[m.name, ["x"] * (len(m.labels) - m.per_rank) + ["0"] * m.per_rank, [0.5] * 40 if m.kind == "histogram" else 2]
              for m in METRICS]  # fmt: skip
    told = {"pid": 1, "start": started(1), "began": 5.0, "ended": 0}
    ended = [
        (f"rank-{k}-77{k}-5.json", {**told, "pid": 770 + k, "began": 1.0 + k, "ended": 2.0 + k, "values": values})
        for k in range(10)
    ]
    files = {
        f"rank-0-1-{started(1)}.json": {**told, "values": values},
        "before.json": {"names": [], "values": values},
    } | dict(ended)
    return {name: json.dumps(content).encode() for name, content in files.items()}


def run_files(r: Random) -> Files:
    row = {"step": 0, **{key: 0.5 for key in by_key() if key != "step"}}
    rows = b"".join(json.dumps({**row, "step": k}).encode() + b"\n" for k in range(3))
    starts = b'{"time": "2025-01-01", "step": 0, "ranks": 1, "code": "x", "equiav": "0.1", "gpu": ""}\n'
    summary = b'{"equiav_run_began_time_seconds": 5.0, "equiav_run_ended_time_seconds": {"finished": 9.0}}'
    cell = {"mean": 1.0, "spread": 0.1}
    retrieval = {
        "clips": 5,
        "image_to_audio": {"R@1": cell, "R@5": cell},
        "audio_to_image": {"R@1": cell},
        "chance": {"R@1": 0.2},
    }
    config = b"train:\n  steps: 3\nmodel: {size: tiny}\nobjective:\n  temperature: 0.07\n"
    return {"metrics.jsonl": rows, "timing.jsonl": rows, "starts.jsonl": starts, "summary.json": summary, "config.yaml": config,
            "eval/retrieval.json": json.dumps(retrieval).encode(), "results.json": b'{"map": 0.5, "accuracy": 0.2}'}  # fmt: skip


ITEMS = [(f"s{k}", k) for k in range(4)]


@cache
def packed() -> Files:
    """As packing leaves it that is killed before it clears up."""

    class Keeps(Store):
        def remove(self, folder: str) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        pack(ITEMS, encode, Keeps(folder), processes=0, part_items=2)
        return folder_files(Path(folder))


def encode(number: int) -> dict[str, bytes]:
    if number == 3:
        raise BadSample("audio", "is refused")
    return {"0.jpg": b"picture", "wav": b"sound"}


# ---- parsers ------------------------------------------------------------------------------------------------------------


class Parser(NamedTuple):
    seeds: Callable[[Random], Files]
    parse: Callable[[Path], Any]
    errors: tuple[type[BaseException], ...]  # that have a name
    most: int = 0  # bytes; 0: OTHERS and 4 times the input's
    seal: Callable[[Random, Files], Files] = lambda r, files: files


def ours(folder: Path) -> Dataset:
    return Dataset(Store(str(folder), patience=1))


def parse_decoder(folder: Path) -> None:
    members = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    ours = decoder.ClipDecoder(settings().model, settings().data)
    out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in ours.fields.items()}
    ours.decode("key", {name: members[name] for name in ours.members(list(members), 0.5)}, out)


def stream(dataset: Dataset, **options: Any) -> None:
    order = Order(dataset.fingerprint, 0, batch=4, lanes=2, window=2)
    use = decoder.ClipDecoder(settings().model, settings().data)
    with Loader(dataset, order, use, workers=0, **options) as loader:
        quarantine = Quarantine(dataset.samples, 1.0)
        for batch in itertools.islice(loader.batches(), 3):
            quarantine.add(batch.bad)


def parse_remote(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, data in folder_files(folder).items():
        memory.pipe_file(f"/fuzz/{name}", data)
    stream(Dataset(Store("memory://fuzz", patience=1)), cache=folder / "cache", cache_bytes=64 << 20)


def parse_verify(folder: Path) -> None:
    dataset = ours(folder)
    for shard in itertools.islice(dataset, 4):
        json.dumps(verify_shard(dataset.store, shard))
        offsets = read_offsets(dataset.store, shard)
        [offsets[k].span for k in range(len(offsets))]
        unusable(dataset.store, shard, decoder.ClipDecoder(settings().model, settings().data), 2)
    survey.survey(dataset, settings().model, settings().data, 2)
    for shard in itertools.islice(dataset, 4):
        index_shard(dataset.store, shard.name)


def parse_labels(folder: Path) -> None:
    found = read_labels(ours(folder))
    found.classes.many_hot(np.arange(3)), found.classes.has(found.classes.names[:1])
    found.classes.counts(), found.parts.counts(), found.balanced(np.ones(len(found.classes), bool))


def parse_offsets(folder: Path) -> None:
    dataset = ours(folder)
    for shard in itertools.islice(dataset, 4):
        found = read_offsets(dataset.store, shard)
        [found[k].span for k in range(len(found))]


def parse_run(folder: Path) -> None:
    config, task = run_of()
    checkpoint.AGAIN = (0, 0)
    state, quarantine = copy.deepcopy(new_state()), Quarantine(100, 0.5)
    with checkpoint.Checkpoints(str(folder), Ranks("cpu"), patience=1, warn=str.encode) as checkpoints:
        find(config, task, checkpoints, state, loader(), quarantine)
        json.dumps(quarantine.state())
        Log(folder, min(state.step, 10), "t", checkpoints.lines).close()


def parse_ended(folder: Path) -> None:
    record = Record(str(folder), "s", 0)
    record.replaced()
    record.look()


def parse_quarantine(folder: Path) -> None:
    quarantine = Quarantine(10, 0.5, folder / "x")
    quarantine.add([Bad(3, "audio", "here", "why"), Bad(4, "image", "there", "")])


def parse_model(folder: Path) -> None:
    (load_classifier if (folder / "classes.json").exists() else load_model)(folder)
    initial_weights(str(folder), settings(), 0)


def parse_label_files(folder: Path) -> None:
    for path in folder.iterdir():
        classes = labels.read_classes(path)
        found = labels.read_label_file(path)
        labels.give(valid_dataset(), found, classes if "x" in classes else ())


@cache
def valid_dataset() -> Dataset:
    folder = tempfile.mkdtemp()
    lay(Path(folder), only_index(Random(0)))
    return ours(Path(folder))


@cache
def loader() -> Loader:
    use = decoder.ClipDecoder(settings().model, settings().data)
    return Loader(valid_dataset(), Order(valid_dataset().fingerprint, 0, batch=4), use, workers=0)


@cache
def embedder() -> Embedder:
    return Embedder(initial_model(settings(), 0), settings())


def parse_report(folder: Path) -> None:
    page([gather(str(folder), 1)], "title")


def one_of(*made: Callable[[], Files]) -> Callable[[Random], Files]:
    return lambda r: dict(r.choice(made)())


def text(name: str, data: bytes) -> Callable[[Random], Files]:
    return lambda r: {name: data}


def of(call: Callable[[bytes], Any], name: str = "x") -> Callable[[Path], Any]:
    return lambda folder: call((folder / name).read_bytes())


BAD, DATA, RUN = (clips.BadClipError,), (DatasetError, ShardError, StoreError), (ConfigError, StoreError)
PARSERS = {
    "frame": Parser(lambda r: {"x": picture(r)}, of(lambda data: clips.decode_frame(data, "x")), BAD, MEDIA),
    "wav": Parser(lambda r: {"x": wav(r)}, of(lambda data: clips.decode_wav(data, "x", settings().data)), BAD, MEDIA),
    "flac": Parser(lambda r: {"x": sound(r)}, of(lambda data: clips.decode_flac(data, "x", settings().data)), BAD, MEDIA),
    "decoder": Parser(lambda r: {"0.jpg": picture(r), "1.png": picture(r), "flac": sound(r), "wav": wav(r)}, parse_decoder,
                      (BadSample,), MEDIA),
    "api picture": Parser(lambda r: {"x.jpg": picture(r)}, lambda f: embedder().embed_image(f / "x.jpg"), BAD, MEDIA),
    "api sound": Parser(lambda r: {"x.wav": sound(r)}, lambda f: embedder().embed_audio(f / "x.wav"), BAD, MEDIA),
    "scan": Parser(tar_files, lambda f: scan(f / "x", "x"), (ShardError,)),
    "offsets": Parser(dataset_files, parse_offsets, DATA, seal=seal_dataset),
    "index": Parser(only_index, lambda f: [(len(ours(f).starts), ours(f).sizes.sum(), *ours(f))], DATA),
    "verify": Parser(dataset_files, parse_verify, DATA, seal=seal_dataset),
    "loader": Parser(dataset_files, lambda f: stream(ours(f)), (*DATA, TooManyBadSamples), seal=seal_dataset),
    "remote": Parser(dataset_files, parse_remote, (*DATA, TooManyBadSamples, CacheError), seal=seal_dataset),
    "labels": Parser(dataset_files, parse_labels, DATA, seal=seal_dataset),
    "checkpoints": Parser(one_of(saved), parse_run, (*RUN, DatasetError), seal=seal_manifests),
    "ended": Parser(lambda r: {"ended-s": b'{"status": 2, "error": "x"}', "owner": b'{"submission": "s"}'},
                    parse_ended, (Ended,)),
    "log": Parser(run_files, lambda f: Log(f, 3, "t").close(), ()),
    "quarantine": Parser(text("x", b'{"sample": 3, "reason": "audio"}\n{"sample": 4}\n'), parse_quarantine,
                         (TooManyBadSamples,)),
    "model": Parser(one_of(partial(model_files, False), partial(model_files, True)), parse_model, RUN),
    "pth": Parser(one_of(*(partial(torch_files, old, kind) for old in (False, True) for kind in ("mae", "own"))),
                  lambda f: from_checkpoint(f / "x.pth", settings(), 0), (CheckpointError, ConfigError)),
    "label files": Parser(lambda r: {r.choice(("x.csv", "x.json", "y_test_split1.txt")): r.choice(LABELS)},
                          parse_label_files, RUN),
    "pack": Parser(one_of(packed), lambda f: pack(ITEMS, encode, Store(str(f), 1), processes=0, part_items=2), DATA),
    "boards": Parser(board_files, lambda f: (Exporter(f, "run").alive(), Exporter(f, "run").answer()), ()),
    "report": Parser(run_files, parse_report, RUN),
}  # fmt: skip


# ---- a child, and who watches it ------------------------------------------------------------------------------------------


def made(name: str, seed: int, number: int) -> Files:
    """Of number below 0, valid ones."""
    r, parser = Random(f"{seed}/{name}/{number}"), PARSERS[name]
    files = parser.seeds(r)
    return parser.seal(r, files if number < 0 else spoil(r, files, parser.seeds(r), StoreError in parser.errors))


def lay(folder: Path, files: Files) -> None:
    for name, data in files.items():
        path = folder / name.replace("\0", "")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if data is None else path.write_bytes(data)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue


def memory(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def place(frames: str) -> str:
    """Where in our code a traceback leads to, and where it ends."""
    found = re.findall(r'File "([^"]+)", line (\d+)', frames)
    inner = [
        f"{path.removeprefix(f'{ROOT}/')}:{line}"
        for path, line in found
        if path.startswith(str(ROOT)) and ".venv" not in path
    ]
    inner = [one for one in inner if not one.startswith("tests/")]
    return (inner or [f"{path}:{line}" for path, line in found] or ["?"])[-1]


def child(name: str, seed: int, numbers: range, until: float, folder: Path, pipe: Any) -> None:
    """Sends each number before it is parsed, then what came of it, and what was wrong."""
    parser, wrong, armed = PARSERS[name], [], False
    said = os.open(folder / "said", os.O_RDWR | os.O_CREAT)
    os.dup2(said, 1), os.dup2(said, 2)
    tempfile.tempdir, sys.dont_write_bytecode, here = str(folder), True, str(folder)
    ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX: threads take no address space of their own
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + SPACE,) * 2)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if armed and event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "socket.connect",
        ):
            wrong.append(("program", place("".join(traceback.format_stack())), f"{event} {args[:2]}"))
        writes = event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")
        writes |= (
            event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        )
        if armed and writes and os.path.isabs(path := str(args[0])) and not path.startswith(here):
            wrong.append(("writes", place("".join(traceback.format_stack())), f"{event} {path[:200]}"))

    def caught(error: BaseException) -> None:
        frames = "".join(traceback.format_tb(error.__traceback__)) + "".join(getattr(error, "__notes__", ()))
        wrong.append((type(error).__name__, place(frames), str(error)[:300]))

    threading.excepthook = lambda given: caught(given.exc_value or RuntimeError("?"))
    sys.addaudithook(hook)
    for number in numbers:
        if time.monotonic() > until:
            break
        pipe.send(number)
        files, work = made(name, seed, number), folder / "input"
        work.mkdir()
        lay(work, files)
        os.ftruncate(said, 0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, outcome, armed = memory("VmRSS"), "accepted", True
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            parser.parse(work)
        except parser.errors as error:
            outcome = type(error).__name__
        except BaseException as error:
            outcome = type(error).__name__
            caught(error)
        faulthandler.cancel_dump_traceback_later()
        armed, taken = False, memory("VmHWM") - before
        if number >= -1 and taken > (parser.most or OTHERS + 4 * sum(len(data or b"") for data in files.values())):
            wrong.append(
                (
                    "memory",
                    re.sub(r"[^\w ]", "", repr(next(iter(files.values())))[2:9]),
                    f"{taken >> 20} MiB, then {outcome}",
                )
            )
        pipe.send((outcome, list(wrong)))
        wrong.clear()
        shutil.rmtree(work)


def attack(name: str, seed: int, numbers: range, seconds: float, kinds: set[tuple[str, ...]]) -> None:
    """Children one after the other, until the time is over."""
    until, outcomes, context = time.monotonic() + seconds, Counter[str](), get_context("fork")

    def tell(number: int, kind: str, where: str, detail: str) -> None:
        if (name, kind, where) in kinds:
            return
        kinds.add((name, kind, where))
        kept = KEPT / f"{name}-{seed}-{number}".replace(" ", "-")
        lay(kept, made(name, seed, number))
        print(
            f"{name}: {kind} at {where}: {detail!r:.300} | --seed {seed} --only '{name}' --number={number} | {kept}",
            flush=True,
        )

    first = numbers.start
    while time.monotonic() < until and first < numbers.stop:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=child, args=(name, seed, range(first, numbers.stop), until, Path(folder), there)
            )
            process.start()
            there.close()
            try:
                while True:
                    message = here.recv()
                    if isinstance(message, int):
                        first = message
                        continue
                    outcomes[message[0]] += 1
                    for one in message[1]:
                        tell(first, *one)
            except EOFError:
                process.join()
            if process.exitcode == 0:
                break
            last = Path(folder, "said").read_text(errors="replace")
            stack = re.sub(r"(?s).*most recent call first\):\n", "", last) if "Timeout" in last else last
            frames = "\n".join(reversed(stack.splitlines())) if "Timeout" in last else stack
            outcomes["died"] += 1
            tell(
                first, f"ends with {process.exitcode}" if "Timeout" not in last else "hangs", place(frames), last[-300:]
            )
            first += 1
    if outcomes.total() > 100 and not outcomes["accepted"]:
        kinds.add((name, "accepts nothing"))
        print(f"{name}: accepts nothing, not even its valid files; mend these in tests/fuzz.py", flush=True)
    print(
        f"{name}: {outcomes.total():,} inputs: {', '.join(f'{n:,} {what}' for what, n in outcomes.most_common())}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="of all parsers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARSERS, action="append", help="these parsers alone")
    parser.add_argument("--number", type=int, help="this input alone")
    given = parser.parse_args()
    names, kinds = given.only or list(PARSERS), set()
    numbers = range(-VALID, sys.maxsize) if given.number is None else range(given.number, given.number + 1)
    for name in names:
        attack(name, given.seed, numbers, 60 * given.minutes / len(names), kinds)
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
