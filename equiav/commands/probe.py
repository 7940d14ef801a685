"""`equiav probe`: what frozen features of a model are worth on labels."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from equiav.augment import Clips
from equiav.config import ConfigError, NotHere, ProbeConfig, TuneConfig, require
from equiav.data.labelled import Labelled, labelled
from equiav.evaluate.classification import results
from equiav.evaluate.look import Features, look
from equiav.evaluate.probe import choose_strength, fit_linear, nearest
from equiav.model.classifier import Classifier
from equiav.parallel import Ranks
from equiav.tasks import Classification
from equiav.terminal import say
from equiav.weights import initial_weights

FEATURES = 1  # version of the files that keep them


def run_probe(config: ProbeConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("device is cuda, expected cpu: this torch sees no GPU")
    probe = config.probe
    require("RANK" not in os.environ, "probe", "started as one of several processes", "one alone: `equiav probe`")
    learned, tested, notes = labelled(config.stream, probe, one=False)
    if tested is None:
        raise ConfigError(
            "probe.test_on is not set, nor is probe.test_url, expected parts of the dataset or another to test on"
        )
    for folder, setting in ((config.out, "out"), (config.features.expanduser(), "features")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotHere(f"{setting}: {folder} cannot be made ({error}); set a folder that can be written") from None
    for note in notes:
        say(note)
    task = Classification(config, TuneConfig(modality=probe.modality), 1, np.zeros)
    model = encoders(config, task)
    same = learned.dataset.fingerprint == tested.dataset.fingerprint
    both = [learned._replace(chosen=learned.chosen | tested.chosen)] if same else [learned, tested]
    found = [features(config, task, model, of) for of in both]
    bad = sum((of.bad for of in found), start=Counter[str]())
    x, right = of_clips(learned, found[0])
    x_tested, right_tested = of_clips(tested, found[-1])
    one = bool((right.sum(axis=1) == 1).all() and (right_tested.sum(axis=1) == 1).all())
    require(len(x) > 1, "probe.train_on", f"{len(x)} clip(s) that can be used", "two or more")
    strength, tried = choose_strength(x, right, probe.held_out, one, config.seed)
    linear = fit_linear(x, right, strength, one).scores(x_tested, one)
    names = learned.labels.classes.names
    said = {
        "model": config.weights or "random",
        "linear": results(right_tested, linear, names) | {"strength": strength, "held out": tried},
        "nearest": results(right_tested, nearest(x, right, x_tested, probe.neighbours), names)
        | {"neighbours": min(probe.neighbours, len(x))},
        "learned from": len(x),
        "dataset": tested.url,
        "parts": probe.test_on,
        "of": tested.clips,
        "frames": probe.test_frames,
        "modality": probe.modality,
        "bad": dict(bad),
    }
    (config.out / "results.json").write_text(json.dumps(said, indent=1, allow_nan=False))
    measure = "accuracy" if one else "mAP"
    for how in ("linear", "nearest"):
        value, (low, high) = said[how][measure], said[how][f"{measure} 95%"] or (math.nan, math.nan)
        value = math.nan if value is None else value
        say(f"{how:8s} {measure} {value:.4f} ({low:.4f} to {high:.4f}) on {len(x_tested):,} clips")
    say(f"{said['model']}, {len(x):,} clips to learn from, strength {strength:g}; {config.out / 'results.json'}")


def encoders(config: ProbeConfig, task: Classification) -> Classifier:
    with torch.device("meta"):
        model = task.build()
    model.to_empty(device="cpu").init_weights(config.seed)
    if config.weights:
        imported = initial_weights(config.weights, config, config.seed, predicts=False, patience=config.stream.patience)
        imported.restrict_to([name for name in model.state_dict() if not name.startswith("head.")])
        for side in ("audio", "image"):
            lacks = any(name.startswith(f"{side}.") for name in imported.fresh)
            require(
                not lacks,
                "weights",
                config.weights,
                f"a model with an encoder for {side}; probe.modality can do without",
            )
        model.load_state_dict(imported.state, strict=False)
        for line in imported.notes:
            say(line)
    return model.to(torch.device(config.device)).eval()


def features(config: ProbeConfig, task: Classification, model: Classifier, of: Labelled) -> Features:
    """Of the chosen clips; from the disk, where the same were asked for before."""
    path = config.features.expanduser() / f"{digest(config, model, of)}.safetensors"
    if kept := read_features(path):
        say(f"features of {len(kept.samples):,} clips of {of.url}: {path}")
        return kept

    def compute(clips: Clips, computes: torch.autocast) -> Tensor:
        audio, image = task.inputs(clips)
        with computes:
            return model.pooled(audio, image).double()

    say(f"looks at {of.clips:,} clips of {of.url}")
    found = look(config, config.probe, of.dataset, Ranks(config.device), of.chosen, compute)
    found = found._replace(values=found.values.astype(np.float32))
    if found.bad or len(found.samples) < of.clips:  # they may be there another time
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.bad.most_common(3))
        say(
            f"of {of.clips - len(found.samples):,} of {of.clips:,} clips nothing could be used ({reasons}); features are not kept"
        )
        return found
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({"samples": found.samples, "values": found.values}, part)
    part.replace(path)
    return found


def read_features(path: Path) -> Features | None:
    try:
        kept = load_file(path)
        return Features(kept["samples"], kept["values"], Counter())
    except (OSError, KeyError, SafetensorError):  # absent, or of a disk that was full
        return None


def digest(config: ProbeConfig, model: Classifier, of: Labelled) -> str:
    """Of all that features depend on."""
    found = hashlib.sha256()
    about = [FEATURES, asdict(config.model), asdict(config.data), config.probe.modality, config.probe.test_frames]
    about += [config.train.precision, config.device, of.dataset.fingerprint]
    found.update(json.dumps(about).encode())
    found.update(np.packbits(of.chosen).tobytes())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("head."):
            found.update(name.encode() + value.cpu().numpy().tobytes())
    return found.hexdigest()[:32]


def of_clips(of: Labelled, found: Features) -> tuple[np.ndarray, np.ndarray]:
    """-> features (n, D), classes (n, classes) bool, of those chosen clips that could be used."""
    kept = of.chosen[found.samples]
    return found.values[kept], of.labels.classes.many_hot(found.samples[kept]).astype(bool)
