"""`equiav finetune`: trains encoders and a linear layer on a dataset's labels; starts, goes on, or says that it is finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from equiav.config import FinetuneConfig
from equiav.data.labelled import labelled
from equiav.evaluate.classification import results, score
from equiav.evaluate.look import reader
from equiav.evaluate.paper import beside_the_paper
from equiav.parallel import Ranks
from equiav.tasks import Classification
from equiav.train.carry import carry_out
from equiav.train.run import Done
from equiav.weights import CLASSES

RESULTS, TABLE = "results.json", "results.md"


def run_finetune(config: FinetuneConfig) -> None:
    tune = config.tune
    learned, tested, notes = labelled(config.stream, tune, tune.loss == "one", needs_label=tune.balance)
    classes = learned.labels.classes
    often = learned.labels.balanced(learned.chosen) if tune.balance else learned.chosen.astype(np.float64)
    if tune.epochs:
        per_epoch = -(-learned.clips // config.train.batch_size)
        steps = max(1, round(tune.epochs * per_epoch))
        train = replace(config.train, steps=steps, warmup_steps=min(steps, round(tune.warmup_epochs * per_epoch)))
        config = replace(config, train=train)
    learns_from = {"labels": learned.labels.digest, "clips": sha256(often.tobytes()).hexdigest()}
    once = bool((often == 1).all())
    task = Classification(config, tune, len(classes.names), classes.many_hot, learns_from, None if once else often)

    def then(ranks: Ranks, done: Done, tell: Callable[[str], None]) -> dict[str, str]:
        beside = {
            CLASSES: json.dumps({"classes": classes.names, "modality": tune.modality, "loss": tune.loss}, indent=1)
        }
        if not tested:
            return beside
        found = score(config, task, done.state.model, tested.dataset, ranks, tested.chosen)
        right = tested.labels.classes.many_hot(found.samples).astype(bool)
        about = {
            "dataset": tested.url,
            "parts": tune.test_on,
            "of": tested.clips,
            "frames": tune.test_frames,
            "bad": dict(found.bad),
        }
        said = {**results(right, found.values, classes.names), **about}
        beside |= {RESULTS: json.dumps(said, indent=1, allow_nan=False), TABLE: beside_the_paper(config, said)}
        if ranks.rank == 0:
            tell(in_words(said))
        return beside

    def again() -> str:
        """A run that is finished is not tested anew: its weights may be gone from here."""
        path = config.out / "model" / RESULTS
        before = json.loads(path.read_text()) if path.exists() else {}
        asked = {"dataset": tested.url, "parts": tune.test_on, "frames": tune.test_frames} if tested else {}
        if all(before.get(what) == value for what, value in asked.items()):
            return ""
        return f"it was tested on {before.get('dataset', 'nothing')}, and is not tested anew; remove {config.out}/model for that"

    def ready(ranks: Ranks) -> None:
        """Whether there is room for the test is known before the first step."""
        if tested:
            reader(config, tune, tested.dataset, ranks, tested.chosen, 0.5, workers=0).close()

    carry_out("finetune", config, task, then, notes, again, ready)


def in_words(said: dict[str, Any]) -> str:
    name = "accuracy" if "accuracy" in said else "mAP"
    low, high = said[f"{name} 95%"] or (math.nan, math.nan)
    missing = f"; of {said['of'] - said['clips']:,} nothing could be used" * (said["clips"] < said["of"])
    what = f"{said['dataset']}" + f" ({said['parts']})" * bool(said["parts"])
    found = math.nan if said[name] is None else said[name]
    return f"{name} {found:.4f} ({low:.4f} to {high:.4f}) on {said['clips']:,} clips of {what}{missing}"
