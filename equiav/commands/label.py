"""`equiav label`: says of the clips of a dataset which classes they have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from equiav.commands.settings import LabelConfig
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


def run_label(config: LabelConfig) -> None:
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
