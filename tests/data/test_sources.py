"""Videos and lists -> members: the right moments, upright and with square pixels, the right sound; or a named reason."""

import io
import json
import re
from fractions import Fraction

import numpy as np
import pytest
import soundfile
from PIL import Image

from equiav.config import ConfigError, DataConfig
from equiav.data.clips import decode_frame, decode_wav, encode_frame, encode_wav
from equiav.data.media import opened
from equiav.data.sources import EncodeFrames, EncodeSynthetic, EncodeVideo, Shape, list_frames, list_videos
from equiav.data.synthetic import World
from streaming import BadSample
from tests.videos import peaks, photo, ramp, rotate, speck, still, time_of, tones, write_video

DATA = DataConfig()
SHAPE = Shape(frames=10, short_side=32, quality=95, audio="wav", max_seconds=30.0, keep_frozen=False, data=DATA)


def shape(**changes):
    return Shape(**{**vars(SHAPE), **changes})


def frames_of(members, count=10):
    return [decode_frame(members[f"{k}.jpg"], "s") for k in range(count)]


def check_times(frames, seconds, step):
    """Each from the middle of its part, as near as frames lie."""
    times = np.array([time_of(frame) for frame in frames]) * seconds
    middles = (np.arange(len(frames)) + 0.5) * seconds / len(frames)
    assert np.abs(times - middles).max() < step + 0.05


def rejected(encode, item):
    with pytest.raises(BadSample) as error:
        encode(item)
    return error.value.reason, error.value.detail


# ---- videos


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a.mp4", {"video": "libx264"}),
        ("a.mp4", {"video": "mpeg4"}),
        ("a.mkv", {"video": "libx264", "sound": "libmp3lame"}),
        ("a.avi", {"video": "mpeg4", "sound": "pcm_s16le"}),
        ("a.webm", {"video": "libvpx", "sound": "libopus", "rate": 48000}),
    ],
)
def test_a_video_becomes_frames_sound_and_a_line_about_it(tmp_path, name, settings):
    path = write_video(tmp_path / name, seconds=4.0, fps=25, **settings)
    members = EncodeVideo(SHAPE)(str(path))
    assert sorted(members) == sorted([*(f"{k}.jpg" for k in range(10)), "wav", "json"])
    frames = frames_of(members)
    assert {frame.shape for frame in frames} == {(32, 48, 3)}
    check_times(frames, 4.0, 1 / 25)
    audio = decode_wav(members["wav"], "s", DATA)
    assert abs(len(audio) / 16000 / 4.0 - 1) < 0.01
    assert np.allclose(peaks(audio, 16000, 2), [440, 1000], atol=2)
    about = json.loads(members["json"])
    assert about["source"] == name
    assert about["seconds"] == round(len(audio) / 16000, 3)
    assert np.abs(np.array(about["frame_seconds"]) - (np.arange(10) + 0.5) * 0.4).max() < 0.041


def test_the_sound_is_as_long_as_it_was_and_the_mean_of_its_channels(tmp_path):
    path = write_video(tmp_path / "a.mkv", seconds=5.0, sound="flac")
    audio = decode_wav(EncodeVideo(SHAPE)(str(path))["wav"], "s", DATA).astype(float)
    assert abs(len(audio) - 80000) < 16
    mean = tones(5.0, 16000, (440, 1000)).astype(float).mean(0)[: len(audio)]
    inside = slice(800, len(mean) - 800)  # the filter's edges
    assert np.abs(audio[inside] - mean[inside]).max() < 0.03 * np.abs(mean).max()


def test_flac_holds_the_same_sound_as_wav(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    flac, wav = (EncodeVideo(shape(audio=kind))(str(path)) for kind in ("flac", "wav"))
    assert "wav" not in flac
    audio, rate = soundfile.read(io.BytesIO(flac["flac"]), dtype="int16")
    assert rate == 16000
    assert np.array_equal(audio, decode_wav(wav["wav"], "s", DATA))
    assert flac["json"] == wav["json"]


def test_only_what_lies_below_half_the_rate_is_left_of_a_sound(tmp_path):
    path = write_video(tmp_path / "a.mkv", sound="flac", pitches=(3000, 11000))  # 11 kHz would fold down to 5 kHz
    audio = decode_wav(EncodeVideo(SHAPE)(str(path))["wav"], "s", DATA)
    spectrum = np.abs(np.fft.rfft(audio[1600:-1600] * np.hanning(len(audio) - 3200)))
    at = lambda pitch: spectrum[round(pitch * (len(audio) - 3200) / 16000) + np.arange(-20, 21)].max()  # noqa: E731
    assert at(5000) < at(3000) / 1000


@pytest.mark.parametrize(
    ("size", "packed"), [((160, 48), (32, 107)), ((48, 160), (107, 32)), ((32, 32), (32, 32)), ((16, 20), (40, 32))]
)
def test_the_short_side_is_as_asked_and_the_shape_is_kept(tmp_path, size, packed):
    path = write_video(tmp_path / "a.mp4", size=size)
    assert {frame.shape[:2] for frame in frames_of(EncodeVideo(SHAPE)(str(path)))} == {packed}


@pytest.mark.parametrize("count", [1, 3, 16])
def test_as_many_frames_as_asked(tmp_path, count):
    path = write_video(tmp_path / "a.mp4", seconds=4.0, fps=25)
    members = EncodeVideo(shape(frames=count))(str(path))
    assert sum(name.endswith(".jpg") for name in members) == count
    check_times(frames_of(members, count), 4.0, 1 / 25)


@pytest.mark.parametrize(("aspect", "packed"), [("2/1", (32, 96)), ("1/2", (43, 32))])
def test_pixels_that_are_not_square_become_so(tmp_path, aspect, packed):
    path = write_video(tmp_path / "a.mp4", size=(96, 64), aspect=Fraction(aspect))
    assert {frame.shape[:2] for frame in frames_of(EncodeVideo(SHAPE)(str(path)))} == {packed}


def blue(picture):
    return picture[..., 2].astype(int) - picture[..., 0] > 80


@pytest.mark.parametrize(
    ("matrix", "corner", "packed"),
    [
        ((1, 0, 0, 1), "upper left", (32, 48)),
        ((0, 1, -1, 0), "upper right", (48, 32)),  # to the right becomes down: a quarter clockwise
        ((-1, 0, 0, -1), "lower right", (32, 48)),
        ((0, -1, 1, 0), "lower left", (48, 32)),
    ],
)
def test_pictures_are_upright_as_the_display_matrix_says(tmp_path, matrix, corner, packed):
    path = write_video(tmp_path / "a.mp4")
    rotate(path, matrix)
    for frame in frames_of(EncodeVideo(SHAPE)(str(path))):
        assert frame.shape[:2] == packed
        marked = blue(frame)
        H, W = packed
        parts = {
            "upper left": marked[: H // 6, : W // 6],
            "upper right": marked[: H // 6, -W // 6 :],
            "lower left": marked[-H // 6 :, : W // 6],
            "lower right": marked[-H // 6 :, -W // 6 :],
        }
        assert [name for name, part in parts.items() if part.mean() > 0.5] == [corner]


def test_a_picture_that_is_turned_and_has_wide_pixels_is_stretched_before_it_is_turned(tmp_path):
    path = write_video(tmp_path / "a.mp4", size=(96, 64), aspect=2)
    rotate(path, (0, 1, -1, 0))
    assert {frame.shape[:2] for frame in frames_of(EncodeVideo(SHAPE)(str(path)))} == {(96, 32)}


def test_frames_at_uneven_times_are_chosen_by_time_and_not_by_number(tmp_path):
    times = [*np.arange(0, 1.0, 0.02), *np.arange(1.0, 4.0, 0.25), 3.99]
    path = write_video(tmp_path / "a.mkv", seconds=4.0, times=times, video="libx264")
    members = EncodeVideo(SHAPE)(str(path))
    check_times(frames_of(members), 4.0, 0.25)
    length = 4.0  # the last picture stands for 0.01 s or more, which not every container says
    shown = [
        [max(t for t in times if t <= (k + 0.5) * more / 10) for k in range(10)] for more in (length, length + 0.1)
    ]
    found = np.array(json.loads(members["json"])["frame_seconds"])
    assert np.minimum(np.abs(found - shown[0]), np.abs(found - shown[1])).max() < 0.011


@pytest.mark.parametrize(
    ("settings", "reason", "detail"),
    [
        ({"sound": None}, "no sound", "no audio stream"),
        ({"video": None}, "no picture", "no video stream"),
        ({"loudness": 0.0}, "silent", "audio is silent"),
        ({"seconds": 0.6}, "too short", r"s of sound, data.min_seconds=1.0"),
        ({"seconds": 31.0, "fps": 1}, "too long", r"31.\d s of sound, max_seconds=30.0; --clip_seconds 10 cuts it"),
        (
            {"audio": tones(1.5, 44100, (440, 1000)), "seconds": 12.0},
            "lengths differ",
            "has 12.0 s of picture and 1.5 s of sound",
        ),
        ({"picture": still, "video": "libx264"}, "frozen", "all 10 frames show the same picture; --keep"),
        ({"picture": still}, "frozen", "all 10 frames show the same picture; --keep"),
    ],
)
def test_what_cannot_be_used_is_rejected_by_name(tmp_path, settings, reason, detail):
    path = write_video(tmp_path / "clip.mp4", **settings)
    found, said = rejected(EncodeVideo(SHAPE), str(path))
    assert found == reason
    assert re.search(detail, said)
    assert reason == "frozen" or "clip.mp4" in said


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_sound_that_begins_later_is_heard_later(tmp_path, name):
    """Two seconds of silence, then the tone: whole, and in clips."""
    path = str(write_video(tmp_path / name, seconds=8.0, audio=tones(6.0, 44100, (440, 440)), late=2.0))
    with opened(path) as media:
        whole = media.sound(SHAPE)
    assert np.abs(whole[: int(1.9 * 16000)]).max() < 50
    assert np.abs(whole[int(2.1 * 16000) : int(2.3 * 16000)]).max() > 5000
    with opened(path) as media:
        second = media.sound(SHAPE, 1.0, 5.0)
    assert np.abs(second[: int(0.9 * 16000)]).max() < 50
    assert np.abs(second[int(1.1 * 16000) : int(1.3 * 16000)]).max() > 5000
    assert abs(len(second) - 4 * 16000) <= 1


@pytest.mark.parametrize("video", ["libx264", "libvpx-vp9", "mpeg4"])
@pytest.mark.parametrize("bit_rate", [60_000, 1_000_000])
def test_what_a_codec_does_to_a_picture_is_no_motion(tmp_path, video, bit_rate):
    how = {"size": (320, 192), "video": video, "bit_rate": bit_rate}
    still_one = write_video(tmp_path / "still.mkv", picture=photo, **how)
    assert rejected(EncodeVideo(shape(short_side=192)), str(still_one))[0] == "frozen"
    assert EncodeVideo(shape(short_side=192))(str(write_video(tmp_path / "moves.mkv", picture=speck, **how)))


def test_a_frozen_picture_is_packed_where_that_is_asked(tmp_path):
    path = write_video(tmp_path / "a.mp4", picture=still)
    assert len(frames_of(EncodeVideo(shape(keep_frozen=True))(str(path)))) == 10
    assert "0.jpg" in EncodeVideo(shape(frames=1))(str(path))  # one frame says nothing about motion


def test_the_limits_of_length_are_those_of_the_settings(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", seconds=3.0))
    assert rejected(EncodeVideo(shape(max_seconds=2.5)), path)[0] == "too long"
    assert rejected(EncodeVideo(shape(data=DataConfig(min_seconds=3.5))), path)[0] == "too short"
    EncodeVideo(shape(max_seconds=3.2, data=DataConfig(min_seconds=2.8)))(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[: len(c) // 2],
        lambda c: c[:100],
        lambda c: b"",
        lambda c: bytes(5000),
        lambda c: np.random.default_rng(0).bytes(20_000),
    ],
)
def test_a_damaged_file_is_rejected_as_corrupt(tmp_path, damage):
    path = write_video(tmp_path / "a.mp4")
    path.write_bytes(damage(path.read_bytes()))
    reason, detail = rejected(EncodeVideo(SHAPE), str(path))
    assert reason == "corrupt"
    assert str(path) in detail


def test_any_damage_gives_members_or_a_named_reason(tmp_path):
    rng = np.random.default_rng(0)
    whole = write_video(tmp_path / "a.mp4", seconds=1.5).read_bytes()
    reasons = set()
    for k in range(25):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 200)):
            content[place] = rng.integers(0, 256)
        path = tmp_path / f"{k}.mp4"
        path.write_bytes(content)
        try:
            EncodeVideo(SHAPE)(str(path))
        except BadSample as error:
            reasons.add(error.reason)
    assert "corrupt" in reasons


def test_a_missing_file_is_rejected_as_missing(tmp_path):
    reason, detail = rejected(EncodeVideo(SHAPE), str(tmp_path / "gone.mp4"))
    assert reason == "missing"
    assert "gone.mp4" in detail


# ---- where videos are found


def test_a_folder_is_searched_for_videos(tmp_path):
    for name in ("b.mp4", "sub/a.MKV", "sub/v1.5.webm", "notes.txt", "sub/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, other = list_videos(tmp_path)
    assert found == [
        ("b", f"{tmp_path}/b.mp4"),
        ("sub/a", f"{tmp_path}/sub/a.MKV"),
        ("sub/v1_5", f"{tmp_path}/sub/v1.5.webm"),
    ]
    assert other == {f"{tmp_path}/notes.txt": "its name ends in .txt", f"{tmp_path}/sub/a.jpg": "its name ends in .jpg"}


def test_a_list_of_paths_is_read_beside_itself(tmp_path):
    (tmp_path / "list.txt").write_text("# clips\n\nclips/x.mp4\n  /far/away/y.1.mkv  \n")
    assert list_videos(tmp_path / "list.txt")[0] == [("x", f"{tmp_path}/clips/x.mp4"), ("y_1", "/far/away/y.1.mkv")]


def test_each_of_a_list_has_a_name_of_its_own(tmp_path):
    """The mark of UTF-8 is no part of a name."""
    (tmp_path / "list.txt").write_text("\ufeffa/clip.mp4\nb/clip.mp4\n/far/x.mp4\n/far/x.mkv\nz.mp4\n")
    keys = [key for key, _ in list_videos(tmp_path / "list.txt")[0]]
    assert keys == ["a/clip", "b/clip", "far/x_mp4", "far/x_mkv", "z"]


def test_what_cannot_be_told_apart_by_its_name_is_numbered(tmp_path):
    (tmp_path / "list.txt").write_text("a.b.mp4\na_b.mp4\na_b_mp4-2.mp4\nz.mp4\nz.mp4\n")
    found, other = list_videos(tmp_path / "list.txt")
    assert dict(found) == {
        "a_b_mp4": f"{tmp_path}/a.b.mp4",
        "a_b_mp4-3": f"{tmp_path}/a_b.mp4",
        "a_b_mp4-2": f"{tmp_path}/a_b_mp4-2.mp4",
        "z": f"{tmp_path}/z.mp4",
    }
    assert other == {"z.mp4": "it is listed more than once, and was taken once"}


def test_nothing_found_is_an_error_that_says_so(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"list\.txt lists no videos"):
        list_videos(tmp_path / "list.txt")
    with pytest.raises(ConfigError, match=r"has none of these files: \.mp4, "):
        list_videos(tmp_path)


# ---- frames and sounds that were extracted before


@pytest.fixture
def extracted(tmp_path):
    """Two clips as CAV-MAE lays them out, and their list."""
    entries = []
    for clip in ("a-1", "b.2"):
        for k in range(10):
            folder = tmp_path / "frames" / f"frame_{k}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{clip}.jpg").write_bytes(encode_frame(ramp(k / 10, (60, 40)), 77))
        (tmp_path / f"{clip}.wav").write_bytes(encode_wav(tones(2.0, 16000, [440])[0], 16000))
        entries.append(
            {
                "video_id": clip,
                "wav": str(tmp_path / f"{clip}.wav"),
                "video_path": str(tmp_path / "frames"),
                "labels": "/m/09x0r,/m/04rlf",
                "more": 1,
            }
        )
    (tmp_path / "list.json").write_text(json.dumps({"data": entries}))
    return tmp_path


def test_extracted_frames_are_packed_as_they_are(extracted):
    items, _ = list_frames(extracted / "list.json")
    assert [key for key, _ in items] == ["a-1", "b_2"]
    for (_, entry), clip in zip(items, ("a-1", "b.2"), strict=True):
        members = EncodeFrames(SHAPE)(entry)
        for k in range(10):
            assert members[f"{k}.jpg"] == (extracted / "frames" / f"frame_{k}" / f"{clip}.jpg").read_bytes()
        assert np.array_equal(decode_wav(members["wav"], "s", DATA), tones(2.0, 16000, [440])[0])
        assert json.loads(members["json"]) == {"video_id": clip, "labels": "/m/09x0r,/m/04rlf"}


def test_a_list_of_extracted_clips_is_read_beside_itself_each_entry_once(tmp_path):
    entry = {"video_id": "a", "wav": "sound/a.wav", "video_path": "frames", "labels": ""}
    entries = [entry, entry, {**entry, "wav": "other.wav"}, {**entry, "video_id": "b", "wav": "/far/b.wav"}]
    (tmp_path / "list.json").write_text(json.dumps({"data": entries}))
    items, other = list_frames(tmp_path / "list.json")
    assert [(key, one["wav"], one["video_path"]) for key, one in items] == [
        ("a", f"{tmp_path}/sound/a.wav", f"{tmp_path}/frames"),
        ("a-2", f"{tmp_path}/other.wav", f"{tmp_path}/frames"),
        ("b", "/far/b.wav", f"{tmp_path}/frames"),
    ]
    assert other == {"a": "it is listed more than once, and was taken once"}


def test_what_an_extracted_clip_lacks_is_named(extracted):
    entry, encode = list_frames(extracted / "list.json")[0][0][1], EncodeFrames(SHAPE)
    assert rejected(encode, entry | {"wav": str(extracted / "gone.wav")})[0] == "missing"
    folder = extracted / "frames"
    (folder / "frame_3" / "a-1.jpg").write_bytes(b"\xff\xd8 not a picture")
    reason, detail = rejected(encode, entry)
    assert (reason, f"{folder}/frame_3/a-1.jpg" in detail) == ("corrupt", True)
    for k in (3, 7):
        (folder / f"frame_{k}" / "a-1.jpg").unlink()
    assert rejected(encode, entry) == ("missing frames", f"2 of 10, first {folder}/frame_3/a-1.jpg")
    assert "9.jpg" in EncodeFrames(shape(frames=10))(list_frames(extracted / "list.json")[0][1][1])


def test_frozen_extracted_frames_are_rejected_too(extracted):
    for k in range(10):
        (extracted / "frames" / f"frame_{k}" / "a-1.jpg").write_bytes(encode_frame(still(0, (60, 40))))
    entry = list_frames(extracted / "list.json")[0][0][1]
    assert rejected(EncodeFrames(SHAPE), entry)[0] == "frozen"
    assert "0.jpg" in EncodeFrames(shape(keep_frozen=True))(entry)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"data": [{"video_id": "a"}]}',
        '{"data": ["a"]}',
        '{"data": 3}',
        '{"data": [{"video_id": 7, "wav": "", "video_path": "", "labels": ""}]}',
    ],
)
def test_a_list_that_is_none_is_named_with_what_was_expected(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ConfigError, match=r'list\.json is not a list of clips .*expected \{"data"'):
        list_frames(tmp_path / "list.json")


# ---- the synthetic world


def test_synthetic_clips_are_those_of_the_world():
    world = World(3, 32, 4)
    members = EncodeSynthetic(world, shape(frames=4))(17)
    clip = world.clip(17)
    assert np.array_equal(decode_wav(members["wav"], "s", DATA), clip.audio)
    for k in range(4):
        packed = np.asarray(Image.open(io.BytesIO(members[f"{k}.jpg"])))
        assert np.abs(packed.astype(int) - clip.frames[k]).mean() < 6
    assert json.loads(members["json"]) == {"synthetic": 17, "seed": 3, "label": clip.label}
