"""Clips with labels, opened by what the settings say: to learn from, and to test on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equiav.config import LabelsConfig, StreamConfig, require
from equiav.data.stream import require_modalities
from streaming import Dataset, DatasetError, Store
from streaming.labels import Labels, read_labels


class Labelled(NamedTuple):
    dataset: Dataset
    labels: Labels
    chosen: np.ndarray  # (samples,) bool

    @property
    def clips(self) -> int:
        return int(self.chosen.sum())

    @property
    def url(self) -> str:
        return self.dataset.store.url

    def notes(self) -> list[str]:
        """What there is to say of them."""
        classes = self.labels.classes
        bare = int((classes.each[self.chosen] == 0).sum())
        counts = classes.counts(self.chosen)
        empty = [name for name, count in zip(classes.names, counts, strict=True) if not count]
        notes = []
        if bare:
            notes.append(
                f"{bare:,} of {self.clips:,} clips of {self.url} have no label: to each class they are an example of what it is "
                "not"
            )
        if empty:
            notes.append(f"{len(empty)} classes have no clip among those of {self.url}: {', '.join(empty[:5])}")
        return notes


def labelled(
    stream: StreamConfig, of: LabelsConfig, one: bool, needs_label: bool = False
) -> tuple[Labelled, Labelled | None, list[str]]:
    """What is learned from, what is tested on, and what there is to say of both. one: each clip has to have exactly one class.
    needs_label: nothing is learned from a clip without one."""
    stream.ready()
    opened = opened_at("stream.url", stream.url, stream, of)
    names = opened.labels.classes.names
    require(len(names) > 1, "labels", f"{len(names)} class", "two or more, to be told apart")
    learned, tested, notes = parts(opened, f"{of.section}.train_on", of.train_on, "stream.url", one), None, []
    if of.test_url or of.test_on:
        setting = f"{of.section}.test_url"
        other = opened_at(setting, of.test_url, stream, of) if of.test_url else opened
        if other.labels.classes.names != names:
            missing = sorted(set(other.labels.classes.names) ^ set(names))
            raise DatasetError(
                f"{setting}: {other.url} has other classes than the dataset of stream.url ({', '.join(missing[:5])}, or "
                "another order); give both the same list: equiav label ... --classes FILE"
            )
        tested = parts(other, f"{of.section}.test_on", of.test_on, setting, one)
        if other.dataset.fingerprint == opened.dataset.fingerprint:  # however it is spelled
            learned, notes = apart(of, learned, tested)
    if needs_label:
        learned = learned._replace(chosen=learned.chosen & (learned.labels.classes.each > 0))
    return learned, tested, [*notes, *learned.notes(), *(tested.notes() if tested else [])]


def apart(of: LabelsConfig, learned: Labelled, tested: Labelled) -> tuple[Labelled, list[str]]:
    """Of one dataset: what is tested on is not learned from."""
    if of.test_on and not of.train_on:
        learned = learned._replace(chosen=learned.chosen & ~tested.chosen)
        require(learned.clips > 0, f"{of.section}.test_on", of.test_on, "parts that leave clips to learn from")
        none = int((learned.labels.parts.each[learned.chosen] == 0).sum())
        if none:
            return learned, [
                f"{none:,} of the {learned.clips:,} clips that are learned from are of no part; {of.section}.train_on "
                "leaves them out"
            ]
        return learned, []
    both = int((learned.chosen & tested.chosen).sum())
    if both and of.train_on:
        raise DatasetError(
            f"{of.section}.train_on {of.train_on} and test_on {of.test_on or '(all)'} have {both:,} clips in common; "
            "a test says nothing of what was learned from"
        )
    return learned, [f"all {both:,} test clips are also training clips: the score measures memorisation"]


def opened_at(setting: str, url: str, stream: StreamConfig, of: LabelsConfig) -> Labelled:
    """All clips of a dataset."""
    dataset = Dataset(Store(url, stream.patience))
    labels = read_labels(dataset)
    require_modalities(setting, dataset, of.hears, of.sees)
    return Labelled(dataset, labels, np.ones(dataset.samples, bool))


def parts(of: Labelled, setting: str, names: str, of_all: str, one: bool) -> Labelled:
    """Those clips that are of these parts. of_all: the setting to name where no parts are."""
    there = of.labels.parts.names
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed:
        known = ", ".join(there[:10]) or "it has none; `equiav label` takes them from a column `fold` or `split`"
        require(name in there, setting, name, f"parts of {of.url}: {known}")
    found = of._replace(chosen=of.labels.parts.has(listed)) if listed else of
    require(found.clips > 0, setting, names, f"parts of {of.url} that have clips")
    if one and (wrong := int((of.labels.classes.each[found.chosen] != 1).sum())):
        raise DatasetError(
            f"{setting if listed else of_all}: {wrong:,} of {found.clips:,} clips of {of.url} have not exactly one label; "
            "tune.loss=one needs that, tune.loss=many does not"
        )
    return found
