"""`equiav plan`: what a configuration costs, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from equiav.commands.settings import PlanConfig
from equiav.config import AUDIO_VECTOR, IMAGE_VECTOR, Config, ModelConfig
from equiav.model import EquiAV
from equiav.model.arithmetic import Side, count
from equiav.terminal import say
from equiav.train import fit
from streaming import Dataset, Store

FLOAT32, FLOAT64 = 4, 8
SAMPLES = 1009  # the batch that is counted, and divided by: a prime above every width


@dataclass
class Plan:
    parameters: dict[str, int]  # part -> trainable parameters
    audio: Side
    image: Side
    forward: int  # multiply-adds for one sample, everything
    forward_backward: int
    local_batch: int  # the largest of any process
    kept_batch: int  # of which activations are kept at a time
    activation_bytes: int  # of one sample, kept for the backward pass, bfloat16 autocast
    state_bytes: int  # weights, gradients and both AdamW moments, float32, over all processes
    embedding_bytes: int  # each process receives from the others in one step, float32
    weight_bytes: int  # each process receives and sends under full sharding in one step: float32, gradients float64


def make_plan(config: PlanConfig) -> Plan:
    """Activations and parameters are of two blocks to an encoder; every further block takes what the second did."""
    two, further = replace(config, model=replace(config.model, depth=2)), config.model.depth - 2
    audio, image = count(config.model, config.objective)
    with torch.device("meta"):
        model = EquiAV(two.model, two.objective)
    activations = _activation_bytes(two)
    activations += further * (activations - _activation_bytes(replace(config, model=replace(config.model, depth=1))))

    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = " ".join(name.split(".")[:2]) if "." in name else name
        parts[part] = parts.get(part, 0) + parameter.numel() * (1 + further * (".blocks.1." in name))
    total, W, G = sum(parts.values()), config.processes, config.train.batch_size
    p = min(config.train.micro_batch, G)
    most, fewest = -(-config.train.micro_batches // W), config.train.micro_batches // W  # of a process
    embeddings = 2 if config.objective.intra == "none" else 6  # of a sample
    gathers = most * (3 if config.train.recompute else 2)
    return Plan(
        parameters=parts,
        audio=audio,
        image=image,
        forward=audio.forward + image.forward,
        forward_backward=audio.forward_backward + image.forward_backward,
        local_batch=most * p,
        kept_batch=p if config.train.recompute else most * p,
        activation_bytes=activations,
        state_bytes=total * FLOAT32 * 4,
        embedding_bytes=embeddings * (G - fewest * p) * config.model.head_width * FLOAT32,
        weight_bytes=total * (gathers * FLOAT32 + FLOAT64) * (W - 1) // W,
    )


def _inputs(config: Config, batch: int) -> list[torch.Tensor | None]:
    m, Q = config.model, 1 + config.objective.sampled
    inputs: list[torch.Tensor | None] = []
    for view in (True, config.objective.needs_augmented):
        inputs.append(torch.empty(batch, m.spectrogram_frames, m.spectrogram_mels) if view else None)
        inputs.append(torch.empty(batch, 3, m.image_size, m.image_size) if view else None)
    return [*inputs, torch.empty(batch, Q, AUDIO_VECTOR), torch.empty(batch, Q, IMAGE_VECTOR)]


def _activation_bytes(config: Config) -> int:
    """What autograd keeps of one sample for the backward pass, on tensors that hold no data (on meta proper, attention would
    keep its weights, which fused kernels do not)."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with FakeTensorMode():
        model = EquiAV(config.model, config.objective)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            embeddings = model(*_inputs(config, SAMPLES))
        # Weights are kept once, activations for every sample: no weight's size is a multiple of SAMPLES.
        total = sum(size for size in kept.values() if size % SAMPLES == 0) // SAMPLES
        del embeddings  # held until here, so that no storage was used twice
    return total


def run_plan(config: PlanConfig) -> None:
    plan, console = make_plan(config), Console()
    if config.stream.url:
        dataset = Dataset(Store(config.stream.url, config.stream.patience))
        if not config.keep:
            config = fit.fit(config, dataset, plan.activation_bytes)
        for line in fit.words(config, dataset, fit.measure(config), config.price):
            say(line)
        if config.write:
            config.write.write_text(yaml.safe_dump(fit.settings(config), sort_keys=False))
            say(f"wrote {config.write}: equiav pretrain --config {config.write}")
        return
    console.print(_parameter_table(plan, config.model))
    console.print(_compute_table(plan))
    if config.model.predictor == "attention":
        console.print(_centroid_table(plan))
    console.print(_memory_table(plan, config))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k else "left")
    return table


def _parameter_table(plan: Plan, model: ModelConfig) -> Table:
    table = _table(f"Parameters, {model.size}", "part", "millions")
    for part, numbers in plan.parameters.items():
        table.add_row(part, f"{numbers / 1e6:.2f}")
    table.add_row("all", f"{sum(plan.parameters.values()) / 1e6:.2f}", style="bold")
    return table


def _compute_table(plan: Plan) -> Table:
    table = _table("Multiply-adds per sample, billions", "part", "audio", "image", "both")
    for part in ("encoder", "predictor", "heads"):
        a, v = getattr(plan.audio, part) / 1e9, getattr(plan.image, part) / 1e9
        table.add_row(f"{part} (both views)" if part == "encoder" else part, f"{a:.2f}", f"{v:.2f}", f"{a + v:.2f}")
    table.add_row("forward", "", "", f"{plan.forward / 1e9:.2f}")
    table.add_row("forward and backward", "", "", f"{plan.forward_backward / 1e9:.2f}", style="bold")
    return table


def _centroid_table(plan: Plan) -> Table:
    table = _table(
        "Appendix Table B: multiply-adds by the size S of the centroid, billions",
        "S",
        "audio",
        "added",
        "here",
        "image",
        "added",
        "here",
    )
    table.add_row("baseline", f"{plan.audio.baseline / 1e9:.2f}", "", "", f"{plan.image.baseline / 1e9:.2f}", "", "")
    for S in plan.audio.separate:
        cells = []
        for side in (plan.audio, plan.image):
            cells += [
                f"{(side.baseline + side.separate[S]) / 1e9:.2f}",
                f"+{side.separate[S] / 1e9:.2f}",
                f"+{side.centroid[S] / 1e9:.3f}",
            ]
        table.add_row(str(S), *cells)
    table.caption = (
        "added: key and value computed again for the centroid, as the paper counts; here: shared with the view's query"
    )
    table.caption_justify = "left"
    return table


def _memory_table(plan: Plan, config: PlanConfig) -> Table:
    W, gib, mib = config.processes, 2**30, 2**20
    table = _table(
        f"Memory and traffic of one of {W} processes, global batch {config.train.batch_size}", "what", "size"
    )
    table.add_row("samples in the local batch", str(plan.local_batch))
    table.add_row("activations per sample, bfloat16", f"{plan.activation_bytes / mib:.0f} MiB")
    table.add_row("activations", f"{plan.activation_bytes * plan.kept_batch / gib:.2f} GiB")
    table.add_row("weights, gradients, AdamW moments, replicated", f"{plan.state_bytes / gib:.2f} GiB")
    table.add_row("weights, gradients, AdamW moments, fully sharded", f"{plan.state_bytes / W / gib:.2f} GiB")
    table.add_row("embeddings received per step", f"{plan.embedding_bytes / mib:.2f} MiB")
    table.add_row("weights and gradients moved per step, fully sharded", f"{plan.weight_bytes / gib:.2f} GiB")
    return table
