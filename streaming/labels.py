"""What a dataset says of its samples: a list of classes, and which of them each sample has.

It lies beside the index, so that nobody reads shards to count classes or to balance them. It names the index that it was
made for, and can be made anew without touching a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from streaming.dataset import Dataset, DatasetError, NoDataset
from streaming.store import Missing, Store

LABELS, FORMAT = "labels", 1


class Labels:
    """Of a dataset: the classes of sample k are `values[starts[k] : starts[k + 1]]`, ascending."""

    def __init__(self, classes: Sequence[str], starts: np.ndarray, values: np.ndarray, digest: str = ""):
        self.classes, self.starts, self.values, self.digest = list(classes), starts, values, digest

    @classmethod
    def of(cls, classes: Sequence[str], samples: Sequence[Sequence[int]]) -> Labels:
        starts = np.zeros(len(samples) + 1, np.int64)
        np.cumsum([len(set(one)) for one in samples], out=starts[1:])
        return cls(classes, starts, np.array([k for one in samples for k in sorted(set(one))], np.int32))

    def __len__(self) -> int:
        """Samples."""
        return len(self.starts) - 1

    def __getitem__(self, sample: int) -> np.ndarray:
        return self.values[self.starts[sample] : self.starts[sample + 1]]

    @property
    def counts(self) -> np.ndarray:
        """(classes,) int64, samples of each."""
        return np.bincount(self.values, minlength=len(self.classes))

    def many_hot(self, samples: np.ndarray) -> np.ndarray:
        """samples (b,), below 0 where there is none -> (b, classes) float32."""
        hot = np.zeros((len(samples), len(self.classes)), np.float32)
        for row, sample in enumerate(samples.tolist()):
            if sample >= 0:
                hot[row, self[sample]] = 1
        return hot


def write_labels(store: Store, fingerprint: str, labels: Labels) -> None:
    lines = "".join(" ".join(map(str, labels[k].tolist())) + "\n" for k in range(len(labels))).encode()
    head = {"format": FORMAT, "dataset": fingerprint, "classes": labels.classes, "checksum": _checksum(lines)}
    store.write(LABELS, json.dumps(head, ensure_ascii=False).encode() + b"\n" + lines)


def read_labels(dataset: Dataset) -> Labels:
    where = f"{dataset.store.url}/{LABELS}"
    try:
        content = dataset.store.read(LABELS)
    except Missing:
        raise NoDataset(f"{dataset.store.url} has no labels; `equiav label` gives it some") from None
    first, _, lines = content.partition(b"\n")
    try:
        head = json.loads(first)
        classes, checksum, made_for = head["classes"], head["checksum"], head["dataset"]
        texts = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if head["format"] != FORMAT or not texts or len(set(classes)) != len(classes):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DatasetError(
            f"{where} is damaged: its first line is no list of classes; `equiav label` makes it anew"
        ) from None
    if made_for != dataset.fingerprint:
        raise DatasetError(f"{where} was made for other shards than are there; `equiav label` makes it anew")
    rows = lines.split(b"\n")[:-1]
    try:
        values = np.array(lines.split(), np.int64) if checksum == _checksum(lines) else np.array([-1])
    except (ValueError, OverflowError):
        values = np.array([-1])
    if len(rows) != dataset.samples or (len(values) and not 0 <= values.min() <= values.max() < len(classes)):
        raise DatasetError(
            f"{where} is damaged: its lines are not those that its first line says; `equiav label` makes it anew"
        )
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row.split()) for row in rows], out=starts[1:])
    return Labels(classes, starts, values.astype(np.int32), hashlib.sha256(content).hexdigest())


def _checksum(lines: bytes) -> str:
    return hashlib.sha256(lines).hexdigest()
