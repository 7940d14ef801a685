"""`equiav finetune`: trains encoders and a linear layer on a dataset's labels; starts, goes on, or says that it is finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from equiav.config import FinetuneConfig, TuneConfig, require
from equiav.data.stream import require_modalities
from equiav.evaluate.classification import results, score
from equiav.evaluate.paper import beside_the_paper
from equiav.parallel import Ranks
from equiav.tasks import Classification
from equiav.train.carry import carry_out
from equiav.train.run import Done
from streaming import Dataset, DatasetError, Selection, Store
from streaming.labels import Labels, read_labels

__all__ = ["FinetuneConfig", "run_finetune"]
CLASSES, RESULTS, TABLE = "classes.json", "results.json", "results.md"


class Labelled(NamedTuple):
    """Clips with labels, to learn from or to test on."""

    dataset: Dataset
    labels: Labels
    chosen: np.ndarray  # (samples,) bool

    @property
    def clips(self) -> int:
        return int(self.chosen.sum())


def run_finetune(config: FinetuneConfig) -> None:
    require(bool(config.stream.url), "stream.url", "not set", "the folder of a packed dataset; `equiav pack` makes one")
    tune = config.tune
    learned, tested = labelled(config)
    classes = learned.labels.classes
    often = learned.labels.balanced(learned.chosen) if tune.balance else learned.chosen.astype(np.float64)
    selection = None if (often == 1).all() else Selection(often)
    if tune.epochs:
        per_epoch = -(-learned.clips // config.train.batch_size)
        steps = max(1, round(tune.epochs * per_epoch))
        train = replace(config.train, steps=steps, warmup_steps=min(steps, round(tune.warmup_epochs * per_epoch)))
        config = replace(config, train=train)
    task = Classification(config, tune, len(classes.names), classes.many_hot, learned.labels.digest, selection)

    def then(ranks: Ranks, done: Done, tell: Callable[[str], None]) -> dict[str, str]:
        beside = {
            CLASSES: json.dumps({"classes": classes.names, "modality": tune.modality, "loss": tune.loss}, indent=1)
        }
        if not tested:
            return beside
        found = score(config, task, done.state.model, tested.dataset, ranks, tested.chosen)
        right = tested.labels.classes.many_hot(found.samples).astype(bool)
        about = {
            "dataset": tested.dataset.store.url,
            "parts": tune.test_on,
            "of": tested.clips,
            "frames": tune.test_frames,
            "bad": dict(found.bad),
        }
        said = {**results(right, found.scores, classes.names), **about}
        beside |= {RESULTS: json.dumps(said, indent=1, allow_nan=False), TABLE: beside_the_paper(config, said)}
        if ranks.rank == 0:
            tell(in_words(said))
        return beside

    def again() -> str:
        """A run that is finished is not tested anew: its weights may be gone from here."""
        path = config.out / "model" / RESULTS
        before = json.loads(path.read_text()) if path.exists() else {}
        asked = {"dataset": tested.dataset.store.url, "frames": tune.test_frames} if tested else {}
        if all(before.get(what) == value for what, value in asked.items()):
            return ""
        return f"it was tested on {before.get('dataset', 'nothing')}, and is not tested anew; remove {config.out}/model for that"

    notes = [note for of in (learned, tested) if of for note in notes_on(of)]
    carry_out("finetune", config, task, then, notes, again)


def in_words(said: dict[str, Any]) -> str:
    name = "accuracy" if "accuracy" in said else "mAP"
    low, high = said[f"{name} 95%"] or (math.nan, math.nan)
    missing = f"; of {said['of'] - said['clips']:,} nothing could be used" * (said["clips"] < said["of"])
    what = f"{said['dataset']}" + f" ({said['parts']})" * bool(said["parts"])
    return f"{name} {math.nan if said[name] is None else said[name]:.4f} ({low:.4f} to {high:.4f}) on {said['clips']:,} clips of {what}{missing}"


def notes_on(of: Labelled) -> list[str]:
    url, classes = of.dataset.store.url, of.labels.classes
    bare = int((classes.each[of.chosen] == 0).sum())
    empty = [name for name, count in zip(classes.names, classes.counts(of.chosen), strict=True) if not count]
    notes = []
    if bare:
        notes.append(
            f"{bare:,} of {of.clips:,} clips of {url} have no label: to each class they are an example of what it is not"
        )
    if empty:
        notes.append(f"{len(empty)} classes have no clip among those of {url}: {', '.join(empty[:5])}")
    return notes


def labelled(config: FinetuneConfig) -> tuple[Labelled, Labelled | None]:
    """What is learned from, and what is tested on."""
    tune = config.tune
    opened = open_labels(config, "stream.url", config.stream.url)
    names = opened[1].classes.names
    require(len(names) > 1, "labels", f"{len(names)} class", "two or more, to be told apart")
    learned = chosen("tune.train_on" if tune.train_on else "stream.url", opened, tune.train_on, tune)
    same = not tune.test_url or tune.test_url == config.stream.url
    tested = None
    if tune.test_url or tune.test_on:
        of = opened if same else open_labels(config, "tune.test_url", tune.test_url)
        if of[1].classes.names != names:
            missing = sorted(set(of[1].classes.names) ^ set(names))
            raise DatasetError(
                f"tune.test_url: {of[0].store.url} has other classes than the dataset of stream.url "
                f"({', '.join(missing[:5])}, or another order); give both the same list: equiav label ... --classes FILE"
            )
        tested = chosen("tune.test_on" if tune.test_on else "tune.test_url", of, tune.test_on, tune)
    if tested and same and tune.test_on and not tune.train_on:
        learned = learned._replace(chosen=learned.chosen & ~tested.chosen)
        require(learned.clips > 0, "tune.test_on", tune.test_on, "parts that leave clips to learn from")
    if tested and same and tune.train_on and (both := int((learned.chosen & tested.chosen).sum())):
        raise DatasetError(
            f"tune.train_on {tune.train_on} and tune.test_on {tune.test_on or '(all)'} have {both:,} clips in common; "
            "a test says nothing of what was learned from"
        )
    return learned, tested


def open_labels(config: FinetuneConfig, setting: str, url: str) -> tuple[Dataset, Labels]:
    dataset = Dataset(Store(url, config.stream.patience))
    labels = read_labels(dataset)
    require_modalities(setting, dataset, config.tune.modality != "image", config.tune.modality != "audio")
    return dataset, labels


def chosen(setting: str, of: tuple[Dataset, Labels], names: str, tune: TuneConfig) -> Labelled:
    """Those clips of a dataset that are of these parts, if the run can do something with their labels."""
    dataset, labels = of
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed:
        there = ", ".join(labels.parts.names[:10]) or "none; `equiav label` takes them from a column `fold` or `split`"
        require(name in labels.parts.names, setting, name, f"parts of {dataset.store.url}: {there}")
    found = Labelled(dataset, labels, labels.parts.has(listed) if listed else np.ones(dataset.samples, bool))
    require(found.clips > 0, setting, names, f"parts of {dataset.store.url} that have clips")
    if tune.loss == "one" and (wrong := int((labels.classes.each[found.chosen] != 1).sum())):
        raise DatasetError(
            f"{setting}: {wrong:,} of {found.clips:,} clips of {dataset.store.url} have not exactly one label; tune.loss=one "
            "needs that, tune.loss=many does not"
        )
    return found
