"""`equiav eval`: plain computations on the same clips, the same at every number of processes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from equiav import cli
from equiav.augment import Clips, make_views
from equiav.config import Config, DataConfig, from_dict
from equiav.data.clips import decode_frame
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from equiav.evaluate.retrieval import Pairs, zero_shot_retrieval
from equiav.evaluate.similarity import columns, similarities
from equiav.model import EquiAV
from equiav.weights import save_model
from streaming import Store
from streaming.pack import pack

CONFIG = from_dict(
    Config, {"model": {"size": "tiny", "depth": 1}, "data": {"audio_mean": -10.3, "audio_std": 3.9}}, "test"
)
COUNT = 37
WORLD = World(4, 64, 3, 2.56)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    encode = EncodeSynthetic(WORLD, Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    pack([(f"a/clip-{k}", k) for k in range(COUNT)], encode, Store(str(root / "clips")), processes=0, part_items=10)
    model = EquiAV(CONFIG.model, CONFIG.objective)
    model.init_weights(5)
    save_model(root / "run" / "model", model.state_dict(), CONFIG)
    return root


def clips(numbers):
    encode = EncodeSynthetic(WORLD, Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    frames = [decode_frame(encode(k)["1.jpg"], str(k)).copy() for k in numbers]
    waveform = torch.from_numpy(np.stack([WORLD.clip(k).audio for k in numbers]))
    pictures = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return Pairs(pictures, waveform, torch.full((len(numbers),), waveform.shape[1]))


def model_of(place):
    from equiav.weights import load_model

    return load_model(place / "run" / "model")[0]


def evaluate(place, out, *more, W=1):
    typed = [
        "eval",
        "--model",
        str(place / "run"),
        "--stream.url",
        str(place / "clips"),
        "--stream.workers",
        "0",
        "--out",
        str(out),
    ]
    typed += [str(word) for word in more]
    if W == 1:
        assert cli.main(typed) == 0
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(W), "-m", "equiav"]
        subprocess.run([*command, *typed], check=True)
    (found,) = out.glob("*.json")
    return json.loads(found.read_text()), next(out.glob("*.md")).read_text()


def test_retrieval_is_that_of_the_whole_matrix(place, tmp_path):
    said, table = evaluate(place, tmp_path / "one", "retrieval", "--batch", "8", "--benchmark", "AudioSet")
    expected = zero_shot_retrieval(model_of(place), CONFIG, clips(range(COUNT)))
    assert (said["clips"], said["of"]) == (COUNT, COUNT)
    for name, (mean, half) in expected.items():
        assert said[name]["mean"] == pytest.approx(mean)
        assert said[name]["half spread"] == pytest.approx(half)
    assert "| EquiAV, the paper (Table 4, AudioSet) | 30.1 | 53.3 | 62.9 | |" in table
    assert f"{100 / COUNT:.2f}" in table
    shared, _ = evaluate(place, tmp_path / "two", "retrieval", "--batch", "8", "--benchmark", "AudioSet", W=2)
    assert shared == said


def test_ways_to_retrieve_differ(place, tmp_path):
    found = [
        evaluate(place, tmp_path / str(k), "retrieval", *more)[0]
        for k, more in enumerate(
            ([], ["--embedding", "original"], ["--vectors", "own"], ["--frames", "3"], ["--seeds", "1"])
        )
    ]
    keys = [json.dumps({name: value for name, value in one.items() if " to " in name}) for one in found]
    assert len(set(keys)) == len(keys)
    assert found[1]["image to audio R@10"]["half spread"] == 0


def test_a_list_says_which_clips(place, tmp_path, capsys):
    entries = [{"video_id": f"clip-{k}", "wav": "x", "video_path": "x", "labels": ""} for k in range(12)]
    (tmp_path / "list.json").write_text(json.dumps({"data": entries}))
    said, _ = evaluate(place, tmp_path / "few", "--clips", tmp_path / "list.json")
    expected = zero_shot_retrieval(model_of(place), CONFIG, clips(range(12)))
    assert said["clips"] == 12
    assert said["audio to image R@1"]["mean"] == pytest.approx(expected["audio to image R@1"][0])
    capsys.readouterr()
    for extra, message in (({"video_id": "gone"}, "1 of 13 clips of"), (None, "none of 1 names, such as 'gone'")):
        data = [*entries, entries[0] | extra] if extra else [entries[0] | {"video_id": "gone"}]
        (tmp_path / "list.json").write_text(json.dumps({"data": data}))
        typed = [
            "--model",
            str(place / "run"),
            "--stream.url",
            str(place / "clips"),
            "--clips",
            str(tmp_path / "list.json"),
        ]
        assert cli.main(["eval", *typed]) in (1, 2)
        assert message in capsys.readouterr().err


def test_similarity_as_trained_is_that_of_training(place):
    """What the objective compares, for the draws of the same seed, epoch and clips."""
    pairs, model = clips(range(6)), model_of(place)
    batch = Clips(0, torch.arange(6), pairs.frames, pairs.waveform, pairs.lengths, torch.ones(6, dtype=torch.bool))
    with torch.no_grad():
        z_a, aug_a, z_v, aug_v, *_ = model(*make_views(CONFIG, batch))
        found = similarities(model, CONFIG, batch, CONFIG.seed, torch.autocast("cpu", enabled=False))
    for side, z, aug in (("audio", z_a, aug_a), ("image", z_v, aug_v)):
        column = columns().index((side, "as trained", "similarity"))
        assert torch.allclose(found[:, column], torch.cosine_similarity(z, aug).double(), atol=1e-5)


def test_kinds_are_told_apart(place, tmp_path):
    said, table = evaluate(place, tmp_path / "one", "similarity", "--batch", "8")
    assert list(said["image"]) == ["as trained", "crop", "jitter", "blur", "flip", "gray"]
    assert list(said["audio"]) == ["as trained", "crop", "jitter", "blur", "flip", "mask and shift"]
    flips = said["image"]["flip"]
    assert flips["sensitivity"] != 0  # against not flipping
    assert said["image"]["crop"]["sensitivity"] != 0
    assert table.count("± ") > 30
    shared, _ = evaluate(place, tmp_path / "two", "similarity", "--batch", "8", W=2)
    assert shared == said


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "model is not set"),
        (["--model", "RUN"], "stream.url is not set"),
        (["similar"], "what: found 'similar', expected one of retrieval, similarity"),
        (["--model", "nowhere", "--stream.url", "CLIPS"], "nowhere: no config.json there"),
        (["--model", "RUN", "--stream.url", "nowhere"], "nowhere holds no dataset"),
        (
            ["--model", "RUN", "--stream.url", "CLIPS", "--clips", "no.json"],
            "clips is no.json, expected a list that exists",
        ),
        (["--model", "RUN", "--stream.url", "CLIPS", "--frames", "0"], "frames is 0, expected 1 to 1000"),
    ],
)
def test_mistakes(place, capsys, typed, said):
    places = {"RUN": str(place / "run"), "CLIPS": str(place / "clips")}
    assert cli.main(["eval", *(places.get(word, word) for word in typed)]) in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "eval: " in line]
    assert said in lines[-1]
