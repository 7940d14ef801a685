"""What is heard and seen of a media file at a time: the one reader of packing, embedding and localizing.

Times are seconds from where a file begins. The picture at a time is the last one that is shown then or before, as a player has
it: a slide may stand for minutes. A file whose clock goes back says nothing of what belongs together, and is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from equiav.config import DataConfig
from equiav.data.clips import BadClipError, check_audio
from streaming import BadSample

AV_TIME_BASE = 1_000_000  # of a seek, a second
WIDEST = 20  # a picture's longer side over its shorter
HOLE, JUMP = 1.0, 60.0  # seconds without sound or a new picture: they were lost; a clock was set anew
FEW = 5  # pictures
SLOW = 4  # times as long as the longest that another picture stands: of a recording of a screen they stand for seconds
COUNTED = ("avi", "mxf")  # say what time it is by how much came before
GAP = 0.1  # seconds of sound that may be missing without being filled
BACK = 0.5  # seconds by which a stream's clock may go back: timestamps that some muxers write are that wrong
PAPER = 203  # candela a square metre
REINHARD = 1.3  # so that paper is light grey, not half as bright as white
LUMINANCE = np.array([0.2627, 0.678, 0.0593], np.float32)  # of BT.2020
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
SLIDE = 1.5  # times the longest that another picture stands
PARTS = 3  # packets after a seek that may be parts of what began before
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273


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
    track: str = "default"


class Timeline(NamedTuple):
    """Of a file, by what its packets say."""

    begin: float  # on the clock of its streams
    shown: np.ndarray  # (n,) when each picture begins to be shown, in order
    shown_until: float
    heard_until: float
    damage: str  # at which reading ended; empty: at the end of the file
    holes: np.ndarray  # (n, 2) when what was lost begins and ends
    broken: np.ndarray  # (n, 2) from a damaged picture until the next whole one

    def check(self, path: str, begin: float, end: float) -> None:
        for lost_from, lost_to in self.holes:
            if lost_from < end and lost_to > begin:
                raise BadSample("hole", f"{path}: what it had from {lost_from:.1f} s to {lost_to:.1f} s was lost")

    @property
    def shared_until(self) -> float:
        """Where sound or picture ends, whichever is first; infinite: both end together, or there is one of them."""
        both = self.shown_until, self.heard_until
        return min(both) if min(both) > 0 and max(both) - min(both) > GAP else math.inf


def length_of(path: str) -> float:
    """Seconds; 0: not known."""
    import av.error

    if not os.path.isfile(path):  # a pipe would be waited for
        return 0.0
    try:
        with av.open(path) as file:
            # Others' clocks may restart on the way, and of a recording of something live the head does not say.
            if file.duration and file.format.name.split(",")[0] in ("mov", "matroska", "avi", "wav", "asf"):
                return file.duration / AV_TIME_BASE
        line = timeline(path, "default")
        return max(line.shown_until, line.heard_until)
    except (av.error.FFmpegError, OSError, ValueError):
        return 0.0


def timeline(path: str, track: str) -> Timeline:
    about = os.stat(path)
    return _timeline(path, track, about.st_size, about.st_mtime_ns)


@lru_cache(64)  # clips of one file are read one after the other
def _timeline(path: str, track: str, size: int, changed: int) -> Timeline:
    import av.error

    shown: list[float] = []
    spans: list[tuple[float, float]] = []  # of packets
    broken: list[tuple[float, float]] = []
    since = None  # a picture that was damaged on the way
    until = {"video": 0.0, "audio": 0.0}
    damage = ""
    with av.open(path) as file:
        begin = origin_of(file)
        streams = [one for one in (picture_of(file), sound_of(file, track, path)) if one is not None]
        last = dict.fromkeys((one.index for one in streams), -math.inf)
        try:
            for packet in file.demux(streams):
                at = packet.dts if packet.pts is None else packet.pts
                if at is None or packet.time_base is None:
                    continue  # the last, which is empty
                stream, time = packet.stream, float(at * packet.time_base) - begin
                if (
                    stream.type == "audio" or packet.is_keyframe
                ):  # pictures between two whole ones come in another order
                    if time < last[stream.index] - BACK:
                        raise BadSample(
                            "clock restarts",
                            f"{path}: its clock goes back from {last[stream.index]:.1f} s to {time:.1f} s, so that nothing says "
                            "which picture belongs to which sound; of files that were joined, pack the parts",
                        )
                    last[stream.index] = max(last[stream.index], time)
                if packet.is_discard:  # before what an edit of the file shows
                    continue
                ends = time + float((packet.duration or 0) * packet.time_base)
                until[stream.type] = max(until[stream.type], ends)
                spans.append((time, ends))
                if stream.type == "video":
                    if packet.is_corrupt and since is None:
                        since = shown[-1] if shown else time
                    elif since is not None and packet.is_keyframe:
                        broken.append((since, time))
                        since = None
                    shown.append(time)
        except (
            av.error.FFmpegError,
            OSError,
            IndexError,
        ) as error:  # IndexError: PyAV's, when a stream appears amid a file
            damage = "a stream begins amid it" if isinstance(error, IndexError) else str(error) or type(error).__name__
        for stream in streams:  # the head may say how long the last picture stands
            if file.format.name in COUNTED:
                _require_all(path, stream, until[stream.type], np.diff(np.unique(shown)))
            if stream.type == "video" and stream.duration and stream.time_base and shown:
                until["video"] = max(until["video"], min(shown) + float(stream.duration * stream.time_base))
    times = np.unique(shown)
    # Of a slide show the last picture stands as long as others do, whatever its packet says.
    rest = until["audio"] - times[-1] if len(times) > 1 else 0.0
    if rest > 0 and rest <= SLIDE * np.diff(times).max():
        until["video"] = max(until["video"], until["audio"])
    holes = _holes(spans, times) if min(until.values()) > 0 else np.empty((0, 2))
    if since is not None:
        broken.append((since, math.inf))
    if (long := holes[np.diff(holes)[:, 0] > JUMP]).size:
        raise BadSample(
            "clock jumps",
            f"{path}: its clock jumps from {long[0, 0]:.1f} s to {long[0, 1]:.1f} s; of files that were joined, pack the parts",
        )
    return Timeline(begin, times, until["video"], until["audio"], damage, holes, np.array(broken).reshape(-1, 2))


def _require_all(path: str, stream: Any, until: float, stands: np.ndarray) -> None:
    """What a head says is there: times that are counted are wrong behind anything that is lost. stands: of each picture."""
    if not stream.time_base:
        return
    says = float(max(stream.frames, stream.duration or 0) * stream.time_base)
    last = float(stands.max()) if stream.type == "video" and len(stands) else 0.0
    if until + GAP + last < says < 2 * until:  # else a writer's mistake
        raise BadSample(
            "corrupt",
            f"{path}: its head says {says:.2f} s of {stream.type}, there are {until:.2f} s, and nothing says which are lost",
        )


def _holes(spans: list[tuple[float, float]], shown: np.ndarray) -> np.ndarray:
    """-> (n, 2): where none of the packets is, and the picture stands far longer than others do."""
    begin, end = np.array(sorted(spans)).T
    covered = np.maximum.accumulate(end)[:-1]
    lost = begin[1:] - covered > HOLE
    holes = np.stack([covered[lost], begin[1:][lost]], axis=1)
    stands = np.diff(shown)
    over = [int(np.searchsorted(shown, lost_from, "right")) - 1 for lost_from, _ in holes]
    others = np.delete(stands, [k for k in over if 0 <= k < len(stands)])
    if len(others) < FEW:  # of slides, nothing can be said
        return np.empty((0, 2))
    return holes[[not 0 <= k < len(stands) or stands[k] > SLOW * others.max() for k in over]]


def picture_of(file: Any) -> Any:
    """The first stream of moving pictures; None: there is none. The cover of a record is none."""
    from av.stream import Disposition

    return next((one for one in file.streams.video if not one.disposition & Disposition.attached_pic), None)


def sound_of(file: Any, track: str, path: str) -> Any:
    """`default`: the one that a player plays; a language, as the file names it; or a number, from 1 on. None: there is none."""
    from av.stream import Disposition

    found = list(file.streams.audio)
    if track.isdigit():
        chosen = found[int(track) - 1 : int(track)] if int(track) else []
    elif track == "default":
        chosen = [one for one in found if one.disposition & Disposition.default] or found
    else:
        chosen = [one for one in found if one.language == track]
    if found and not chosen:
        languages = ", ".join(one.language or "?" for one in found)
        raise BadSample("no such track", f"{path} has {len(found)} track(s) of sound ({languages}), none is {track}")
    return chosen[0] if chosen else None


def origin_of(file: Any) -> float:
    """The time at which a file begins, on the clock of its streams: of its picture, where it has one."""
    for stream in (*filter(None, [picture_of(file)]), *file.streams.audio):
        if stream.start_time is not None:
            return float(stream.start_time * stream.time_base)
    return 0.0


class Media:
    """A file that is read. `about`: what is worth knowing of it beside its clips."""

    def __init__(self, path: str, file: Any, track: str):
        self.path, self.file = path, file
        self.about: dict[str, Any] = {}
        self.picture, self.track = picture_of(file), sound_of(file, track, path)
        self.line = timeline(path, track)
        if len(file.streams.audio) > 1:
            number = [one.index for one in file.streams.audio].index(self.track.index) + 1
            self.about["track"] = f"{number} of {len(file.streams.audio)} ({self.track.language or 'of no language'})"
        transfer = getattr(self.picture.codec_context, "color_trc", 0) if self.picture is not None else 0
        if transfer in HDR:
            self.about["hdr"] = HDR[transfer]

    def sound(self, shape: Shape, begin: float = 0.0, end: float = math.inf) -> np.ndarray:
        """All of it, or from begin to end -> (L,) int16, mono, at data.sample_rate; checked."""
        path, rate = self.path, shape.data.sample_rate
        if self.track is None:
            raise BadSample("no sound", f"{path} has no audio stream")
        self.line.check(path, begin, end)
        audio = self._samples("mono", shape, begin, end)[0]
        seconds = len(audio) / rate
        if seconds < shape.data.min_seconds:
            raise BadSample(
                "too short", f"{path} has {seconds:.2f} s of sound, data.min_seconds={shape.data.min_seconds}"
            )
        if seconds > shape.max_seconds:
            raise BadSample(
                "too long",
                f"{path} has {seconds:.1f} s of sound, max_seconds={shape.max_seconds}; --clip_seconds 10 cuts it",
            )
        quiet = 2 * shape.data.silence * 32768 + 2
        if self.track.codec_context.channels > 1 and np.ptp(audio) <= quiet:
            left = self._samples("stereo", shape, begin, end)[0]
            if np.ptp(left) > 10 * quiet:
                raise BadSample(
                    "antiphase",
                    f"{path}: its channels cancel each other when they become one; `ffmpeg -i IN -af pan=mono|c0=c0 OUT` keeps "
                    "the first",
                )
        try:
            return check_audio(audio, rate, path, shape.data)
        except BadClipError as error:
            raise BadSample("silent", str(error)) from None

    def _samples(self, layout: str, shape: Shape, begin: float, end: float) -> np.ndarray:
        """-> (channels, L) int16. What is not there between two sounds is silence, or all that follows would be early."""
        import av.error

        rate, parts, told = shape.data.sample_rate, [], 0  # samples so far
        resampler = av.AudioResampler(format="s16p", layout=layout, rate=rate)
        channels = 1 if layout == "mono" else 2
        first: Any = None  # seconds
        try:
            for frame in self._decode(self.track, begin):
                time = None if frame.time is None else frame.time - self.line.begin
                if time is not None and time > end:
                    break
                first = (time or 0.0) if first is None else first
                missing = 0 if time is None else round((time - first) * rate) - told
                if missing > GAP * rate:
                    if end == math.inf and told + missing > shape.max_seconds * rate:
                        raise BadSample("too long", f"{self.path} has a pause of {missing / rate:,.0f} s in its sound")
                    parts.append(np.zeros((channels, missing), np.int16))
                    told += missing
                for part in resampler.resample(frame):
                    parts.append(part.to_ndarray())
                    told += parts[-1].shape[1]
            parts += [part.to_ndarray() for part in resampler.resample(None)]
        except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
            raise self._corrupt(error) from None
        audio = np.concatenate(parts, axis=1) if parts else np.empty((channels, 0), np.int16)
        lead = round((begin - (first or 0.0)) * rate)  # of what was decoded before it begins; negative: it lacks
        if lead > 0:
            audio = audio[:, lead:]
        elif -lead > GAP * rate:
            audio = np.concatenate([np.zeros((channels, -lead), np.int16), audio], axis=1)
        return audio if end == math.inf else audio[:, : round((end - begin) * rate)]

    def pictures(
        self, shape: Shape, begin: float = 0.0, end: float = math.inf
    ) -> tuple[list[np.ndarray], list[float], float]:
        """Those shown at the middles of equal parts of all of it, or of what it has from begin to end -> (H, W, 3) uint8 each,
        when each began to be shown, in seconds from begin, and the length in seconds."""
        import av.error

        path, line = self.path, self.line
        if self.picture is None:
            what = "a cover, and no other picture" if self.file.streams.video else "no video stream"
            raise BadSample("no picture", f"{path} has {what}")
        if not len(line.shown) or (line.damage and end == math.inf):
            raise BadSample("corrupt", f"{path}: {line.damage or 'the video stream is empty'}")
        line.check(path, begin, end)
        first = float(line.shown[0]) if end == math.inf else begin
        length = min(end, line.shown_until) - first
        if length <= 0 and end < math.inf:
            raise BadSample("lengths differ", f"{path} has no picture from {begin:.1f} s on")
        wanted = [first + length * (k + 0.5) / shape.frames for k in range(shape.frames)]
        found: list[Any] = [None] * shape.frames
        damaged = [False] * shape.frames
        clean, tainted = False, False
        aspect = self.picture.sample_aspect_ratio
        try:
            for frame in self._decode(self.picture, first if begin else 0.0):
                if frame.time is None:
                    continue
                time = frame.time - line.begin
                # What a damaged picture has wrong, those have that are told as changes of it. Where decoding begins amid
                # such, they become whole bit by bit.
                tainted = frame.is_corrupt or (clean and tainted and not frame.key_frame)
                clean = clean or not tainted
                for k, at in enumerate(wanted):
                    if found[k] is None or time <= at + 1e-6:
                        found[k], damaged[k] = frame, tainted
                if time > wanted[-1]:
                    break
        except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
            raise self._corrupt(error) from None
        for frame, at, wrong in zip(found, wanted, damaged, strict=True):
            if wrong or any(since < at < until for since, until in line.broken):
                raise BadSample("corrupt", f"{path}: the picture at {at:.2f} s is damaged")
            due = line.shown[max(0, np.searchsorted(line.shown, at + 1e-6, "right") - 1)]
            # Not every packet is a picture, so that one may be a little older than what is due.
            if frame is None or abs(frame.time - line.begin - due) > max(length / shape.frames, 0.5):
                raise BadSample("corrupt", f"{path}: the picture at {at:.2f} s cannot be decoded")
        seconds = [round(frame.time - line.begin - first, 3) for frame in found]
        return [_picture(frame, aspect, shape.short_side) for frame in found], seconds, length

    def _corrupt(self, error: Exception) -> BadSample:
        if isinstance(error, BadSample):
            return error
        return BadSample("missing" if isinstance(error, FileNotFoundError) else "corrupt", f"{self.path}: {error}")

    def _decode(self, stream: Any, begin: float) -> Iterator[Any]:
        """Frames, of which the first is not later than `begin`. Not every container finds its way there at once, nor back to its
        beginning: then it is opened anew."""
        import av.error

        at = self.line.begin + begin
        for back in (0.0, 2.0, 10.0):
            if begin - back <= 0:
                break
            try:
                self.file.seek(int((at - back) * AV_TIME_BASE))
            except av.error.FFmpegError:
                break
            decoded = _decoded(self.file, stream)
            first = next(decoded, None)
            # A file that refreshes its pictures bit by bit has packets that begin one, and no whole picture there.
            whole = stream.type == "audio" or (first is not None and first.key_frame)
            if first is not None and whole and first.time is not None and first.time <= at:
                yield first
                yield from decoded
                return
        with av.open(self.path) as file:
            if stream.index >= len(file.streams):  # it was found late, and is not there now
                raise BadSample("corrupt", f"{self.path}: stream {stream.index} cannot be found again")
            yield from file.decode(file.streams[stream.index])


@contextmanager
def opened(path: str, track: str = "default") -> Iterator[Media]:
    """A BadSample says why it cannot be read."""
    import av.error

    with ExitStack() as stack:
        try:
            media = Media(path, stack.enter_context(av.open(path)), track)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, BadSample):
                raise
            reason = "missing" if isinstance(error, FileNotFoundError) else "corrupt"
            raise BadSample(reason, f"{path}: {error}") from None
        yield media


def _decoded(file: Any, stream: Any) -> Iterator[Any]:
    """From where the file stands: what comes before the first whole frame there is passed over, and the first packets may be
    parts of such."""
    import av.error

    whole = False
    for number, packet in enumerate(file.demux(stream)):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            if whole and number > PARTS:
                raise
            continue
        whole = whole or bool(frames)
        yield from frames


def _picture(frame: Any, aspect: Any, short_side: int) -> np.ndarray:
    """As a player shows it: upright, with square pixels."""
    transfer = HDR.get(getattr(frame, "color_trc", 0))
    shown = _toned(frame.to_ndarray(format="rgb48le"), transfer) if transfer else frame.to_ndarray(format="rgb24")
    picture = Image.fromarray(shown)
    width, height = picture.size
    if aspect:
        width = max(1, round(width * float(aspect)))
    if frame.rotation:
        picture = picture.rotate(frame.rotation, expand=True)
        width, height = (height, width) if frame.rotation % 180 else (width, height)
    return sized(picture, width, height, short_side)


def sized(picture: Image.Image, width: int, height: int, short_side: int) -> np.ndarray:
    """A picture that is to be shown as width x height -> (H, W, 3) uint8."""
    if max(width, height) > WIDEST * min(width, height):
        raise BadSample(
            "odd shape", f"its picture is {width} x {height} pixels, expected at most {WIDEST} times as long as wide"
        )
    scale = short_side / min(width, height)
    return np.asarray(picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))


def _toned(signal: np.ndarray, transfer: str) -> np.ndarray:
    """(H, W, 3) uint16 of PQ or HLG in BT.2020 -> uint8 as an ordinary screen shows it: light by ITU-R BT.2100, on which paper
    is 1; Reinhard's curve, which leaves what is dark and lets 1000 candela a square metre be white; BT.709."""
    x = signal.astype(np.float32) / 65535
    if transfer == "PQ":
        power = x ** (1 / 78.84375)
        light = 10000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    else:
        scene = np.where(x <= 0.5, x * x / 3, (np.exp((x - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = 1000 * scene * np.maximum(scene @ LUMINANCE, 1e-6)[..., None] ** 0.2
    light = light / PAPER
    bright = light @ LUMINANCE
    white = 1000 / PAPER
    light = light * ((1 + bright / white**2) / (1 + bright) * REINHARD)[..., None]
    linear = np.clip(light @ TO_BT709.T, 0, 1)
    return (255 * np.where(linear < 0.018, 4.5 * linear, 1.099 * linear**0.45 - 0.099)).round().astype(np.uint8)
