"""`equiav smoke`: clips from nothing, pretraining, zero-shot retrieval, a report. One process, no files needed."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equiav.augment import Batch
from equiav.augment.draws import Purpose, uniforms
from equiav.clips import check_audio, decode_frame, encode_frame
from equiav.config import Config, require, to_yaml
from equiav.evaluate.report import plot_run
from equiav.evaluate.retrieval import Pairs, zero_shot_retrieval
from equiav.synthetic import World
from equiav.train import train
from equiav.weights import save_model

HELD_OUT_FROM = 10**9  # indices of the held-out clips begin here


@dataclass(frozen=True)
class SmokeConfig(Config):
    """Generates clips, pretrains the tiny model on them, retrieves, and writes a report."""

    clips: int = 2048
    """Clips to train on."""
    held_out: int = 512
    """Clips to retrieve among; chance is 1 in this many."""
    out: Path = Path("runs/smoke")
    """Folder of report.md, report.png, metrics.jsonl, config.yaml and the trained model; a next run writes over them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.clips >= self.train.batch_size,
            "clips",
            self.clips,
            f"train.batch_size={self.train.batch_size} or more",
        )
        require(self.held_out >= 10, "held_out", self.held_out, "10 or more")


class StoredClip(NamedTuple):
    """As a shard would hold it: frames compressed, audio as it is."""

    name: str
    frames: list[bytes]
    audio: np.ndarray  # (L,) int16


def run_smoke(config: SmokeConfig) -> None:
    console, started = Console(), time.perf_counter()
    require(config.device == "cpu" or torch.cuda.is_available(), "device", config.device, "cpu: this torch sees no GPU")
    if config.device == "cpu":
        keep_freed_memory()
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "config.yaml").write_text(to_yaml(config))

    clock = {}
    columns = [TextColumn("{task.description:11s}"), BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
               TextColumn("{task.fields[note]}")]  # fmt: skip
    with Progress(*columns, console=console) as progress:
        clips = generate(config, progress)
        clock["generate"] = time.perf_counter() - started
        training, held_out = clips[: config.clips], clips[config.clips :]

        steps, rows = config.train.steps, []
        bar = progress.add_task("pretraining", total=steps, note="")
        with (config.out / "metrics.jsonl").open("w") as log:

            def report(step: int, metrics: dict[str, float]) -> None:
                rows.append(metrics)
                log.write(json.dumps({"step": step, **metrics}) + "\n")
                note = f"loss {metrics['loss']:.2f}, accuracy {metrics['accuracy_inter']:.2f}"
                progress.update(bar, advance=1, note=note)

            begun = time.perf_counter()
            model = train(config, batches(training, config), report)
            clock["pretrain"] = time.perf_counter() - begun

    begun = time.perf_counter()
    middle = len(held_out[0].frames) // 2
    retrieval = zero_shot_retrieval(model, config, decode(held_out, [middle] * len(held_out), config))
    clock["retrieve"] = time.perf_counter() - begun
    save_model(config.out / "model", model, config)
    clock["in all"] = time.perf_counter() - started
    text = write_report(config, rows, retrieval, clock)
    console.print(text, highlight=False, markup=False)
    console.print(f"report: {config.out / 'report.md'} and report.png")


def generate(config: SmokeConfig, progress: Progress) -> list[StoredClip]:
    """The training clips, then the held-out ones, on all cores."""
    indices = [*range(config.clips), *range(HELD_OUT_FROM, HELD_OUT_FROM + config.held_out)]
    seconds = 0.01 * config.model.spectrogram_frames  # as long as the model hears
    world = World(config.seed, config.model.image_size, seconds=seconds, sample_rate=config.data.sample_rate)
    bar = progress.add_task("generating", total=len(indices), note="clips")
    clips = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("forkserver")) as pool:
        for clip in pool.map(partial(generate_one, world), indices, chunksize=32):
            clips.append(clip)
            progress.update(bar, advance=1)
    return clips


def generate_one(world: World, index: int) -> StoredClip:
    clip = world.clip(index)
    return StoredClip(f"synthetic-{world.seed}-{index}", [encode_frame(frame) for frame in clip.frames], clip.audio)


def decode(clips: list[StoredClip], frame: list[int], config: Config) -> Pairs:
    """One frame and the sound of each clip; a clip that cannot be used is an error that names it."""
    images = [decode_frame(clip.frames[k], clip.name) for clip, k in zip(clips, frame, strict=True)]
    audio = [check_audio(clip.audio, config.data.sample_rate, clip.name, config.data) for clip in clips]
    lengths = torch.tensor([len(sound) for sound in audio])
    waveform = torch.zeros(len(audio), int(lengths.max()), dtype=torch.int16)
    for row, sound in zip(waveform, audio, strict=True):
        row[: len(sound)] = torch.from_numpy(sound)
    return Pairs(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), waveform, lengths)


def batches(clips: list[StoredClip], config: Config) -> Iterator[Batch]:
    """Epoch after epoch, each in an order of its own; every clip with one of its frames, drawn for that epoch."""
    everyone, size = torch.arange(len(clips)), config.train.batch_size
    epoch = 0
    while True:
        order = uniforms(config.seed, epoch, everyone, Purpose.ORDER, 1)[:, 0].argsort()
        frame = (uniforms(config.seed, epoch, everyone, Purpose.FRAME, 1)[:, 0] * len(clips[0].frames)).long()
        for start in range(0, len(clips) - size + 1, size):
            samples = order[start : start + size]
            yield Batch(epoch, samples, *decode([clips[k] for k in samples], frame[samples].tolist(), config))
        epoch += 1


def keep_freed_memory() -> None:
    """Tells glibc not to hand large freed blocks back to the kernel: on CPU, faulting them in again for every batch costs
    as much as the arithmetic (docs/LOG.md has the figures)."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mallopt, mmap_threshold, trim_threshold = ctypes.CDLL(None).mallopt, -3, -1
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def write_report(
    config: SmokeConfig,
    rows: list[dict[str, float]],
    retrieval: dict[str, tuple[float, float]],
    clock: dict[str, float],
) -> str:
    """report.md and report.png -> the Markdown."""
    plot_run(rows, retrieval, config.held_out, config.out / "report.png")
    last = rows[-max(1, len(rows) // 20) :]
    mean = {name: sum(row[name] for row in last) / len(last) for name in rows[-1]}
    chance = 100 / config.held_out
    lines = [
        "# EquiAV smoke run", "",
        f"{config.clips} synthetic clips, {config.train.steps} steps of {config.train.batch_size} on {config.device}, "
        f"seed {config.seed}; settings in config.yaml.", "",
        f"## Zero-shot retrieval among {config.held_out} held-out clips", "",
        "| | R@1 % | R@5 % | R@10 % | R@1 over chance |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for direction in ("image to audio", "audio to image"):
        cells = [retrieval[f"{direction} R@{k}"] for k in (1, 5, 10)]
        lines.append(
            f"| {direction} | "
            + " | ".join(f"{m:.1f} ± {s:.1f}" for m, s in cells)
            + f" | {cells[0][0] / chance:.1f}x |"
        )
    lines += [f"| chance | {chance:.2f} | {5 * chance:.2f} | {10 * chance:.2f} | 1x |", "",
              "± is half the spread over three draws of the centroid's vectors.", "",
              f"## Training, mean of the last {len(last)} steps", "", "| metric | value |", "|---|---|"]  # fmt: skip
    lines += [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in mean.items() if name != "lr"]
    lines += ["", "Similarity is the cosine of the predicted and the augmented embedding; gain is that less the cosine of the",
              "unpredicted one: a predictor that does nothing gains nothing.", "",
              "## Seconds", "", "| " + " | ".join(clock) + " |", "|" + "---|" * len(clock),
              "| " + " | ".join(f"{value:.1f}" for value in clock.values()) + " |", "", "![curves](report.png)", ""]  # fmt: skip
    text = "\n".join(lines)
    (config.out / "report.md").write_text(text)
    return text
