"""`equiav eval`: what a pretrained model is worth without labels, on a dataset; alone, or as one of torchrun's processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from equiav.augment import Clips, normalised_spectrogram, original_image, sampled_vectors
from equiav.config import (
    Config,
    ConfigError,
    LabelsConfig,
    ModelSettings,
    NotHere,
    StreamConfig,
    TrainConfig,
    require,
    to_dict,
)
from equiav.data.labels import keys_of
from equiav.data.sources import key_of, list_frames
from equiav.data.stream import require_modalities
from equiav.evaluate.look import Looked, look
from equiav.evaluate.paper import retrieval_table, similarity_table
from equiav.evaluate.retrieval import both_directions
from equiav.evaluate.similarity import columns, similarities
from equiav.model import EquiAV
from equiav.parallel import Ranks
from equiav.train.run import launched
from equiav.weights import bring, load_model, model_folder
from streaming import Dataset, DatasetError, Store


@dataclass(frozen=True)
class EvalConfig:
    """Evaluates a pretrained model. retrieval: finds each clip's picture by its sound and the other way round (Table 4).
    similarity: how well the predictors know what augmentations do, by kind (Table 7)."""

    what: tyro.conf.Positional[Literal["retrieval", "similarity"]] = "retrieval"
    """retrieval, or similarity."""
    model: str = ""
    """Model folder, or a run's: a path, s3://..., or any other that fsspec reads."""
    out: Path = Path("runs/eval")
    """Folder of WHAT.json and WHAT.md."""
    clips: Path | None = None
    """List of the clips that are looked at (CAV-MAE's and EquiAV's format, .json). Without it: all of the dataset."""
    embedding: Literal["trained", "original"] = "trained"
    """For retrieval: what training compared (by default the centroid of predictions), or the untransformed clip's embedding."""
    vectors: Literal["shared", "own"] = "shared"
    """Of the centroid: the same for every clip, or drawn for each, as the released program does."""
    seeds: int = 3
    """Draws of the vectors; the mean and half the spread are told."""
    frames: int = 1
    """Pictures of a clip, from the middles of equal parts, over which embeddings are averaged; 1: the middle one."""
    benchmark: Literal["", "MSR-VTT", "AudioSet", "VGGSound"] = ""
    """What the dataset is, of those in the paper's Table 4: its numbers are shown beside the result."""
    batch: int = 32
    """Clips that are computed together; a process has two of these."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it computes."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the encoders."""
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "seeds", self.seeds, "1 or more")
        require(1 <= self.frames <= 1000, "frames", self.frames, "1 to 1000")
        require(self.batch >= 1, "batch", self.batch, "1 or more")


@dataclass(frozen=True)
class Pictures(LabelsConfig):
    """How `look` looks: at sound and pictures."""

    section = "eval"


def run_eval(config: EvalConfig) -> None:
    require(bool(config.model), "model", "not set", "a model folder, or the folder of a run")
    require(bool(config.stream.url), "stream.url", "not set", "the folder of a packed dataset; `equiav pack` makes one")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("device is cuda, expected cpu: this torch sees no GPU")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotHere(f"out: {config.out} cannot be made ({error}); set a folder that can be written") from None
    console = Console(stderr=True)

    def tell(message: str) -> None:
        console.print(f"equiav eval: {message}", highlight=False, markup=False, soft_wrap=True)

    ranks = Ranks(config.device)
    with launched(ranks, tell) as takes_part:
        if not takes_part:
            return
        with TemporaryDirectory(prefix="equiav-") as temporary:
            path = bring(config.model, Path(temporary)) if "://" in config.model else Path(config.model).expanduser()
            model, settings = load_model(model_folder(path))
        model.to(ranks.device)
        dataset = Dataset(Store(config.stream.url, config.stream.patience))
        require_modalities("stream.url", dataset, True, True)
        chosen = listed(config, dataset)
        if ranks.rank == 0:
            tell(f"{config.what} of {int(chosen.sum()):,} clips of {dataset.store.url}, {ranks.size} process(es)")
        run = retrieve if config.what == "retrieval" else compare
        said, table = run(config, model, settings, lambda frames, compute: look(
            as_run(config, settings, ranks), Pictures(test_frames=frames), dataset, ranks, chosen, compute))  # fmt: skip
        about = {
            "model": config.model,
            "dataset": dataset.store.url,
            "of": int(chosen.sum()),
            "settings": asked(config),
        }
        if ranks.rank == 0:
            (config.out / f"{config.what}.json").write_text(json.dumps({**said, **about}, indent=1, allow_nan=False))
            (config.out / f"{config.what}.md").write_text(table)
            print(table)
            tell(f"{config.out / config.what}.json")


Look = Callable[[int, Callable[[Clips, torch.autocast], Tensor]], Looked]


def retrieve(config: EvalConfig, model: EquiAV, settings: ModelSettings, look_at: Look) -> tuple[dict[str, Any], str]:
    count = settings.objective.sampled_in_evaluation if config.embedding == "trained" else 0
    seeds = range(config.seeds if count else 1)
    d = settings.model.head_width

    def compute(clips: Clips, computes: torch.autocast) -> Tensor:
        """-> (b, seeds x 2 d): the audio's and the image's embedding for each seed"""
        spectrogram = normalised_spectrogram(clips.waveform, clips.lengths, settings.model, settings.data)
        image, found = original_image(clips.frames, settings.model.image_size), []
        for seed in seeds:
            t_a = t_v = None
            if count:
                samples = clips.samples if config.vectors == "own" else torch.zeros_like(clips.samples[:1])
                t_a, t_v = sampled_vectors(settings, seed, 0, samples, count)
            with computes:
                if config.embedding == "original":
                    h_a, h_v = model.encode_audio(spectrogram).mean(dim=1), model.encode_image(image).mean(dim=1)
                    found += [
                        F.normalize(side.inter_head(h), dim=1) for side, h in ((model.audio, h_a), (model.image, h_v))
                    ]
                else:
                    found += [model.embed_audio(spectrogram, t_a), model.embed_image(image, t_v)]
        return torch.cat(found, dim=1).double()

    found = look_at(config.frames, compute)
    values = torch.from_numpy(found.values).view(len(found.samples), len(seeds), 2, d)
    values = F.normalize(values, dim=-1).float()
    spread = both_directions([(values[:, k, 0], values[:, k, 1]) for k in range(len(seeds))])
    said = {name: {"mean": mean, "half spread": half} for name, (mean, half) in spread.items()}
    return {"clips": len(found.samples), **said, "bad": dict(found.bad)}, retrieval_table(
        config.benchmark, spread, len(found.samples), len(seeds)
    )


def compare(config: EvalConfig, model: EquiAV, settings: ModelSettings, look_at: Look) -> tuple[dict[str, Any], str]:
    found = look_at(1, lambda clips, computes: similarities(model, settings, clips, 0, computes))
    if len(found.samples) < 2:
        raise DatasetError(
            "stream.url: one clip says nothing of how far numbers are from clip to clip, expected two or more"
        )
    means = found.values.mean(axis=0)
    errors = found.values.std(axis=0, ddof=1) / np.sqrt(len(found.values))
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for (side, kind, number), mean, error in zip(columns(), means.tolist(), errors.tolist(), strict=True):
        rows.setdefault(side, {}).setdefault(kind, {})[number] = mean
        rows[side][kind][f"{number} error"] = error
    return {"clips": len(found.samples), **rows, "bad": dict(found.bad)}, similarity_table(rows, len(found.samples))


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


def as_run(config: EvalConfig, settings: ModelSettings, ranks: Ranks) -> Config:
    """The settings of a run that looks at its clips as this does."""
    train = TrainConfig(batch_size=2 * config.batch * ranks.size, micro_batch=config.batch, precision=config.precision)
    own = {name: getattr(settings, name) for name in ("model", "augment", "objective", "data")}
    return Config(**own, device=config.device, stream=config.stream, train=train)


def asked(config: EvalConfig) -> dict[str, Any]:
    values = to_dict(config)
    found = {name: values[name] for name in ("embedding", "vectors", "seeds", "frames", "precision")}
    return {**found, "clips": str(config.clips or "all")}
