"""`python -m benchmarks [NAME ...]`: measures here and now, prints a Markdown table. Ratios are taken within one run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from torchaudio.compliance.kaldi import fbank
from torchvision.transforms.v2 import functional as tv

from benchmarks import stream, training
from benchmarks.training import DEVICE, Row, seconds
from equiav.augment import AudioVectors, ImageVectors, augment_image, augment_spectrogram, log_mel
from equiav.augment.draws import Purpose
from equiav.config import Config, from_dict
from equiav.data.synthetic import World
from streaming.processes import keep_freed_memory


def draws() -> Iterator[Row]:
    config = from_dict(Config, {}, "benchmark")
    samples = torch.arange(20_000, device=DEVICE)
    for name, kind in (("image", ImageVectors), ("audio", AudioVectors)):
        vectors = kind(config.model, config.augment)
        spent = seconds(lambda vectors=vectors: vectors.draw(0, 0, samples, Purpose.VIEW_IMAGE))
        yield (
            f"{name} augmentation vectors drawn",
            f"{len(samples) / spent / 1000:,.0f} samples/ms",
            "20,000 samples at once",
        )


def logmel() -> Iterator[Row]:
    waveform = 0.1 * torch.randn(32, 160_000, device=DEVICE)
    ours = seconds(lambda: log_mel(waveform), 5)
    options = {"htk_compat": True, "use_energy": False, "window_type": "hanning", "num_mel_bins": 128, "dither": 0.0}
    theirs = seconds(lambda: [fbank(w[None], sample_frequency=16000, **options) for w in waveform], 5)
    yield (
        "log-mel, 10 s clips",
        f"{32 / ours:,.0f} clips/s",
        f"{theirs / ours:.1f}x torchaudio's kaldi.fbank, clip by clip",
    )


def augment() -> Iterator[Row]:
    B, config = 32, from_dict(Config, {}, "benchmark")
    image, audio = ImageVectors(config.model, config.augment), AudioVectors(config.model, config.augment)
    frames = torch.randint(0, 256, (B, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    t_v = image.draw(0, 0, torch.arange(B, device=DEVICE), Purpose.VIEW_IMAGE)[:, 0]
    p = {name: value.cpu() for name, value in image.decode(t_v).items()}

    def one_by_one() -> None:
        for k in range(B):
            box = [round(float(p[name][k]) * 256 / 224) for name in ("top", "left", "height", "width")]
            x = tv.resized_crop(frames[k].float() / 255, *box, size=[224, 224], antialias=True)
            if p["jitter_on"][k]:
                x = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(x, 0.8), 1.2), 1.1)
                x = tv.adjust_hue(x, float(p["hue"][k]))
            if p["blur_on"][k]:
                x = tv.gaussian_blur(x, [17, 17], [float(p["sigma"][k])] * 2)
            tv.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    ours, theirs = seconds(lambda: augment_image(frames, t_v, image), 5), seconds(one_by_one, 5)
    yield "image views, 256 to 224 pixels", f"{B / ours:,.0f}/s", f"{theirs / ours:.1f}x torchvision, image by image"
    spectrogram = torch.randn(B, 1024, 128, device=DEVICE)
    t_a = audio.draw(0, 0, torch.arange(B, device=DEVICE), Purpose.VIEW_AUDIO)[:, 0]
    spent = seconds(lambda: augment_spectrogram(spectrogram, t_a, audio), 5)
    yield "spectrogram views, 1024 x 128", f"{B / spent:,.0f}/s", f"batches of {B}"


def synthetic() -> Iterator[Row]:
    world = World(seconds=2.56)
    world.clip(0)
    spent = seconds(lambda: [world.clip(k) for k in range(100)], 5)
    yield "synthetic clips at test size", f"{100 / spent:,.0f} clips/s", "one core"


def plan() -> Iterator[Row]:
    command = [sys.executable, "-m", "equiav", "plan"]
    spent = seconds(lambda: subprocess.run(command, check=True, capture_output=True), 3)
    yield "equiav plan, vit_b16, from the shell", f"{spent:.1f} s", "median of 3"


def prediction() -> Iterator[Row]:
    """On the smoke run's clips: what `equiav plan --keep` says, and what the run then takes from the shell."""
    with tempfile.TemporaryDirectory() as folder:
        command, data = [sys.executable, "-m", "equiav"], f"{folder}/data"
        packing = ["pack", "synthetic:2048", "--to", data, "--short_side", "64", "--shard_samples", "128"]
        subprocess.run([*command, *packing], check=True, capture_output=True)
        settings = ["--config", "smoke", "--device", DEVICE, "--stream.url", data]
        told = subprocess.run(
            [*command, "plan", "--keep", *settings], check=True, capture_output=True, text=True
        ).stdout
        predicted = 60 * float(re.search(r"would take ([\d.]+) minutes", told)[1])  # type: ignore[index]
        begun = time.perf_counter()
        subprocess.run([*command, "pretrain", *settings, "--out", f"{folder}/run"], check=True, capture_output=True)
        took = time.perf_counter() - begun
    yield (
        "what `equiav plan` predicts of the smoke run",
        f"{predicted:.0f} s",
        f"it took {took:.0f} s: {predicted / took:.2f}x",
    )


BENCHMARKS = {
    call.__name__: call for call in (draws, logmel, augment, synthetic, *training.BENCHMARKS, plan, prediction)
}
BENCHMARKS |= {f"stream_{call.__name__}": call for call in stream.BENCHMARKS}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    keep_freed_memory()
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"{where}, torch {torch.__version__}\n\n| what | figure | beside |\n|---|---|---|")
    for name in names or BENCHMARKS:
        for row in BENCHMARKS[name]():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
