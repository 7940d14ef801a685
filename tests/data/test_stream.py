"""The stream of a run: packed clips come back as the model's batches, each with the frame that its draw says."""

import io
import itertools
import json
import re
import wave
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import webdataset
from PIL import Image

from equiav import cli
from equiav.augment.draws import Purpose, uniforms
from equiav.config import Config, ConfigError, DataConfig, from_dict
from equiav.data.local_s3 import LocalS3
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.stream import batches, open_stream
from equiav.data.synthetic import World
from streaming import Dataset, DatasetError, Store, StoreError
from streaming.pack import pack

COUNT, FRAMES, BATCH = 11, 3, 4
LENGTH = 255 * 160 + 400


def pack_clips(folder, audio="wav", seconds=3.0, size=64):
    shape = Shape(FRAMES, size, 95, audio, 30.0, False, DataConfig())
    encode = EncodeSynthetic(World(1, size, FRAMES, seconds), shape)
    pack([(f"clip-{k}", k) for k in range(COUNT)], encode, Store(str(folder)), processes=0, part_items=3)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """11 clips in 4 shards. Not to be changed."""
    return pack_clips(tmp_path_factory.mktemp("clips") / "wav")


def settings(url, seed=0, **stream):
    return from_dict(
        Config,
        {
            "model": {"size": "tiny"},
            "train": {"batch_size": BATCH},
            "seed": seed,
            "stream": {"url": str(url), "workers": 0, "window": 2, "lanes": 2, **stream},
        },
        "test",
    )


def take(config, count, start=0, **arguments):
    with open_stream(config, **arguments) as loader:
        stream = batches(loader, start)
        taken = list(itertools.islice(stream, count))
        stream.close()
    return taken


def members_by_id(folder):
    """What sample number n holds: shards by name, samples in their order, read by webdataset alone."""
    samples = webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
    return [{name: data for name, data in s.items() if name[0] != "_"} for s in samples]


def waveform(members):
    if "flac" in members:
        return soundfile.read(io.BytesIO(members["flac"]), dtype="int16")[0]
    with wave.open(io.BytesIO(members["wav"])) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_batches_have_the_shapes_that_the_model_takes(clips):
    for batch in take(settings(clips), 2):
        assert (batch.samples.shape, batch.samples.dtype) == ((BATCH,), torch.int64)
        assert (batch.frames.shape, batch.frames.dtype) == ((BATCH, 3, 64, 64), torch.uint8)
        assert (batch.waveform.shape, batch.waveform.dtype) == ((BATCH, LENGTH), torch.int16)
        assert (batch.lengths.shape, batch.lengths.dtype) == ((BATCH,), torch.int64)
        assert (batch.valid.shape, batch.valid.dtype) == ((BATCH,), torch.bool)
        assert batch.frames.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("seed", [0, 2**40 + 7])
def test_each_clip_comes_once_an_epoch_with_the_frame_of_its_draw(clips, seed):
    packed, chosen = members_by_id(clips), set()
    taken = take(settings(clips, seed), 6)
    assert [batch.epoch for batch in taken] == [0, 0, 0, 1, 1, 1]
    for epoch in (0, 1):
        of_epoch = taken[3 * epoch : 3 * epoch + 3]
        assert sorted(s for batch in of_epoch for s in batch.samples[batch.valid].tolist()) == list(range(COUNT))
        assert [int(batch.valid.sum()) for batch in of_epoch] == [4, 4, 3]
        draws = uniforms(seed, epoch, torch.arange(COUNT), Purpose.FRAME, 1)[:, 0].tolist()
        for batch in of_epoch:
            for row in np.flatnonzero(batch.valid.numpy()):
                sample = int(batch.samples[row])
                k = int(draws[sample] * FRAMES)
                chosen.add((sample, k))
                frame = np.asarray(Image.open(io.BytesIO(packed[sample][f"{k}.jpg"]))).astype(int)
                others = [
                    np.asarray(Image.open(io.BytesIO(packed[sample][f"{j}.jpg"]))) for j in range(FRAMES) if j != k
                ]
                mine = batch.frames[row].permute(1, 2, 0).numpy()
                assert np.abs(mine - frame).max() <= 3  # another decoder
                assert all(np.abs(mine - other.astype(int)).max() > 10 for other in others)
                audio = waveform(packed[sample])[:LENGTH]
                assert int(batch.lengths[row]) == len(audio)
                assert np.array_equal(batch.waveform[row].numpy(), audio)
    assert len({k for _, k in chosen}) == FRAMES
    assert len(chosen) > COUNT  # another epoch, other frames


def test_the_place_after_the_last_clip_is_empty_and_marked(clips):
    batch = take(settings(clips), 3)[2]
    (row,) = np.flatnonzero(~batch.valid.numpy())
    assert batch.samples[row] == -1
    assert batch.lengths[row] == 0
    assert not batch.frames[row].any()
    assert not batch.waveform[row].any()


def same(left, right):
    return left.epoch == right.epoch and all(torch.equal(a, b) for a, b in zip(left[1:6], right[1:6], strict=True))


def test_a_stream_taken_up_in_the_middle_goes_on_as_it_would_have(clips):
    whole = take(settings(clips), 8)
    for start in (1, 2, 3, 5):
        taken = take(settings(clips), 8 - start, start)
        assert all(same(a, b) for a, b in zip(taken, whole[start:], strict=True))
    assert not same(take(settings(clips, seed=1), 1)[0], whole[0])


def test_ranks_have_the_rows_of_the_same_batches(clips):
    whole = take(settings(clips), 4)
    parts = [take(settings(clips), 4, rank=rank, ranks=2) for rank in (0, 1)]
    for k, batch in enumerate(whole):
        for field in ("samples", "frames", "waveform", "lengths", "valid"):
            assert torch.equal(torch.cat([getattr(part[k], field) for part in parts]), getattr(batch, field))


def test_flac_and_wav_are_heard_alike(clips, tmp_path):
    flac = pack_clips(tmp_path / "flac", "flac")
    heard = []
    for folder in (clips, flac):
        keys = [json.loads(members["json"])["synthetic"] for members in members_by_id(folder)]
        rows = {}
        for batch in take(settings(folder), 3):
            for row in np.flatnonzero(batch.valid.numpy()):
                rows[keys[batch.samples[row]]] = (batch.waveform[row], batch.lengths[row])
        heard.append(rows)
    assert sorted(heard[0]) == sorted(heard[1]) == list(range(COUNT))
    assert all(torch.equal(a, b) for k in range(COUNT) for a, b in zip(heard[0][k], heard[1][k], strict=True))


def test_a_short_clip_is_padded_and_a_large_frame_made_small(tmp_path):
    folder = pack_clips(tmp_path / "short", seconds=1.5, size=80)
    packed = members_by_id(folder)
    batch = take(settings(folder), 1)[0]
    assert batch.frames.shape[2:] == (64, 64)
    for row in range(BATCH):
        audio = waveform(packed[int(batch.samples[row])])
        assert int(batch.lengths[row]) == len(audio) == 24000
        assert np.array_equal(batch.waveform[row, :24000].numpy(), audio)
        assert not batch.waveform[row, 24000:].any()


@pytest.mark.slow
def test_a_clip_that_cannot_be_used_is_left_out_by_name(clips, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in clips.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    dataset = Dataset(Store(str(folder)))
    victim = int(dataset.starts[1])  # the first sample of the second shard
    tar = folder / dataset[1].name
    key = members_by_id(folder)[victim]
    content = bytearray(tar.read_bytes())
    content[content.index(key["wav"]) + 100] ^= 1
    tar.write_bytes(content)
    taken = take(settings(folder, max_bad=0.1), 3)
    lost = [int(s) for batch in taken for s in batch.samples[~batch.valid].tolist() if s >= 0]
    assert lost == [victim]
    with open_stream(settings(folder)) as loader:
        (bad,) = [one for batch in itertools.islice(loader.batches(0), 3) for one in batch.bad]
    assert bad.sample == victim
    assert tar.name in bad.where


@pytest.fixture(scope="module")
def s3(clips, tmp_path_factory):
    with LocalS3(tmp_path_factory.mktemp("store")) as server:
        (server.folder / "bucket" / "empty").mkdir(parents=True)
        for path in clips.iterdir():
            (server.folder / "bucket" / path.name).write_bytes(path.read_bytes())
        yield server


def as_users_have_it(monkeypatch, server, **changes):
    """Everything in the environment: the keys, and where the store is."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.options["endpoint_url"])
    for name, value in changes.items():
        monkeypatch.setenv(name, value)


def test_the_environment_says_where_the_store_is_and_who_asks(s3, clips, monkeypatch, tmp_path):
    as_users_have_it(monkeypatch, s3)
    taken = take(settings("s3://bucket", cache=str(tmp_path)), 3)
    assert all(same(a, b) for a, b in zip(taken, take(settings(clips), 3), strict=True))


@pytest.mark.parametrize(
    ("url", "environment", "kind", "message"),
    [
        (
            "s3://bucket",
            {"AWS_SECRET_ACCESS_KEY": "w" * 40},
            StoreError,
            "s3://bucket/index: access is refused .*AWS_SECRET",
        ),
        (
            "s3://bucket",
            {"AWS_ACCESS_KEY_ID": "AKIAWRONGWRONGWRONG0"},
            StoreError,
            "s3://bucket/index: access is refused",
        ),
        ("s3://none", {}, DatasetError, "s3://none holds no dataset: s3://none/index does not exist .*equiav pack"),
        ("s3://bucket/empty", {}, DatasetError, "s3://bucket/empty holds no dataset"),
        ("s4://bucket", {}, StoreError, "s4://bucket: Protocol not known: s4"),
    ],
)
def test_what_is_wrong_with_the_store_is_said_at_the_start(
    s3, monkeypatch, tmp_path, capsys, url, environment, kind, message
):
    as_users_have_it(monkeypatch, s3, **environment)
    with pytest.raises(kind, match=message):
        open_stream(settings(url, cache=str(tmp_path)))
    assert cli.main(["verify", url]) == (1 if kind is StoreError and "refused" in message else 2)
    told = capsys.readouterr().err
    assert re.search(f"^equiav verify: {message}", told)
    assert told.count("\n") == 1


def test_a_stream_from_nowhere_is_asked_for():
    with pytest.raises(
        ConfigError, match=r"stream\.url is not set, expected the folder of a packed dataset; `equiav pack`"
    ):
        open_stream(settings(""))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_lie_in_pinned_memory(clips):
    for batch in take(replace(settings(clips), device="cuda"), 2):
        assert all(values.is_pinned() for values in (batch.frames, batch.waveform, batch.lengths))
