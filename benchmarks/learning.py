"""`python -m benchmarks.learning FOLDER`: what learning looks like when it goes well and when not, drawn for docs/guide.md.

Runs of the smoke recipe, one after the other (15 minutes on two cores); a run that is in FOLDER already is not done again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from equiav.config import DataConfig
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from streaming import Store
from streaming.pack import pack

CLIPS, BATCH = 2048, 32
WORLD = World(0, 64, seconds=2.56)
SHAPE = Shape(WORLD.frames, WORLD.size, 90, "wav", WORLD.seconds, False, DataConfig())
RUNS = {  # name -> what the picture calls it, whether pictures have their own sounds, settings
    "well": ("as it should be", True, {}),
    "longer": ("the same, four times as long", True, {"train.steps": 1600, "train.warmup_steps": 80}),
    "rate": ("learning rate 20 times too high", True, {"train.lr": 0.04}),
    "pairs": ("each picture with another clip's sound", False, {}),
    "batch": ("batches of 4", True, {"train.batch_size": 4, "train.micro_batch": 4, "train.steps": 800}),
}
PANELS = {
    "Inter-modal loss over chance": ("loss_inter", None),
    "Accuracy, inter": ("accuracy_inter", (0, 1)),
    "Similarity, audio": ("similarity_audio", (0, 1)),
    "Gain, audio": ("gain_audio", None),
}


@dataclass(frozen=True)
class Pairs:
    """Members of clip k; `own`: with its own sound, else with the next clip's."""

    own: bool

    def __call__(self, k: int) -> dict[str, bytes]:
        encode = EncodeSynthetic(WORLD, SHAPE)
        return encode(k) if self.own else {**encode(k), "wav": encode(k + 1)["wav"]}


def run(folder: Path, name: str) -> list[dict[str, float]]:
    _, own, settings = RUNS[name]
    data = folder / ("own" if own else "others")
    if not (data / "index").exists():
        items = [(f"synthetic-0-{k}", k) for k in range(CLIPS)]
        pack(items, Pairs(own), Store(str(data)), processes=len(os.sched_getaffinity(0)), part_items=128)
    log = folder / name / "metrics.jsonl"
    if not (folder / name / "model" / "config.json").exists():
        typed = [f"--{field}={value}" for field, value in settings.items()]
        command = [sys.executable, "-m", "equiav", "pretrain", "--config", "smoke", "--stream.url", str(data)]
        subprocess.run([*command, "--out", str(folder / name), *typed], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in log.read_text().splitlines()]


def draw(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, (field, limits)) in zip(axes.flat, PANELS.items(), strict=True):
        for name, rows in logs.items():
            values = np.array([row[field] for row in rows])
            if field.startswith("loss"):
                values = values / np.log(RUNS[name][2].get("train.batch_size", BATCH))
            width = max(1, len(values) // 40)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axis.plot(np.arange(len(smooth)) + width / 2, smooth, label=RUNS[name][0])
        axis.set(title=title, xlabel="step", ylim=limits or (None, None))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(folder: Path) -> None:
    logs = {name: run(folder, name) for name in RUNS}
    draw({name: logs[name] for name in ("well", "longer")}, folder / "learning-well.png")
    draw({name: logs[name] for name in ("well", "rate", "pairs", "batch")}, folder / "learning-ill.png")
    print("| run | loss over chance | accuracy | similarity | gain | effective rank |\n|---|---|---|---|---|---|")
    for name, rows in logs.items():
        last = {key: float(np.mean([row[key] for row in rows[-40:]])) for key in rows[-1]}
        chance = np.log(RUNS[name][2].get("train.batch_size", BATCH))
        figures = [last["loss_inter"] / chance, last["accuracy_inter"], last["similarity_audio"], last["gain_audio"]]
        print(
            f"| {RUNS[name][0]} | "
            + " | ".join(f"{x:.2f}" for x in figures)
            + f" | {last['effective_rank_audio']:.1f} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
