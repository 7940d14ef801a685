"""The attacked run and the reference are to be equal. For `tests.soak`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.numpy

if TYPE_CHECKING:
    from tests.soak.round import Round

# What a run says of lines of its log that it lacks, or that are not those that it wrote.
SAYS_SO = (
    r"(?i)(metrics\.jsonl|\blines?\b|\blog\b).*(missing|lack|nowhere|differ|changed|damaged|altered|wrong|lost|unlike|"
    r"not (the|those|what|whole)|no longer|cannot|gap|set aside)|(lack|missing|without|damaged|lost).*(metrics\.jsonl|\blines?\b)"
)


def compare(round_: Round) -> list[str]:
    """What differs."""
    reference, out = round_.folder / "reference", round_.out
    found = [
        *_metrics(round_, out, reference),
        *_weights(out, reference),
        *_quarantine(out, reference),
        *_samples(round_, out, reference),
        *_files(out, reference),
        *_left_over(round_),
    ]
    if not round_.lied:
        diff = round_.command("diff", str(reference), str(out))
        if diff.returncode:
            found.append(f"equiav diff ends with {diff.returncode}: {(diff.stdout + diff.stderr)[-500:]}")
    return found


def _metrics(round_: Round, out: Path, reference: Path) -> Iterator[str]:
    ours, theirs = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (out, reference))
    steps = round_.plan.settings["train"]["steps"]
    if [json.loads(line)["step"] for line in theirs] != list(range(steps)):
        yield "metrics of the reference: steps are missing, twice or in disorder"
    if ours == theirs:
        return
    asked = round_.lied or any(re.match("move|digit", event) for event in round_.happened)
    if asked and (said := _said(round_)):
        round_.notes.append(f"metrics.jsonl differs, and the run says so: {said[:3]}")
        expected = {json.loads(line)["step"]: line for line in theirs}
        wrong = [step for step, line in _by_step(ours) if line != expected.get(step) and step not in round_.lied]
        if wrong:
            yield f"metrics of steps {wrong[:9]} differ, and nobody changed these: said is only {said[:2]}"
        return
    first = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    more = f"; changed here: {sorted(round_.lied)[:9]}; nothing was said" if asked else ""
    yield (
        f"metrics differ, from line {first} on: {len(ours)} lines, expected {len(theirs)}; got "
        f"{_parts(ours[first : first + 1], theirs[first : first + 1])}{more}"
    )


def _said(round_: Round) -> list[str]:
    """Words about lines that are not what they were."""
    texts = [path.read_text(errors="replace") for path in sorted(round_.folder.glob("start-*.log"))]
    spoken = [line for text in texts for line in text.splitlines() if line.startswith("equiav ")]
    return [line for line in spoken if re.search(SAYS_SO, line)]


def _by_step(rows: list[str]) -> Iterator[tuple[int, str]]:
    for row in rows:
        try:
            yield json.loads(row)["step"], row
        except (ValueError, KeyError, TypeError):
            yield -1, row


def _parts(ours: list[str], theirs: list[str]) -> str:
    """Where two lines differ."""
    if not ours or not theirs:
        return f"{ours}, expected {theirs}"[:300]
    k = next((k for k, (a, b) in enumerate(zip(ours[0], theirs[0], strict=False)) if a != b), 0)
    return f"...{ours[0][max(0, k - 30) : k + 30]!r}, expected ...{theirs[0][max(0, k - 30) : k + 30]!r}"


def _weights(out: Path, reference: Path) -> Iterator[str]:
    ours, theirs = (safetensors.numpy.load_file(f / "model" / "model.safetensors") for f in (out, reference))
    names = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or ours[name].tobytes() != theirs[name].tobytes()
    ]
    if names:
        yield f"weights differ: {len(names)} tensors of {len(theirs)}, {names[0]} the first"


def _quarantine(out: Path, reference: Path) -> Iterator[str]:
    """As a list: each sample once."""
    ours, theirs = (
        sorted((row["sample"], row["reason"]) for row in lines(folder / "quarantine.jsonl"))
        for folder in (out, reference)
    )
    for name, rows in (("attacked", ours), ("reference", theirs)):
        twice = sorted({row[0] for row in rows if [other[0] for other in rows].count(row[0]) > 1})
        if twice:
            yield f"quarantine of the {name}: samples {twice[:9]} are listed more than once"
    if set(ours) != set(theirs):
        lacking, new = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
        yield f"quarantine: {len(ours)} rows, expected {len(theirs)}; lacking {lacking[:6]}, not expected {new[:6]}"


def _samples(round_: Round, out: Path, reference: Path) -> Iterator[str]:
    copies = sorted((round_.folder / "older").iterdir())
    ours, theirs = samples([*copies, out]), samples([reference])
    if ours != theirs:
        different = sorted(step for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step))
        yield f"samples of steps {different[:9]} differ: {ours.get(different[0])}, expected {theirs.get(different[0])}"


def _files(out: Path, reference: Path) -> Iterator[str]:
    """What else is a function of the run."""
    for name in ("model/config.json", "model/classes.json", "model/results.json"):
        ours, theirs = (
            (folder / name).read_text() if (folder / name).exists() else None for folder in (out, reference)
        )
        if ours != theirs:
            yield f"{name} differs: {_parts([ours or ''], [theirs or ''])}"


def _left_over(round_: Round) -> Iterator[str]:
    """Names in the bucket and in `out` that a run without events does not leave."""
    for ours, theirs in ((round_.kept, round_.runs / "reference"), (round_.out, round_.folder / "reference")):
        more = {
            name: example
            for name, example in _names(ours).items()
            if name not in _names(theirs) and not re.match(r"damaged-|stalls|not_finite|samples-|quarantine", name)
        }
        if more:
            yield f"left in {ours.name}: {sorted(more.values())[:9]}"
    steps = round_.plan.settings["train"]["steps"]
    for folder in round_.kept.glob("step-*"):
        files = any(
            path.is_file() for path in folder.rglob("*")
        )  # the server keeps folders that are empty: S3 has none
        if files and not (folder / "manifest.json").exists() and int(folder.name.split("-")[1]) < steps:
            yield f"left in the bucket: {folder.name}, which is no checkpoint"


def _names(folder: Path) -> dict[str, str]:
    """Paths within, as patterns."""
    found = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {re.sub(r"-[0-9a-f]{8,32}\b|\d+", "#", name): name for name in found}


def copy_of_log(out: Path, to: Path) -> None:
    """`out` as it is now, for a move to another machine, and for the samples that it names."""
    to.mkdir(parents=True)
    for path in out.iterdir() if out.exists() else ():
        if path.is_file():
            shutil.copy2(path, to)


def lines(path: Path) -> list[Any]:
    """Whole ones: the last may be under way, and what is damaged is none."""
    found = []
    for line in path.read_text(errors="replace").split("\n")[:-1] if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def samples(folders: list[Path]) -> dict[int, list[int]]:
    """Step -> the ids of its samples, in the order of the ranks, in the start that ran it last. Each folder is a later copy."""
    order: dict[str, int] = {}
    rows: dict[tuple[int, str, int], list[int]] = {}  # step, start, rank
    for folder in folders:
        for row in lines(folder / "starts.jsonl"):
            order.setdefault(row["token"], len(order))
        for path in folder.glob("samples-*.jsonl"):
            for token, step, ids in lines(path):
                rows[step, token, int(path.stem.split("-")[1])] = ids
    found: dict[int, dict[int, list[int]]] = {}
    for (step, token, _), ids in sorted(rows.items()):
        # a start that was killed before it was listed has no place: the first
        found.setdefault(step, {}).setdefault(order.get(token, -1), []).extend(ids)
    return {step: of_starts[max(of_starts)] for step, of_starts in found.items()}
