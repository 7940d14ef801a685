"""`equiav finetune`: trains encoders and a linear layer on a dataset's labels; starts, goes on, or says that it is finished."""

from __future__ import annotations

import json
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
    dataset, tune = Dataset(Store(config.stream.url, config.stream.patience)), config.tune
    labels = read_labels(dataset)
    check(config, dataset, labels)
    if tune.epochs:
        per_epoch = -(-dataset.samples // config.train.batch_size)
        steps = max(1, round(tune.epochs * per_epoch))
        train = replace(config.train, steps=steps, warmup_steps=min(steps, round(tune.warmup_epochs * per_epoch)))
        config = replace(config, train=train)
    task = Classification(config, tune, len(labels.classes), labels.many_hot, labels.digest)
    tested = opened_test(config, labels)

    def then(ranks: Ranks, done: Done, tell: Callable[[str], None]) -> dict[str, str]:
        beside = {
            CLASSES: json.dumps({"classes": labels.classes, "modality": tune.modality, "loss": tune.loss}, indent=1)
        }
        if tested:
            found = score(config, task, done.state.model, tested[0], ranks)
            right = tested[1].many_hot(found.samples).astype(bool)
            said = results(right, found.scores, labels.classes, tune.loss == "one")
            beside[RESULTS] = json.dumps({**said, "dataset": tested[0].store.url, "of": tested[0].samples}, indent=1)
            name = "accuracy" if tune.loss == "one" else "mAP"
            if ranks.rank == 0:
                low, high = said[f"{name} 95%"]
                tell(
                    f"{name} {said[name]:.4f} ({low:.4f} to {high:.4f}) on {said['clips']:,} clips of {tested[0].store.url}"
                )
        return beside

    carry_out("finetune", config, task, then)


def check(config: FinetuneConfig, dataset: Dataset, labels: Labels) -> None:
    """What would teach nothing, or something else than is meant."""
    of_each = np.diff(labels.starts)
    if config.tune.loss == "one" and (wrong := int((of_each != 1).sum())):
        raise DatasetError(
            f"{dataset.store.url}: {wrong:,} of {dataset.samples:,} clips have not exactly one label; tune.loss=one needs that, "
            "tune.loss=many does not"
        )
    require_modalities(dataset, config.tune.modality != "image", config.tune.modality != "audio")
    require(len(labels.classes) > 1, "labels", f"{len(labels.classes)} class", "two or more, to be told apart")


def opened_test(config: FinetuneConfig, labels: Labels) -> tuple[Dataset, Labels] | None:
    if not config.tune.test_url:
        return None
    dataset = Dataset(Store(config.tune.test_url, config.stream.patience))
    theirs = read_labels(dataset)
    if theirs.classes != labels.classes:
        missing = sorted(set(labels.classes) ^ set(theirs.classes))
        raise DatasetError(
            f"tune.test_url: {dataset.store.url} has other classes than {config.stream.url} ({', '.join(missing[:5])}, or "
            "another order); give both the same list: equiav label ... --classes FILE"
        )
    return dataset, theirs
