"""`equiav stats`: numbers that can be counted by hand."""

import numpy as np
import pytest
import torch
import webdataset
import yaml

from equiav import cli
from equiav.augment.logmel import log_mel
from equiav.commands.pack import IndexConfig, run_index
from equiav.config import load
from equiav.config.settings import Config
from equiav.data.clips import encode_frame, encode_wav
from tests.videos import ramp


@pytest.fixture
def clips(tmp_path):
    """Seven clips of noise in two shards, 2 to 5 s long, with one or two pictures; an eighth has no sound."""
    rng, waves = np.random.default_rng(0), []
    picture = encode_frame(ramp(0.5, (60, 40)), 90)
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar"), encoder=False) as tar:
            for k in range(4):
                key, members = f"clip-{4 * shard + k}", {"0.jpg": picture}
                if k % 2:
                    members["1.jpg"] = picture
                if key != "clip-7":
                    waves.append((rng.normal(size=16000 * (2 + k)) * 3000).astype(np.int16))
                    members["wav"] = encode_wav(waves[-1], 16000)
                tar.write({"__key__": key, **members})
    run_index(IndexConfig(str(tmp_path), tried=0))
    return tmp_path, waves


def test_they_are_what_is_heard(clips, capsys):
    folder, waves = clips
    values = torch.cat([log_mel(torch.from_numpy(w)[None].float() / 32768)[0].flatten() for w in waves]).double()
    assert cli.main(["stats", str(folder), "--write", str(folder / "data.yaml")]) == 0
    told = capsys.readouterr().out
    assert "8 clips in 2 shards" in told
    assert "training cannot use 1: no sound" in told
    assert "pictures: 1 of 4 clips, 2 of 4 clips" in told
    found = yaml.safe_load((folder / "data.yaml").read_text())["data"]
    assert found["audio_mean"] == pytest.approx(float(values.mean()), abs=1e-3)
    assert found["audio_std"] == pytest.approx(float(values.std(correction=0)), abs=1e-3)
    config, _ = load(Config, "test", ["--config", str(folder / "data.yaml")])
    assert config.data.audio_mean == found["audio_mean"]
    (folder / "labels.csv").write_text("clip-0,a;b\nclip-1,a\n")
    assert cli.main(["label", str(folder), str(folder / "labels.csv")]) == 0
    assert cli.main(["stats", str(folder)]) == 0
    assert "labels: 2 classes of 1 to 2 clips; 0.38 of a clip, 6 clips have none" in capsys.readouterr().out
    assert cli.main(["stats", str(folder), "--write", str(folder / "data.yaml")]) == 2
    assert "exists already; name a file that does not" in capsys.readouterr().err


def test_some_of_all_shards_are_heard(clips, capsys):
    assert cli.main(["stats", str(clips[0]), "--samples", "2"]) == 0
    assert "2 were heard" in capsys.readouterr().out
