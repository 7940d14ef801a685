"""The stream of a run: `streaming` with EquiAV's decoder, and its batches as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch

import streaming
from equiav.augment import Clips
from equiav.augment.draws import Purpose, uniforms
from equiav.config import Config, ConfigError, NotHere
from equiav.data.clips import DECODE_AUDIO
from equiav.data.decoder import IMAGES, ClipDecoder
from streaming import Dataset, DatasetError, Loader, Order, Selection, ShardError, Store
from streaming.dataset import read_offsets


def open_stream(
    config: Config,
    *,
    hears: bool = True,
    sees: bool = True,
    often: np.ndarray | None = None,
    rank: int = 0,
    ranks: int = 1,
    sharers: int = 1,
    options: dict[str, Any] | None = None,
) -> Loader:
    """The loader of one rank. `hears`, `sees`: what the run uses of a clip. `often`: in the mean, how often each comes.
    `sharers`: ranks on this node. `options`: for the file system, beside what the environment says."""
    s = config.stream
    s.ready()
    cache = s.cache.expanduser()
    store = Store(s.url, s.patience, options)
    if not store.local:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotHere(f"stream.cache: {cache} cannot be made ({error}); set a folder that can be written") from None
    dataset = Dataset(store, None if store.local else cache)
    order = Order(dataset.fingerprint, config.seed, config.train.batch_size, s.lanes, s.window)

    empty = pinned if config.device == "cuda" else np.empty
    return Loader(
        dataset,
        order,
        ClipDecoder(config.model, config.data, hears, sees),
        rank=rank,
        ranks=ranks,
        unit=config.train.micro_batch,
        workers=s.workers,
        ahead=s.ahead,
        selection=None if often is None else Selection(often),
        cache=cache,
        cache_bytes=s.cache_bytes,
        sharers=sharers,
        draw=partial(frame_draw, config.seed),
        empty=empty,
    )


def modalities(dataset: Dataset) -> tuple[bool, bool]:
    """Whether its clips have sound, and pictures: whether any does, of some that lie far apart. Where all of these are damaged,
    each sample will say what it lacks."""
    found: list[tuple[bool, bool]] = []
    for number in {0, len(dataset) // 2, len(dataset) - 1}:
        with suppress(DatasetError, ShardError):
            offsets = read_offsets(dataset.store, dataset[number])
            for place in {0, len(offsets) // 2, len(offsets) - 1}:
                names = offsets[place].members
                sound = any(name in DECODE_AUDIO for name in names)
                found.append((sound, any(name.rpartition(".")[2] in IMAGES for name in names)))
    return (any(sound for sound, _ in found), any(picture for _, picture in found)) if found else (True, True)


def require_modalities(setting: str, dataset: Dataset, hears: bool, sees: bool) -> None:
    sound, pictures = modalities(dataset)
    lacks = ["sound"] * (hears and not sound) + ["pictures"] * (sees and not pictures)
    if lacks:
        has = " and ".join(["sound"] * sound + ["pictures"] * pictures) or "neither sound nor pictures"
        raise ConfigError(
            f"{setting}: the clips of {dataset.store.url} have {has}, and this run needs {' and '.join(lacks)}, too; "
            "`equiav finetune --tune.modality` can use one alone"
        )


def frame_draw(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """samples (b,) int64 -> (b,): which of its frames a clip shows."""
    return uniforms(seed, epoch, torch.from_numpy(samples), Purpose.FRAME, 1)[:, 0].numpy()


def pinned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory from which the GPU copies by itself; torch keeps freed blocks of it."""
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)


def batches(loader: Loader, start: int = 0) -> Iterator[Clips]:
    """From step `start`, counted over all epochs, without end."""
    for batch in loader.batches(start):
        yield as_tensors(batch)


def as_tensors(batch: streaming.Batch) -> Clips:
    fields = {name: torch.from_numpy(values) for name, values in batch.fields.items()}
    frames = (
        fields["frames"].permute(0, 3, 1, 2) if "frames" in fields else None
    )  # (b, 3, H, W), channels last in memory
    samples, valid = torch.from_numpy(batch.samples), torch.from_numpy(batch.valid)
    return Clips(batch.epoch, samples, frames, fields.get("waveform"), fields.get("lengths"), valid)
