"""Model weights on disk: our folder of `model.safetensors` and `config.json`, and checkpoints that others have published."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from torch.serialization import safe_globals

from equiav.config import ConfigError, ModelSettings, require, to_dict
from equiav.known import SETTINGS, model_folder, model_store, read_settings
from equiav.model import EquiAV
from equiav.model.classifier import Classifier
from equiav.model.importers import CheckpointError, Format, Imported, detect, import_state, own_state, strip
from streaming import Store
from streaming.store import Missing

WEIGHTS = "model.safetensors"
CLASSES = "classes.json"  # of a fine-tuned model


class Classes(NamedTuple):
    """What a fine-tuned model tells apart, and from what."""

    names: list[str]
    modality: str  # audio, image, both
    one: bool  # a clip has one of them


def save_model(folder: Path, weights: Mapping[str, Tensor], settings: ModelSettings) -> None:
    """Weights, and what it takes to use them. `config.json` is written last: where it stands, its weights are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).unlink(missing_ok=True)
    safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    content = {f.name: getattr(settings, f.name) for f in dataclasses.fields(ModelSettings)}
    temporary = folder / f"{SETTINGS}.part"
    temporary.write_text(json.dumps(to_dict(ModelSettings(**content)), indent=2) + "\n")
    temporary.replace(folder / SETTINGS)


def load_model(folder: Path) -> tuple[EquiAV, ModelSettings]:
    if (folder / CLASSES).is_file():
        raise ConfigError(
            f"{folder} was fine-tuned: it names classes, and has no heads that embed; `equiav predict` and `equiav probe` use it"
        )
    state, settings = read_folder(folder)
    with torch.device("meta"):
        model = EquiAV(settings.model, settings.objective)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{folder / WEIGHTS}: does not hold the weights of {folder / SETTINGS}: {error}") from None
    return model.eval(), settings


def load_classifier(folder: Path) -> tuple[Classifier, ModelSettings, Classes]:
    state, settings = read_folder(folder)
    source = folder / CLASSES
    try:
        said = json.loads(source.read_text("utf-8"))
        classes = Classes(said["classes"], said["modality"], said["loss"] == "one")
        texts = isinstance(classes.names, list) and all(isinstance(name, str) for name in classes.names)
        if not texts or len(set(classes.names)) != len(classes.names):
            raise ValueError("classes are no list of distinct names")
        if classes.modality not in ("audio", "image", "both") or said["loss"] not in ("one", "many"):
            raise ValueError(f"modality is {classes.modality!r}, loss {said['loss']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{source} does not say the classes of a fine-tuned model: {error}") from None
    with torch.device("meta"):
        hears, sees = classes.modality != "image", classes.modality != "audio"
        model = Classifier(settings.model, len(classes.names), hears, sees)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{folder / WEIGHTS}: does not hold the weights of {source}: {error}") from None
    return model.eval(), settings, classes


def read_folder(folder: Path) -> tuple[dict[str, Tensor], ModelSettings]:
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} there; expected a model folder as `equiav import` writes it")
    source = str(folder / SETTINGS)
    settings = read_settings((folder / SETTINGS).read_bytes(), source)
    try:
        return safetensors.torch.load_file(folder / WEIGHTS), settings
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{folder / WEIGHTS}: does not hold the weights of {source}: {error}") from None


def initial_weights(
    source: str,
    settings: ModelSettings,
    seed: int,
    path: Path | None = None,
    predicts: bool = True,
    patience: float = 600.0,
) -> Imported:
    """What a run begins with: from a model folder (ours, also that within a run's folder) or a published checkpoint, on this
    machine or in a store. `settings` are the run's own; path: where its files were downloaded to; `predicts`: its model has
    predictors."""
    with tempfile.TemporaryDirectory(prefix="equiav-") as folder:
        try:
            if path is None:
                path = download(source, Path(folder), patience) if "://" in source else Path(source).expanduser()
            folder = str(path if path.is_dir() else path.parent) if "://" in source else folder
            path = model_folder(path)
            if path.is_dir():
                state, theirs = read_folder(path)
                for name in ("heads", *(("predictor_heads",) if predicts else ())):  # which no shape shows
                    found, here = getattr(theirs.model, name), getattr(settings.model, name)
                    require(found == here, f"model.{name}", here, f"{found}, as that model has")
                trim(state, theirs, settings)
                other = theirs.model.predictor != settings.model.predictor
                if other:  # what fits of another kind of predictor fits by chance
                    state = {name: x for name, x in state.items() if ".predictor." not in name}
                imported = own_state(state, initial_model(settings, seed))
                if other:
                    imported.notes.append(
                        f"that model's predictor is {theirs.model.predictor}, this one's {settings.model.predictor}: it is "
                        "not taken over"
                    )
                imported.notes += [
                    f"that model was trained with data.{name} {getattr(theirs.data, name):g}, here it is {value:g}"
                    for name, value in vars(settings.data).items()
                    if name in ("audio_mean", "audio_std", "sample_rate") and value != getattr(theirs.data, name)
                ]
            else:
                kind, imported = from_checkpoint(path, settings, seed)
                theirs = settings_of(kind, settings)
        except (ConfigError, CheckpointError) as error:
            raise ConfigError(f"weights: {str(error).replace(folder, source)}") from None
    predicts = predicts and any(".predictor." in name for name in imported.state.keys() - imported.fresh.keys())
    if predicts and theirs.augment.variant != settings.augment.variant:
        raise ConfigError(
            f"weights: the predictors of {source} were trained with the vectors of augment.variant={theirs.augment.variant}, "
            f"this run draws those of {settings.augment.variant}; set augment.variant={theirs.augment.variant}"
        )
    return imported


def trim(state: dict[str, Tensor], theirs: ModelSettings, settings: ModelSettings) -> None:
    """Of the positions of a longer or larger input, the first rows and columns: not the first of the list."""
    for side in ("audio", "image"):
        (R, C), (rows, columns) = (getattr(of.model, f"{side}_grid") for of in (theirs, settings))
        name = f"{side}.encoder.positions"
        fits = name in state and state[name].dim() == 2 and len(state[name]) == R * C
        if (rows, columns) != (R, C) and rows <= R and columns <= C and fits:
            state[name] = state[name].view(R, C, -1)[:rows, :columns].reshape(rows * columns, -1)


def download(url: str, folder: Path, patience: float = 600.0, moved: Callable[[], None] = lambda: None) -> Path:
    """From a store to this machine -> the file, or the folder that has a model's files."""
    if url.endswith((".pth", ".pt")):
        where, _, name = url.rpartition("/")
        names = [name]
    else:
        where, names = url, [SETTINGS, WEIGHTS]
    store = Store(where, patience)
    if names[0] == SETTINGS:
        store = model_store(where, patience)
    for name in names:
        try:
            store.download(name, folder / name, moved)
        except Missing:
            raise ConfigError(
                f"{store.url}/{name} does not exist; expected a model folder, a run's checkpoints, or a .pth file"
            ) from None
    if names[0] == SETTINGS and store.exists(CLASSES):
        (folder / CLASSES).write_bytes(store.read(CLASSES))
    return folder / names[0] if len(names) == 1 else folder


def initial_model(settings: ModelSettings, seed: int) -> EquiAV:
    with torch.device("meta"):
        model = EquiAV(settings.model, settings.objective)
    model.to_empty(device="cpu").init_weights(seed)
    return model


def from_checkpoint(path: Path, settings: ModelSettings, seed: int, kind: str = "auto") -> tuple[Format, Imported]:
    state, beside = strip(read_checkpoint(path))
    found: Format = detect(state) if kind == "auto" else kind  # type: ignore[assignment]
    imported = import_state(state, found, initial_model(settings, seed))
    imported.ignored |= dict.fromkeys(beside, "stands beside the weights: the state of a training program")
    return found, imported


def settings_of(kind: Format, settings: ModelSettings) -> ModelSettings:
    """With what a checkpoint was trained: the predictor of the released EquiAV knows the vectors of that program only."""
    if kind != "equiav":
        return settings
    return dataclasses.replace(settings, augment=dataclasses.replace(settings.augment, variant="released"))


def read_checkpoint(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors and plain values alone. Nothing in it is run, and its checksums hold."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, expected a .pth file")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if not path.stat().st_size:
        raise CheckpointError(f"{path} is empty")
    archive = zipfile.is_zipfile(path)
    try:
        damaged = None
        if archive:
            with zipfile.ZipFile(path) as parts:
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                    raise zipfile.BadZipFile("it has compressed parts, which torch.save does not write")
                damaged = parts.testzip()
    except Exception as error:  # whatever a damaged archive raises
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again") from None
    if damaged:
        raise CheckpointError(f"{path} is damaged: {damaged} in it has not its checksum; fetch it again")
    try:
        with safe_globals(
            [argparse.Namespace]
        ):  # the arguments of a training program, as MAE keeps them: a bare holder
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # whatever torch has to say of a file that may hold anything
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            what = f"holds an object of class {named[1]}, which is not read: it could run code. Save its state_dict() alone"
        elif archive:
            what = f"is an archive without a checkpoint in it: {plain(error)}"
        else:
            what = "was not written by torch.save"
        raise CheckpointError(f"{path}: not a PyTorch checkpoint of plain tensors: {what}") from None


def plain(error: BaseException) -> str:
    """The first line, without a terminal's colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
