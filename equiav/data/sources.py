"""Where clips come from: video files, lists of extracted frames and sounds, the synthetic world -> members of a sample."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import escape
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from equiav.config import ConfigError
from equiav.data.clips import (
    ENCODE_AUDIO,
    PICTURES,
    BadClipError,
    decode_frame,
    encode_frame,
    read_picture,
    require_whole_jpeg,
)
from equiav.data.media import Shape, length_of, opened, sized
from equiav.data.synthetic import World
from streaming import BadSample

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".flv", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".wmv",
          ".asf", ".ogv", ".vob", ".mxf")  # fmt: skip
SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff")
# Frames are the same picture if the means of their blocks differ by no more than this. What a codec makes of one picture differs
# by up to 29 in a value and 7 in a mean at starving bit rates; a picture that darkens by 6 % does by 9, what moves by far more.
STILL, BLOCK = 8, 8  # of 255; pixels
TWICE = "it is listed more than once, and was taken once"
PASSED_OVER = "passed-over.jsonl"  # of a dataset: files that are no videos
APART = 0.8  # picture and sound belong together if the shorter is so much of the longer, or within a second

Found = list[tuple[str, Any]]  # key, and what a clip is made of
Span = tuple[str, float, float]  # of a video: path, seconds from its beginning at which the clip begins and ends


class Still(NamedTuple):
    """A picture that stands, and the sound beside it, from when to when."""

    picture: str
    sound: str
    begin: float = 0.0
    end: float = math.inf


def list_stills(source: Path) -> tuple[Found, dict[str, str]]:
    """A folder, or a list, of sounds, each with the picture of its name beside it -> as `list_videos`."""
    sounds, other = list_videos(source, SOUNDS)
    found: Found = []
    for key, path in sounds:
        sound = Path(path)
        beside = [one for one in sound.parent.glob(f"{escape(sound.stem)}.*") if one.suffix.lower() in PICTURES]
        if len(beside) == 1:
            found.append((key, Still(str(beside[0]), path)))
        else:
            other[path] = f"{len(beside) or 'no'} pictures of its name are beside it"
    taken = {still.picture for _, still in found}
    return found, {path: why for path, why in other.items() if absolute(Path(path)) not in taken}


def list_videos(source: Path, endings: Sequence[str] = VIDEOS) -> tuple[Found, dict[str, str]]:
    """A folder (searched through), or a text file with a path a line -> (key, path) of each video; and path -> why, of what else
    the folder has."""
    if not source.is_dir():
        try:
            lines = [line.strip() for line in source.read_text("utf-8-sig").split("\n")]
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"source {source}: byte {error.start} is no UTF-8, expected a video's path a line"
            ) from None
        named = [line for line in lines if line and not line.startswith("# ")]
        if not named:
            raise ConfigError(f"source {source} lists no videos")
        for name in named:
            if not Path(name).name or "\0" in name:
                raise ConfigError(f"source {source}: {name!r} names no file, expected a video's path a line")
        other = {name: TWICE for name, count in Counter(named).items() if count > 1}
        named = list(dict.fromkeys(named))
        return list(_keys([Path(name) for name in named], [absolute(source.parent / name) for name in named])), other
    taken, other = [], {}
    for folder, folders, files in os.walk(source):
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                other[os.path.join(folder, name)] = "a linked folder"
        for name in files:
            ending = Path(name).suffix.lower()
            if not os.path.isfile(os.path.join(folder, name)):
                other[os.path.join(folder, name)] = "it is no file"
            elif ending in endings:
                taken.append(Path(folder, name))
            else:
                other[os.path.join(folder, name)] = f"its name ends in {ending}" if ending else "its name has no ending"
    if not taken:
        passed = f"; {len(other)} other file(s) are there, such as {min(other)}" if other else ""
        raise ConfigError(f"source {source} has none of these files: {', '.join(endings)}{passed}")
    taken.sort()
    return list(_keys([path.relative_to(source) for path in taken], map(absolute, taken), whole=True)), other


def _keys(names: Sequence[Path], contents: Iterable[Any], whole: bool = False) -> Iterator[tuple[str, Any]]:
    """A name for each, of its own: short where that suffices, else with its folders, else with its ending. `whole`: always with
    its folders."""
    forms = [
        lambda name: key_of(str(name.with_suffix("")) if whole else name.with_suffix("").name),
        lambda name: key_of(str(name.with_suffix("")).lstrip("/")),
        lambda name: key_of(str(name).lstrip("/")),
    ]
    keys = [forms[0](name) for name in names]
    for form in forms[1:]:
        often = {key for key, count in Counter(keys).items() if count > 1}
        keys = [form(name) if key in often else key for name, key in zip(names, keys, strict=True)]
    return zip(_distinct(keys), contents, strict=True)


def _distinct(keys: Sequence[str]) -> list[str]:
    """What still has the name of one before it is numbered."""
    taken, found = set(keys), []
    seen: Counter[str] = Counter()
    for key in keys:
        seen[key] += 1
        new = key
        if seen[key] > 1:
            new = next(name for n in count(seen[key]) if (name := f"{key}-{n}") not in taken)
            taken.add(new)
        found.append(new)
    return found


def cut(found: Found, seconds: float, overlap: float) -> Found:
    """Videos -> clips of so many seconds, each with the time of its beginning in its name. A rest that is shorter than half is
    left out, and so is nothing else: a video that is not longer is one clip."""
    with ThreadPoolExecutor(16) as pool:
        lengths = list(pool.map(length_of, [one.sound if isinstance(one, Still) else one for _, one in found]))
    clips: Found = []
    for (key, content), length in zip(found, lengths, strict=True):
        if length <= seconds * 1.05:  # or not known: whoever reads it will say why
            clips.append((key, content))
            continue
        for k in count():
            begin = k * (seconds - overlap)
            if k and begin + seconds / 2 > length:
                break
            span = begin, min(begin + seconds, length)
            of = Still(*content[:2], *span) if isinstance(content, Still) else (content, *span)
            clips.append((f"{key}-{round(1000 * begin):09d}", of))
    return list(zip(_distinct([key for key, _ in clips]), [content for _, content in clips], strict=True))


def absolute(path: Path) -> str:
    """FFmpeg takes what stands before a colon for a protocol, unless a folder stands before that."""
    return str(path.absolute())


def list_frames(source: Path) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str]]:
    """A CAV-MAE or EquiAV list: {"data": [{"video_id", "wav", "video_path", "labels"}]} -> (key, entry), and video_id -> why, of
    entries that are none of it."""
    try:
        entries = json.loads(source.read_text("utf-8-sig"))["data"]
        for entry in entries:
            for name in ("video_id", "wav", "video_path"):
                if not isinstance(entry[name], str):
                    raise TypeError(f"{name} is {entry[name]!r}, expected text")
        entries = [{name: entry[name] for name in ("video_id", "wav", "video_path", "labels")} for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"source {source} is not a list of clips ({type(error).__name__}: {error}), expected "
            '{"data": [{"video_id": ..., "wav": ..., "video_path": ..., "labels": ...}]}'
        ) from None
    if not entries:
        raise ConfigError(f"source {source} lists no clips")
    once = {json.dumps(entry, sort_keys=True): entry for entry in entries}
    often = Counter(json.dumps(entry, sort_keys=True) for entry in entries)
    other = {once[text]["video_id"]: TWICE for text, count in often.items() if count > 1}
    for entry in once.values():  # as in every list: beside the list itself
        entry["wav"], entry["video_path"] = (absolute(source.parent / entry[name]) for name in ("wav", "video_path"))
    return list(zip(_distinct([key_of(e["video_id"]) for e in once.values()]), once.values(), strict=True)), other


def files_of(content: Any, frames: int) -> list[str]:
    """What a clip is made of."""
    if isinstance(content, dict):
        names = [f"{content['video_path']}/frame_{k}/{content['video_id']}.jpg" for k in range(frames)]
        return [content["wav"], *names]
    if isinstance(content, Still):
        return [content.picture, content.sound]
    return [content[0] if isinstance(content, tuple) else content]


def key_of(name: str) -> str:
    """A sample's key ends at its first dot, and is UTF-8: names keep what they have of them as underscores, and of bytes that are
    no UTF-8 the number."""
    return "".join(c if c.isascii() or c.encode(errors="ignore") else f"_{ord(c) - 0xDC00:02x}" for c in name).replace(
        ".", "_"
    )


class EncodeSynthetic:
    def __init__(self, world: World, shape: Shape):
        self.world, self.shape = world, shape

    def __call__(self, index: int) -> dict[str, bytes]:
        clip = self.world.clip(index)
        about = {"synthetic": index, "seed": self.world.seed, "label": clip.label}
        frames = [encode_frame(frame, self.shape.quality) for frame in clip.frames] if self.shape.sees else []
        return _members(frames, clip.audio if self.shape.hears else None, about, self.shape)


def account(source: str, call: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    """Files hold what nobody foresaw. One that a library stumbles over is named, and costs itself alone."""
    try:
        return call()
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("unforeseen", f"{source}: {type(error).__name__}: {error}") from error


class EncodeFrames:
    """An entry of a list: frames at video_path/frame_K/video_id.jpg, copied as they are, and the sound."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def __call__(self, entry: dict[str, Any]) -> dict[str, bytes]:
        return account(entry["video_id"], lambda: self._encode(entry))

    def _encode(self, entry: dict[str, Any]) -> dict[str, bytes]:
        paths = [Path(path) for path in files_of(entry, self.shape.frames)[1:]] if self.shape.sees else []
        absent = [str(path) for path in paths if not path.is_file()]
        if absent:
            raise BadSample("missing frames", f"{len(absent)} of {len(paths)}, first {absent[0]}")
        contents = [path.read_bytes() for path in paths]
        try:
            frames = [decode_frame(content, str(path)) for content, path in zip(contents, paths, strict=True)]
        except BadClipError as error:
            raise BadSample("corrupt", str(error)) from None
        _check_motion(frames, self.shape)
        audio = None
        if self.shape.hears:
            with opened(entry["wav"]) as media:
                audio = media.sound(self.shape)
        return _members(contents, audio, {"video_id": entry["video_id"], "labels": entry["labels"]}, self.shape)


class EncodeVideo:
    """A video, or a span of one."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def __call__(self, content: str | Span) -> dict[str, bytes]:
        path, *span = (content,) if isinstance(content, str) else content
        return account(path, lambda: self._encode(path, *span))

    def _encode(self, path: str, *span: float) -> dict[str, bytes]:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise BadSample("missing", f"{path} is no file")
        if not self.shape.hears and path.lower().endswith(PICTURES):
            return _members([_still(path, self.shape)], None, {"source": Path(path).name}, self.shape)
        both = self.shape.hears and self.shape.sees
        with opened(path, self.shape.track) as media:
            line = media.line
            if both and not span and not line.damage and line.shared_until < math.inf:
                _require_alike(path, line.shown_until, line.heard_until)
                whole = (0.0, line.shared_until)  # pictures are spread over what both have
            else:
                whole = span
            audio = media.sound(self.shape, *whole) if self.shape.hears else None
            frames, times, length = media.pictures(self.shape, *whole) if self.shape.sees else ([], [], math.inf)
        seconds = length if audio is None else len(audio) / self.shape.data.sample_rate
        if both:
            _require_alike(path, length, seconds)
        _check_motion(frames, self.shape)
        about: dict[str, Any] = {"source": Path(path).name, "seconds": round(seconds, 3), "frame_seconds": times}
        about |= media.about
        if span:
            about["begin_seconds"] = round(span[0], 3)
        return _members([encode_frame(frame, self.shape.quality) for frame in frames], audio, about, self.shape)


class EncodeStill:
    """A sound with a picture, which needs not move."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def __call__(self, still: Still) -> dict[str, bytes]:
        return account(still.sound, lambda: self._encode(still))

    def _encode(self, still: Still) -> dict[str, bytes]:
        with opened(still.sound, self.shape.track) as media:
            audio = media.sound(self.shape, still.begin, still.end)
        about: dict[str, Any] = {"source": Path(still.sound).name, "picture": Path(still.picture).name}
        about |= {"seconds": round(len(audio) / self.shape.data.sample_rate, 3), **media.about}
        if still.end < math.inf:
            about["begin_seconds"] = round(still.begin, 3)
        return _members([_still(still.picture, self.shape)], audio, about, self.shape)


def _still(path: str, shape: Shape) -> bytes:
    """A file of a picture -> JPEG."""
    try:
        require_whole_jpeg(Path(path).read_bytes(), path)
        picture = Image.fromarray(read_picture(path, path))
    except BadClipError as error:
        raise BadSample("corrupt", str(error)) from None
    return encode_frame(sized(picture, *picture.size, shape.short_side), shape.quality)


def _require_alike(path: str, seen: float, heard: float) -> None:
    """seen, heard: seconds."""
    if min(seen, heard) < min(APART * max(seen, heard), max(seen, heard) - 1):
        raise BadSample("lengths differ", f"{path} has {seen:.1f} s of picture and {heard:.1f} s of sound")


def _check_motion(frames: Sequence[np.ndarray], shape: Shape) -> None:
    if shape.keep_frozen or len(frames) < 2:
        return
    means = [_block_means(frame) for frame in frames]
    if all(m.shape == means[0].shape and np.abs(m - means[0]).max() <= STILL for m in means[1:]):
        raise BadSample("frozen", f"all {len(frames)} frames show the same picture; --keep-frozen packs such clips too")


def _block_means(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H / 8, W / 8, 3); what is left at the edges belongs to the last."""
    rows, columns = (range(0, max(1, side - BLOCK + 1), BLOCK) for side in frame.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(frame.astype(np.float32), rows, 0), columns, 1)
    heights, widths = np.diff([*rows, frame.shape[0]]), np.diff([*columns, frame.shape[1]])
    return sums / (heights[:, None] * widths)[..., None]


def _members(
    frames: Sequence[bytes], audio: np.ndarray | None, about: dict[str, Any], shape: Shape
) -> dict[str, bytes]:
    members = {f"{k}.jpg": frame for k, frame in enumerate(frames)}
    if audio is not None:
        members[shape.audio] = ENCODE_AUDIO[shape.audio](audio, shape.data.sample_rate)
    members["json"] = json.dumps(about).encode()
    return members
