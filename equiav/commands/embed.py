"""`equiav embed`, `equiav score`, `equiav predict`: a trained model, used on files."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiav.api import Embedder, Labeller, load
from equiav.augment import Clips, normalised_spectrogram, original_image
from equiav.commands.settings import EmbedConfig, PredictConfig, ScoreConfig, UseConfig
from equiav.config import Config, ConfigError, TrainConfig, require
from equiav.data.clips import PICTURES, BadClipError, IncompleteError
from equiav.data.labels import keys_of
from equiav.data.sources import SOUNDS, VIDEOS, list_videos
from equiav.data.stream import modalities
from equiav.evaluate.evaluations import Pictures
from equiav.evaluate.look import look
from equiav.parallel import Ranks
from equiav.progress import bar
from equiav.terminal import say
from equiav.vectors import Vectors, read, together
from streaming import Dataset, Store
from streaming.dataset import INDEX

CORES = len(os.sched_getaffinity(0))
FILES, CLIPS = 64, 8192  # that are kept together, while it goes on
FEW = 20  # problems that are named


def opened(config: UseConfig) -> Embedder | Labeller:
    for name in config.files:
        require(Path(name).is_file(), "files", name, "a file that exists")
    return load(config.weights, config.device)


def embedder(config: UseConfig, model: Embedder | Labeller) -> Embedder:
    if not isinstance(model, Embedder):
        raise ConfigError(
            f"weights: {config.weights} was fine-tuned and has no embeddings to compare; `equiav predict` uses it"
        )
    return model


def run_embed(config: EmbedConfig) -> None:
    dataset = dataset_of(config)
    names = [] if dataset else listed(config.files)
    model = embedder(config, load(config.weights, config.device))
    of = sha256(dataset.fingerprint.encode() if dataset else "\0".join(names).encode())
    of.update(f"{config.frames} {model.digest()}".encode())
    parts = config.out.absolute().parent / f".{config.out.name}.{of.hexdigest()[:16]}.parts"
    parts.mkdir(exist_ok=True)
    with (parts / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it ends, however it ends
        except OSError:
            raise ConfigError(f"out: another `equiav embed` is writing {config.out}") from None
        try:
            _embed(config, model, dataset, names, parts)
        finally:
            if not any(parts.glob("*.npz")):  # nothing to go on with
                shutil.rmtree(parts, ignore_errors=True)


def _embed(config: EmbedConfig, model: Embedder, dataset: Dataset | None, names: list[str], parts: Path) -> None:
    whole = dataset.samples if dataset else len(names)
    piece = CLIPS if dataset else FILES
    found, problems = [], []
    with bar() as progress:
        shown = progress.add_task("embedding", total=whole, note=f"{'clips' if dataset else 'files'}")
        for begin in range(0, whole, piece):
            end = min(begin + piece, whole)
            path = parts / f"{begin:09d}.npz"
            if not path.exists():
                some, bad = (
                    of_dataset(config, model, dataset, begin, end)
                    if dataset
                    else of_files(config, model, names[begin:end])
                )
                some.write(path)
                (parts / f"{begin:09d}.txt").write_text("\n".join(bad))
            found.append(read(path))
            problems += (parts / f"{begin:09d}.txt").read_text().splitlines()
            progress.update(shown, completed=end)
    rows = together(found)
    for problem in problems if len(problems) <= FEW else problems[:FEW]:
        say(problem)
    what = "clip" if dataset else "file"
    if not len(rows.name):
        shutil.rmtree(parts)
        raise ConfigError(f"files: none of {whole} {what}(s) could be embedded, such as {problems[0]}")
    rows._replace(model=model.digest()).write(config.out)
    for left in parts.parent.glob(f".{config.out.name}.*.parts"):  # of other inputs, too, which were given up
        if left == parts or not locked(left):
            shutil.rmtree(left)
    lacks = "".join(
        f", {count:,} without {what_is}"
        for what_is, of_side in (("sound", rows.audio), ("picture", rows.image))
        if (count := int(np.isnan(of_side).all(axis=1).sum()))
    )
    done = len(set(rows.name.tolist()))
    say(f"{config.out}: {len(rows.name):,} parts of {done:,} {what}(s), {model.dim} numbers each{lacks}")
    if problems:
        missed = f"{whole - done} of {whole} {what}s" if done < whole else f"{len(problems)} part(s)"
        raise IncompleteError(f"{missed} could not be embedded" + "; they are named above" * (len(problems) <= FEW))


def locked(parts: Path) -> bool:
    try:
        with (parts / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def dataset_of(config: EmbedConfig) -> Dataset | None:
    """If that is what is named."""
    (first, *others) = config.files
    if "://" in first or (Path(first).is_dir() and (Path(first) / INDEX).is_file()):
        require(not others, "files", f"{first} and {len(others)} more", "one dataset, or files")
        return Dataset(Store(first, config.stream.patience))
    return None


def listed(files: tuple[str, ...]) -> list[str]:
    names: list[str] = []
    for name in files:
        path = Path(name).expanduser()
        require(path.exists(), "files", name, "a file or a folder that exists")
        if path.is_dir() or path.suffix == ".txt":
            names += [one for _, one in list_videos(path, (*VIDEOS, *SOUNDS, *PICTURES))[0]]
        else:
            names.append(name)
    return list(dict.fromkeys(names))


def of_files(config: EmbedConfig, model: Embedder, names: list[str]) -> tuple[Vectors, list[str]]:
    """-> their parts, and why some could not be embedded. Files are decoded while others are computed."""

    def decoded(name: str) -> tuple[list[tuple[float, float, Any, list[Any]]], list[str]]:
        lost: list[str] = []
        try:
            return list(model.windows(name, config.frames, lost=lost)), lost
        except BadClipError as error:  # the others' embeddings are not to be lost
            return [], [str(error)]

    parts, problems = [nothing(model.dim)], []
    with ThreadPoolExecutor(CORES) as pool:
        waiting = deque[tuple[str, Future[Any]]]()
        for name in (*names, *[None] * CORES):  # as many ahead as there are cores
            if name is not None:
                waiting.append((name, pool.submit(decoded, name)))
            if waiting and (name is None or len(waiting) > CORES):
                done, future = waiting.popleft()
                windows, lost = future.result()
                problems += [" ".join(one.split()) for one in lost]
                if not windows:
                    continue
                found = model.of_windows(windows, config.frames)
                count = len(found.begin)
                none = np.full((count, model.dim), np.nan, np.float32)
                audio = none if found.audio is None else found.audio
                image = none if found.image is None else found.image
                parts.append(Vectors(np.array([done] * count), found.begin, found.end, audio, image))
    return together(parts), problems


def of_dataset(
    config: EmbedConfig, model: Embedder, dataset: Dataset, begin: int, end: int
) -> tuple[Vectors, list[str]]:
    chosen = np.zeros(dataset.samples, bool)
    chosen[begin:end] = True
    hears, sees = modalities(dataset)
    kind = "both" if hears and sees else "audio" if hears else "image"
    train = TrainConfig(batch_size=2 * config.batch, micro_batch=config.batch, precision="float32")
    own = {name: getattr(model.settings, name) for name in ("model", "augment", "objective", "data")}
    run = Config(**own, device="cuda" if model.device.type == "cuda" else "cpu", stream=config.stream, train=train)
    t_a, t_v = model.vectors

    def compute(clips: Clips, computes: torch.autocast) -> Tensor:
        found = []
        with computes:
            if hears:
                spectrogram = normalised_spectrogram(clips.waveform, clips.lengths, run.model, run.data)
                found.append(model.network.embed_audio(spectrogram, t_a))
            if sees:
                found.append(model.network.embed_image(original_image(clips.frames, run.model.image_size), t_v))
        return torch.cat(found, dim=1).double()

    looked = look(run, Pictures(modality=kind, test_frames=config.frames), dataset, Ranks(run.device), chosen, compute)
    keys = list(islice(keys_of(dataset), begin, end))
    n, d = len(looked.samples), model.dim
    none = np.full((n, d), np.nan, np.float32)
    values = looked.values.reshape(n, -1, d)
    values = (values / np.linalg.norm(values, axis=2, keepdims=True)).astype(np.float32)
    audio, image = values[:, 0] if hears else none, values[:, -1] if sees else none
    name = np.array([keys[k - begin] for k in looked.samples])
    lost = sorted(set(range(begin, end)) - set(looked.samples.tolist()))
    reasons = ", ".join(f"{count} {why}" for why, count in looked.bad.most_common(3))
    problems = [f"{keys[k - begin]}: nothing of it can be used (of all: {reasons})" for k in lost]
    return Vectors(name, np.zeros(n), np.full(n, np.nan), audio, image), problems


def nothing(width: int) -> Vectors:
    none = np.zeros((0, width), np.float32)
    return Vectors(np.array([], "U1"), np.zeros(0), np.zeros(0), none, none)


def run_score(config: ScoreConfig) -> None:
    model, problems = embedder(config, opened(config)), []
    for name in config.files:
        lost: list[str] = []
        try:
            parts = list(model.windows(name, config.frames, lost=lost))
            found = model.of_windows(parts, config.frames) if parts else None
            for one in lost:
                say(one)
            if found is None:
                raise BadClipError(name, "no part of it can be read")
            if found.audio is None or found.image is None:
                raise BadClipError(
                    name, f"has no {'sound' if found.audio is None else 'picture'}, and a score needs both"
                )
        except BadClipError as error:  # the others' scores are not to be lost
            problems.append(str(error))
            say(str(error))
            continue
        scores = (found.audio * found.image).sum(axis=1)
        for begin, end, score in zip(found.begin, found.end, scores, strict=True):
            say(f"{score:7.4f}  {name}  {begin:.1f} to {end:.1f} s")
    if len(problems) == len(config.files):
        raise ConfigError(f"files: none of {len(problems)} could be scored, such as {problems[0]}")
    if problems:
        raise IncompleteError(f"{len(problems)} of {len(config.files)} files could not be scored; they are named above")


def run_predict(config: PredictConfig) -> None:
    model = opened(config)
    if not isinstance(model, Labeller):
        raise ConfigError(f"weights: {config.weights} knows no classes; `equiav finetune` teaches it some")
    for name in config.files:
        said = model.predict_video(name, config.frames, config.top)
        say(f"{name}: " + ", ".join(f"{label} {probability:.3f}" for label, probability in said))
