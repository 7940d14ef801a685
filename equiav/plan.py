"""`equiav plan`: what a configuration costs, counted from the model itself on the meta device. Needs no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from equiav.config import AUDIO_VECTOR, IMAGE_VECTOR, Config, ModelConfig, require
from equiav.model import EquiAV

TABLE_B = (1, 4, 8, 16)
FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class PlanConfig(Config):
    """Parameters, multiply-adds, memory and traffic of a configuration, without a GPU."""

    world_size: int = 8
    """Processes (GPUs) that share the global batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.world_size <= self.train.batch_size, "world_size", self.world_size,
                f"1 to train.batch_size={self.train.batch_size}")  # fmt: skip


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
    activation_bytes: int  # of one sample, kept for the backward pass, bfloat16 autocast
    state_bytes: int  # weights, gradients and both AdamW moments, float32, over all processes
    embedding_bytes: int  # each process receives from the others in one step, float32
    weight_bytes: int  # each process receives and sends under full sharding in one step


def make_plan(config: PlanConfig) -> Plan:
    model_config, objective = config.model, config.objective
    with torch.device("meta"):
        model = EquiAV(model_config, objective)
        flops = FlopCounterMode(display=False)
        with flops:
            embeddings = model(*_inputs(config, batch=1))
        forward = flops.get_total_flops()
        by_module = {name: sum(ops.values()) // 2 for name, ops in flops.get_flop_counts().items()}
        with flops:
            trained = embeddings[:6]  # plain_a and plain_v carry no gradient
            sum(z.sum() for z in trained if z is not None).backward()  # type: ignore[union-attr]
        sides = [_count_side(model, name, by_module, config) for name in ("audio", "image")]

    parts = {}
    for name, parameter in model.named_parameters():
        part = " ".join(name.split(".")[:2]) if "." in name else name
        parts[part] = parts.get(part, 0) + parameter.numel()
    total, W, G = sum(parts.values()), config.world_size, config.train.batch_size
    local = math.ceil(G / W)
    compared = sum(z is not None for z in trained)
    return Plan(
        parameters=parts,
        audio=sides[0],
        image=sides[1],
        forward=forward // 2,
        forward_backward=(forward + flops.get_total_flops()) // 2,
        local_batch=local,
        activation_bytes=_activation_bytes(config, 2) - _activation_bytes(config, 1),
        state_bytes=total * FLOAT32 * 4,
        embedding_bytes=compared * (G - G // W) * model_config.head_width * FLOAT32,
        weight_bytes=total * (2 * BFLOAT16 + FLOAT32) * (W - 1) // W,  # gathered forward and backward, reduced once
    )


def _inputs(config: Config, batch: int) -> list[torch.Tensor | None]:
    m, Q = config.model, config.objective.queries
    audio = [torch.empty(batch, m.spectrogram_frames, m.spectrogram_mels) for _ in range(2)]
    image = [torch.empty(batch, 3, m.image_size, m.image_size) for _ in range(2)]
    if config.objective.intra == "none" and config.objective.inter_on != "augmented":
        audio[1] = image[1] = None  # type: ignore[call-overload]
    t_a, t_v = torch.empty(batch, Q, AUDIO_VECTOR), torch.empty(batch, Q, IMAGE_VECTOR)
    return [audio[0], image[0], audio[1], image[1], t_a, t_v]


def _count_side(model: EquiAV, name: str, by_module: dict[str, int], config: Config) -> Side:
    branch = model.get_submodule(name)

    def part(*names: str) -> int:
        return sum(by_module.get(f"EquiAV.{name}.{n}", 0) for n in names)

    def predict(queries: int) -> int:
        """Multiply-adds of the predictor for this many queries, key and value included."""
        h = torch.empty(1, math.prod(branch.encoder.grid), config.model.width)  # type: ignore[union-attr]
        d_t = AUDIO_VECTOR if name == "audio" else IMAGE_VECTOR
        counter = FlopCounterMode(display=False)
        with counter:
            branch.predictor(h, torch.empty(1, queries, d_t))  # type: ignore[operator]
        return counter.get_total_flops() // 2

    one = predict(1)
    heads = part("intra_head", "inter_head")
    return Side(
        encoder=part("encoder"), predictor=part("predictor"), heads=heads,
        baseline=part("encoder") + one + heads,
        centroid={S: predict(1 + S) - one for S in _sizes(config)},
        separate={S: predict(S) for S in _sizes(config)},
    )  # fmt: skip


def _sizes(config: Config) -> list[int]:
    return sorted({*TABLE_B, config.objective.centroid_size})


def _activation_bytes(config: Config, batch: int) -> int:
    """What autograd keeps for the backward pass of `batch` samples, counted on tensors that hold no data."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        model = EquiAV(config.model, config.objective)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            embeddings = model(*_inputs(config, batch))  # held until the count is taken: storages must not be reused
        total = sum(kept.values())
        del embeddings
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
        "Appendix Table B: multiply-adds by the size S of the centroid, billions", "S",
        "audio", "added", "here", "image", "added", "here",
    )  # fmt: skip
    table.add_row("baseline", f"{plan.audio.baseline / 1e9:.2f}", "", "", f"{plan.image.baseline / 1e9:.2f}", "", "")
    for S in plan.audio.separate:
        cells = []
        for side in (plan.audio, plan.image):
            cells += [f"{(side.baseline + side.separate[S]) / 1e9:.2f}", f"+{side.separate[S] / 1e9:.2f}",
                      f"+{side.centroid[S] / 1e9:.3f}"]  # fmt: skip
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
    table.add_row("activations", f"{plan.activation_bytes * plan.local_batch / gib:.2f} GiB")
    table.add_row("weights, gradients, AdamW moments, replicated", f"{plan.state_bytes / gib:.2f} GiB")
    table.add_row("weights, gradients, AdamW moments, fully sharded", f"{plan.state_bytes / W / gib:.2f} GiB")
    table.add_row("embeddings received per step", f"{plan.embedding_bytes / mib:.2f} MiB")
    table.add_row("weights and gradients moved per step, fully sharded", f"{plan.weight_bytes / gib:.2f} GiB")
    return table
