"""`equiav eval`: what a pretrained model is worth without labels, on a dataset; alone, or as one of torchrun's processes."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from equiav.config import ConfigError, NotHere, require, to_dict
from equiav.data.labels import keys_of
from equiav.data.sources import key_of, list_frames
from equiav.data.stream import require_modalities
from equiav.evaluate.evaluations import EVALUATIONS, FeatureReader
from equiav.evaluate.settings import EvalConfig
from equiav.known import model_folder
from equiav.parallel import Ranks
from equiav.terminal import masked
from equiav.train.run import launched
from equiav.weights import download, load_model
from streaming import Dataset, DatasetError, Store


def run_eval(config: EvalConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("device is cuda, expected cpu: this torch sees no GPU")
    remote = "://" in config.weights
    out = Store(
        config.out or ("runs/eval" if remote else str(Path(config.weights).expanduser() / "eval")),
        config.stream.patience,
    )
    if "://" not in out.url:  # before it computes for hours
        try:
            Path(out.url).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotHere(f"out: {out.url} cannot be made ({error}); set a folder that can be written") from None
    console = Console(stderr=True)

    def tell(message: str) -> None:
        console.print(f"equiav eval: {message}", highlight=False, markup=False, soft_wrap=True)

    ranks = Ranks(config.device)
    with launched(ranks, tell) as takes_part:
        if not takes_part:
            return
        with TemporaryDirectory(prefix="equiav-") as temporary:
            path = download(config.weights, Path(temporary)) if remote else Path(config.weights).expanduser()
            model, settings = load_model(model_folder(path))
        model.to(ranks.device).requires_grad_(False)
        dataset = Dataset(Store(config.stream.url, config.stream.patience))
        require_modalities("stream.url", dataset, True, True)
        looker = FeatureReader(config, model, settings, dataset, ranks, listed(config, dataset))
        if ranks.rank == 0:
            of = int(looker.chosen.sum())
            tell(f"{config.what} of {of:,} clips of {dataset.store.url}, {ranks.size} process(es)")
        found = EVALUATIONS[config.what](looker)
        about = {
            "model": masked(config.weights),
            "dataset": dataset.store.url,
            "of": int(looker.chosen.sum()),
            "settings": asked(config),
        }
        if ranks.rank == 0:
            written = json.dumps({**found.said, **about}, indent=1, allow_nan=False)
            out.write(f"{config.what}.json", written.encode())
            out.write(f"{config.what}.md", found.table.encode())
            if found.picture:
                content = io.BytesIO()
                found.picture.save(content, "PNG")
                out.write(f"{config.what}.png", content.getvalue())
            print(found.table)
            tell(f"{out.url}/{config.what}.json")


def listed(config: EvalConfig, dataset: Dataset) -> np.ndarray:
    """(samples,) bool: those that are looked at."""
    if config.clips is None:
        return np.ones(dataset.samples, bool)
    require(config.clips.is_file(), "clips", config.clips, "a list that exists (.json)")
    names = {key_of(entry["video_id"]) for _, entry in list_frames(config.clips)[0]}
    keys = list(keys_of(dataset))
    chosen = np.array([key in names or key.rpartition("/")[2] in names for key in keys])
    if not chosen.any():
        raise ConfigError(
            f"clips: none of {len(names)} names, such as {min(names)!r}, is that of a clip, such as {keys[0]!r}"
        )
    there = Counter(name for key in keys for name in {key, key.rpartition("/")[2]})
    if several := [name for name in names if there[name] > 1]:
        raise DatasetError(f"clips: {min(several)!r} is the name of {there[min(several)]} clips of {dataset.store.url}")
    if missing := names - there.keys():
        raise DatasetError(
            f"clips: {len(missing)} of {len(names)} clips of {config.clips} are not in {dataset.store.url}, such as "
            f"{min(missing)!r}; numbers of fewer candidates are better than they should be"
        )
    return chosen


def asked(config: EvalConfig) -> dict[str, Any]:
    values = to_dict(config)
    found = {
        name: values[name] for name in ("embedding", "vectors", "seeds", "frames", "strengths", "views", "precision")
    }
    return {**found, "clips": str(config.clips or "all")}
