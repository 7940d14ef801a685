"""Every setting: its unit, its default, why. A run is a function of these values and of nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

IMAGE_VECTOR = 18  # elements of t_v, Appendix C
AUDIO_VECTOR = 24  # elements of t_a, Appendix C
MOST_WIDTH, MOST_DEPTH, MOST_TOKENS = 1 << 16, 512, 1 << 16  # of a model: somebody else may have written its settings
MOST_BATCH = 1 << 24
LONG = 10**8  # seconds, three years: more is a mistake, and more than a thread can wait


class ConfigError(ValueError):
    """A setting is wrong. The message names it, what was found, what is expected."""


class NotHere(ConfigError):  # noqa: N818
    """This machine cannot do what a setting says. Another may."""


def require(condition: bool, setting: str, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{setting} is {found}, expected {expected}")


SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "model": {
            "width": 64,
            "depth": 3,
            "heads": 2,
            "image_size": 64,
            "image_patch": 8,
            "spectrogram_frames": 256,
            "spectrogram_mels": 64,
            "audio_patch": 16,
            "aug_width": 64,
            "predictor_heads": 2,
            "head_hidden": 128,
            "head_width": 64,
        },
        "augment": {"max_mask_frames": 48, "max_mask_mels": 24},
        "data": {"frame_size": 64},
    },
    "vit_s16": {"model": {"width": 384, "depth": 12, "heads": 6}},
    "vit_b16": {"model": {"width": 768, "depth": 12, "heads": 12}},
    "vit_l16": {"model": {"width": 1024, "depth": 24, "heads": 16}},
}
"""What each `model.size` puts in the place of the defaults below."""


@dataclass(frozen=True)
class ModelConfig:
    size: Literal["tiny", "vit_s16", "vit_b16", "vit_l16"] = "vit_b16"
    """Named size: the defaults of the fields below (vit_b16 is the paper's)."""
    width: int = 768
    """Channels of both encoders."""
    depth: int = 12
    """Transformer blocks of each encoder."""
    heads: int = 12
    """Attention heads of each encoder block."""
    image_size: int = 224
    """Side of the square image, pixels."""
    image_patch: int = 16
    """Side of an image patch, pixels."""
    spectrogram_frames: int = 1024
    """Length of the spectrogram, 10 ms frames; shorter clips are padded, longer ones cut."""
    spectrogram_mels: int = 128
    """Mel bins of the spectrogram."""
    audio_patch: int = 16
    """Side of a spectrogram patch, frames and mel bins."""
    aug_width: int = 256
    """Channels of the encoded augmentation vector, the predictor's query."""
    predictor: Literal["attention", "linear", "hypernet"] = "attention"
    """Transformation predictor: the paper's, EquiMod's linear layer, or SIE's hypernetwork (Table 7)."""
    predictor_width: int = 0
    """Inner width of the predictor (attention: heads x head size; linear: hidden; hypernet: rank).
    0: 64 per head for attention; for the others the width whose parameter count is nearest to attention's."""
    predictor_heads: int = 8
    """Attention heads of the attention predictor."""
    head_hidden: int = 2048
    """Hidden channels of the four projection heads."""
    head_width: int = 512
    """Channels of an embedding."""

    def __post_init__(self) -> None:
        positive = "width depth heads image_size image_patch spectrogram_frames spectrogram_mels audio_patch aug_width"
        for name in [*positive.split(), "predictor_heads", "head_hidden", "head_width"]:
            most = MOST_DEPTH if name == "depth" else MOST_WIDTH
            require(0 < getattr(self, name) <= most, f"model.{name}", getattr(self, name), f"1 to {most}")
        found = self.predictor_width
        require(0 <= found <= MOST_WIDTH, "model.predictor_width", found, f"0 (automatic) to {MOST_WIDTH}")
        require(self.width % self.heads == 0, "model.width", self.width, f"a multiple of model.heads={self.heads}")
        require(self.width % 4 == 0, "model.width", self.width, "a multiple of 4 (2-D sin-cos positions)")
        require(
            self.image_size % self.image_patch == 0,
            "model.image_size",
            self.image_size,
            f"a multiple of model.image_patch={self.image_patch}",
        )
        for name in ("spectrogram_frames", "spectrogram_mels"):
            require(
                getattr(self, name) % self.audio_patch == 0,
                f"model.{name}",
                getattr(self, name),
                f"a multiple of model.audio_patch={self.audio_patch}",
            )
        for side, (rows, columns) in (("image", self.image_grid), ("audio", self.audio_grid)):
            require(rows * columns <= MOST_TOKENS, f"the {side}'s patches", rows * columns, f"{MOST_TOKENS} at most")
        if self.predictor == "attention" and self.predictor_width:
            require(
                self.predictor_width % self.predictor_heads == 0,
                "model.predictor_width",
                self.predictor_width,
                f"a multiple of model.predictor_heads={self.predictor_heads}",
            )

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of image patches."""
        side = self.image_size // self.image_patch
        return side, side

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Rows (frequency) and columns (time) of spectrogram patches."""
        return self.spectrogram_mels // self.audio_patch, self.spectrogram_frames // self.audio_patch


@dataclass(frozen=True)
class AugmentConfig:
    """Distributions of the augmentations (Appendix C). Only random resized crop is always on."""

    variant: Literal["paper", "released"] = "paper"
    """`released` keeps what the authors' published program does where it parts from the paper (docs/method.md)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a crop, share of the picture."""
    image_crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of an image crop."""
    audio_crop_ratio: tuple[float, float] = (0.8, 1.5)
    """Frequency share over time share of a spectrogram crop; 1 keeps the 8:1 shape of a 1024 x 128 spectrogram."""
    jitter_p: float = 0.8
    """Probability of jitter (brightness, contrast, and for images saturation and hue)."""
    jitter_factor: float = 0.4
    """Jitter factors are drawn from 1 +- this."""
    jitter_hue: float = 0.1
    """Hue shift is drawn from +- this, share of the colour circle."""
    blur_p: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, pixels."""
    flip_p: float = 0.5
    """Probability of the horizontal (for spectrograms: time) flip."""
    gray_p: float = 0.2
    """Probability of grayscale, images only."""
    mask_p: float = 0.8
    """Probability of SpecAugment and time shift, drawn as one."""
    max_mask_frames: int = 192
    """Longest time mask, frames."""
    max_mask_mels: int = 48
    """Tallest frequency mask, mel bins."""

    def __post_init__(self) -> None:
        for name in ("jitter_p", "blur_p", "flip_p", "gray_p", "mask_p"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "a probability")
        for name in ("crop_scale", "image_crop_ratio", "audio_crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"augment.{name}", (low, high), "two positive numbers, the smaller first")
        require(self.crop_scale[1] <= 1, "augment.crop_scale", self.crop_scale, "shares of at most 1")
        require(0 <= self.jitter_factor < 1, "augment.jitter_factor", self.jitter_factor, "0 to below 1")
        require(0 <= self.jitter_hue <= 0.5, "augment.jitter_hue", self.jitter_hue, "0 to 0.5")
        for name in ("max_mask_frames", "max_mask_mels"):
            require(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Eq. 8-16 and the ablations of Tables 5, 6, 8, 9 and A."""

    intra: Literal["equivariant", "invariant", "none"] = "equivariant"
    """The target of the augmented embedding: the prediction, the original, or none (Table 5)."""
    intra_positive_in_denominator: bool = True
    """Eq. 9; false gives EquiMod's form, Eq. A (Table 9)."""
    inter_on: Literal["original", "augmented", "equivariant", "centroid"] = "centroid"
    """The embedding of a clip that the inter-modal loss compares (Table 5)."""
    centroid_size: int = 16
    """S, the number of equivariant representations in a centroid (Table 6)."""
    schedule: Literal["joint", "two_stage", "alternating"] = "joint"
    """Both losses together, intra-modal first and inter-modal after, or one after the other by step (Table 8)."""
    two_stage_split: float = 0.5
    """Share of the steps that the first stage of `two_stage` takes."""
    weight_inter: float = 1.0
    weight_intra_audio: float = 1.0
    weight_intra_image: float = 1.0
    temperature: float = 0.07
    """tau, of both losses."""
    learnable_temperature: bool = False
    """Learn log tau, starting at `temperature`; never below 0.01."""

    def __post_init__(self) -> None:
        require(1 <= self.centroid_size <= 1 << 16, "objective.centroid_size", self.centroid_size, f"1 to {1 << 16}")
        require(0 < self.temperature < math.inf, "objective.temperature", self.temperature, "a positive number")
        intra = self.intra != "none" and self.weight_intra_audio + self.weight_intra_image > 0
        inter = self.weight_inter > 0
        require(intra or inter, "objective", "without any loss", "intra other than none or a positive weight")
        require(
            (intra and inter) or self.schedule == "joint",
            "objective.schedule",
            self.schedule,
            "joint, since only one of the two losses has a weight",
        )
        require(0 < self.two_stage_split < 1, "objective.two_stage_split", self.two_stage_split, "between 0 and 1")
        for name in ("weight_inter", "weight_intra_audio", "weight_intra_image"):
            require(0 <= getattr(self, name) < math.inf, f"objective.{name}", getattr(self, name), "0 or more")

    @property
    def sampled(self) -> int:
        """Vectors drawn for what represents a clip, beside the view's own."""
        return self.centroid_size if self.inter_on == "centroid" else 0

    @property
    def sampled_in_evaluation(self) -> int:
        """`sampled`, for clips without an augmented view: a single prediction needs a vector of its own, too."""
        return 1 if self.inter_on == "equivariant" else self.sampled

    @property
    def needs_augmented(self) -> bool:
        return self.intra != "none" or self.inter_on == "augmented"


@dataclass(frozen=True)
class DataConfig:
    sample_rate: int = 16000
    """Hz. Clips at another rate are refused; packing resamples."""
    audio_mean: float = -4.346
    """Mean of the log-mel spectrogram over the dataset (AudioSet's, Table D)."""
    audio_std: float = 4.332
    """Standard deviation of the log-mel spectrogram over the dataset (AudioSet's, Table D)."""
    frame_size: int = 256
    """Side of the central square of a frame that training reads, pixels; frames of another size are resized to it."""
    min_seconds: float = 1.0
    """Shorter audio is refused."""
    silence: float = 1e-4
    """Audio that stays within this of its middle is silent, and refused; full scale is 1."""

    def __post_init__(self) -> None:
        require(self.min_seconds >= 0.025, "data.min_seconds", self.min_seconds, "at least one window, 0.025 s")
        require(0 <= self.silence < 1, "data.silence", self.silence, "0 to below 1")
        require(self.frame_size >= 2, "data.frame_size", self.frame_size, "2 or more")
        require(0 < self.sample_rate <= 10**6, "data.sample_rate", self.sample_rate, "1 to 1000000 Hz")
        require(math.isfinite(self.audio_mean), "data.audio_mean", self.audio_mean, "a finite number")
        require(0 < self.audio_std < math.inf, "data.audio_std", self.audio_std, "a positive number")


@dataclass(frozen=True)
class StreamConfig:
    """The dataset and how it is streamed. Only `url`, `lanes` and `window` affect the order of samples."""

    url: str = ""
    """Folder that `equiav pack` or `equiav index` filled: s3://..., or any other that fsspec reads. Credentials and endpoint
    come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL; AWS_NO_SIGN_REQUEST=1: none)."""
    lanes: int = 8
    """Parts of a batch that are mixed by themselves. Reads are longest where nodes divide it."""
    window: int = 16
    """Shards that are mixed at a time, over all nodes. Local disk holds two windows."""
    workers: int = 4
    """Decoding processes of each training process; 0: threads."""
    ahead: int = 2
    """Batches prepared beyond the one in use."""
    cache: Path = Path("~/.cache/equiav")
    """Local folder for shards of a remote dataset; all processes of a node share it."""
    cache_bytes: int = 64 << 30
    """Upper limit of the cache on disk, in bytes."""
    patience: float = 600.0
    """Seconds for which a store that does not answer is asked again before the run gives up."""
    max_bad: float = 0.01
    """Share of the dataset that may turn out unusable before the run stops; three clips at least, unless it is 0."""

    def __post_init__(self) -> None:
        for name in ("lanes", "window"):
            require(1 <= getattr(self, name) <= 1 << 20, f"stream.{name}", getattr(self, name), f"1 to {1 << 20}")
        for name, most in (("workers", 256), ("ahead", 64), ("cache_bytes", 1 << 62), ("patience", LONG)):
            value = getattr(self, name)
            require(0 <= value <= most, f"stream.{name}", value, f"0 to {most}")
        require(0 <= self.max_bad <= 1, "stream.max_bad", self.max_bad, "a share")

    def ready(self) -> None:
        require(bool(self.url), "stream.url", "not set", "the folder of a packed dataset; `equiav pack` makes one")


@dataclass(frozen=True)
class TrainConfig:
    """Table D, pre-training. Durations in steps: a run's length must not depend on how its data is counted."""

    batch_size: int = 256
    """Global batch: samples in one step, over all workers."""
    steps: int = 147_900
    """Updates in the run (20 epochs of AudioSet-2M at batch 256)."""
    warmup_steps: int = 14_790
    """Linear warm-up (2 epochs)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: the paper's. muon: matrices move along their orthogonalized momentum (Jordan et al., 2024), the rest by AdamW; its
    learning rates are AdamW's."""
    lr: float = 1e-4
    """Peak learning rate."""
    lr_start: float = 1e-6
    """Learning rate of the first step, and of the last (half-cycle cosine)."""
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest norm of the gradient over all parameters."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; weights, loss and optimizer stay float32. auto: bfloat16 on cuda."""

    micro_batch: int = 32
    """Rows that are computed together. Processes share the batch in whole micro-batches, so that what is computed, to the last
    bit, does not depend on their number. Processes beyond the number of micro-batches wait as spares."""
    recompute: bool = False
    """Keep nothing of a micro-batch between the embeddings and the gradient: memory for one micro-batch, however many a process
    has, and a third more time. The result is the same."""
    shard: int = 0
    """Processes that hold one copy of the model and optimizer together. 0: those of a node, so that only sums of gradients
    cross from node to node. The result is the same."""
    compile: bool = False
    """Compile the encoders' blocks."""
    max_skipped: int = 10
    """Steps in a row without a finite loss and gradient, none of which changes anything, after which the run stops."""

    def __post_init__(self) -> None:
        require(self.micro_batch >= 1, "train.micro_batch", self.micro_batch, "1 or more")
        require(self.shard >= 0, "train.shard", self.shard, "0 or more")
        require(self.max_skipped >= 1, "train.max_skipped", self.max_skipped, "1 or more")
        most = f"2 (a contrast needs a negative) to {MOST_BATCH}"
        require(2 <= self.batch_size <= MOST_BATCH, "train.batch_size", self.batch_size, most)
        require(1 <= self.steps <= 10**12, "train.steps", self.steps, "1 to 10^12")
        require(
            0 <= self.warmup_steps <= self.steps,
            "train.warmup_steps",
            self.warmup_steps,
            f"0 to train.steps={self.steps}",
        )
        require(
            0 < self.lr_start <= self.lr < math.inf,
            "train.lr_start",
            self.lr_start,
            f"above 0, at most train.lr={self.lr}",
        )
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        require(all(0 <= b < 1 for b in self.betas), "train.betas", self.betas, "two numbers from 0 to below 1")
        require(self.clip > 0, "train.clip", self.clip, "a positive number")

    @property
    def micro_batches(self) -> int:
        """In a step; the most processes that can share it."""
        return -(-self.batch_size // self.micro_batch)


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, and where."""

    url: str = ""
    """Folder that all processes read and write: s3://..., or any other that fsspec knows. Empty: `checkpoints` in `out`."""
    every_steps: int = 1000
    """Steps between two; 0: by time alone."""
    every_seconds: float = 0.0
    """Seconds between two, beside those by steps; 0: by steps alone."""
    keep: int = 3
    """The newest that stay."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept, too; 0: none."""
    patience: float = 600.0
    """Seconds for which a store that does not answer is asked again before a save has failed."""
    overdue_seconds: float = 1800.0
    """For so long a save may be due without one that succeeds. Then the run says so again and again."""
    overdue: Literal["say", "end"] = "say"
    """end: an overdue run ends with status 146 after saying so, to be started again where it can save."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_every"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), "0 or more")
        for name in ("every_seconds", "patience", "overdue_seconds"):
            value = getattr(self, name)
            require(0 <= value <= LONG, f"checkpoint.{name}", value, f"0 to {LONG} seconds")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics for Prometheus. Under `python -m launch.node` that program serves them, at a port of its own."""

    port: int = 0
    """Port at which /metrics is served while the run lives, 9108 by custom; 0: none."""

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "metrics.port", self.port, "0 to 65535")


@dataclass(frozen=True)
class ModelSettings:
    """Everything needed to use a model: the network, and how its inputs and vectors are made. Saved beside the weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        require(
            self.augment.max_mask_frames < self.model.spectrogram_frames,
            "augment.max_mask_frames",
            self.augment.max_mask_frames,
            f"below model.spectrogram_frames={self.model.spectrogram_frames}",
        )
        require(
            self.augment.max_mask_mels < self.model.spectrogram_mels,
            "augment.max_mask_mels",
            self.augment.max_mask_mels,
            f"below model.spectrogram_mels={self.model.spectrogram_mels}",
        )


@dataclass(frozen=True)
class Config(ModelSettings):
    """A pretraining run."""

    seed: int = 0
    """Seed of every random draw: initial weights, order, augmentations."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the run."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")


@dataclass(frozen=True)
class RunConfig(Config):
    """A run that is kept: it goes on where it was, or says that it is finished."""

    out: Path = Path("runs/pretrain")
    """Folder of metrics.jsonl, timing.jsonl, quarantine.jsonl, config.yaml, starts.jsonl, summary.json and the trained model."""
    weights: str = ""
    """Weights to begin with: a model folder (of `equiav import` or of a run), or a checkpoint of MAE, CAV-MAE or EquiAV (.pth);
    s3://..., or any other that fsspec reads, too. Read before the first step only. Empty: drawn from the seed."""
    resume: Literal["auto", "never", "anyway"] = "auto"
    """never: an error where `checkpoint.url` holds checkpoints. anyway: begins at step 0 where it holds none that can be used;
    those that cannot are set aside."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    stall_seconds: float = 60.0
    """Without a step, after which the run has stalled: the rank that holds it up is named, every rank writes where it stands to
    `out`/stalls, and the processes end, to be started again. Waiting for a store is no stall within its patience. 0: never."""
    log_samples: bool = False
    """Write the ids of every step's samples to samples-RANK.jsonl, each line with the token of the start (starts.jsonl)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.stall_seconds <= LONG, "stall_seconds", self.stall_seconds, f"0 to {LONG} seconds")


@dataclass(frozen=True)
class LabelsConfig:
    """Which labelled clips are learned from and tested on, and what of them."""

    section = ""  # what it is called among the settings
    modality: Literal["audio", "image", "both"] = "both"
    """The input of the classifier."""
    train_on: str = ""
    """Parts of the dataset that are learned from, with commas between (`equiav label` says which there are). Empty: all of it
    that is not tested on."""
    test_url: str = ""
    """Folder of the dataset on which the model is tested at the end, of the same classes. Empty: that of stream.url, where
    test_on names parts of it."""
    test_on: str = ""
    """Parts of that dataset that are tested on, with commas between. Empty: all of it."""
    test_frames: int = 1
    """Frames of a clip over which what is said of it is averaged; 1: the middle one."""

    def __post_init__(self) -> None:
        require(1 <= self.test_frames <= 1000, f"{self.section}.test_frames", self.test_frames, "1 to 1000")

    @property
    def hears(self) -> bool:
        return self.modality != "image"

    @property
    def sees(self) -> bool:
        return self.modality != "audio"


@dataclass(frozen=True)
class TuneConfig(LabelsConfig):
    """The labels, the loss and the inputs of fine-tuning (docs/downstream.md)."""

    section = "tune"
    loss: Literal["one", "many"] = "many"
    """one: a clip has one class (cross-entropy). many: each class by itself (binary cross-entropy, its mean over the classes)."""
    balance: bool = False
    """Clips of rare classes come more often: in proportion to the sum of 1 / (clips of a class) over the classes of a clip."""
    epochs: float = 0.0
    """Training epochs; sets `train.steps`. 0: `train.steps` as it is."""
    warmup_epochs: float = 0.0
    """Epochs of warm-up; sets `train.warmup_steps`."""
    mixup: float = 0.0
    """Probability with which a clip is mixed with another of its micro-batch; the share is drawn from Beta(10, 10)."""
    drop_path: float = 0.0
    """Probability with which a clip passes the last block by; it grows from 0 with the depth."""
    time_roll: bool = False
    """Turn the spectrogram by a random number of frames."""
    benchmark: Literal["", "AudioSet-20K", "AudioSet-2M", "VGGSound", "ESC-50", "SPC-v1", "FSD-50K", "UCF101", "HMDB51",
                       "Kinetics400"] = ""  # fmt: skip
    """Name of the dataset in the paper's tables: its number is shown beside the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mixup", "drop_path"):
            require(0 <= getattr(self, name) < 1 or (name == "mixup" and self.mixup == 1), f"tune.{name}", getattr(self, name),
                    "a probability")  # fmt: skip
        require(
            0 <= self.warmup_epochs <= self.epochs,
            "tune.warmup_epochs",
            self.warmup_epochs,
            f"0 to tune.epochs={self.epochs}",
        )


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tunes on a dataset with labels (`equiav label`). The same command starts the run, goes on where it was, or says that
    it is finished. Begin with --weights: a pretraining run, its model folder, or a published checkpoint. The paper's datasets
    have recipes (docs/downstream.md)."""

    out: Path = Path("runs/finetune")
    """Folder of metrics.jsonl, config.yaml and the others of a run, and of the trained model with its classes and results."""
    tune: TuneConfig = field(default_factory=TuneConfig)

    def ready(self) -> None:
        self.stream.ready()


@dataclass(frozen=True)
class ProbeOn(LabelsConfig):
    """The labels, and how they are predicted from frozen features."""

    section = "probe"
    neighbours: int = 20
    """Clips that are asked, of those that are learned from, for what lies nearest."""
    held_out: float = 0.2
    """Share of the clips that are learned from on which the strength of the regularisation is chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.neighbours >= 1, "probe.neighbours", self.neighbours, "1 or more")
        require(0 < self.held_out < 1, "probe.held_out", self.held_out, "between 0 and 1")


@dataclass(frozen=True)
class ProbeConfig(Config):
    """Says what frozen features of a model are worth on labels: by a linear classifier, and by the nearest clips."""

    weights: str = ""
    """The model: its folder, a run's, or a checkpoint of MAE, CAV-MAE or EquiAV (.pth). Empty: as it is drawn from the seed, to
    compare with."""
    out: Path = Path("runs/probe")
    """Folder of results.json."""
    features: Path = Path("~/.cache/equiav/features")
    """Folder in which features are kept, for the next time."""
    probe: ProbeOn = field(default_factory=ProbeOn)

    def ready(self) -> None:
        self.stream.ready()


ROUNDING = ("device", "train.micro_batch", "train.compile")
"""Settings that a run may change when it resumes: its numbers may differ in the last bits from there on."""

WITHOUT_EFFECT = {
    "out",
    "weights",  # on a run that has begun
    "resume",
    "log_samples",
    "stall_seconds",
    "checkpoint",
    "metrics",
    "stream.url",
    "stream.workers",
    "stream.ahead",
    "stream.cache",
    "stream.cache_bytes",
    "stream.patience",
    "stream.max_bad",
    "train.recompute",
    "train.shard",
    "tune.test_url",
    "tune.test_frames",
    "tune.benchmark",
}
"""Settings, and sections, that a run may change on its way without a trace."""
