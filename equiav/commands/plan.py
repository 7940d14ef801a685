"""`equiav plan`: what a configuration costs, counted from the model itself on the meta device. Needs no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from equiav.config import AUDIO_VECTOR, IMAGE_VECTOR, Config, ModelConfig, require
from equiav.model import EquiAV

TABLE_B = (1, 4, 8, 16)
FLOAT32, FLOAT64 = 4, 8
SAMPLES = 1009  # the batch that is counted, and divided by: a prime above every width


@dataclass(frozen=True)
class PlanConfig(Config):
    """Parameters, multiply-adds, memory and traffic of a configuration, without a GPU."""

    world_size: int = 8
    """Processes (GPUs) that share the global batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.world_size <= self.train.micro_batches,
            "world_size",
            self.world_size,
            f"1 to {self.train.micro_batches}, the micro-batches in a step",
        )


@dataclass
class Side:
    """Multiply-adds of one modality for one sample, forward."""

    encoder: int  # both views
    predictor: int  # the query of the view and the S of the centroid, key and value once
    heads: int  # projection heads
    baseline: int  # the paper's Table B baseline: both views, the view's own query, the heads
    centroid: dict[int, int] = field(default_factory=dict)  # S -> added for the centroid, given the key and value
    separate: dict[int, int] = field(default_factory=dict)  # S -> added where key and value are computed again


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
    """Counts a model of two blocks to an encoder; every further block costs what the second did."""
    two, further = replace(config, model=replace(config.model, depth=2)), config.model.depth - 2
    with torch.device("meta"):
        model, flops = EquiAV(two.model, two.objective), FlopCounterMode(display=False)
        with flops:
            embeddings = model(*_inputs(two, batch=1))
        forward = flops.get_total_flops() // 2
        by_module = {name: sum(ops.values()) // 2 for name, ops in flops.get_flop_counts().items()}
        trained = [z for z in embeddings[:6] if z is not None]
        with flops:
            torch.autograd.backward(trained, [torch.empty_like(z) for z in trained])
        backward = flops.get_total_flops() // 2
        audio, image = (_count_side(model, name, by_module, two, further) for name in ("audio", "image"))
    blocks = further * sum(by_module[f"EquiAV.{name}.encoder.blocks.1"] for name in ("audio", "image"))
    activations = _activation_bytes(two)
    activations += further * (activations - _activation_bytes(replace(config, model=replace(config.model, depth=1))))

    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = " ".join(name.split(".")[:2]) if "." in name else name
        parts[part] = parts.get(part, 0) + parameter.numel() * (1 + further * (".blocks.1." in name))
    total, W, G = sum(parts.values()), config.world_size, config.train.batch_size
    p = min(config.train.micro_batch, G)
    most, fewest = -(-config.train.micro_batches // W), config.train.micro_batches // W  # of a process
    gathers = most * (3 if config.train.recompute else 2)
    return Plan(
        parameters=parts,
        audio=audio,
        image=image,
        forward=forward + blocks,
        forward_backward=forward + backward + 3 * blocks,  # a product's backward pass is two products
        local_batch=most * p,
        kept_batch=p if config.train.recompute else most * p,
        activation_bytes=activations,
        state_bytes=total * FLOAT32 * 4,
        embedding_bytes=len(trained) * (G - fewest * p) * config.model.head_width * FLOAT32,
        weight_bytes=total * (gathers * FLOAT32 + FLOAT64) * (W - 1) // W,
    )


def _inputs(config: Config, batch: int) -> list[torch.Tensor | None]:
    m, Q = config.model, 1 + config.objective.sampled
    inputs: list[torch.Tensor | None] = []
    for view in (True, config.objective.needs_augmented):
        inputs.append(torch.empty(batch, m.spectrogram_frames, m.spectrogram_mels) if view else None)
        inputs.append(torch.empty(batch, 3, m.image_size, m.image_size) if view else None)
    return [*inputs, torch.empty(batch, Q, AUDIO_VECTOR), torch.empty(batch, Q, IMAGE_VECTOR)]


def _count_side(model: EquiAV, name: str, by_module: dict[str, int], config: Config, further: int) -> Side:
    branch = model.audio if name == "audio" else model.image

    def part(*names: str) -> int:
        return sum(by_module.get(f"EquiAV.{name}.{n}", 0) for n in names)

    def predict(queries: int) -> int:
        """Multiply-adds of the predictor for this many queries, key and value included."""
        h = torch.empty(1, math.prod(branch.encoder.grid), config.model.width)
        counter = FlopCounterMode(display=False)
        with counter:
            branch.predictor(h, torch.empty(1, queries, AUDIO_VECTOR if name == "audio" else IMAGE_VECTOR))
        return counter.get_total_flops() // 2

    one = predict(1)
    query = predict(2) - one  # each further query costs the same
    encoder = part("encoder") + further * part("encoder.blocks.1")
    heads = part("intra_head", "inter_head")
    sizes = sorted({*TABLE_B, config.objective.centroid_size})
    return Side(
        encoder=encoder,
        predictor=part("predictor"),
        heads=heads,
        baseline=encoder + one + heads,
        centroid={S: S * query for S in sizes},
        separate={S: one + (S - 1) * query for S in sizes},
    )


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
    for part, count in plan.parameters.items():
        table.add_row(part, f"{count / 1e6:.2f}")
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
    W, gib, mib = config.world_size, 2**30, 2**20
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
