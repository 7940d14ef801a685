"""Label files of datasets that people have -> which labels a clip has, by its name."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from equiav.config import ConfigError
from equiav.data.sources import key_of
from streaming import Dataset
from streaming.dataset import read_offsets
from streaming.labels import Labels

FOLDERS = "folders"
THREADS = 16  # shards whose keys are read together

Found = dict[str, list[str]]  # name of a clip -> its labels


def read_label_file(path: Path) -> Found:
    """By what the file looks like:

    - AudioSet's (# comments; YTID, start, end, "labels" in quotes)
    - VGGSound's (id, start, label, split; no head): clips are id_start, or id
    - a head with `filename` and `category` (ESC-50), `fname` and `labels` (FSD50K), `youtube_id` and `label` (Kinetics)
    - UCF101's and Speech Commands' lists: CLASS/name[.avi|.wav] [number] a line; HMDB51's CLASS_test_splitN.txt
    - path,label[;label]
    - CAV-MAE's and EquiAV's lists (.json)
    """
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, expected a file of labels") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is no UTF-8; save it as UTF-8") from None
    if path.suffix == ".json":
        return dict(_json(path, text))
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise ConfigError(f"{path}: has no labels")
    found: Found = {}
    for name, labels in _rows(path, lines):
        if not labels:
            raise ConfigError(f"{path}: {name} has no label")
        found.setdefault(name, []).extend(label for label in labels if label not in found[name])
    return found


def _json(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    try:
        for entry in json.loads(text)["data"]:
            labels = entry["labels"]
            yield (
                entry["video_id"],
                [label for one in ([labels] if isinstance(labels, str) else labels) for label in _split(one, ",")],
            )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a list of clips ({type(error).__name__}: {error}), expected "
            '{"data": [{"video_id": ..., "labels": ...}]}'
        ) from None


def _rows(path: Path, lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    head = next(csv.reader(lines[:1], skipinitialspace=True))
    for columns in (("filename", "category"), ("fname", "labels"), ("youtube_id", "label")):
        if set(columns) <= set(head):
            name, label = (head.index(column) for column in columns)
            rows = csv.reader(lines[1:], skipinitialspace=True)
            for number, row in enumerate(rows, 2):
                _require(path, number, len(row) == len(head), row, f"{len(head)} columns")
                clip = Path(row[name]).stem
                if {"time_start", "time_end"} <= set(head):  # Kinetics, as it is usually fetched
                    clip += "".join(f"_{int(row[head.index(at)]):06d}" for at in ("time_start", "time_end"))
                yield clip, _split(row[label], ",") if columns[0] == "fname" else [row[label]]
            return
    of_one = re.fullmatch(r"(.+)_test_split\d", path.stem)
    for number, row in enumerate(csv.reader(lines, skipinitialspace=True), 1):
        if of_one and len(row) == 1:  # HMDB51: name [number], of the class that the file is called after
            yield Path(row[0].rsplit(" ", 1)[0]).stem, [of_one[1]]
        elif len(row) == 1:  # CLASS/name [number]
            place = Path(row[0].rsplit(" ", 1)[0] if row[0].rpartition(" ")[2].isdigit() else row[0])
            _require(path, number, len(place.parts) > 1, row, "CLASS/name, or path,label[;label]")
            yield str(place.with_suffix("")), [place.parent.name]
        elif len(row) == 2:
            yield str(Path(row[0]).with_suffix("")), _split(row[1], ";")
        elif len(row) == 4 and _is_number(row[1]) and _is_number(row[2]):  # AudioSet
            yield row[0], _split(row[3], ",")
        elif len(row) == 4 and _is_number(row[1]):  # VGGSound; its names have commas
            yield f"{row[0]}_{int(float(row[1])):06d}", [row[2]]
        else:
            _require(path, number, False, row, "path,label[;label], or AudioSet's or VGGSound's columns")


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


def give(dataset: Dataset, found: Found, classes: Sequence[str] = ()) -> Given:
    """Labels to the clips of a dataset, by their names: a clip's key as it is, its last part, and either without the time that
    cutting a video puts behind it. classes: all there are, in their order; none: those that occur, sorted."""
    number = {name: k for k, name in enumerate(classes or sorted({one for listed in found.values() for one in listed}))}
    strange = sorted({one for listed in found.values() for one in listed} - number.keys())
    if strange:
        raise ConfigError(
            f"labels: {', '.join(strange[:5])} ({len(strange)} in all) are not among the {len(number)} classes"
        )
    by_name = {key_of(name): (name, listed) for name, listed in found.items()}
    last = Counter(name.rpartition("/")[2] for name in by_name)
    for name, of_it in list(by_name.items()):  # a list may have folders that the dataset has not
        if last[short := name.rpartition("/")[2]] == 1:
            by_name.setdefault(short, of_it)
    samples: list[list[int]] = []
    without, used = [], set()
    for key in keys_of(dataset):
        name, listed = next((by_name[form] for form in _forms(key) if form in by_name), ("", []))
        samples.append([number[one] for one in listed])
        used.add(name)
        if not listed:
            without.append(key)
    if not any(samples):
        names = ", ".join(repr(name) for name in list(found)[:3])
        raise ConfigError(
            f"labels: none of {len(found)} names, such as {names}, is that of a clip, such as {without[0]!r}"
        )
    return Given(Labels.of(list(number), samples), without, sorted(found.keys() - used))


def from_folders(dataset: Dataset) -> Found:
    found: Found = {}
    for key in keys_of(dataset):
        folder = key.rpartition("/")[0].rpartition("/")[2]
        if not folder:
            raise ConfigError(f"labels: clip {key!r} lay in no folder, so `{FOLDERS}` says nothing of its class")
        found[key] = [folder]
    return found


def keys_of(dataset: Dataset) -> Iterator[str]:
    """Of all samples, in the order of the index."""

    def of_a_shard(number: int) -> list[str]:
        offsets = read_offsets(dataset.store, dataset[number])
        return [offsets[k].key for k in range(len(offsets))]

    with ThreadPoolExecutor(THREADS) as pool:
        for keys in pool.map(of_a_shard, range(len(dataset))):
            yield from keys


def _forms(key: str) -> Iterator[str]:
    for form in (key, re.sub(r"-\d{9}$", "", key)):
        yield form
        yield form.rpartition("/")[2]


def read_classes(path: Path) -> list[str]:
    """`index,mid,display_name` as CAV-MAE has it (a class is its mid), or a name a line."""
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ConfigError(f"classes {path}: {error}; expected a name a line, or index,mid,display_name") from None
    rows = list(csv.reader(lines))
    if rows and rows[0][:2] == ["index", "mid"]:
        names = [row[1] for row in sorted(rows[1:], key=lambda row: int(row[0]))]
    else:
        names = [line.strip() for line in lines]
    twice = {name for name in names if names.count(name) > 1}
    if twice or not names:
        raise ConfigError(
            f"classes {path}: {', '.join(sorted(twice)[:5]) or 'none'} stand there twice, expected each once"
        )
    return names
