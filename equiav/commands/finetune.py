"""`equiav finetune`: trains encoders and a linear layer on a dataset's labels; starts, goes on, or says that it is finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from equiav.config import FinetuneConfig, require
from equiav.data.stream import require_modalities
from equiav.evaluate.classification import results, score
from equiav.parallel import Ranks
from equiav.tasks import Classification
from equiav.train.carry import carry_out
from equiav.train.run import Done
from streaming import Dataset, DatasetError, Store
from streaming.labels import Labels, read_labels

__all__ = ["FinetuneConfig", "run_finetune"]
CLASSES, RESULTS = "classes.json", "results.json"


def run_finetune(config: FinetuneConfig) -> None:
    require(bool(config.stream.url), "stream.url", "not set", "the folder of a packed dataset; `equiav pack` makes one")
    tune = config.tune
    dataset, labels = opened(config, "stream.url", config.stream.url)
    require(len(labels.classes) > 1, "labels", f"{len(labels.classes)} class", "two or more, to be told apart")
    if tune.epochs:
        per_epoch = -(-dataset.samples // config.train.batch_size)
        steps = max(1, round(tune.epochs * per_epoch))
        train = replace(config.train, steps=steps, warmup_steps=min(steps, round(tune.warmup_epochs * per_epoch)))
        config = replace(config, train=train)
    task = Classification(config, tune, len(labels.classes), labels.many_hot, labels.digest)
    tested = opened(config, "tune.test_url", tune.test_url, labels) if tune.test_url else None
    notes = [
        f"{bare:,} of {of.samples:,} clips of {of.store.url} have no label: to each class they are an example of what it is not"
        for of, given in (pair for pair in ((dataset, labels), tested) if pair)
        if (bare := int((np.diff(given.starts) == 0).sum()))
    ]

    def then(ranks: Ranks, done: Done, tell: Callable[[str], None]) -> dict[str, str]:
        beside = {
            CLASSES: json.dumps({"classes": labels.classes, "modality": tune.modality, "loss": tune.loss}, indent=1)
        }
        if not tested:
            return beside
        found = score(config, task, done.state.model, tested[0], ranks)
        right = tested[1].many_hot(found.samples).astype(bool)
        said = results(right, found.scores, labels.classes, tune.loss == "one")
        about = {
            "dataset": tested[0].store.url,
            "of": tested[0].samples,
            "frames": tune.test_frames,
            "bad": dict(found.bad),
        }
        beside[RESULTS] = json.dumps({**said, **about}, indent=1, allow_nan=False)
        if ranks.rank == 0:
            name = "accuracy" if tune.loss == "one" else "mAP"
            low, high = said[f"{name} 95%"] or (math.nan, math.nan)
            missing = f"; of {tested[0].samples - said['clips']:,} nothing could be used" * (
                said["clips"] < tested[0].samples
            )
            tell(
                f"{name} {said[name] or math.nan:.4f} ({low:.4f} to {high:.4f}) on {said['clips']:,} clips of "
                f"{tested[0].store.url}{missing}"
            )
        return beside

    def again() -> str:
        """A run that is finished is not tested anew: its weights may be gone from here."""
        path = config.out / "model" / RESULTS
        before = json.loads(path.read_text()) if path.exists() else {}
        asked = {"dataset": tested[0].store.url, "frames": tune.test_frames} if tested else {}
        if all(before.get(what) == value for what, value in asked.items()):
            return ""
        return f"it was tested on {before.get('dataset', 'nothing')}, and is not tested anew; remove {config.out}/model for that"

    carry_out("finetune", config, task, then, notes, again)


def opened(config: FinetuneConfig, setting: str, url: str, like: Labels | None = None) -> tuple[Dataset, Labels]:
    """A dataset, and labels of it with which the run can do something. like: of the dataset that it learns from."""
    dataset = Dataset(Store(url, config.stream.patience))
    labels = read_labels(dataset)
    require_modalities(setting, dataset, config.tune.modality != "image", config.tune.modality != "audio")
    if config.tune.loss == "one" and (wrong := int((np.diff(labels.starts) != 1).sum())):
        raise DatasetError(
            f"{setting}: {wrong:,} of {dataset.samples:,} clips of {dataset.store.url} have not exactly one label; tune.loss=one "
            "needs that, tune.loss=many does not"
        )
    if like and labels.classes != like.classes:
        missing = sorted(set(labels.classes) ^ set(like.classes))
        raise DatasetError(
            f"{setting}: {dataset.store.url} has other classes than the dataset of stream.url ({', '.join(missing[:5])}, or "
            "another order); give both the same list: equiav label ... --classes FILE"
        )
    return dataset, labels
