"""Plots of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from monitoring import metrics as m


def plot_run(
    rows: list[dict[str, float]], retrieval: dict[str, tuple[float, float]], candidates: int, path: Path
) -> None:
    """Loss terms, accuracies, predictor similarity and gain over the steps; recall beside chance."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    panels = (
        ("Loss terms", (m.LOSS,)),
        ("Accuracy", (m.ACCURACY,)),
        ("Predictor similarity and gain", (m.SIMILARITY, m.GAIN)),
    )
    for axis, (title, metrics) in zip(axes.flat, panels, strict=False):
        for metric in metrics:
            for key, labels in metric.logged.items():
                if key in rows[0] and labels != ("total",):
                    name = key if len(metrics) > 1 else " ".join(labels)
                    _curve(axis, [row[key] for row in rows], name)
        axis.set(title=title, xlabel="step", xlim=(0, len(rows)))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    _bars(axes[1, 1], retrieval, candidates)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(axis: Axes, values: list[float], label: str) -> None:
    """The values faintly, their running mean on top."""
    (line,) = axis.plot(values, alpha=0.2, linewidth=0.8)
    width = max(1, len(values) // 25)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axis.plot(np.arange(len(smooth)) + width / 2, smooth, color=line.get_color(), label=label.replace("_", " "))


def _bars(axis: Axes, retrieval: dict[str, tuple[float, float]], candidates: int) -> None:
    ks = (1, 5, 10)
    for shift, direction in ((-0.25, "image to audio"), (0.0, "audio to image")):
        mean, spread = zip(*(retrieval[f"{direction} R@{k}"] for k in ks), strict=True)
        bars = axis.bar(np.arange(3) + shift, mean, 0.24, yerr=spread, label=direction)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    bars = axis.bar(np.arange(3) + 0.25, [100 * k / candidates for k in ks], 0.24, color="0.7", label="chance")
    axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set(
        title=f"Retrieval among {candidates} held-out clips, %", xticks=range(3), xticklabels=[f"R@{k}" for k in ks]
    )
    axis.legend(frameon=False, fontsize=9)
