"""Label files of datasets that people have -> which labels a clip has, and of which parts (folds, splits) it is, by its name."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from equiav.config import ConfigError
from equiav.data.clips import PICTURES
from equiav.data.sources import SOUNDS, VIDEOS, key_of
from streaming import Dataset
from streaming.dataset import read_offsets
from streaming.labels import Labels, Sets

FOLDERS = "folders"
HEADS = ("path", "file", "filename", "name", "clip", "video")
ENDINGS = {*VIDEOS, *SOUNDS, *PICTURES}
THREADS = 16  # shards whose keys are read together


class Said(NamedTuple):
    """Of a clip."""

    labels: list[str]
    parts: list[str]

    def add(self, labels: Sequence[str], parts: Sequence[str]) -> None:
        self.labels.extend(label for label in dict.fromkeys(labels) if label not in self.labels)
        self.parts.extend(part for part in dict.fromkeys(parts) if part not in self.parts)


Found = dict[str, Said]  # by a clip's name


class Columns(NamedTuple):
    """Of a table with a head: which says what."""

    name: str
    label: str  # "*": every other column is a class, and a clip is of those that have 1, true, yes or x
    split: str = ""
    separator: str = ""  # of columns; empty: a tab, a semicolon or a comma, by what the head has
    between: str = ";"  # of a cell's labels


def columns_of(text: str, separator: str, between: str) -> Columns | None:
    """name=COLUMN,label=COLUMN[,split=COLUMN]"""
    if not text:
        return None
    given = {name: column for name, _, column in (one.partition("=") for one in text.split(","))}
    if not {"name", "label"} <= given.keys() <= {"name", "label", "split"} or not all(given.values()):
        raise ConfigError(f"columns is {text!r}, expected name=COLUMN,label=COLUMN[,split=COLUMN]")
    separator = separator.replace("\\t", "\t")
    if len(separator) > 1:
        raise ConfigError(f"separator is {separator!r}, expected one character, or \\t")
    return Columns(given["name"], given["label"], given.get("split", ""), separator, between)


def read_label_file(path: Path, columns: Columns | None = None) -> Found:
    """By its columns, or by what the file looks like:

    - AudioSet's (# comments; YTID, start, end, "labels" in quotes)
    - VGGSound's (id, start, label, split; no head): clips are id_start, as they are usually fetched
    - a head with `filename` and `category` (ESC-50), `fname` and `labels` (FSD50K), `youtube_id` and `label` (Kinetics)
    - UCF101's and Speech Commands' lists: CLASS/name[.avi|.wav] [number] a line; HMDB51's CLASS_test_splitN.txt
    - path,label[;label], with or without a head
    - CAV-MAE's and EquiAV's lists (.json)

    A clip is of the part that a column `fold` or `split` says, or VGGSound's last; where there is none, of one that is called
    after the file. HMDB51's numbers are splitN-train (1), splitN-test (2), and neither (0).
    """
    try:
        text = path.read_text("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path}: no such file, expected a file of labels") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is no UTF-8; save it as UTF-8") from None
    found: Found = {}
    try:
        if path.suffix == ".json":
            pairs = list(_json(text))
        else:
            lines = [line for line in text.splitlines() if line.strip() and not line.startswith("# ")]
            read = _rows(path, lines) if columns is None else _by_columns(path, lines, columns)
            pairs = list(read) if lines else []
    except (csv.Error, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is no file of labels ({type(error).__name__}: {error}); docs/downstream.md lists them"
        ) from None
    for name, labels, part in pairs:
        if columns and name and not labels:  # a table may have rows without
            continue
        if not name or not labels:
            raise ConfigError(f"{path}: {name or 'a line'} has no {'label' if name else 'name'}")
        of = (path.stem if part is None else part).strip()
        if "," in of:
            raise ConfigError(f"{path}: {name} is of the part {of!r}, expected a name without a comma; rename it")
        found.setdefault(name, Said([], [])).add(labels, [of] if of else [])
    if not found:
        raise ConfigError(f"{path}: has no labels")
    return found


def labels_of_entry(labels: Any) -> list[str]:
    """Of an entry of a CAV-MAE list; none, where they are no text."""
    listed = [labels] if isinstance(labels, str) else labels if isinstance(labels, list) else []
    return [label for one in listed if isinstance(one, str) for label in _split(one, ",")]


Row = tuple[str, list[str], str | None]  # name, labels, part; None: the file's own


def _json(text: str) -> Iterator[Row]:
    for entry in json.loads(text)["data"]:
        if not isinstance(entry["video_id"], str):
            raise TypeError(f"video_id is {entry['video_id']!r}, expected text")
        yield entry["video_id"], labels_of_entry(entry["labels"]), None


def classes_of_table(path: Path, columns: Columns) -> list[str]:
    """Of a table with a column for each, those that no clip has included."""
    lines = path.read_text("utf-8-sig").splitlines()[:1]
    separator = columns.separator or next((one for one in "\t;," if one in lines[0]), ",")
    head = next(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    return [name for one in head if (name := one.strip()) not in (columns.name, columns.split)]


MISSING = ("nan", "NaN", "<NA>", "None", "NULL")  # what programs write into a cell that has nothing
YES, NO = ("1", "1.0", "true", "yes", "x"), ("", "0", "0.0", "false", "no")


def _by_columns(path: Path, lines: list[str], columns: Columns) -> Iterator[Row]:
    separator = columns.separator or next((one for one in "\t;," if one in lines[0]), ",")
    head, *rows = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    head = [name.strip() for name in head]
    for wanted in filter(None, (columns.name, columns.label.replace("*", ""), columns.split)):
        if head.count(wanted) != 1:
            raise ConfigError(f"{path}: {head.count(wanted)} columns are called {wanted!r}, of {', '.join(head)}")
    classes = [name for name in head if name not in (columns.name, columns.split)] if columns.label == "*" else []
    if twice := sorted(name for name, count in Counter(classes).items() if count > 1):
        raise ConfigError(f"{path}: {Counter(classes)[twice[0]]} columns are called {twice[0]!r}")
    for number, row in enumerate(rows, 2):
        _require(path, number, len(row) == len(head), row, f"{len(head)} columns, as in its head")
        cells = dict(zip(head, map(str.strip, row), strict=True))
        for name in classes:
            good = cells[name].lower() in (*YES, *NO)
            _require(path, number, good, f"{cells[name]!r} for {name}", "1 or 0, true or false, yes or no")
        labels = [name for name in classes if cells[name].lower() in YES]
        if columns.label != "*" and cells[columns.label] not in MISSING:
            labels = _split(cells[columns.label], columns.between)
        yield _stem(cells[columns.name]), labels, cells[columns.split] if columns.split else None


def _rows(path: Path, lines: list[str]) -> Iterator[Row]:
    head = next(csv.reader(lines[:1], skipinitialspace=True, strict=True))
    for columns in (("filename", "category"), ("fname", "labels"), ("youtube_id", "label")):
        if set(columns) <= set(head):
            name, label = (head.index(column) for column in columns)
            part = next((head.index(column) for column in ("fold", "split") if column in head), None)
            rows = csv.reader(lines[1:], skipinitialspace=True, strict=True)
            for number, row in enumerate(rows, 2):
                _require(path, number, len(row) == len(head), row, f"{len(head)} columns")
                clip = _stem(row[name])
                if {"time_start", "time_end"} <= set(head):  # Kinetics, as it is usually fetched
                    clip += "".join(f"_{int(float(row[head.index(at)])):06d}" for at in ("time_start", "time_end"))
                labels = _split(row[label], ",") if columns[0] == "fname" else _split(row[label], "\n")
                yield clip, labels, None if part is None else row[part].strip()
            return
    of_one = re.fullmatch(r"(.+)_test_(split\d)", path.stem)
    named = len(head) == 2 and head[0].lower() in HEADS and head[1].lower() in ("label", "labels", "class", "category")
    for number, row in enumerate(csv.reader(lines[named:], skipinitialspace=True, strict=True), 1 + named):
        if of_one and len(row) == 1:  # HMDB51: name [number], of the class that the file is called after
            clip = _without_number(row[0])
            part = {"1": f"{of_one[2]}-train", "2": f"{of_one[2]}-test"}.get(row[0].strip()[len(clip) :].strip(), "")
            yield _stem(clip), [of_one[1]], part
        elif len(row) == 1:  # CLASS/name [number]
            place = Path(_without_number(row[0]))
            _require(path, number, len(place.parts) > 1, row, "CLASS/name, or path,label[;label]")
            yield _stem(str(place)), [place.parent.name], None
        elif len(row) == 2:
            yield _stem(row[0]), _split(row[1], ";"), None
        elif len(row) == 4 and _is_number(row[1]) and _is_number(row[2]):  # AudioSet
            yield row[0], _split(row[3], ","), None
        elif len(row) == 4 and _is_number(row[1]):  # VGGSound; its names have commas
            yield f"{row[0]}_{int(float(row[1])):06d}", _split(row[2], "\n"), row[3].strip()
        else:
            _require(path, number, False, row, "path,label[;label], or AudioSet's or VGGSound's columns")


def _stem(name: str) -> str:
    """Without its ending, if that is one: a name may have dots."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in ENDINGS else name


def _without_number(line: str) -> str:
    name, _, last = line.strip().rpartition(" ")
    return name if last.isdigit() and name else line.strip()


def _split(text: str, by: str) -> list[str]:
    return [part for one in text.split(by) if (part := one.strip())]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _require(path: Path, number: int, condition: bool, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{path}, row {number}: found {found}, expected {expected}")


class Given(NamedTuple):
    labels: Labels
    without: list[str]  # keys of clips that have no label
    unused: list[str]  # names in the file that no clip has


def give(dataset: Dataset, found: Found, classes: Sequence[str] = (), other: str = "") -> Given:
    """Labels to the clips of a dataset, by their names: a clip's key, with or without the time that cutting a video puts behind
    it; or where one of both has folders that the other has not, and nothing else fits. classes: all there are, in their order;
    none: those that occur, sorted. other: of them, the class of what is none of them."""
    occur = {one for said in found.values() for one in said.labels}
    number = {name: k for k, name in enumerate(classes or sorted(occur))}
    if other and other not in number:
        raise ConfigError(f"other is {other!r}, expected one of the {len(number)} classes")
    strange = sorted(occur - number.keys())
    if strange and not other:
        raise ConfigError(
            f"labels: {', '.join(strange[:5])} ({len(strange)} in all) are not among the {len(number)} classes; "
            "--other CLASS makes them that one"
        )
    part_names = sorted({part for said in found.values() for part in said.parts})
    by_key: dict[str, str] = {}
    by_last: dict[str, list[str]] = {}
    for name in found:
        key = key_of(name)
        if key in by_key:
            raise ConfigError(
                f"labels: {by_key[key]!r} and {name!r} are names of one clip, {key!r}; give each its folder"
            )
        by_key[key] = name
        by_last.setdefault(key.rpartition("/")[2], []).append(key)
    fits: dict[str, str] = {}  # name by its last part -> the video that it was taken for
    samples: list[list[int]] = []
    parts: list[list[int]] = []
    without, used = [], set()
    for key in keys_of(dataset):
        video = re.sub(r"-\d{9}$", "", key)
        match = key if key in by_key else video if video in by_key else ""
        if not match:
            last = video.rpartition("/")[2]
            near = [one for one in by_last.get(last, ()) if one.endswith(f"/{video}") or video.endswith(f"/{one}")]
            before = fits.setdefault(near[0], video) if near else video
            if len(near) > 1 or before != video:
                both = near[:2] if len(near) > 1 else [before, video]
                raise ConfigError(f"labels: {last!r} may be {both[0]!r} or {both[1]!r}; write names with their folders")
            match = near[0] if near else ""
        said = found[by_key[match]] if match else Said([], [])
        samples.append([number[one if one in number else other] for one in said.labels])
        of_video = found[by_key[video]].parts if match == key != video and video in by_key else []
        parts.append([part_names.index(part) for part in {*said.parts, *of_video}])
        used.add(by_key.get(video, ""))
        used.add(by_key.get(match, ""))
        if not said.labels:
            without.append(key)
    if not any(samples):
        names = ", ".join(repr(name) for name in list(found)[:3])
        raise ConfigError(
            f"labels: none of {len(found)} names, such as {names}, is that of a clip, such as {without[0]!r}"
        )
    labels = Labels(Sets.of(list(number), samples), Sets.of(part_names, parts))
    return Given(labels, without, sorted(found.keys() - used))


def give_by_key(dataset: Dataset, found: dict[str, list[str]]) -> Labels:
    """Those that packing knows of its clips; a clip that is not named has none."""
    classes = sorted({one for listed in found.values() for one in listed})
    number = {name: k for k, name in enumerate(classes)}
    samples = [[number[one] for one in found.get(key, ())] for key in keys_of(dataset)]
    return Labels(Sets.of(classes, samples), Sets.of([], [[] for _ in samples]))


def from_folders(dataset: Dataset) -> Found:
    found: Found = {}
    for key in keys_of(dataset):
        folder = key.rpartition("/")[0].rpartition("/")[2]
        if not folder:
            raise ConfigError(f"labels: clip {key!r} lay in no folder, so `{FOLDERS}` says nothing of its class")
        found[key] = Said([folder], [])
    return found


def keys_of(dataset: Dataset) -> Iterator[str]:
    """Of all samples, in the order of the index."""

    def of_a_shard(number: int) -> list[str]:
        offsets = read_offsets(dataset.store, dataset[number])
        return [offsets[k].key for k in range(len(offsets))]

    with ThreadPoolExecutor(THREADS) as pool:
        for keys in pool.map(of_a_shard, range(len(dataset))):
            yield from keys


def read_classes(path: Path) -> list[str]:
    """`index,mid,display_name` as CAV-MAE has it (a class is its mid), `index,name,mid` without a head (FSD50K), `number name`
    (UCF101), or a name a line."""
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"classes {path}: {error}; expected a name a line, or index,mid,display_name") from None
    try:
        rows = list(csv.reader(lines))
    except csv.Error as error:
        raise ConfigError(f"classes {path}: {error}; expected a name a line, or index,mid,display_name") from None
    if rows and rows[0][:2] == ["index", "mid"]:
        wrong = [row for row in rows[1:] if len(row) < 2 or not row[0].isdigit()]
        if wrong:
            raise ConfigError(f"classes {path}: found {wrong[0]}, expected index,mid,display_name")
        names = [row[1] for row in sorted(rows[1:], key=lambda row: int(row[0]))]
    elif rows and all(len(row) == 3 and row[0] == str(k) for k, row in enumerate(rows)):
        names = [row[1] for row in rows]
    elif all(re.fullmatch(rf"{k} \S.*", line.strip()) for k, line in enumerate(lines, 1)):
        names = [line.strip().partition(" ")[2].strip() for line in lines]
    else:
        names = [line.strip() for line in lines]
    if not names:
        raise ConfigError(f"classes {path}: there are none, expected a name a line, or index,mid,display_name")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"classes {path}: {', '.join(sorted(twice)[:5])} stand there twice, expected each once")
    return names
