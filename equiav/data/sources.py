"""Where clips come from: video files, lists of extracted frames and sounds, the synthetic world -> members of a sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from equiav.config import ConfigError, DataConfig
from equiav.data.clips import ENCODE_AUDIO, BadClipError, check_audio, decode_frame, encode_frame
from equiav.data.synthetic import World
from streaming import BadSample

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".flv", ".mpg", ".mpeg", ".ts", ".3gp")
STILL = 2  # frames whose values differ by no more than this everywhere are the same picture


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


def list_videos(source: Path) -> list[tuple[str, str]]:
    """A folder (searched through), or a text file with a path a line -> (key, path) of each video."""
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in VIDEOS)
        if not paths:
            raise ConfigError(f"source {source} has no video files ({', '.join(VIDEOS)})")
        return [(_key(str(path.relative_to(source).with_suffix(""))), str(path)) for path in paths]
    lines = [line.strip() for line in source.read_text().splitlines()]
    paths = [source.parent / line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise ConfigError(f"source {source} lists no videos")
    return [(_key(path.with_suffix("").name), str(path)) for path in paths]


def list_frames(source: Path) -> list[tuple[str, dict[str, Any]]]:
    """A CAV-MAE or EquiAV list: {"data": [{"video_id", "wav", "video_path", "labels"}]} -> (key, entry)."""
    try:
        entries = json.loads(source.read_text())["data"]
        return [
            (_key(entry["video_id"]), {k: entry[k] for k in ("video_id", "wav", "video_path", "labels")})
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"source {source} is not a list of clips ({type(error).__name__}: {error}), expected "
            '{"data": [{"video_id": ..., "wav": ..., "video_path": ..., "labels": ...}]}'
        ) from None


def _key(name: str) -> str:
    """A sample's key ends at its first dot: names keep what they have of them as underscores."""
    return name.replace(".", "_")


class EncodeSynthetic:
    def __init__(self, world: World, shape: Shape):
        self.world, self.shape = world, shape

    def __call__(self, index: int) -> dict[str, bytes]:
        clip = self.world.clip(index)
        about = {"synthetic": index, "seed": self.world.seed, "label": clip.label}
        return _members(
            [encode_frame(frame, self.shape.quality) for frame in clip.frames], clip.audio, about, self.shape
        )


class EncodeFrames:
    """An entry of a list: frames at video_path/frame_K/video_id.jpg, copied as they are, and the sound."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def __call__(self, entry: dict[str, Any]) -> dict[str, bytes]:
        paths = [
            Path(entry["video_path"]) / f"frame_{k}" / f"{entry['video_id']}.jpg" for k in range(self.shape.frames)
        ]
        absent = [str(path) for path in paths if not path.is_file()]
        if absent:
            raise BadSample("missing frames", f"{len(absent)} of {len(paths)}, first {absent[0]}")
        contents = [path.read_bytes() for path in paths]
        try:
            frames = [decode_frame(content, str(path)) for content, path in zip(contents, paths, strict=True)]
        except BadClipError as error:
            raise BadSample("corrupt", str(error)) from None
        _check_motion(frames, self.shape)
        audio = read_audio(entry["wav"], self.shape)
        return _members(contents, audio, {"video_id": entry["video_id"], "labels": entry["labels"]}, self.shape)


class EncodeVideo:
    def __init__(self, shape: Shape):
        self.shape = shape

    def __call__(self, path: str) -> dict[str, bytes]:
        audio = read_audio(path, self.shape)
        seconds = len(audio) / self.shape.data.sample_rate
        frames, times = read_frames(path, self.shape)
        _check_motion(frames, self.shape)
        about = {"source": Path(path).name, "seconds": round(seconds, 3), "frame_seconds": times}
        return _members([encode_frame(frame, self.shape.quality) for frame in frames], audio, about, self.shape)


def read_audio(path: str, shape: Shape) -> np.ndarray:
    """The first sound stream of a file -> (L,) int16, mono, at data.sample_rate; checked."""
    import av.error

    try:
        with av.open(path) as file:
            if not file.streams.audio:
                raise BadSample("no sound", f"{path} has no audio stream")
            to_mono = av.AudioResampler(format="s16", layout="mono", rate=shape.data.sample_rate)
            parts = [part.to_ndarray()[0] for frame in file.decode(audio=0) for part in to_mono.resample(frame)]
            parts += [part.to_ndarray()[0] for part in to_mono.resample(None)]
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("missing" if isinstance(error, FileNotFoundError) else "corrupt", f"{path}: {error}") from None
    audio = np.concatenate(parts) if parts else np.empty(0, np.int16)
    seconds = len(audio) / shape.data.sample_rate
    if seconds < shape.data.min_seconds:
        raise BadSample("too short", f"{path} has {seconds:.2f} s of sound, data.min_seconds={shape.data.min_seconds}")
    if seconds > shape.max_seconds:
        raise BadSample(
            "too long", f"{path} has {seconds:.1f} s of sound, max_seconds={shape.max_seconds}; cut it into clips"
        )
    try:
        return check_audio(audio, shape.data.sample_rate, path, shape.data)
    except BadClipError as error:
        raise BadSample("silent", str(error)) from None


def read_frames(path: str, shape: Shape) -> tuple[list[np.ndarray], list[float]]:
    """Frames from the middles of equal parts of a video -> (H, W, 3) uint8 each, and their times in seconds."""
    import av.error

    try:
        with av.open(path) as file:
            if not file.streams.video:
                raise BadSample("no picture", f"{path} has no video stream")
            stream = file.streams.video[0]
            aspect = stream.sample_aspect_ratio
            times = [float(packet.pts * packet.time_base) for packet in file.demux(stream) if packet.pts is not None]
            if not times:
                raise BadSample("corrupt", f"{path}: the video stream is empty")
            first, length = min(times), max(times) - min(times)
            wanted = [first + length * (k + 0.5) / shape.frames for k in range(shape.frames)]
            nearest: list[Any] = [None] * shape.frames
            file.seek(0)
            for frame in file.decode(stream):
                for k, at in enumerate(wanted):
                    if nearest[k] is None or abs(frame.time - at) < abs(nearest[k].time - at):
                        nearest[k] = frame
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("corrupt", f"{path}: {error}") from None
    for frame, at in zip(nearest, wanted, strict=True):
        if frame is None or abs(frame.time - at) > max(length / shape.frames, 0.5):
            raise BadSample("corrupt", f"{path}: nothing can be decoded near {at:.2f} s")
    return [_picture(frame, aspect, shape.short_side) for frame in nearest], [round(frame.time, 3) for frame in nearest]


def _picture(frame: Any, aspect: Any, short_side: int) -> np.ndarray:
    """As a player shows it: upright, with square pixels."""
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    width, height = picture.size
    if aspect:
        width = round(width * float(aspect))
    if frame.rotation:
        picture = picture.rotate(frame.rotation, expand=True)
        width, height = (height, width) if frame.rotation % 180 else (width, height)
    scale = short_side / min(width, height)
    return np.asarray(picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))


def _check_motion(frames: Sequence[np.ndarray], shape: Shape) -> None:
    if shape.keep_frozen or len(frames) < 2:
        return
    first = frames[0].astype(np.int16)
    if all(frame.shape == first.shape and np.abs(frame - first).max() <= STILL for frame in frames[1:]):
        raise BadSample("frozen", f"all {len(frames)} frames show the same picture; --keep-frozen packs such clips too")


def _members(frames: Sequence[bytes], audio: np.ndarray, about: dict[str, Any], shape: Shape) -> dict[str, bytes]:
    members = {f"{k}.jpg": frame for k, frame in enumerate(frames)}
    members[shape.audio] = ENCODE_AUDIO[shape.audio](audio, shape.data.sample_rate)
    members["json"] = json.dumps(about).encode()
    return members
