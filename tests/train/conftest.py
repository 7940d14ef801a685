import pytest
import yaml

from equiav.config import DataConfig
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from streaming import Store
from streaming.pack import pack


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """26 clips in 7 shards, steps of 8: the last of an epoch has 2."""
    folder = tmp_path_factory.mktemp("pretrain")
    encode = EncodeSynthetic(World(1, 64, 3, 2.56), Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    pack([(f"clip-{k}", k) for k in range(26)], encode, Store(str(folder / "clips")), processes=0, part_items=4)
    settings = {
        "model": {"size": "tiny", "depth": 1},
        "data": {"audio_mean": -10.3, "audio_std": 3.9},
        "objective": {"centroid_size": 3},
        "stream": {"url": str(folder / "clips"), "window": 3, "lanes": 2, "workers": 0},
        "train": {"batch_size": 8, "micro_batch": 2, "steps": 24, "warmup_steps": 4, "lr": 1e-3, "lr_start": 1e-6},
        "checkpoint": {"every_steps": 4},
        "log_samples": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"
