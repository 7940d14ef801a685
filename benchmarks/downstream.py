"""`python -m benchmarks.downstream FOLDER [SEED]`: what pretraining is worth on labels, in the synthetic world. Under 15 minutes
on two cores.

The world: a mixture; a fifth of the objects are silent, a fifth are out of sight, so that a clip's shapes and colours can only
be told from both: shapes are told from the sound rather, colours from the picture. The smoke recipe pretrains on clips without
their labels, then the same encoders are probed and fine-tuned. LEAST says by how much each has to be ahead; docs/benchmarks.md
has the figures of three seeds, from which it was taken before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from equiav.config import DataConfig
from equiav.data.labels import keys_of
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import COLOURS, SHAPES, Rules, World
from streaming import Dataset, Store
from streaming.labels import Labels, Sets, write_labels
from streaming.pack import pack

NAMES = (*SHAPES, *COLOURS)
RULES = Rules(silent=0.2, unseen=0.2, classes="things")
PRETRAIN, LABELLED, TEST = 4096, 1024, 1024
FEW, TIMES = 48, 4  # clips, and so many sets of them
STEPS, EPOCHS, OF_FEW = 1000, 8, 30
LEAST = {
    "frozen, pretrained over random": 0.04,
    "fine-tuned, both over sound": 0.1,
    "fine-tuned, both over pictures": 0.08,
    "few labels, pretrained over scratch": 0.015,
}


def make(folder: Path, rules: Rules, seed: int, count: int) -> None:
    """Clips, with labels; some of them in parts of FEW each."""
    if (folder / "labels").exists():
        return
    world = World(seed, 64, 10, 2.56, rules=rules)
    encode = EncodeSynthetic(world, Shape(10, 64, 90, "wav", 30.0, True, DataConfig(silence=0.0)))
    store = Store(str(folder))
    pack([(f"clip-{k}", k) for k in range(count)], encode, store, processes=2, part_items=64)
    dataset = Dataset(store)
    numbers = [int(key.partition("-")[2]) for key in keys_of(dataset)]
    classes = Sets.of(NAMES, [[NAMES.index(name) for name in world.labels(k)] for k in numbers])
    parts = Sets.of([f"few {k}" for k in range(TIMES)], [[k // FEW] if k < TIMES * FEW else [] for k in numbers])
    write_labels(store, dataset.fingerprint, Labels(classes, parts))


def equiav(folder: Path, *words: object) -> None:
    command = [sys.executable, "-m", "equiav", *map(str, words), "--config", "smoke", "--data.silence", "0"]
    with (folder / "log.txt").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def measure(folder: Path, seed: int) -> dict[str, float]:
    """-> mAP of each way."""
    make(folder / "pretrain", Rules(classes="things"), 10 * seed + 1, PRETRAIN)
    make(folder / "clips", RULES, 10 * seed + 2, LABELLED)
    make(folder / "test", RULES, 10 * seed + 3, TEST)
    run, clips, test = folder / "run", folder / "clips", folder / "test"
    equiav(folder, "pretrain", "--stream.url", folder / "pretrain", "--out", run, "--seed", seed, "--train.steps", STEPS,
           "--train.warmup_steps", STEPS // 20)  # fmt: skip
    found = {}
    for name, init in (("pretrained", run), ("random", "")):
        out = folder / f"frozen-{name}"
        equiav(folder, "probe", "--stream.url", clips, "--probe.test_url", test, "--out", out, "--features", folder / "features",
               "--seed", seed, *(["--weights", init] if init else []))  # fmt: skip
        found[f"frozen, {name}"] = json.loads((out / "results.json").read_text())["linear"]["mAP"]

    def tuned(name: str, *more: object) -> None:
        out = folder / name.replace(", ", "-")
        equiav(folder, "finetune", "--stream.url", clips, "--tune.test_url", test, "--out", out, "--seed", seed, "--tune.loss",
               "many", "--tune.drop_path", 0.1, "--train.lr", 1e-3, *more)  # fmt: skip
        found[name] = json.loads((out / "model" / "results.json").read_text())["mAP"]

    for modality in ("audio", "image", "both"):
        tuned(f"fine-tuned, {modality}", "--weights", run, "--tune.modality", modality, "--tune.epochs", EPOCHS,
              "--tune.warmup_epochs", 1)  # fmt: skip
    for name, init in (("few labels, pretrained", ["--weights", run]), ("few labels, scratch", [])):
        for k in range(TIMES):
            tuned(
                f"{name} {k}", *init, "--tune.train_on", f"few {k}", "--tune.epochs", OF_FEW, "--tune.warmup_epochs", 1
            )
        found[name] = sum(found.pop(f"{name} {k}") for k in range(TIMES)) / TIMES
    return found


def ahead(found: dict[str, float]) -> dict[str, float]:
    pairs = [("frozen, pretrained", "frozen, random"), ("fine-tuned, both", "fine-tuned, audio"),
             ("fine-tuned, both", "fine-tuned, image"), ("few labels, pretrained", "few labels, scratch")]  # fmt: skip
    return {name: found[one] - found[other] for name, (one, other) in zip(LEAST, pairs, strict=True)}


def main(folder: Path, seed: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    found = measure(folder, seed)
    print(f"| mAP on {TEST:,} clips, seed {seed} | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} |")
    print("\n| ahead by | mAP | at least |\n|---|---|---|")
    missed = [name for name, value in ahead(found).items() if not value >= LEAST[name]]
    for name, value in ahead(found).items():
        print(f"| {name} | {value:+.3f} | {LEAST[name]:+.3f} |")
    print(f"\n{(time.perf_counter() - begun) / 60:.1f} minutes")
    (folder / "found.json").write_text(json.dumps(found, indent=1))
    if missed:
        print(f"not ahead by as much: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
