"""`equiav label`: says of the clips of a dataset which classes they have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from equiav.config import require
from equiav.data.labels import FOLDERS, from_folders, give, read_classes, read_label_file
from equiav.terminal import say
from streaming import Dataset, Store
from streaming.labels import write_labels

NAMED = 5


@dataclass(frozen=True)
class LabelConfig:
    """Gives the clips of a dataset their labels, by their names; the shards stay as they are. The labels it had are replaced."""

    url: tyro.conf.Positional[str] = ""
    """Folder of the dataset; it must be writable."""
    labels: tyro.conf.Positional[tuple[str, ...]] = field(default=())
    """Files of labels: AudioSet's, VGGSound's, ESC-50's, FSD50K's, Kinetics' or UCF101's, CAV-MAE's lists (.json), or
    path,label[;label] a line. Or `folders`: a clip's class is the folder that it lay in."""
    classes: Path | None = None
    """File of all classes in their order: a name a line, or CAV-MAE's index,mid,display_name. Without it: those that occur."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""

    def __post_init__(self) -> None:
        require(self.patience >= 0, "patience", self.patience, "0 or more")


def run_label(config: LabelConfig) -> None:
    require(bool(config.url), "url", "not given", "the folder of a dataset")
    require(bool(config.labels), "labels", "not given", f"files of labels, or {FOLDERS}")
    dataset = Dataset(Store(config.url, config.patience))
    classes = read_classes(config.classes.expanduser()) if config.classes else []
    if FOLDERS in config.labels:
        require(len(config.labels) == 1, "labels", " ".join(config.labels), f"files, or {FOLDERS} alone")
        found = from_folders(dataset)
    else:
        found = {}
        for name in config.labels:
            for clip, labels in read_label_file(Path(name).expanduser()).items():
                found.setdefault(clip, []).extend(label for label in labels if label not in found[clip])
    given = give(dataset, found, classes)
    write_labels(dataset.store, dataset.fingerprint, given.labels)
    labelled, all_of_them = dataset.samples - len(given.without), len(given.labels.values)
    say(
        f"{labelled:,} of {dataset.samples:,} clips have labels, {all_of_them:,} in all, of {len(given.labels.classes):,} classes"
    )
    counts = given.labels.counts
    empty = [name for name, count in zip(given.labels.classes, counts, strict=True) if not count]
    for listed, what in (
        (given.without, "clips without a label"),
        (given.unused, "names in the files that no clip has"),
        (empty, "classes without a clip"),
    ):
        if listed:
            more = ", ..." if len(listed) > NAMED else ""
            say(f"  {len(listed):,} {what}: {', '.join(listed[:NAMED])}{more}")
