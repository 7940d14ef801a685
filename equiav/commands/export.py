"""`equiav export`: a model folder for others: weights, programs that need no EquiAV, a model card."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from equiav.api import Embedder, Labeller, load
from equiav.commands.settings import ExportConfig
from equiav.config import to_yaml
from equiav.known import SETTINGS, model_folder
from equiav.programs import programs, require_onnx, write
from equiav.terminal import masked, plain, say
from equiav.weights import CLASSES, WEIGHTS, download

CARD = "README.md"  # where model hubs look for it


def run_export(config: ExportConfig) -> None:
    if "onnx" in config.formats:
        require_onnx()
    with ExitStack() as stack:
        temporary = stack.enter_context(TemporaryDirectory(prefix="equiav-"))
        remote = "://" in config.weights
        given = download(config.weights, Path(temporary)) if remote else Path(config.weights).expanduser()
        folder = model_folder(given)
        model = load(folder)
        out = config.out.absolute()
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(stack.enter_context(TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)), "model")
        part.mkdir()
        for name in (SETTINGS, WEIGHTS, *([CLASSES] if isinstance(model, Labeller) else [])):
            shutil.copyfile(folder / name, part / name)
        off: dict[str, float] = {}
        for name, program in programs(model).items():
            off |= write(program, part / name, config.formats)
        (part / CARD).write_text(card(config, model, given, folder, off))
        if out.exists():
            out.rmdir()
        part.replace(out)
    for name, worst in off.items():
        say(f"{config.out / name}: reloaded, it is off by {worst:.1e} at most")
    say(f"{config.out / CARD}")


def card(config: ExportConfig, model: Embedder | Labeller, run: Path, folder: Path, off: dict[str, float]) -> str:
    """-> Markdown. run: what was named; folder: the model's own, in it."""
    embeds = isinstance(model, Embedder)
    name = (
        config.name
        or (config.weights if "://" in config.weights else str(run.resolve())).rstrip("/").rpartition("/")[2]
    )
    head: dict[str, Any] = {
        "license": config.license or "unknown",
        "library_name": "equiav",
        "tags": ["audio-visual", "self-supervised", "equiav"] if embeds else ["audio-visual", "equiav"],
        "pipeline_tag": "feature-extraction" if embeds else "audio-classification",
    }
    s, trained = model.settings, run / "config.yaml"
    what = (
        f"Embeds sounds and pictures in one space of {s.model.head_width} numbers, where those that belong together are near."
        if isinstance(model, Embedder)
        else f"Tells {len(model.classes)} classes apart"
        + (", of which a clip has one." if model.one else ", of which a clip may have several.")
    )
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", f"# {plain(name)}", ""]
    lines += [
        f"{what} EquiAV ([paper](https://arxiv.org/abs/2403.09502)), {s.model.size}, written by equiav {version('equiav')}.",
        "",
        "## Use",
        "```python",
        "import equiav",
        'model = equiav.load("PATH OF THIS FOLDER")',
        *(
            ["z = model.embed_video('my.mp4')  # of parts as long as the model hears: .audio, .image, .begin, .end"]
            if embeds
            else ["model.predict_video('my.mp4')"]
        ),
        "```",
        "",
    ]
    if off:
        lines += ["Without this package, from what each program says of its inputs:", ""]
        lines += ["| program | takes | gives | off by, at most |", "|---|---|---|---|"]
        for key, program in programs(model).items():
            takes = ", ".join(f"{n} {_shape(x)}" for n, x in program.inputs.items())
            for file in (f"{key}.pt2", f"{key}.onnx"):
                if file in off:
                    lines.append(f"| `{file}` | {takes} | {program.output} | {off[file]:.0e} |")
        lines += [
            "",
            f"`waveform`: mono at {s.data.sample_rate} Hz, in [-1, 1], filled up with zeros to {model.length} samples "
            f"({model.seconds:.2f} s); `lengths`: how many of them are the sound's own; `frames`: the central square of a "
            f"picture, {s.data.frame_size} pixels, RGB. b is any number of clips.",
            "",
        ]
    lines += ["## Data", "", config.data or "Not said.", "", "## Results", ""]
    told = {path.resolve() for of in (run, folder) for path in (of / "results.md", *of.glob("eval/*.md"))}
    tables = [path.read_text() for path in sorted(told) if path.is_file()]
    lines += tables or ["Not measured, or not beside the model: `equiav eval`, `equiav finetune` leave them there.", ""]
    lines += [
        "## Limits",
        "",
        f"- It hears {model.seconds:.2f} s at a time, up to {s.data.sample_rate // 2} Hz, and sees the central square of single "
        f"pictures at {s.model.image_size} pixels: no motion.",
        "- A score is a cosine; what is high depends on the model and the clips. Compare with pairs that do not belong together.",
        "- It knows what its data shows, and repeats what is uneven in it. It was not made to recognise people.",
        f"- Spectrograms are normalised by {s.data.audio_mean:g} and {s.data.audio_std:g}: recordings of another loudness may "
        "lie outside what it knows.",
        "",
        "## Settings",
        "```yaml",
        masked(trained.read_text() if trained.is_file() else to_yaml(s)).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _shape(x: Any) -> str:
    return f"({', '.join(['b', *map(str, x.shape[1:])])}) {str(x.dtype).removeprefix('torch.')}"
