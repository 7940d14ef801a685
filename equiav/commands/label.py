"""`equiav label`: says of the clips of a dataset which classes they have."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from equiav.config import require
from equiav.data.labels import (
    FOLDERS,
    Said,
    classes_of_table,
    columns_of,
    from_folders,
    give,
    read_classes,
    read_label_file,
)
from equiav.terminal import say
from streaming import Dataset, Store
from streaming.labels import write_labels

NAMED = 5


@dataclass(frozen=True)
class LabelConfig:
    """Gives the clips of a dataset their labels, by their names; the shards stay as they are. The labels it had are replaced."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the dataset; it must be writable."""
    labels: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = field(default=())
    """Files of labels: AudioSet's, VGGSound's, ESC-50's, FSD50K's, Kinetics' or UCF101's, CAV-MAE's lists (.json), or
    path,label[;label] a line. And `folders`: a clip's class is the folder that it lay in."""
    columns: str = ""
    """Of a table of yours: name=COLUMN,label=COLUMN[,split=COLUMN]. label=*: each other column is a class, with 1 where a clip
    has it. Without it: what the file looks like."""
    separator: str = ""
    """Of the table's columns. Empty: a tab, a semicolon or a comma, by what its head has."""
    between: str = ";"
    """Of the labels in one cell of the table."""
    classes: Path | None = None
    """File of all classes in their order: a name a line, or as AudioSet, CAV-MAE, FSD50K or UCF101 have it. Without it: those
    that occur."""
    other: str = ""
    """Of these classes, the one of clips whose label is none of them."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""

    def __post_init__(self) -> None:
        require(bool(self.between), "between", self.between, "what separates labels")
        require(self.patience >= 0, "patience", self.patience, "0 or more")


def run_label(config: LabelConfig) -> None:
    require(bool(config.url), "url", "not given", "the folder of a dataset")
    require(bool(config.labels), "labels", "not given", f"files of labels, or {FOLDERS}")
    dataset = Dataset(Store(config.url, config.patience))
    columns = columns_of(config.columns, config.separator, config.between)
    classes = read_classes(config.classes.expanduser()) if config.classes else []
    found = from_folders(dataset) if FOLDERS in config.labels else {}
    stems = Counter(Path(name).stem for name in config.labels)
    for name in config.labels:
        require(stems[Path(name).stem] == 1, "labels", name, "files of different names: a file's name may be a part's")
        for clip, said in read_label_file(Path(name).expanduser(), columns).items() if name != FOLDERS else ():
            found.setdefault(clip, Said([], [])).add(*said)
    if columns and columns.label == "*" and not classes:
        tables = (Path(name).expanduser() for name in config.labels if name != FOLDERS)
        classes = sorted({one for table in tables for one in classes_of_table(table, columns)})
    given = give(dataset, found, classes, config.other)
    write_labels(dataset.store, dataset.fingerprint, given.labels)
    of, parts = given.labels.classes, given.labels.parts
    say(
        f"{dataset.samples - len(given.without):,} of {dataset.samples:,} clips have labels, {len(of.values):,} in all, "
        f"of {len(of.names):,} classes"
    )
    if parts.names:
        listed = [f"{name} ({count:,})" for name, count in zip(parts.names, parts.counts().tolist(), strict=True)]
        say(f"  parts: {', '.join(listed[:NAMED])}{', ...' if len(listed) > NAMED else ''}")
    empty = [name for name, count in zip(of.names, of.counts(), strict=True) if not count]
    for listed, what in (
        (given.without, "clips without a label"),
        (given.unused, "names in the files that no clip has"),
        (empty, "classes without a clip"),
    ):
        if listed:
            more = ", ..." if len(listed) > NAMED else ""
            say(f"  {len(listed):,} {what}: {', '.join(listed[:NAMED])}{more}")
