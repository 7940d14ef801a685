"""Videos that say what time it is: the picture grows brighter from beginning to end, the sound is one tone a channel."""

from fractions import Fraction

import av
import numpy as np

DARK, BRIGHT = 30, 220


def ramp(share, size):
    """(H, W, 3) uint8: grey by the time, as a share of the whole; the upper left corner blue."""
    width, height = size
    picture = np.full((height, width, 3), round(DARK + (BRIGHT - DARK) * share), np.uint8)
    picture[: height // 4, : width // 4] = (0, 0, 255)
    return picture


def still(share, size):
    return ramp(0.5, size)


def photo(share, size):
    """A still picture with detail at all sizes, of which a lossy codec makes another each time."""
    rng, (width, height) = np.random.default_rng(0), size
    whole = np.zeros((height, width, 3), np.float32)
    for coarse in (4, 8, 16, 32):
        small = rng.normal(size=(height // coarse, width // coarse, 3)) * coarse**0.5
        whole += np.kron(small, np.ones((coarse, coarse, 1)))[:height, :width]
    return (255 * (whole - whole.min()) / np.ptp(whole)).astype(np.uint8)


def speck(share, size):
    """The same, and over it something of a sixteenth of its width moves."""
    picture, (width, height) = photo(share, size), size
    left = round(width * (0.4 + 0.2 * share))
    picture[height // 2 : height // 2 + height // 16, left : left + width // 16] = 255
    return picture


def time_of(frame):
    """Share of the whole, from a frame's lower right part."""
    H, W = frame.shape[:2]
    return (frame[H // 2 :, W // 2 :].mean() - DARK) / (BRIGHT - DARK)


def tones(seconds, rate, pitches, loudness=0.4):
    """(channels, L) int16"""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([(loudness * 32767 * np.sin(2 * np.pi * pitch * time)).astype(np.int16) for pitch in pitches])


def write_video(
    path,
    *,
    seconds=3.0,
    size=(96, 64),
    fps=10,
    times=None,
    picture=ramp,
    video="mpeg4",
    sound="aac",
    rate=44100,
    pitches=(440, 1000),
    loudness=0.4,
    aspect=None,
    format="yuv420p",
    clock=1000,
    bit_rate=2_000_000,
    audio=None,
    late=0.0,
    options=None,
    clock_begins=0,
):
    """`times`: of each frame, in place of a constant rate. video, sound: names of encoders; None: without. late:
    seconds after the picture at which the sound begins. clock_begins: seconds."""
    with av.open(str(path), "w", container_options={"output_ts_offset": str(clock_begins)}) as file:
        streams = []
        if video:
            stream = file.add_stream(video, rate=fps, options=options or {})
            stream.width, stream.height, stream.pix_fmt = *size, format
            stream.codec_context.time_base = Fraction(1, clock)
            stream.bit_rate = bit_rate
            if aspect:
                stream.codec_context.sample_aspect_ratio = aspect
            frames = []
            for at in np.arange(0, seconds, 1 / fps) if times is None else times:
                frame = av.VideoFrame.from_ndarray(picture(at / seconds, size), format="rgb24")
                frame.pts, frame.time_base = round(at * clock), Fraction(1, clock)
                frames.append(frame)
            streams.append((stream, frames))
        if sound:
            waves = tones(seconds, rate, pitches, loudness) if audio is None else audio
            stream = file.add_stream(sound, rate=rate, layout={1: "mono", 2: "stereo", 6: "5.1"}[len(waves)])
            if sound == "wmav2":
                stream.bit_rate = 128_000  # it has no rate of its own
            frame = av.AudioFrame.from_ndarray(waves.T.reshape(1, -1).copy(), format="s16", layout=stream.layout.name)
            frame.sample_rate, frame.pts, frame.time_base = rate, round(late * rate), Fraction(1, rate)
            streams.append((stream, [frame]))
        for stream, frames in streams:
            for frame in [*frames, None]:
                file.mux(stream.encode(frame))
    return path


def shown_from(path, at):
    """Cuts a video as `ffmpeg -ss -c copy` does: packets from the key frame before, of which those before `at` are not shown."""
    source = path.with_name(f"whole-{path.name}")
    path.rename(source)
    with av.open(str(source)) as whole, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as cut:
        streams = {stream.index: cut.add_stream_from_template(stream) for stream in whole.streams}
        for packet in whole.demux():
            stream = packet.stream
            if packet.dts is None or (stream.type == "audio" and packet.pts * stream.time_base < at):
                continue
            shift = round(at / stream.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, streams[stream.index]
            cut.mux(packet)
    source.unlink()


def pause(path, at, seconds):
    """Nothing for so long in the sound, from a moment on."""
    source = path.with_name(f"whole-{path.name}")
    path.rename(source)
    with av.open(str(source)) as whole, av.open(str(path), "w") as late:
        streams = {stream.index: late.add_stream_from_template(stream) for stream in whole.streams}
        for packet in whole.demux():
            if packet.dts is None:
                continue
            if packet.stream.type == "audio" and packet.pts * packet.stream.time_base >= at:
                packet.pts += round(seconds / packet.stream.time_base)
                packet.dts += round(seconds / packet.stream.time_base)
            packet.stream = streams[packet.stream.index]
            late.mux(packet)
    source.unlink()


def rotate(path, matrix):
    """Writes another display matrix into the only video track of an MP4: (a, b, c, d), x' = a x + c y, y' = b x + d y."""
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd")
    place = header + 4 + 4 + 36
    assert content[place : place + 4] == b"\x00\x01\x00\x00", "the matrix of the first track is not where it should be"
    a, b, c, d = (round(x * 65536) % 2**32 for x in matrix)
    for k, value in enumerate((a, b, 0, c, d, 0)):
        content[place + 4 * k : place + 4 * k + 4] = value.to_bytes(4, "big")
    path.write_bytes(content)


def peaks(audio, rate, count):
    """The loudest frequencies, Hz, ascending."""
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    found = []
    for _ in range(count):
        top = int(spectrum.argmax())
        found.append(top * rate / len(audio))
        spectrum[max(0, top - 30) : top + 30] = 0
    return sorted(found)
