"""The datasets of `tests.soak`, and damage: by mutation, so that nobody has to have thought of it."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from xxhash import xxh3_64_hexdigest

from equiav.config import DataConfig
from equiav.data.clips import encode_flac, encode_frame, encode_wav
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from streaming import Store
from streaming.pack import pack
from tests.soak.plan import Plan

PICTURES = {"JPEG": 60, "PNG": 14, "AVIF": 12, "EPS": 3, "WEBP": 4, "GIF": 2, "TIFF": 3, "GRAY": 2}  # shares
TEMPERATE = 0.35  # of clips something is damaged, at most


# ---- bytes --------------------------------------------------------------------------------------------------------------


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Other bytes than these."""
    while (found := draw.choice(MUTATIONS)(content, draw)) == content:
        pass
    return found


def flip_bit(content: bytes, draw: random.Random, count: int = 1) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(count):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    return flip_bit(content, draw, draw.randrange(2, 40))


def flip_early(content: bytes, draw: random.Random) -> bytes:
    """Among the first bytes, where formats say what they are."""
    return flip_bit(content[:64], draw) + content[64:]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def cut_last(content: bytes, draw: random.Random) -> bytes:
    return content[: -draw.randrange(1, 9)]


def splice(content: bytes, draw: random.Random) -> bytes:
    """A part of it comes again at another place, over what was there or between."""
    start, at = draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)
    part = content[start : start + draw.randrange(1, 400)]
    return content[:at] + part + content[at + draw.choice((0, len(part))) :]


def drop(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + content[start + draw.randrange(1, 400) :]


def blank(content: bytes, draw: random.Random) -> bytes:
    """Zeros, as a disk leaves them that lost power."""
    start = draw.randrange(len(content) + 1)
    stop = min(len(content), start + draw.choice((1, 16, 512, 4096)))
    return content[:start] + bytes(stop - start) + content[stop:]


def foreign(content: bytes, draw: random.Random) -> bytes:
    """Another format's, whole."""
    return draw.choice(sorted(formats().items()))[1]


def foreign_within(content: bytes, draw: random.Random) -> bytes:
    other, at = foreign(content, draw), draw.randrange(len(content) + 1)
    return (content[:at] + other)[: max(len(content), at + 1)]


def more(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice((b"\0", b"\n", draw.randbytes(300), content))


def nothing(content: bytes, draw: random.Random) -> bytes:
    return b""


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_bit, flip_bit, flip_bits, flip_early, cut, cut, cut_last, splice, splice, drop, blank, foreign, foreign_within, more,
    nothing,
)  # fmt: skip


@cache
def formats() -> Mapping[str, bytes]:
    """A small file of each format that somebody could have put in the place of another."""
    numbers = np.random.default_rng(1)
    frame, sound = (
        numbers.integers(0, 255, (40, 56, 3), np.uint8),
        numbers.integers(-9000, 9000, 40_000).astype(np.int16),
    )
    found = {kind: encode_picture(frame, kind) for kind in PICTURES}
    found |= {"WAV": encode_wav(sound, 16_000), "FLAC": encode_flac(sound, 16_000)}
    found |= {
        "stereo": encode_wav(sound, 44_100),
        "JSON": b'{"step": 1, "loss": NaN}\n',
        "text": b"404 not found\n" * 9,
    }
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            info = tarfile.TarInfo("a.0.jpg")
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
        found["tar"] = file.getvalue()
    return found


def encode_picture(frame: np.ndarray, kind: str) -> bytes:
    if kind == "JPEG":
        return encode_frame(frame, 90)
    picture, file = Image.fromarray(frame), io.BytesIO()
    if kind == "GRAY":
        picture.convert("L").save(file, "JPEG")
    else:
        picture.save(file, kind)
    return file.getvalue()


def mutated_json(value: Any, draw: random.Random) -> Any:
    """One value of it is another, or is gone; however deep it lies."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value)) if isinstance(value, dict) else draw.randrange(len(value))
        changed = value.copy()
        if draw.random() < 0.1:
            del changed[key]
        else:
            changed[key] = mutated_json(value[key], draw)
        return changed
    odd = (
        None,
        -1,
        0,
        1,
        1 << 70,
        1e308,
        True,
        "",
        "x",
        "../../x",
        "/etc/passwd",
        "a\0b",
        "0" * 16,
        [],
        {},
        [[]],
        {"a": 1},
    )
    if isinstance(value, int | float) and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, value * 2, -value))
    return draw.choice([other for other in odd if other != value])


def another_digit(text: str, draw: random.Random) -> str:
    at = draw.choice([k for k, letter in enumerate(text) if letter.isdigit()])
    return text[:at] + draw.choice([digit for digit in "0123456789" if digit != text[at]]) + text[at + 1 :]


# ---- a dataset ----------------------------------------------------------------------------------------------------------


class Clips:
    """Synthetic clips in all formats; some members are mutated before they are packed."""

    def __init__(self, seed: int, frames: int, damaged: dict[int, list[str]]):
        shape = Shape(frames, 64, 90, "wav", 30.0, False, DataConfig())
        self.world, self.seed, self.damaged = World(seed, 64, frames, 2.56), seed, damaged
        self.encode = EncodeSynthetic(self.world, shape)

    def __call__(self, index: int) -> dict[str, bytes]:
        draw, clip = random.Random(f"{self.seed}/{index}"), self.world.clip(index)
        members: dict[str, bytes] = {}
        for k, frame in enumerate(clip.frames):
            kind = draw.choices(list(PICTURES), list(PICTURES.values()))[0]
            name = "png" if kind == "PNG" and draw.random() < 0.3 else "jpg"  # else under a name that is not its own
            members[f"{k}.{name}"] = encode_picture(frame, kind)
        sound = {"wav": encode_wav, "flac": encode_flac}
        name = draw.choice(sorted(sound))
        members[name] = sound[name](clip.audio, 16_000)
        members["json"] = json.dumps({"synthetic": index}).encode()
        for what in self.damaged.get(index, ()):
            name = next(name for name in members if name.startswith(f"{what}.") or (what == "sound" and name in sound))
            members[name] = mutated(members[name], draw)
        return members


def make_dataset(plan: Plan, folder: Path) -> None:
    """Some clips are damaged before they are packed: of few every frame, of more some frames, of few the sound."""
    draw, damaged = random.Random(plan.settings["seed"]), {}
    for index in range(plan.clips):
        frames, u = [str(k) for k in range(plan.frames)], draw.random() / max(plan.damage, 1e-9)
        if u < 0.04 * TEMPERATE / 0.35:
            damaged[index] = frames
        elif u < TEMPERATE - 0.05:
            damaged[index] = draw.sample(frames, draw.randrange(1, plan.frames))
        elif u < TEMPERATE:
            damaged[index] = ["sound"]
    encode = Clips(plan.settings["seed"] % 1000, plan.frames, damaged)
    items = [(f"clip-{k}", k) for k in range(plan.clips)]
    store = Store(str(folder))
    pack(items, encode, store, processes=0, part_items=plan.part_items, max_shard_bytes=plan.max_shard_bytes)


def damage_dataset(plan: Plan, folder: Path) -> list[str]:
    """What is packed is damaged: members within the tars, a shard as a whole, an offsets file. -> what was done."""
    draw, done = random.Random(f"{plan.settings['seed']}/packed"), []
    shards = sorted(folder.glob("*.tar"))
    for shard in shards:
        if draw.random() < 0.4 * plan.damage:
            done.append(_damage_within(shard, draw))
    if len(shards) > 5 and draw.random() < plan.damage:
        for shard in draw.sample(shards, 1 + (len(shards) > 12)):
            done.append(draw.choice((_damage_tar, _damage_offsets, _reseal_offsets, _swap))(shard, draw))
    return done


def _damage_within(shard: Path, draw: random.Random) -> str:
    """Some bytes at some places; it is as long as before."""
    content = bytearray(shard.read_bytes())
    for _ in range(draw.randrange(1, 4)):
        start = draw.randrange(len(content))
        stop = min(len(content), start + draw.choice((1, 30, 600, 3000)))
        content[start:stop] = mutated(bytes(content[start:stop]), draw)[: stop - start].ljust(stop - start, b"\xff")
    shard.write_bytes(content)
    return f"within {shard.name}"


def _damage_tar(shard: Path, draw: random.Random) -> str:
    if draw.random() < 0.3:
        shard.unlink()
        return f"{shard.name} is gone"
    shard.write_bytes(mutated(shard.read_bytes(), draw))
    return f"{shard.name} mutated"


def _damage_offsets(shard: Path, draw: random.Random) -> str:
    path = Path(f"{shard}.offsets")
    path.write_bytes(mutated(path.read_bytes(), draw))
    return f"{path.name} mutated"


def _swap(shard: Path, draw: random.Random) -> str:
    other = draw.choice(sorted(shard.parent.glob("*.tar")))
    shard.write_bytes(other.read_bytes())
    return f"{shard.name} is a copy of {other.name}"


def _reseal_offsets(shard: Path, draw: random.Random) -> str:
    """An offsets file that the index calls right, and that is wrong: some value of a line, or some bytes."""
    path, index = Path(f"{shard}.offsets"), shard.parent / "index"
    old = path.read_bytes()
    lines = old.splitlines()
    k = draw.randrange(len(lines))
    if draw.random() < 0.7:
        lines[k] = json.dumps(mutated_json(json.loads(lines[k]), draw), separators=(",", ":")).encode()
    else:
        lines[k] = mutated(lines[k], draw).replace(b"\n", b" ")
    new = b"".join(line + b"\n" for line in lines)
    path.write_bytes(new)
    sums = xxh3_64_hexdigest(old).encode(), xxh3_64_hexdigest(new).encode()
    index.write_bytes(sealed_index(index.read_bytes().partition(b"\n")[2].replace(*sums), index.read_bytes()))
    return f"{path.name} mutated and sealed"


def sealed_index(lines: bytes, index: bytes) -> bytes:
    """An index with other lines; its first line is right for them, as far as the number of shards is the same."""
    head = json.loads(index.partition(b"\n")[0])
    head["fingerprint"] = hashlib.sha256(lines).hexdigest()
    return json.dumps(head).encode() + b"\n" + lines


def samples_of_shards(folder: Path) -> list[int]:
    return [path.read_bytes().count(b"\n") for path in sorted(folder.glob("*.tar.offsets"))]


def write_label_files(plan: Plan, folder: Path) -> list[Path]:
    """path,label[;label] a line: what `equiav label` reads. A file's name is a part's."""
    draw = random.Random(f"{plan.settings['seed']}/labels")
    many = plan.settings["tune"]["loss"] == "many"
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for k in range(plan.clips):
        labels = draw.sample(["dog", "cat", "rain", "horn", "sea"], draw.randrange(1, 4) if many else 1)
        rows["test" if k % 4 == 3 else "train"].append(f"clip-{k},{';'.join(labels)}\n")
    files = [folder / f"{name}.csv" for name in rows]
    for path in files:
        path.write_text("".join(rows[path.stem]))
    return files
