"""What a dataset says of its samples: a list of classes, and which of them each sample has; and of which parts (folds, splits)
it is.

It lies beside the index, so that nobody reads shards to count classes, to balance them or to leave a fold out. It names the
index that it was made for, and can be made anew without touching a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from streaming.dataset import Dataset, DatasetError, NoDataset
from streaming.order import sample_of
from streaming.outside import parse, table
from streaming.store import Missing, Store

LABELS, FORMAT = "labels", 2
LARGEST, OF_A_CLIP = 64 << 20, 1 << 12  # bytes: of the names of classes and parts, of a clip's line, at most


class Sets:
    """Of a dataset: sample k has the names of numbers `values[starts[k] : starts[k + 1]]`, ascending."""

    def __init__(self, names: Sequence[str], each: Sequence[int], values: np.ndarray):
        """each: how many names a sample has."""
        self.names, self.values = list(names), values
        self.starts = np.zeros(len(each) + 1, np.int64)
        np.cumsum(each, out=self.starts[1:])

    @classmethod
    def of(cls, names: Sequence[str], samples: Sequence[Sequence[int]]) -> Sets:
        each = [sorted(set(one)) for one in samples]
        return cls(names, [len(one) for one in each], np.array([k for one in each for k in one], np.int32))

    def __len__(self) -> int:
        """Samples."""
        return len(self.starts) - 1

    def __getitem__(self, sample: int) -> np.ndarray:
        return self.values[self.starts[sample] : self.starts[sample + 1]]

    @property
    def each(self) -> np.ndarray:
        """(samples,) int64, how many it has."""
        return np.diff(self.starts)

    @property
    def samples(self) -> np.ndarray:
        """(values,) int64: the sample of each value."""
        return np.repeat(np.arange(len(self)), self.each)

    def counts(self, among: np.ndarray | None = None) -> np.ndarray:
        """(names,) int64, samples of each; of those `among` (samples,) bool, where it is given."""
        values = self.values if among is None else self.values[among[self.samples]]
        return np.bincount(values, minlength=len(self.names))

    def many_hot(self, samples: np.ndarray) -> np.ndarray:
        """ids of samples (b,), below 0 where there is none -> (b, names) float32."""
        hot = np.zeros((len(samples), len(self.names)), np.float32)
        for row, sample in enumerate(sample_of(samples).tolist()):
            if sample >= 0:
                hot[row, self[sample]] = 1
        return hot

    def has(self, names: Sequence[str]) -> np.ndarray:
        """(samples,) bool: whether it has one of these."""
        wanted = np.isin(self.values, [self.names.index(name) for name in names])
        return np.bincount(self.samples, wanted, len(self)) > 0


class Labels(NamedTuple):
    classes: Sets
    parts: Sets
    digest: str = ""

    def balanced(self, among: np.ndarray) -> np.ndarray:
        """among (samples,) bool -> (samples,) how often each of them comes in an epoch of as many, if rare classes come more
        often: in proportion to the sum of 1 / clips of a class over the classes that it has."""
        with np.errstate(divide="ignore"):
            rarity = 1 / (self.classes.counts(among) + 0.01)
        weights = np.bincount(self.classes.samples, rarity[self.classes.values], len(among)) * among
        total = np.cumsum(weights)[-1]
        if not total:
            raise DatasetError("none of the clips that are learned from has a label: there is nothing to balance")
        return weights * (among.sum() / total)


def write_labels(store: Store, fingerprint: str, labels: Labels) -> None:
    lines = "".join(
        f"{' '.join(map(str, labels.classes[k].tolist()))}|{' '.join(map(str, labels.parts[k].tolist()))}\n"
        for k in range(len(labels.classes))
    ).encode()
    head = {"format": FORMAT, "dataset": fingerprint, "classes": labels.classes.names, "parts": labels.parts.names,
            "checksum": _checksum(lines)}  # fmt: skip
    store.write(LABELS, json.dumps(head, ensure_ascii=False).encode() + b"\n" + lines)


def read_labels(dataset: Dataset) -> Labels:
    where = f"{dataset.store.url}/{LABELS}"
    try:
        content = dataset.store.read(LABELS, most=LARGEST + OF_A_CLIP * dataset.samples)
    except Missing:
        raise NoDataset(f"{dataset.store.url} has no labels; `equiav label` gives it some") from None
    first, _, lines = content.partition(b"\n")
    try:
        head = table(parse(first), "it")
        if head["format"] != FORMAT or not all(_names(head[what]) for what in ("classes", "parts")):
            raise ValueError
        checksum, made_for = head["checksum"], head["dataset"]
    except (ValueError, KeyError):
        raise DatasetError(
            f"{where} is damaged: its first line is no list of classes; `equiav label` makes it anew"
        ) from None
    if made_for != dataset.fingerprint:
        raise DatasetError(f"{where} was made for other shards than are there; `equiav label` makes it anew")
    try:
        if checksum != _checksum(lines):
            raise ValueError
        rows = [line.split(b"|") for line in lines.split(b"\n")[:-1]]
        classes, parts = _read(head["classes"], rows, 0), _read(head["parts"], rows, 1)
        if len(rows) != dataset.samples:
            raise ValueError
    except (ValueError, IndexError, OverflowError):
        raise DatasetError(
            f"{where} is damaged: its lines are not those that its first line says; `equiav label` makes it anew"
        ) from None
    return Labels(classes, parts, hashlib.sha256(content).hexdigest())


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _read(names: list[str], rows: list[list[bytes]], column: int) -> Sets:
    values = np.array(b" ".join(row[column] for row in rows).split(), np.int64)
    if len(values) and not 0 <= values.min() <= values.max() < len(names):
        raise ValueError
    return Sets(names, [len(row[column].split()) for row in rows], values.astype(np.int32))


def _checksum(lines: bytes) -> str:
    return hashlib.sha256(lines).hexdigest()
