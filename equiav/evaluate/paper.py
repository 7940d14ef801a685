"""What the paper reports (Tables 1 to 4 and 7), to stand beside what was measured here."""

from __future__ import annotations

import math
from typing import Any

from equiav.config import FinetuneConfig
from equiav.evaluate.retrieval import Spread

Row = tuple[str, str, dict[str, float]]  # table, measure, number by modality
FINE_TUNED: dict[str, Row] = {
    "AudioSet-20K": ("Table 1", "mAP", {"audio": 42.4, "image": 25.7, "both": 46.6}),
    "AudioSet-2M": ("Table 1", "mAP", {"audio": 49.1, "image": 30.1, "both": 54.6}),
    "VGGSound": ("Table 1", "accuracy", {"audio": 61.0, "image": 50.7, "both": 67.1}),
    "ESC-50": ("Table 2", "accuracy", {"audio": 96.0}),
    "SPC-v1": ("Table 2", "accuracy", {"audio": 97.8}),
    "FSD-50K": ("Table 2", "mAP", {"audio": 62.6}),  # called accuracy there, which a clip of several labels has not
    "UCF101": ("Table 3", "accuracy", {"image": 89.7}),
    "HMDB51": ("Table 3", "accuracy", {"image": 64.4}),
    "Kinetics400": ("Table 3", "accuracy", {"image": 57.3}),
}

AT = ("R@1", "R@5", "R@10")
RETRIEVED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # image to audio, audio to image (Table 4)
    "MSR-VTT": ((13.8, 31.4, 43.0), (14.4, 33.3, 43.0)),
    "AudioSet": ((30.1, 53.3, 62.9), (29.6, 53.7, 63.1)),
    "VGGSound": ((28.5, 51.5, 61.7), (28.4, 51.8, 62.3)),
}
SIMILAR = {"audio": 0.90, "image": 0.92}  # Table 7, the attention predictor on AudioSet


def retrieval_table(benchmark: str, spread: Spread, clips: int, seeds: int) -> str:
    """-> Markdown."""
    lines = [f"| among {clips:,} clips, % | R@1 | R@5 | R@10 | median rank |", "|---|---|---|---|---|"]
    for number, direction in enumerate(("image to audio", "audio to image")):
        cells = [spread[f"{direction} {name}"] for name in (*AT, "median rank")]
        lines.append(f"| {direction} | " + " | ".join(f"{mean:.1f} ± {half:.1f}" for mean, half in cells) + " |")
        if benchmark:
            paper = " | ".join(f"{value:.1f}" for value in RETRIEVED[benchmark][number])
            lines.append(f"| EquiAV, the paper (Table 4, {benchmark}) | {paper} | |")
    lines.append(
        f"| chance | {' | '.join(f'{100 * min(1, k / clips):.2f}' for k in (1, 5, 10))} | {(clips + 1) / 2:.1f} |"
    )
    return "\n".join([*lines, "", f"± is half the spread over {seeds} draw(s) of the centroid's vectors.", ""])


def similarity_table(rows: dict[str, dict[str, dict[str, float]]], clips: int) -> str:
    """-> Markdown."""
    lines = [f"| {clips:,} clips | augmentation | similarity | gain | sensitivity |", "|---|---|---|---|---|"]
    for side, of_kinds in rows.items():
        for kind, said in of_kinds.items():
            cells = [
                f"{said[name]:.3f} ± {said[f'{name} error']:.3f}" for name in ("similarity", "gain", "sensitivity")
            ]
            lines.append(f"| {side} | {kind} | {' | '.join(cells)} |")
    paper = ", ".join(f"{value:.2f} ({side})" for side, value in SIMILAR.items())
    told = (
        "Similarity: cosine of the predicted and the augmented embedding. Gain: less the cosine without prediction. "
        "Sensitivity: less that of another draw's prediction. Kinds stand alone, without the crop that every view of training "
        "has. ± is the standard error. "
        f"The paper, as trained, on AudioSet: {paper} (Table 7)."
    )
    return "\n".join([*lines, "", told, ""])


def beside_the_paper(config: FinetuneConfig, said: dict[str, Any]) -> str:
    """said: `results`, and of which clips -> Markdown."""
    tune = config.tune
    table, measure, numbers = FINE_TUNED.get(tune.benchmark, ("", "accuracy" if "accuracy" in said else "mAP", {}))
    low, high = (100 * x for x in said.get(f"{measure} 95%") or (math.nan, math.nan))
    paper = f"{numbers[tune.modality]:.1f} ({table})" if tune.modality in numbers else "not reported"
    here = "-" if said.get(measure) is None else f"{100 * said[measure]:.1f}"
    interval = f"{low:.1f} to {high:.1f}" if math.isfinite(low) else "-"
    what = {"audio": "sound", "image": "pictures", "both": "sound and pictures"}[tune.modality]
    return "\n".join(
        [
            f"| {tune.benchmark or 'dataset'}, {what} | {measure}, % | 95% interval | clips |",
            "|---|---|---|---|",
            f"| here | {here} | {interval} | {said['clips']:,} of {said['of']:,} |",
            *([f"| EquiAV, the paper | {paper} | | |"] if tune.benchmark else []),
            "",
            f"{config.model.size}, from {config.weights or 'scratch'}, "
            f"{config.train.steps:,} steps of {config.train.batch_size}, seed {config.seed}; "
            f"the last step's weights; tested on {said['dataset']}"
            + f" ({said['parts']})" * bool(said["parts"])
            + (f", mean of the probabilities over {tune.test_frames} frame(s)" if tune.modality != "audio" else "")
            + ".",
            "",
        ]
    )
