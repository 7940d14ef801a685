"""`equiav smoke`: clips from nothing, packed, served from S3, streamed; pretraining, zero-shot retrieval, a report."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equiav.commands.settings import SmokeConfig
from equiav.config import ConfigError, NotHere
from equiav.data.local_s3 import LocalS3
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from equiav.evaluate.evaluations import EVALUATIONS, FeatureReader, applicable
from equiav.evaluate.examples import evenly
from equiav.evaluate.page import page
from equiav.evaluate.report import gather
from equiav.evaluate.settings import EvalConfig
from equiav.model import EquiAV
from equiav.parallel import Ranks
from equiav.tasks import Pretraining
from equiav.train import run
from equiav.train.log import writing
from equiav.train.run import Done
from equiav.weights import save_model
from monitoring.metrics import brief
from streaming import Dataset, Store
from streaming.pack import Progress as Packed
from streaming.pack import pack
from streaming.processes import keep_freed_memory

BUCKET, SHARD = "smoke", 128  # clips in a shard
EVALUATED = {
    "retrieval": 0,
    "similarity": 128,
    "centroid": 16,
    "localize": 128,
    "attention": 64,
    "examples": 0,
}  # clips; 0: all
MARKER = "SMOKE.txt"  # in a folder that a smoke run made
HELD_OUT_FROM = 10**9  # indices of the held-out clips begin here


def run_smoke(config: SmokeConfig) -> None:
    console, started = Console(), time.perf_counter()
    if config.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("device is cuda, expected cpu: this torch sees no GPU")
    if config.device == "cpu":
        keep_freed_memory()
    take_folder(config.out)
    for folder in ("eval", "checkpoints", "model"):
        shutil.rmtree(config.out / folder, ignore_errors=True)
    for left in ("config.yaml", "metrics.jsonl", "timing.jsonl", "quarantine.jsonl", "starts.jsonl"):
        (config.out / left).unlink(missing_ok=True)

    with tempfile.TemporaryDirectory(prefix="equiav-smoke-") as scratch, LocalS3(Path(scratch, "store")) as s3:
        config = replace(
            config, stream=replace(config.stream, url=f"s3://{BUCKET}/train", cache=Path(scratch, "cache"))
        )
        clock, rows = {}, []
        columns = [
            TextColumn("{task.description:11s}"),
            BarColumn(16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
        ]
        with Progress(*columns, console=console) as progress:
            pack_clips(config, s3, progress)
            clock["pack"] = time.perf_counter() - started

            bar = progress.add_task("pretraining", total=config.train.steps, note="")

            def show(step: int, metrics: dict[str, float], timing: dict[str, Any]) -> None:
                rows.append(metrics)
                progress.update(bar, completed=step + 1, note=brief({**metrics, **timing}))

            begun = time.perf_counter()
            done = run(config, Pretraining(config), Ranks(config.device), lambda message: None, show, s3.options)
            clock["pretrain"] = time.perf_counter() - begun

        model: Any = done.state.model.eval()
        save_model(config.out / "model", model.state_dict(), config)
        begun = time.perf_counter()
        evaluated = evaluate(config, model, s3)
        clock["evaluate"] = time.perf_counter() - begun
    clock["in all"] = time.perf_counter() - started
    text = write_report(config, rows, evaluated["retrieval"], clock, done)
    gathered = gather(str(config.out))
    data = {"title": "EquiAV smoke run", "runs": [gathered]}
    (config.out / "report.data.json").write_text(json.dumps(data, indent=1, allow_nan=False))
    (config.out / "report.html").write_text(page([gathered], "EquiAV smoke run"), "utf-8")
    console.print(text, highlight=False, markup=False)
    console.print(f"report: {config.out / 'report.html'}, in any browser, and report.md")


def take_folder(out: Path) -> None:
    """What an earlier smoke run left is removed, and nothing else is."""
    marker = out / MARKER
    if not marker.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"out: {out} holds something that `equiav smoke` did not make; name another folder, or remove it"
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        marker.write_text("`equiav smoke` made this folder, and removes what is in it when it runs here again.\n")


def pack_clips(config: SmokeConfig, s3: LocalS3, progress: Progress) -> None:
    """The clips to train on and those held out, as two datasets of shards on the store."""
    seconds = 0.01 * config.model.spectrogram_frames  # as long as the model hears
    side = config.model.image_size
    world = World(config.seed, side, seconds=seconds, sample_rate=config.data.sample_rate)
    encode = EncodeSynthetic(world, Shape(world.frames, side, 90, "wav", seconds, False, config.data))
    (s3.folder / BUCKET).mkdir(parents=True, exist_ok=True)
    bar = progress.add_task("packing", total=config.clips + config.held_out, note="")
    packed = 0
    for name, first, count in (("train", 0, config.clips), ("held-out", HELD_OUT_FROM, config.held_out)):

        def report(done: Packed, before: int = packed) -> None:
            progress.update(bar, completed=before + done.items, note=f"{done.bytes / 2**20:.0f} MiB")

        items = [(f"synthetic-{config.seed}-{k}", k) for k in range(first, first + count)]
        done = pack(
            items,
            encode,
            Store(f"s3://{BUCKET}/{name}", options=s3.options),
            processes=len(os.sched_getaffinity(0)),
            part_items=SHARD,
            report=report,
        )
        report(done)
        packed += count


def evaluate(config: SmokeConfig, model: EquiAV, s3: LocalS3) -> dict[str, dict[str, Any]]:
    """Of the held-out clips, as `equiav eval` -> what each evaluation says."""
    dataset = Dataset(Store(f"s3://{BUCKET}/held-out", options=s3.options), config.stream.cache)
    stream = replace(config.stream, url=dataset.store.url, workers=0)  # each look would start them anew
    folder, found = config.out / "eval", {}
    folder.mkdir(exist_ok=True)
    model.requires_grad_(False)
    for what in applicable(config):
        clips = EVALUATED[what]
        of = EvalConfig(what=what, stream=stream, device=config.device, batch=8, views=8, strengths=(1.0,))  # type: ignore[arg-type]
        chosen = evenly(np.ones(dataset.samples, bool), clips or dataset.samples)
        looker = FeatureReader(of, model, config, dataset, Ranks(config.device), chosen)
        result = EVALUATIONS[what](looker)
        about = {"model": str(config.out), "dataset": "the held-out clips", "of": int(chosen.sum())}
        found[what] = {**result.said, **about}
        (folder / f"{what}.json").write_text(json.dumps(found[what], indent=1, allow_nan=False))
        (folder / f"{what}.md").write_text(result.table)
    return found


def write_report(
    config: SmokeConfig, rows: list[dict[str, float]], retrieval: dict[str, Any], clock: dict[str, float], done: Done
) -> str:
    """report.md -> the Markdown."""
    last = rows[-max(1, len(rows) // 20) :]
    mean = {name: sum(row[name] for row in last) / len(last) for name in rows[-1]}
    chance = 100 / config.held_out
    stats, decoded = done.stats, sum(done.stats.decoded)
    lines = [
        "# EquiAV smoke run",
        "",
        f"{config.clips} synthetic clips, {config.train.steps} steps of {config.train.batch_size} on {config.device}, "
        f"seed {config.seed}; settings in config.yaml.",
        "",
        f"## Zero-shot retrieval among {config.held_out} held-out clips",
        "",
        "| | R@1 % | R@5 % | R@10 % | R@1 over chance |",
        "|---|---|---|---|---|",
    ]
    for direction in ("image to audio", "audio to image"):
        cells = [tuple(retrieval[f"{direction} R@{k}"].values()) for k in (1, 5, 10)]
        lines.append(
            f"| {direction} | "
            + " | ".join(f"{m:.1f} ± {s:.1f}" for m, s in cells)
            + f" | {cells[0][0] / chance:.1f}x |"
        )
    lines += [
        f"| chance | {chance:.2f} | {5 * chance:.2f} | {10 * chance:.2f} | 1x |",
        "",
        "± is half the spread over three draws of the centroid's vectors.",
        "",
        f"## Training, mean of the last {len(last)} steps",
        "",
        "| metric | value |",
        "|---|---|",
    ]
    lines += [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in mean.items() if name != "lr"]
    lines += [
        "",
        "Similarity is the cosine of the predicted and the augmented embedding; gain is that less the cosine of the",
        "unpredicted one: a predictor that does nothing gains nothing.",
        "",
        "## Stream",
        "",
        f"{decoded} clips decoded, {1000 * sum(stats.decode_seconds) / decoded:.2f} ms each; {done.quarantined.total()} "
        f"quarantined. {stats.fetch['requests']} requests to S3, {stats.fetch['retries']} retries, "
        f"{stats.fetch['bytes'] / 2**20:.1f} MiB. Training waited {stats.wait_seconds:.1f} s for data.",
        "",
        "## Seconds",
        "",
        "| " + " | ".join(clock) + " |",
        "|" + "---|" * len(clock),
        "| " + " | ".join(f"{value:.1f}" for value in clock.values()) + " |",
        "",
    ]
    text = "\n".join(lines)
    (config.out / "report.md").write_text(text)
    return text
