"""Where clips come from: video files, lists of extracted frames and sounds, the synthetic world -> members of a sample."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from equiav.config import ConfigError, DataConfig
from equiav.data.clips import ENCODE_AUDIO, BadClipError, check_audio, decode_frame, encode_frame
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
AV_TIME_BASE = 1_000_000  # of a seek, a second
WIDEST = 20  # a picture's longer side over its shorter
GAP = 0.1  # seconds of sound that may be missing without being filled
APART = 0.8  # picture and sound belong together if the shorter is so much of the longer, or within a second

Found = list[tuple[str, Any]]  # key, and what a clip is made of
Span = tuple[str, float, float]  # of a video: path, seconds from its beginning at which the clip begins and ends


@dataclass(frozen=True)
class Shape:
    """What clips are packed as."""

    frames: int
    short_side: int
    quality: int
    audio: str
    max_seconds: float
    keep_frozen: bool
    data: DataConfig
    hears: bool = True
    sees: bool = True


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
        raise ConfigError(f"source {source} has no video files ({', '.join(endings)}){passed}")
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
        lengths = list(pool.map(length_of, [path for _, path in found]))
    clips: Found = []
    for (key, path), length in zip(found, lengths, strict=True):
        if length <= seconds * 1.05:  # or not known: whoever reads it will say why
            clips.append((key, path))
            continue
        for k in count():
            begin = k * (seconds - overlap)
            if k and begin + seconds / 2 > length:
                break
            clips.append((f"{key}-{round(1000 * begin):09d}", (path, begin, min(begin + seconds, length))))
    return list(zip(_distinct([key for key, _ in clips]), [content for _, content in clips], strict=True))


def absolute(path: Path) -> str:
    """FFmpeg takes what stands before a colon for a protocol, unless a folder stands before that."""
    return str(path.absolute())


def length_of(path: str) -> float:
    """Seconds; 0: not known."""
    import av.error

    if not os.path.isfile(path):  # a pipe would be waited for
        return 0.0
    try:
        with av.open(path) as file:
            if file.duration:
                return file.duration / AV_TIME_BASE
            # A recording of something live does not say: its last packet does.
            stream = (*file.streams.video, *file.streams.audio)[0]
            ends = [float(p.pts * p.time_base) for p in file.demux(stream) if p.pts is not None]
            return max(ends) - min(ends) if ends else 0.0
    except (av.error.FFmpegError, OSError, ValueError, IndexError):
        return 0.0


def origin_of(file: Any) -> float:
    """The time at which a file begins, on the clock of its streams: of its picture, where it has one."""
    for stream in (*file.streams.video, *file.streams.audio):
        if stream.start_time is not None:
            return float(stream.start_time * stream.time_base)
    return 0.0


def frames_from(file: Any, stream: Any, at: float) -> Iterator[Any]:
    """Decoded frames, of which the first is not later than `at`. Not every container finds its way there at once, nor back to its
    beginning: then it is opened anew."""
    for begin in (at, at - 2.0, at - 10.0):
        if begin <= origin_of(file):
            break
        file.seek(int(begin * AV_TIME_BASE))
        decoded = _decoded(file, stream)
        first = next(decoded, None)
        if first is not None and first.time is not None and first.time <= at:
            yield first
            yield from decoded
            return
    yield from all_frames(file.name, stream.index)


def all_frames(path: str, index: int) -> Iterator[Any]:
    import av

    with av.open(path) as file:
        yield from file.decode(file.streams[index])


def _decoded(file: Any, stream: Any) -> Iterator[Any]:
    """From where the file stands: what comes before the first whole frame there is passed over."""
    import av.error

    whole = False
    for packet in file.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            if whole:
                raise
            continue
        whole = whole or bool(frames)
        yield from frames


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
        audio = read_audio(entry["wav"], self.shape) if self.shape.hears else None
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
        audio = read_audio(path, self.shape, *span) if self.shape.hears else None
        frames, times, length = read_frames(path, self.shape, *span) if self.shape.sees else ([], [], math.inf)
        seconds = length if audio is None else len(audio) / self.shape.data.sample_rate
        if (
            self.shape.hears
            and self.shape.sees
            and min(seconds, length) < min(APART * max(seconds, length), max(seconds, length) - 1)
        ):
            raise BadSample("lengths differ", f"{path} has {length:.1f} s of picture and {seconds:.1f} s of sound")
        _check_motion(frames, self.shape)
        about: dict[str, Any] = {"source": Path(path).name, "seconds": round(seconds, 3), "frame_seconds": times}
        if span:
            about["begin_seconds"] = round(span[0], 3)
        return _members([encode_frame(frame, self.shape.quality) for frame in frames], audio, about, self.shape)


def read_audio(path: str, shape: Shape, begin: float = 0.0, end: float = math.inf) -> np.ndarray:
    """The first sound stream of a file, or what it has from begin to end -> (L,) int16, mono, at data.sample_rate; checked."""
    import av.error

    try:
        with av.open(path) as file:
            if not file.streams.audio:
                raise BadSample("no sound", f"{path} has no audio stream")
            stream, rate, origin = file.streams.audio[0], shape.data.sample_rate, origin_of(file)
            to_mono = av.AudioResampler(format="s16", layout="mono", rate=rate)
            parts, told = [], 0  # samples so far
            first: Any = None  # seconds
            for frame in frames_from(file, stream, origin + begin) if begin else file.decode(stream):
                time = None if frame.time is None else frame.time - origin
                if time is not None and time > end:
                    break
                first = (time or 0.0) if first is None else first
                missing = 0 if time is None else round((time - first) * rate) - told
                if missing > GAP * rate:  # what is not there is silence, or all that follows would be early
                    if end == math.inf and told + missing > shape.max_seconds * rate:
                        raise BadSample("too long", f"{path} has a pause of {missing / rate:,.0f} s in its sound")
                    parts.append(np.zeros(missing, np.int16))
                    told += missing
                for part in to_mono.resample(frame):
                    parts.append(part.to_ndarray()[0])
                    told += len(parts[-1])
            parts += [part.to_ndarray()[0] for part in to_mono.resample(None)]
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("missing" if isinstance(error, FileNotFoundError) else "corrupt", f"{path}: {error}") from None
    audio = np.concatenate(parts) if parts else np.empty(0, np.int16)
    lead = round(
        (begin - (first or 0.0)) * shape.data.sample_rate
    )  # of what was decoded before it begins; negative: it lacks
    if lead > 0:
        audio = audio[lead:]
    elif -lead > GAP * shape.data.sample_rate:
        audio = np.concatenate([np.zeros(-lead, np.int16), audio])
    if end < math.inf:
        audio = audio[: round((end - begin) * shape.data.sample_rate)]
    seconds = len(audio) / shape.data.sample_rate
    if seconds < shape.data.min_seconds:
        raise BadSample("too short", f"{path} has {seconds:.2f} s of sound, data.min_seconds={shape.data.min_seconds}")
    if seconds > shape.max_seconds:
        raise BadSample(
            "too long",
            f"{path} has {seconds:.1f} s of sound, max_seconds={shape.max_seconds}; --clip_seconds 10 cuts it",
        )
    try:
        return check_audio(audio, shape.data.sample_rate, path, shape.data)
    except BadClipError as error:
        raise BadSample("silent", str(error)) from None


def read_frames(
    path: str, shape: Shape, begin: float = 0.0, end: float = math.inf
) -> tuple[list[np.ndarray], list[float], float]:
    """Frames from the middles of equal parts of a video, or of what it has from begin to end -> (H, W, 3) uint8 each, their times
    in seconds from begin, and the length in seconds."""
    import av.error

    try:
        with av.open(path) as file:
            if not file.streams.video:
                raise BadSample("no picture", f"{path} has no video stream")
            stream = file.streams.video[0]
            aspect = stream.sample_aspect_ratio
            if end < math.inf:
                first = origin_of(file) + begin
                length = min(end, float((stream.duration or 0) * (stream.time_base or 0)) or end) - begin
            else:
                times = [
                    float(packet.pts * packet.time_base)
                    for packet in file.demux(stream)
                    if packet.pts is not None and not packet.is_discard  # before what an edit of the file shows
                ]
                if not times:
                    raise BadSample("corrupt", f"{path}: the video stream is empty")
                first, length = min(times), max(times) - min(times)
            if length <= 0 and end < math.inf:
                raise BadSample("lengths differ", f"{path} has no picture from {begin:.1f} s on")
            wanted = [first + length * (k + 0.5) / shape.frames for k in range(shape.frames)]
            nearest: list[Any] = [None] * shape.frames
            last = first
            for frame in frames_from(file, stream, first) if begin else all_frames(path, stream.index):
                if frame.time is None:
                    continue
                last = max(last, frame.time)
                for k, at in enumerate(wanted):
                    if nearest[k] is None or abs(frame.time - at) < abs(nearest[k].time - at):
                        nearest[k] = frame
                if frame.time > first + length + 1:
                    break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("corrupt", f"{path}: {error}") from None
    for frame, at in zip(nearest, wanted, strict=True):
        if frame is None or abs(frame.time - at) > max(length / shape.frames, 0.5):
            if end < math.inf and last < at:
                raise BadSample("lengths differ", f"{path}: its picture ends at {last - first + begin:.1f} s")
            raise BadSample("corrupt", f"{path}: nothing can be decoded near {at - first + begin:.2f} s")
    seconds = [round(frame.time - first, 3) for frame in nearest]
    return [_picture(frame, aspect, shape.short_side) for frame in nearest], seconds, length


def _picture(frame: Any, aspect: Any, short_side: int) -> np.ndarray:
    """As a player shows it: upright, with square pixels."""
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    width, height = picture.size
    if aspect:
        width = max(1, round(width * float(aspect)))
    if frame.rotation:
        picture = picture.rotate(frame.rotation, expand=True)
        width, height = (height, width) if frame.rotation % 180 else (width, height)
    if max(width, height) > WIDEST * min(width, height):
        raise BadSample(
            "odd shape", f"its picture is {width} x {height} pixels, expected at most {WIDEST} times as long as wide"
        )
    scale = short_side / min(width, height)
    return np.asarray(picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))


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
