"""The world is deterministic, and what is seen really decides what is heard."""

import numpy as np
import pytest
import torch
from torchaudio.functional import spectrogram as stft

from equiav.config import DataConfig
from equiav.data.clips import check_audio, decode_frame, encode_frame
from equiav.data.synthetic import ATTRIBUTES, CLASSES, COLOURS, SHAPES, Rules, World

WORLD = World(seconds=2.56)
CLIPS = [WORLD.clip(i) for i in range(200)]
SHAPE, SIZE, BRIGHTNESS, X, HUE, MOTION = range(6)


def test_deterministic_and_distinct():
    for index in (0, 3, 10**9):
        one, again = World(seconds=2.56).clip(index), WORLD.clip(index)
        for a, b in zip(one, again, strict=True):
            assert np.array_equal(a, b)
    assert not np.array_equal(World(seed=1, seconds=2.56).clip(0).audio, CLIPS[0].audio)
    assert len({clip.audio.tobytes() for clip in CLIPS}) == len(CLIPS)


def test_format():
    clip = CLIPS[0]
    assert clip.frames.shape == (10, 64, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.audio.shape == (40960,)
    assert clip.attributes.shape == (2, len(ATTRIBUTES))
    assert decode_frame(encode_frame(clip.frames[0]), "s").shape == (64, 64, 3)
    full = World(size=224, seconds=10).clip(0)
    assert full.frames.shape == (10, 224, 224, 3)
    assert full.audio.shape == (160000,)


def test_every_clip_passes_the_boundary():
    for index, clip in enumerate(CLIPS):
        check_audio(clip.audio, 16000, str(index), DataConfig())
        assert np.abs(clip.audio).max() < 32767, "clipped"


def test_classes_are_balanced_and_attributes_cover_their_range():
    labels = np.array([clip.label for clip in CLIPS])
    assert set(labels) == set(range(len(CLASSES)))
    attributes = np.stack([clip.attributes for clip in CLIPS])
    assert (attributes[:, 0, X] < 0.5).all()
    assert (attributes[:, 1, X] >= 0.5).all()
    for k in (SIZE, BRIGHTNESS, HUE, MOTION):
        assert attributes[..., k].min() < 0.1
        assert attributes[..., k].max() > 0.9


def test_both_objects_are_in_sight():
    """Objects are more colourful than any scene: there is one in each half of every frame."""
    for index in range(400):
        clip = WORLD.clip(index)
        for k, hidden_by in ((0, 1), (1, 0)):
            centre = round(64 * (0.16 + 0.68 * clip.attributes[k, X]))
            near = clip.frames[:, :, max(0, centre - 3) : centre + 4].astype(int)
            colour = (near.max(axis=3) - near.min(axis=3)).max(axis=(1, 2))
            assert colour.min() > 60, (index, k, hidden_by)


def correlation(a, b):
    return np.corrcoef(np.asarray(a, float), np.asarray(b, float))[0, 1]


def only_first_note(clip):
    """The samples between the first onset and the second: one object sounds alone."""
    start, stop = (int(0.75 * clip.attributes[k, X] * len(clip.audio)) for k in range(2))
    return clip.audio[start:stop].astype(np.float32) / 32767


def test_brightness_is_loudness():
    alone = [only_first_note(clip)[:1500] for clip in CLIPS]
    loudness = [20 * np.log10(np.sqrt(np.mean(x**2)) + 1e-6) for x in alone if len(x) == 1500]
    brightness = [clip.attributes[0, BRIGHTNESS] for clip, x in zip(CLIPS, alone, strict=True) if len(x) == 1500]
    assert correlation(brightness, loudness) > 0.85
    seen = [clip.frames.max(axis=(1, 2, 3)).mean() for clip in CLIPS]  # the brightest thing in sight
    assert correlation(seen, [clip.attributes[:, BRIGHTNESS].max() for clip in CLIPS]) > 0.8


def test_size_is_pitch_and_shape_is_timbre():
    rows = []
    for clip in CLIPS:
        note = only_first_note(clip)
        if len(note) < 4096 or clip.attributes[0, HUE] < 0.3:
            continue
        power = stft(
            torch.from_numpy(note[:4096].copy()), 0, torch.hann_window(4096), 4096, 4096, 4096, 2.0, False, center=False
        )[:, 0]
        rows.append((clip.attributes[0], power))
    discs = [(a, p) for a, p in rows if a[SHAPE] == 0]
    pitch = [np.log2(float(p.argmax()) * 16000 / 4096) for _, p in discs]
    assert correlation([a[SIZE] for a, _ in discs], pitch) < -0.98  # large is low
    pure = [float(p.max() / p.sum()) for a, p in rows if a[SHAPE] == 0]
    rich = [float(p.max() / p.sum()) for a, p in rows if a[SHAPE] == 2]
    assert np.median(pure) > 1.5 * np.median(rich)


def test_left_is_early():
    """The first sound comes as early as the left object is left; flipping the picture breaks that."""
    onset, left_edge, flipped_edge = [], [], []
    for clip in CLIPS:
        level = np.abs(clip.audio).astype(float)
        onset.append(np.argmax(level > 0.25 * level.max()) if clip.attributes[0, BRIGHTNESS] > 0.5 else np.nan)
        colourful = (clip.frames.max(axis=3) - clip.frames.min(axis=3)).max(axis=(0, 1))  # by column; scenes are dull
        bright = np.flatnonzero(colourful > 85)
        left_edge.append(bright[0] if len(bright) else np.nan)
        flipped_edge.append(63 - bright[-1] if len(bright) else np.nan)
    onset, left_edge, flipped_edge = map(np.array, (onset, left_edge, flipped_edge))
    known = np.isfinite(onset) & np.isfinite(left_edge)
    assert known.sum() > 60
    assert correlation(onset[known], left_edge[known]) > 0.6
    assert abs(correlation(onset[known], flipped_edge[known])) < 0.35


def test_hue_is_decay():
    rows = []
    for clip in CLIPS:
        note = only_first_note(clip)
        if len(note) > 12000:
            early, late = (np.sqrt(np.mean(note[k : k + 2000] ** 2)) for k in (1000, 9000))
            rows.append((clip.attributes[0, HUE], np.log(late / early)))
    assert correlation(*zip(*rows, strict=True)) > 0.75


@pytest.mark.parametrize("change", ["frames", "seconds", "size"])
def test_other_settings_keep_the_attributes(change):
    other = World(**{"seconds": 2.56, change: {"frames": 3, "seconds": 1.0, "size": 32}[change]})
    assert np.array_equal(other.clip(5).attributes, CLIPS[5].attributes)


def test_labels_are_shapes_in_order():
    for clip in CLIPS[:20]:
        left, right = (SHAPES[int(k)] for k in clip.attributes[:, SHAPE])
        assert CLASSES[clip.label] == f"{left} and {right}"


def before_the_first_note(clip):
    return clip.audio[: int(0.75 * clip.attributes[0, X] * len(clip.audio))].astype(float)


def test_scene_is_ambience():
    """Light is the level of the noise, tint how dull it is; both are seen in the corners, where no object comes."""
    quiet = [clip for clip in CLIPS if clip.attributes[0, X] > 0.05]
    level = [np.log(before_the_first_note(clip).std()) for clip in quiet]
    assert correlation([clip.scene[0] for clip in quiet], level) > 0.9
    loud = [clip for clip in quiet if clip.scene[0] > 0.4]
    roughness = [np.diff(before_the_first_note(clip)).std() / before_the_first_note(clip).std() for clip in loud]
    assert correlation([clip.scene[1] for clip in loud], roughness) < -0.8
    corners = [clip.frames[:, -6:].mean(axis=(0, 1, 2)) for clip in CLIPS]
    assert correlation([clip.scene[0] for clip in CLIPS], [corner[1] for corner in corners]) > 0.9
    assert correlation([clip.scene[1] for clip in CLIPS], [(c[0] - c[2]) / c.sum() for c in corners]) > 0.8


def test_motion_is_tremolo():
    """Objects move up and down 1 to 4 times, their sound swells 2 to 8 times a second."""
    swell, motion = [], []
    for clip in CLIPS:
        note = only_first_note(clip)
        if len(note) < 16000 or clip.attributes[0, HUE] < 0.5:
            continue
        envelope = np.abs(note[1000:15000]).reshape(-1, 100).mean(axis=1)  # 160 values a second
        log = np.log(envelope + 1e-5)
        log = log - np.polyval(np.polyfit(np.arange(len(log)), log, 1), np.arange(len(log)))
        spectrum = np.abs(np.fft.rfft(log * np.hanning(len(log)), 2048))
        frequency = np.fft.rfftfreq(2048, 1 / 160)
        spectrum[(frequency < 1.5) | (frequency > 9)] = 0
        swell.append(frequency[spectrum.argmax()])
        motion.append(clip.attributes[0, MOTION])
    assert len(swell) >= 10
    assert correlation(swell, motion) > 0.9


def test_a_label_is_known_without_the_clip():
    world = World(5, 32, 2, seconds=0.5)
    assert [world.labels(k) for k in range(20)] == [[CLASSES[world.clip(k).label]] for k in range(20)]


# ---- worlds with rules of their own


def world(**rules):
    of = World(seconds=2.56, rules=Rules(**rules))
    return of, [of.clip(k) for k in range(200)]


def loudness_and_brightness(clips):
    """Of the first notes, where they come from an object that is heard alone and is seen."""
    rows = []
    for clip in clips:
        if not clip.heard.all():
            continue
        level = np.abs(clip.audio).astype(float)
        rows.append((np.log(level.max()), clip.attributes[:, BRIGHTNESS].max()))
    return correlation(*zip(*rows, strict=True))


def noise_and_light(clips):
    quiet = [clip for clip in clips if not clip.heard.any()]
    return correlation([np.log(clip.audio.astype(float).std()) for clip in quiet], [clip.scene[0] for clip in quiet])


def purity(clips):
    """How much of the power of a disc's sound is in one frequency, and of a triangle's, where they sound alone."""
    found = {0: [], 2: []}
    for clip in clips:
        if clip.heard.sum() == 1 and clip.attributes[clip.heard, SHAPE][0] in found:
            power = np.abs(np.fft.rfft(clip.audio.astype(float) * np.hanning(len(clip.audio)))) ** 2
            found[int(clip.attributes[clip.heard, SHAPE][0])].append(power.max() / power.sum())
    return np.median(found[0]) / np.median(found[2])


def test_worlds_can_be_told_apart():
    silent = 0.45
    _, mixture = world(silent=silent)
    _, bound = world(silent=silent, correspondence="bound")
    _, free = world(silent=silent, correspondence="free")
    assert loudness_and_brightness(mixture) > 0.6
    assert loudness_and_brightness(bound) > 0.6
    assert abs(loudness_and_brightness(free)) < 0.35
    assert noise_and_light(mixture) > 0.9
    assert abs(noise_and_light(bound)) < 0.4
    assert abs(noise_and_light(free)) < 0.4
    assert purity(mixture) > 1.5
    assert purity(free) > 1.5
    assert purity(bound) < 1.3


def test_what_is_seen_is_that_of_the_mixture():
    """Rules of correspondence change sounds alone."""
    for correspondence in ("bound", "free"):
        other = World(seconds=2.56, rules=Rules(correspondence)).clip(3)
        assert np.array_equal(other.frames, CLIPS[3].frames)
        assert not np.array_equal(other.audio, CLIPS[3].audio)


def test_some_are_silent_and_some_are_out_of_sight():
    of, clips = world(silent=0.3, unseen=0.2)
    seen, heard = (np.stack([getattr(clip, name) for clip in clips]) for name in ("seen", "heard"))
    assert (seen | heard).all()
    assert abs((~heard).mean() - 0.3) < 0.06
    assert abs((~seen).mean() - 0.2) < 0.06
    full = World(seconds=2.56)
    for k, clip in enumerate(clips[:60]):
        if seen[k].all() and heard[k].all():
            assert np.array_equal(clip.frames, full.clip(k).frames)
            assert np.array_equal(clip.audio, full.clip(k).audio)
        colour = (clip.frames.max(axis=3).astype(int) - clip.frames.min(axis=3)).max(axis=(1, 2))
        assert (colour.min() > 60) == bool(seen[k].any())
        if not heard[k].any():
            assert np.abs(clip.audio).max() < 500
        check_audio(clip.audio, 16000, str(k), DataConfig(silence=0.0))
    assert of.clip(7).frames.tobytes() == clips[7].frames.tobytes()


def test_masks_are_where_something_is_seen_that_sounds():
    of, clips = world(silent=0.4, unseen=0.2)
    inside, outside = [], []
    for k, clip in enumerate(clips[:60]):
        mask = of.masks(k)
        assert mask.shape == clip.frames.shape[:3]
        assert mask.any(axis=(1, 2)).all() == bool((clip.seen & clip.heard).any())
        colour = clip.frames.max(axis=3).astype(int) - clip.frames.min(axis=3)
        inside += colour[mask].tolist()
        if (clip.seen <= clip.heard).all():  # nothing that is seen is silent
            outside += colour[~mask].tolist()
    assert np.median(inside) > 90
    assert np.percentile(outside, 90) < 90


def test_classes_of_many_labels_are_skewed():
    of, clips = world(skew=1.0, classes="shapes")
    counts = np.zeros(len(SHAPES), int)
    for k, clip in enumerate(clips):
        labels = of.labels(k)
        assert labels == sorted({SHAPES[int(shape)] for shape in clip.attributes[:, SHAPE]})
        counts += [shape in labels for shape in SHAPES]
    assert (np.diff(counts) < 0).all()
    assert counts[0] > 2 * counts[-1] > 0
    things = World(seconds=2.56, rules=Rules(skew=1.0, classes="things"))
    for k, clip in enumerate(clips):
        colours = {COLOURS[int(4 * hue)] for hue in clip.attributes[:, HUE]}
        assert things.labels(k) == sorted({*of.labels(k), *colours})
