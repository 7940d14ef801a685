"""What a round of `tests.soak` is: a function of the seed and the round's number."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

EVENTS = {
    "kill worker": 3,
    "kill decoder": 1,
    "kill fetcher": 1,
    "kill all": 2,
    "kill agent": 1,
    "term": 3,
    "term all": 1,
    "int all": 1,
    "stop worker": 1.5,
    "stop child": 0.5,
    "stop for good": 0.5,
    "down": 1.5,
    "fault clips": 2,
    "fault runs": 2,
    "lie": 1,
    "lie to start": 1,
    "upload": 3,
    "stale": 2,
    "stale to start": 2,
    "late": 1,
    "late to start": 1,
    "clear cache": 1,
    "move": 2.5,
    "digit metrics": 1.5,
    "digit lines": 2,
    "damage checkpoint": 2,
    "damage index": 1,
    "damage labels": 0.5,
    "damage cache": 1,
    "probe": 1.5,
    "full out": 1.5,
    "full cache": 1,
    "intruder": 1,
    "twin": 1,
}
STALL = 20  # seconds
CALM = 0.08  # of the rounds are long, and almost nothing happens: what grows is seen


class Event(NamedTuple):
    kind: str
    moving: bool  # first waits until a step is done
    delay: float  # seconds since the event before, or since that step
    draws: str  # seed of what else there is to choose


class Start(NamedTuple):
    ranks: int  # 0: without torchrun
    settings: dict[str, Any]


@dataclass
class Plan:
    command: str
    clips: int
    frames: int
    part_items: int
    max_shard_bytes: int
    damage: float  # of the dataset: how much, 0 to 1
    settings: dict[str, Any]  # of both runs
    reference: dict[str, Any]
    starts: list[Start]
    events: list[Event]
    tight: bool  # cache
    init: str  # "", "folder" or "s3"

    def __str__(self) -> str:
        start, stream, train = self.starts[0].settings, self.settings["stream"], self.settings["train"]
        c, model, objective = start["checkpoint"], self.settings["model"], self.settings["objective"]
        return (
            f"{self.command}{f' --weights ({self.init})' if self.init else ''}, {self.clips} clips of {self.frames} frames, "
            f"{self.part_items} a shard of {self.max_shard_bytes >> 10} kB at most, damage {self.damage:.2f}, window "
            f"{stream['window']}, lanes {stream['lanes']}, width {model['width']}, {model['predictor']} predictor, "
            f"{objective['schedule']}/{objective['intra']}/{objective['inter_on']}, {train['steps']} steps of "
            f"{train['batch_size']} in {train['micro_batch']}s, save every {c['every_steps']} steps or "
            f"{c['every_seconds']} s, keep {c['keep']}, patience {start['stream']['patience']} and {c['patience']}"
            f"{', tight cache' if self.tight else ''}"
        )


def planned(seed: int, number: int, kinds: Sequence[str] = (), slow: float = 1.0) -> Plan:
    """kinds: only events whose names begin so. slow: the time without a step after which a run has stalled grows so."""
    draw = random.Random(f"{seed}/{number}")
    command = draw.choice(("pretrain", "pretrain", "finetune"))
    settings = _settings(draw, command)
    settings["stall_seconds"] = STALL * slow
    calm = random.Random(f"{seed}/{number}/calm").random() < CALM
    settings["train"]["steps"] *= 4 if calm else 1
    steps = settings["train"]["steps"]
    return Plan(
        command=command,
        clips=draw.randrange(24, 120),
        frames=draw.randrange(2, 6),
        part_items=draw.choice((1, 2, 3, 5, 8, 11, 17, 200)),
        max_shard_bytes=draw.choice((1 << 28, 1 << 28, 400 << 10)),
        damage=draw.choice((0.0, 0.3, 0.5, 0.7, 1.0)),
        settings=settings,
        reference={
            "stream": {"workers": draw.randrange(2), "ahead": draw.randrange(1, 4), "patience": 20},
            "checkpoint": {"every_steps": draw.choice([7, steps + 7])},
        },
        starts=_starts(draw, steps),
        events=_events(draw, f"{seed}/{number}", kinds, command)[: 1 if calm else None],
        tight=draw.random() < 0.4,
        init=draw.choice(("", "", "folder", "s3") if command == "pretrain" else ("", "folder", "s3")),
    )


def _settings(draw: random.Random, command: str) -> dict[str, Any]:
    batch = draw.randrange(2, 29)
    micro = draw.randrange(1, min(8, 2 + batch // 2))
    steps = max(16, min(120, round(draw.uniform(200, 450) / math.ceil(batch / micro))))
    settings = {
        "seed": draw.randrange(1 << 40),
        "stream": {"window": draw.randrange(1, 7), "lanes": draw.randrange(1, 8), "max_bad": 0.95},
        "train": {"batch_size": batch, "micro_batch": micro, "steps": steps, "warmup_steps": draw.randrange(5),
                  "lr": 1e-3, "lr_start": 1e-6},
        "log_samples": True,
        **_model(draw),
        "objective": _objective(draw),
    }  # fmt: skip
    if command == "finetune":
        settings["tune"] = _tune(draw)
    return settings


def _model(draw: random.Random) -> dict[str, Any]:
    """Small, and no number is a power of two because somebody thought of powers of two."""
    heads, predictor, asks = (
        draw.choice((1, 2, 3, 5)),
        draw.choice(("attention", "linear", "hypernet")),
        draw.randrange(1, 4),
    )
    inner = asks * draw.randrange(3, 14) if predictor == "attention" else draw.randrange(3, 40)
    patches = draw.choice((8, 16)), draw.choice((8, 16))
    frames, mels = patches[1] * draw.randrange(8, 20), patches[1] * draw.randrange(2, 5)
    return {
        "model": {
            "size": "tiny", "depth": draw.randrange(1, 3), "heads": heads, "width": 4 * heads * draw.randrange(2, 7),
            "image_patch": patches[0], "image_size": patches[0] * draw.randrange(2, 6), "audio_patch": patches[1],
            "spectrogram_frames": frames, "spectrogram_mels": mels, "aug_width": draw.randrange(5, 70),
            "predictor": predictor, "predictor_heads": asks, "predictor_width": draw.choice((0, inner)),
            "head_hidden": draw.randrange(9, 90), "head_width": draw.randrange(5, 70),
        },
        "augment": {"max_mask_frames": draw.randrange(frames), "max_mask_mels": draw.randrange(mels)},
        "data": {"audio_mean": -10.3, "audio_std": 3.9, "frame_size": draw.choice((33, 48, 64, 64, 70))},
    }  # fmt: skip


def _objective(draw: random.Random) -> dict[str, Any]:
    intra = draw.choice(("equivariant", "equivariant", "equivariant", "invariant", "none"))
    schedule = draw.choice(("joint", "two_stage", "alternating"))
    return {
        "intra": intra,
        "inter_on": draw.choice(("centroid", "centroid", "original", "augmented", "equivariant")),
        "centroid_size": draw.randrange(1, 6),
        "schedule": "joint" if intra == "none" else schedule,
        "two_stage_split": draw.uniform(0.1, 0.9),
        "intra_positive_in_denominator": draw.random() < 0.7,
        "learnable_temperature": draw.random() < 0.3,
    }


def _tune(draw: random.Random) -> dict[str, Any]:
    return {
        "loss": draw.choice(("one", "many")),
        "modality": draw.choice(("both", "both", "audio", "image")),
        "test_on": "test",
        "test_frames": draw.randrange(1, 4),
        "balance": draw.random() < 0.3,
        "mixup": draw.choice((0.0, 0.5, 1.0)),
        "drop_path": draw.choice((0.0, 0.2)),
        "time_roll": draw.random() < 0.5,
    }


def _starts(draw: random.Random, steps: int) -> list[Start]:
    """Without end: after the last of them the first comes again."""
    patience = draw.choice([20, 30, 60, 120])
    checkpoint = {
        "every_steps": draw.choice([1, 2, 3, 5, 8, 13, steps + 7]),
        "every_seconds": draw.choice([0, 0, 0, 2, 5]),
        "keep": draw.randrange(1, 4),
        "patience": draw.choice([20, 30, 60]),
    }
    starts = []
    for _ in range(40):
        stream = {"workers": draw.choice([0, 1, 1, 2]), "ahead": draw.randrange(4), "patience": patience}
        train = {"recompute": draw.random() < 0.25, "shard": draw.choice([0, 0, 0, 1])}
        start = {"stream": stream, "train": train, "checkpoint": checkpoint}
        starts.append(Start(draw.choice([0, 1, 2, 2, 3, 4]), start))
    return starts


def _events(draw: random.Random, seed: str, kinds: Sequence[str], command: str) -> list[Event]:
    weights = {kind: weight for kind, weight in EVENTS.items() if not kinds or kind.startswith(tuple(kinds))}
    if command == "pretrain" and len(weights) > 1:
        weights.pop("damage labels", None)
    events = []
    for k in range(draw.randrange(4, 9)):
        kind, moving = draw.choices(list(weights), list(weights.values()))[0], draw.random() < 0.6
        events.append(Event(kind, moving, draw.uniform(0, 4 if moving else 12), f"{seed}/{k}"))
    return events
