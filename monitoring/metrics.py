"""Every number that a run tells of itself, defined once.

metrics.jsonl, timing.jsonl, the progress line, the exporter, the dashboards, the alerts and docs/metrics.md take names, units
and meanings from here. A name in Prometheus is `equiav_` and the one given here, with its unit at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "equiav_"
GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"
STEP_SECONDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 120.0)
PHASES = ("data", "views", "model", "update", "save")


@dataclass(frozen=True, eq=False)
class Metric:
    name: str
    kind: str
    help: str
    """What it is."""
    why: str
    """What one reads from it: what is good, and what to do where it is not."""
    labels: tuple[str, ...] = ()
    """Beside `run`, which all have. `rank`: where ranks differ."""
    logged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Its keys in metrics.jsonl and timing.jsonl -> the values of its labels."""
    brief: str = ""
    """How the progress line has it."""

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def per_rank(self) -> bool:
        return "rank" in self.labels


METRICS: list[Metric] = []


def _define(kind: str, name: str, help: str, why: str, *labels: str, **more: Any) -> Metric:
    metric = Metric(name, kind, help, why, labels, **more)
    METRICS.append(metric)
    return metric


def _gauge(name: str, help: str, why: str, *labels: str, **more: Any) -> Metric:
    return _define(GAUGE, name, help, why, *labels, **more)


def _counter(name: str, help: str, why: str, *labels: str, **more: Any) -> Metric:
    return _define(COUNTER, f"{name}_total", help, why, *labels, **more)


def _of(name: str, *values: str, alone: str = "") -> dict[str, tuple[str, ...]]:
    """Keys name_VALUE, and `name` itself for the value `alone`."""
    return ({name: (alone,)} if alone else {}) | {f"{name}_{value}": (value,) for value in values}


TERMS = ("inter", "intra_audio", "intra_image")
CLASS = "class"
SIDES = ("audio", "image")

# ---- where the run is

STEP = _gauge(
    "step",
    "Updates that are done.",
    "Grows. Where it does not, `last_step_time_seconds` says since when.",
    logged={"step": ()},
)
STEPS_PLANNED = _gauge("steps_planned", "Updates that the run has in all (train.steps).", "The end of `step`.")
EPOCH = _gauge(
    "epoch", "Times that the dataset has been gone through, the present one in part.", "How often a clip has been seen."
)
LAST_STEP = _gauge(
    "last_step_time_seconds",
    "When the last step ended, in seconds since 1970.",
    "More than some steps ago: the run stalls. `stalls/` in its folder says which rank, and where.",
)
BEGAN = _gauge(
    "run_began_time_seconds",
    "When this start of the run began, in seconds since 1970.",
    "Changes with each restart, whoever made it; the dashboards mark it.",
)
ENDED = _gauge(
    "run_ended_time_seconds",
    "When the run ended, in seconds since 1970, by how: finished, asked, failed.",
    "There only once it has ended; alerts are silent from then on, until there is a later step.",
    "how",
)
BUILD = _gauge(
    "build_info",
    "1; the releases that the run is made with.",
    "Whether two runs can be compared.",
    "version",
    "code",
    "torch",
    "device",
)

# ---- whether it learns

LOSS = _gauge(
    "loss",
    "Of the global batch, by term of Eq. 16; `total` has the weights of the terms.",
    "Falls. A jump that stays: look at `gradient_norm`, then lower train.lr.",
    "term",
    logged=_of("loss", *TERMS, CLASS, alone="total"),
    brief="loss {:.2f}",
)
CHANCE = _gauge(
    "loss_over_chance_ratio",
    "A term of the loss over the logarithm of its candidates.",
    "1 is what guessing reaches, whatever the batch size. Still near 1 after the warm-up: nothing is learned.",
    "term",
)
ACCURACY = _gauge(
    "accuracy_ratio",
    "Share of anchors nearer to their positive than to any other candidate.",
    "Rises from near 0 to near 1 within the batch. 1 at once: the batch has the same clip twice, or the task "
    "is too easy.",
    "term",
    logged=_of("accuracy", *TERMS, CLASS),
    brief="accuracy {:.2f}",
)
GRADIENT = _gauge(
    "gradient_norm",
    "Norm of the gradient over all parameters, before train.clip.",
    "Steady, after the warm-up. Ten times its usual value: an unstable run.",
    logged={"gradient_norm": ()},
)
RATE = _gauge("learning_rate", "Of this step.", "Follows the schedule.", logged={"lr": ()})
NOT_FINITE = _counter(
    "not_finite_steps",
    "Steps whose loss or gradient was not finite, so that nothing was updated.",
    "0. Some, far apart: lower train.clip. Many: train.lr, or train.precision=float32.",
)
SKIPPED = _gauge(
    "skipped_steps",
    "Steps of the run's history that updated nothing.",
    "As `not_finite_steps_total`, over restarts.",
    logged={"skipped": ()},
)

# ---- whether it is equivariant

SIMILARITY = _gauge(
    "similarity_ratio",
    "Cosine of the predicted embedding with that of the augmented view.",
    "Rises towards 1 (Table 7). It must not rise alone: see `gain_ratio`.",
    "modality",
    logged=_of("similarity", *SIDES),
)
GAIN = _gauge(
    "gain_ratio",
    "How much nearer to the augmented view the prediction is than the embedding itself.",
    "Above 0. Near 0 with a high similarity: the predictor is the identity, and the encoder invariant.",
    "modality",
    logged=_of("gain", *SIDES),
)
SENSITIVITY = _gauge(
    "sensitivity_ratio",
    "Similarity lost where another augmentation's vector is given to the predictor.",
    "Above 0. Near 0: the predictor does not read the vector.",
    "modality",
    logged=_of("sensitivity", *SIDES),
)
SPREAD = _gauge(
    "centroid_spread_ratio",
    "Mean distance (1 - cosine) of a clip's predictions from their centroid.",
    "Above 0, and steady. Near 0: the sampled vectors change nothing, and the centroid is one prediction.",
    "modality",
    logged=_of("spread", *SIDES),
)
EFFECTIVE_RANK = _gauge(
    "effective_rank",
    "Directions that the inter-modal embeddings of a batch fill, of those there are.",
    "Rises, to tens or hundreds. Near 1: all clips have one embedding.",
    "modality",
    logged=_of("effective_rank", *SIDES),
)

# ---- how fast it is

CLIPS = _counter("clips", "Clips that were trained on.", "Its rate is the throughput.")
STEPS = _counter(
    "steps", "Steps that this start of the run has done, those done again included.", "Its rate is the pace."
)
STEP_TIME = _define(
    HISTOGRAM,
    "step_seconds",
    "From the end of a step to the end of the next.",
    "Narrow. A second hump: data, saves, or a node that is slow now and then.",
)
THROUGHPUT = _gauge(
    "clips_per_second",
    "Of the last step.",
    "For the progress line; Prometheus takes the rate of `clips_total`.",
    logged={"clips_per_second": ()},
    brief="{:.0f} clips/s",
)
BATCH = _gauge(
    "batch_clips",
    "Clips of the last step that could be used.",
    "train.batch_size, less what is bad.",
    logged={"clips": ()},
)
PHASE = _counter(
    "phase_seconds",
    "Seconds by what this rank did: waited for data, made views, computed the model with its "
    "loss and gradients, updated the weights, saved.",
    "data: the loader is too slow. views: it waits for no other rank, so that who has more is slow itself.",
    "phase",
    "rank",
)
FLOPS = _gauge(
    "clip_flops",
    "Operations of a clip's forward and backward pass, two for each multiply-add; what is recomputed counts once.",
    "Times the throughput: what the run computes.",
)
PEAK = _gauge(
    "peak_flops_per_second",
    "What the GPUs that take part can do together, in dense bfloat16, as their maker says; where we know them.",
    "What the run computes, over this, is its MFU. Steady; where it falls, something holds the GPUs up.",
)

# ---- what it reads

READS = _counter("store_requests", "Requests for shards, retries included.", "Falls when the cache is warm.", "rank")
RETRIES = _counter(
    "store_retries", "Requests that were sent again.", "Rises: the store is overloaded, or away.", "rank"
)
HEDGED = _counter(
    "store_hedged_requests", "Requests sent a second time, since the first was late.", "A slow store.", "rank"
)
READ_BYTES = _counter(
    "store_read_bytes", "Bytes of shards that were read.", "Its rate is what the store has to give.", "rank"
)
HITS = _counter(
    "cache_hits",
    "Windows of shards that were on this machine's disk.",
    "All, from the second epoch on, where stream.cache_bytes has room for the dataset.",
    "rank",
)
MISSES = _counter("cache_misses", "Windows of shards that had to be read.", "As `cache_hits_total`.", "rank")
DECODED = _counter(
    "decoded_samples", "Samples that were decoded.", "With `decode_seconds_total`: the cost of one.", "rank"
)
DECODE = _counter(
    "decode_seconds",
    "Seconds that decoding processes computed.",
    "Near stream.workers for each second: they are the limit; give more.",
    "rank",
)
READY = _gauge(
    "ready_batches", "Batches that were decoded and not yet taken.", "0 all the time: the run waits for data.", "rank"
)
QUARANTINED = _gauge(
    "quarantined_samples",
    "Samples that could not be used, by reason.",
    "The run ends at `quarantine_limit_samples`; quarantine.jsonl names them.",
    "reason",
)
LIMIT = _gauge(
    "quarantine_limit_samples",
    "Samples that may be in quarantine before the run ends (stream.max_bad).",
    "What `quarantined_samples` must stay below.",
)
BAD = _gauge("bad_clips", "Clips of the last step that could not be used.", "0, or few.", logged={"bad": ()})
SAMPLES = _gauge("dataset_samples", "Of the dataset.", "An epoch.")

# ---- what is saved

SAVED_STEP = _gauge(
    "saved_step",
    "Step of the last checkpoint that is durable.",
    "What a crash goes back to.",
    logged={"saved_step": ()},
)
SAVED_TIME = _gauge(
    "saved_time_seconds",
    "When it became durable, in seconds since 1970; at first, when the run began.",
    "Its age is what a crash costs.",
)
UNSAVED = _gauge(
    "unsaved_seconds",
    "Since a save is due of which none has succeeded.",
    "Some seconds, then 0. More than checkpoint.overdue_seconds: look at the store.",
    logged={"unsaved_seconds": ()},
)
SAVES = _counter("saves", "Checkpoints that became durable.", "One for each checkpoint.every_steps.")
FAILED_SAVES = _counter("failed_saves", "Checkpoints that came to nothing.", "0. The log says why.")
FAILED = _gauge("failed_saves_of_start", "As `failed_saves_total`, for the log.", "0.", logged={"failed_saves": ()})
SAVE_HOLD = _gauge(
    "save_hold_seconds", "For which the last save held up the steps.", "Well under a step.", logged={"save_seconds": ()}
)
SAVED_BYTES = _gauge("saved_bytes", "Of the last checkpoint.", "Three times the weights, in float32.")

# ---- who takes part

WORLD = _gauge("world_size", "Processes that take part.", "Below `world_size_target`: nodes are missing.")
WORLD_TARGET = _gauge(
    "world_size_target", "Processes that the run could use (nodes MAX times workers).", "See `world_size`."
)
SPARES = _gauge(
    "spare_processes", "Processes beyond the number of micro-batches: they wait.", "0, or a machine too many."
)
ROUNDS = _counter("rounds", "Times that this node has joined the others.", "Each costs a restart of the workers.")
NO_PROGRESS = _gauge(
    "rounds_without_progress",
    "Rounds in a row that failed on this node with no step saved since the first of them.",
    "0 or 1. At 10 the run ends: it fails in the same place each time, or more often than it is saved.",
)
LOST = _counter(
    "lost_workers",
    "Workers of this node that ended by themselves, by how.",
    "0. Many: docs/operations.md, restart storm.",
    "how",
)
JOINING = _counter(
    "rendezvous_seconds",
    "Seconds for which this node waited for the others to come together.",
    "Seconds for each round. Minutes: fewer nodes than MIN.",
)
STARTING = _counter(
    "start_seconds",
    "From the start of a rank to its first step: imports, weights, the checkpoint.",
    "What a restart costs beside the steps done again.",
    "rank",
)

# ---- machines

GPU_PEAK = _gauge(
    "gpu_memory_peak_bytes",
    "Most that this rank's process has held of its GPU.",
    "Well below what the GPU has; else lower train.micro_batch or set train.recompute.",
    "rank",
)
GPU_TOTAL = _gauge("gpu_memory_bytes", "What this rank's GPU has.", "As `gpu_memory_peak_bytes`.", "rank")
MEMORY = _gauge("resident_bytes", "Memory of this rank's process.", "Flat. Rising for hours: a leak.", "rank")


def by_key() -> dict[str, tuple[Metric, tuple[str, ...]]]:
    """Of metrics.jsonl and timing.jsonl: key -> its metric, and the values of that one's labels."""
    return {key: (metric, values) for metric in METRICS for key, values in metric.logged.items()}


def brief(values: Mapping[str, float]) -> str:
    """A step in a few words: what the definitions have a short form for, the first key of each."""
    words = []
    for metric in METRICS:
        found = next((values[key] for key in metric.logged if key in values), None)
        if metric.brief and found is not None:
            words.append(metric.brief.format(found))
    return ", ".join(words)


def series(metric: Metric) -> Iterator[str]:
    """The names under which Prometheus has it."""
    if metric.kind == HISTOGRAM:
        yield from (f"{metric.full_name}_{part}" for part in ("bucket", "sum", "count"))
    else:
        yield metric.full_name
