"""What the paper reports of fine-tuning (Tables 1 to 3), to stand beside what was measured here."""

from __future__ import annotations

import math
from typing import Any

from equiav.config import FinetuneConfig

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
            f"{config.model.size}, from {config.init or 'scratch'}, {config.train.steps:,} steps of {config.train.batch_size}, "
            f"seed {config.seed}; the last step's weights; tested on {said['dataset']}"
            + f" ({said['parts']})" * bool(said["parts"])
            + (f", mean of the probabilities over {tune.test_frames} frame(s)" if tune.modality != "audio" else "")
            + ".",
            "",
        ]
    )
