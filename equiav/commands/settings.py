"""What each command can be told, and what it asks for before it begins. Nothing heavy is imported here: whoever mistypes, or asks
for help, is answered at once. (`eval` is told in equiav/evaluate/settings.py; a run, fine-tuning and probes in equiav/config.)"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equiav.config import (
    Config,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    ModelSettings,
    ProbeConfig,
    RunConfig,
    StreamConfig,
    require,
)
from equiav.data.synthetic import Rules
from equiav.evaluate.settings import EvalConfig, require_weights
from equiav.vectors import check_ending

__all__ = ["EvalConfig", "FinetuneConfig", "ProbeConfig"]

CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrains on a packed dataset. The same command starts the run, goes on where it was, or says that it is finished."""

    def ready(self) -> None:
        self.stream.ready()


@dataclass(frozen=True)
class SmokeConfig(RunConfig):
    """Generates clips, pretrains the tiny model on them, retrieves, and writes a report."""

    clips: int = 2048
    """Clips to train on."""
    held_out: int = 512
    """Clips to retrieve among; chance is 1 in this many."""
    out: Path = Path("runs/smoke")
    """Folder of report.html, report.md, metrics.jsonl, config.yaml and the trained model; a next run writes over them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.clips >= self.train.batch_size,
            "clips",
            self.clips,
            f"train.batch_size={self.train.batch_size} or more",
        )
        require(self.held_out >= 10, "held_out", self.held_out, "10 or more")


@dataclass(frozen=True)
class PackConfig:
    """Packs clips into shards. Killed and started again with the same settings, it goes on where it was."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = ""
    """A folder of videos, a video, a text file with a path a line, a CAV-MAE / EquiAV list (.json), or synthetic:COUNT."""
    to: str = ""
    """Folder for the dataset: s3://bucket/name, or any other that fsspec writes."""
    frames: int = 10
    """Frames of a clip, from the middles of as many equal parts."""
    short_side: int = 256
    """Short side of a frame in pixels. Frames of a list are packed as they are."""
    quality: int = 90
    """Quality of the JPEGs, 1 to 100."""
    modality: Literal["both", "audio", "image"] = "both"
    """The part of each clip to pack. audio: sound files are taken, too; image: pictures are, and videos need no sound.
    Pretraining needs both."""
    stills: bool = False
    """The source has sounds, each with a picture of its name beside it (a.jpg beside a.wav), which stands."""
    audio: Literal["wav", "flac"] = "wav"
    """flac takes about half the space, and ten times as long to decode."""
    track: str = "default"
    """Audio track: the one that a player plays, a language as the file names it (eng), or a number from 1 on."""
    clip_seconds: float = 0.0
    """Cut longer videos into clips of this length. 0: a video is a clip."""
    clip_overlap: float = 0.0
    """Seconds that neighbouring clips of a video share."""
    max_seconds: float = 30.0
    """Longer clips are rejected: training hears only the beginning, and frames from later would not belong to it."""
    keep_frozen: bool = False
    """Pack clips whose frames all show the same picture, too."""
    max_shard_bytes: int = 256 << 20
    """Size of a shard, at most."""
    shard_samples: int = 512
    """Clips of a shard, at most. What is finished survives a kill shard by shard."""
    processes: int = CORES
    """Processes that decode and encode."""
    timeout: float = 600.0
    """Seconds after which a clip is given up."""
    in_order: bool = False
    """Keep the order of the source. By default clips are shuffled over the shards: neighbours in a list are often alike, and
    a batch is drawn from some shards at a time."""
    seed: int = 0
    """Seed of the shuffle and of the synthetic world."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""
    data: DataConfig = field(default_factory=DataConfig)
    world: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        for name in ("frames", "short_side", "shard_samples", "processes", "max_seconds", "timeout"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(self.clip_seconds >= 0, "clip_seconds", self.clip_seconds, "0 or more")
        if self.clip_seconds:
            require(
                self.data.min_seconds <= self.clip_seconds <= self.max_seconds,
                "clip_seconds",
                self.clip_seconds,
                f"data.min_seconds={self.data.min_seconds} to max_seconds={self.max_seconds}",
            )
        most = 0.9 * self.clip_seconds
        require(0 <= self.clip_overlap <= most, "clip_overlap", self.clip_overlap, "0 to nine tenths of clip_seconds")
        good = self.track.isalnum() and self.track != "0"
        require(good, "track", self.track, "default, a language such as eng, or a number from 1 on")
        require(self.short_side >= 2, "short_side", self.short_side, "2 or more")
        require(not self.stills or self.modality == "both", "stills", True, "false, or modality both")
        require(self.frames <= 1000, "frames", self.frames, "at most 1000")
        require(self.patience >= 0, "patience", self.patience, "0 or more")
        w = self.world
        for name in ("silent", "unseen", "skew"):
            require(0 <= getattr(w, name) <= 10, f"world.{name}", getattr(w, name), "0 to 10")
        require(w.silent + w.unseen <= 1, "world.unseen", w.unseen, f"at most 1 less world.silent={w.silent}")
        require(1 <= self.quality <= 100, "quality", self.quality, "1 to 100")
        require(self.max_shard_bytes >= 1 << 16, "max_shard_bytes", self.max_shard_bytes, f"{1 << 16} or more")

    def ready(self) -> None:
        require(bool(self.source), "source", "not given", "what to pack: a folder, a list, or synthetic:COUNT")
        require(bool(self.to), "to", "not set", "the folder to pack into (--to s3://bucket/name)")


@dataclass(frozen=True)
class IndexConfig:
    """Makes the index of shards (*.tar) that somebody else packed, and the offsets file of each."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the shards; it must be writable."""
    processes: int = CORES
    """Shards that are read at a time."""
    tried: int = 50
    """Samples of each shard that are decoded as training would, to say what it would refuse; 0: none."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        require(self.processes > 0, "processes", self.processes, "a positive number")
        require(self.patience >= 0, "patience", self.patience, "0 or more")
        require(self.tried >= 0, "tried", self.tried, "0 or more")

    def ready(self) -> None:
        require(bool(self.url), "url", "not given", "the folder of the shards")


@dataclass(frozen=True)
class VerifyConfig:
    """Reads every byte of a dataset and compares it with its index."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the dataset."""
    processes: int = CORES
    """Shards that are read at a time."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        require(self.processes > 0, "processes", self.processes, "a positive number")
        require(self.patience >= 0, "patience", self.patience, "0 or more")

    def ready(self) -> None:
        require(bool(self.url), "url", "not given", "the folder of a dataset")


@dataclass(frozen=True)
class LabelConfig:
    """Gives the clips of a dataset their labels, by their names; the shards stay as they are. The labels it had are replaced."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the dataset; it must be writable."""
    labels: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = field(default=())
    """Files of labels: AudioSet's, VGGSound's, ESC-50's, FSD50K's, Kinetics' or UCF101's, CAV-MAE's lists (.json), or
    path,label[;label] a line. And `folders`: a clip's class is the folder that it lay in."""
    columns: str = ""
    """Of a table of yours: name=COLUMN,label=COLUMN[,split=COLUMN]. label=*: each other column is a class, with 1 where a clip
    has it. Without it: what the file looks like."""
    separator: str = ""
    """Separator of the table's columns. Empty: the first of tab, semicolon, comma that its head has."""
    between: str = ";"
    """Separator of the labels in one cell of the table."""
    classes: Path | None = None
    """File of all classes in their order: a name a line, or as AudioSet, CAV-MAE, FSD50K or UCF101 have it. Without it: those
    that occur."""
    other: str = ""
    """The class of clips whose label is none of `classes`."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""

    def __post_init__(self) -> None:
        require(bool(self.between), "between", self.between, "what separates labels")
        require(self.patience >= 0, "patience", self.patience, "0 or more")

    def ready(self) -> None:
        require(bool(self.url), "url", "not given", "the folder of a dataset")
        require(bool(self.labels), "labels", "not given", "files of labels, or folders")


@dataclass(frozen=True)
class ShowConfig(Config):
    """Shows a dataset: how many clips, how long, of which labels, what packing rejected, and some of them. With a clip's key: its
    frames, its spectrogram, and the views that training makes of it."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the dataset."""
    key: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="KEY")] = ""
    """Key of a clip."""
    png: Path | None = None
    """File for the picture. Without it, a terminal shows it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.png:
            require(self.png.suffix.lower() == ".png", "png", self.png, "a name that ends in .png")
            require(self.png.parent.is_dir(), "png", self.png, "a file in a folder that is there")

    def ready(self) -> None:
        require(bool(self.url), "url", "not given", "the folder of a dataset")


@dataclass(frozen=True)
class StatsConfig:
    """Says how long clips are, how many frames they have, and the mean and deviation of their spectrograms."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = ""
    """Folder of the dataset."""
    samples: int = 1000
    """Clips that are heard, of as many shards as there are; 0: all."""
    write: Path | None = None
    """File to write the settings into that the dataset wants (data.audio_mean, data.audio_std), for --config."""
    seed: int = 0
    """Seed of the choice."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        require(self.patience >= 0, "patience", self.patience, "0 or more")
        require(self.samples >= 0, "samples", self.samples, "0 or more")

    def ready(self) -> None:
        require(bool(self.url), "url", "not given", "the folder of a dataset")
        if self.write and self.write.exists():
            raise ConfigError(f"write: {self.write} exists already; name a file that does not")
        if self.write:
            require(self.write.parent.is_dir(), "write", self.write, "a file in a folder that is there")


@dataclass(frozen=True)
class PlanConfig(Config):
    """Parameters, multiply-adds, memory and traffic of a configuration, without a GPU. With --stream.url: settings that fit that
    dataset and this machine, and how long a run would take."""

    world_size: int = 0
    """Processes (GPUs) that share the global batch. 0: eight, or as many as can share it."""
    write: Path | None = None
    """File for the settings that fit (with --stream.url), for --config."""
    keep: bool = False
    """Keep the settings as they are, and say how long a run with them would take (with --stream.url)."""
    price: float = 0.0
    """Price of an hour of this machine, in any currency."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.price >= 0, "price", self.price, "0 or more")
        require(
            0 <= self.world_size <= self.train.micro_batches,
            "world_size",
            self.world_size,
            f"1 to {self.train.micro_batches}, the micro-batches in a step",
        )

    @property
    def processes(self) -> int:
        return self.world_size or min(8, self.train.micro_batches)

    def ready(self) -> None:
        if self.write:
            require(bool(self.stream.url), "write", self.write, "a dataset to fit the settings to (--stream.url)")
            require(not self.write.exists(), "write", f"{self.write}, which exists", "a file that does not")
            require(self.write.parent.is_dir(), "write", self.write, "a file in a folder that is there")
        require(
            bool(self.stream.url) or not self.keep, "keep", True, "a dataset to try the settings with (--stream.url)"
        )


@dataclass(frozen=True)
class ImportConfig(ModelSettings):
    """Turns a published checkpoint into a model folder: released EquiAV, CAV-MAE or MAE."""

    checkpoint: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """The .pth file."""
    out: Path = Path("imported")
    """Folder to write; must not exist yet."""
    format: Literal["auto", "equiav", "cavmae", "mae"] = "auto"
    """Which program wrote the checkpoint; auto looks at its keys."""
    seed: int = 0
    """Seed of the weights that the checkpoint does not have (CAV-MAE and MAE: predictors and heads)."""

    def ready(self) -> None:
        if self.checkpoint is None:
            raise ConfigError("no checkpoint named; expected `equiav import CHECKPOINT --out FOLDER`")
        if self.out.exists():
            raise ConfigError(f"--out {self.out}: exists already; name a folder that does not")


@dataclass(frozen=True)
class UseConfig:
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = field(default=())
    """Videos or sound files."""
    weights: str = ""
    """Model folder, or a run's: a path, s3://..., or any other that fsspec reads."""
    frames: int = 1
    """Pictures of each part of a video, over which is averaged."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        require(1 <= self.frames <= 1000, "frames", self.frames, "1 to 1000")

    def ready(self) -> None:
        require(bool(self.files), "files", "not given", "videos, sound files or pictures")
        require_weights(self.weights)


@dataclass(frozen=True)
class EmbedConfig(UseConfig):
    """Writes the embeddings of files, each in parts as long as the model hears, or of the clips of a dataset. Killed and started
    again, it goes on where it was."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = field(default=())
    """Videos and sound files, folders of them, lists (.txt, a path a line), or one dataset (of `equiav pack`; s3://...)."""
    out: Path = Path("embeddings.npz")
    """File to write: name, begin and end (seconds) of each part, its audio and its image (rows that are not a number where it has
    none). .npz, .parquet, .safetensors, .npy, .faiss."""
    batch: int = 32
    """Clips that are computed together."""
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 1, "batch", self.batch, "1 or more")

    def ready(self) -> None:
        require(bool(self.files), "files", "not given", "videos, sound files, a folder, a list, or a dataset")
        require_weights(self.weights)
        require(self.out.absolute().parent.is_dir(), "out", self.out, "a file in a folder that is there")
        require(not self.out.is_dir(), "out", self.out, "a file; there is a folder of that name")
        check_ending(self.out)


@dataclass(frozen=True)
class ScoreConfig(UseConfig):
    """Says how well sound and picture of each file belong together, part by part: the cosine of their embeddings."""


@dataclass(frozen=True)
class PredictConfig(UseConfig):
    """Names the likeliest classes of each file, by a fine-tuned model."""

    top: int = 5
    """Classes that are named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top >= 1, "top", self.top, "1 or more")


@dataclass(frozen=True)
class SearchConfig:
    """Prints what of an index (`equiav embed --out`) is nearest to a file: pictures by a sound, sounds by a picture."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = ""
    """A sound, a picture, or a video, whose first part is taken."""
    weights: str = ""
    """The model by which the index was made: its folder, or a run's."""
    index: Path = Path("embeddings.npz")
    """A file that `equiav embed` wrote."""
    by: Literal["auto", "audio", "image"] = "auto"
    """The part of the file to compare: its sound or its picture. auto: a video's sound."""
    among: Literal["auto", "audio", "image"] = "auto"
    """The part of the index to compare with. auto: the other one."""
    top: int = 10
    """Rows that are printed."""
    device: str = "cpu"
    """Device of the model."""

    def __post_init__(self) -> None:
        require(self.top >= 1, "top", self.top, "1 or more")

    def ready(self) -> None:
        require(bool(self.file), "file", "not given", "a sound, a picture or a video")
        require_weights(self.weights)
        require("://" in self.file or Path(self.file).is_file(), "file", self.file, "a file that exists")


@dataclass(frozen=True)
class LocalizeConfig:
    """Draws what of a video's pictures belongs to its sound: bright is what adds to the score of the two."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = field(default="")
    """A video with sound."""
    weights: str = ""
    """Model folder, or a run's: a path, s3://..., or any other that fsspec reads."""
    out: Path = Path("heat.mp4")
    """File to write: .mp4, with the sound, or .png, a picture of each part that is as long as the model hears."""
    others: Path | None = None
    """Embeddings of other sounds (`equiav embed`): what the sound has of its own beside them is looked for. It points better."""
    fps: float = 5.0
    """Pictures a second of the video that is written."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device."""

    def __post_init__(self) -> None:
        require(0.1 <= self.fps <= 60, "fps", self.fps, "0.1 to 60")
        require(self.out.suffix.lower() in (".mp4", ".png"), "out", self.out, "a name that ends in .mp4 or .png")

    def ready(self) -> None:
        require(bool(self.file), "file", "not given", "a video with sound")
        require_weights(self.weights)
        require(Path(self.file).is_file(), "file", self.file, "a file that exists")
        require(self.out.absolute().parent.is_dir(), "out", self.out, "a file in a folder that is there")
        same = self.out.exists() and self.out.samefile(self.file)
        require(not same, "out", self.out, "another file than it reads")


@dataclass(frozen=True)
class ExportConfig:
    """Writes a model for others: its weights and settings, programs from samples and pixels to embeddings (or classes), each
    reloaded and compared, and a model card."""

    weights: str = ""
    """Model folder, or a run's: a path, s3://..., or any other that fsspec reads."""
    out: Path = Path("exported")
    """Folder to write: a new one, or an empty one."""
    formats: tuple[Literal["torch", "onnx"], ...] = ("torch", "onnx")
    """Formats of the programs: torch (torch.export, for PyTorch), onnx (for everything else; `pip install 'equiav[export]'`)."""
    name: str = ""
    """Name of the model on its card. Default: the folder's name."""
    license: str = ""
    """License of the weights, as model hubs spell it (apache-2.0, cc-by-nc-4.0). Choose one that the data's license allows."""
    data: str = ""
    """The training data, for the card: names, hours, origin."""

    def ready(self) -> None:
        require_weights(self.weights)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(f"out: {self.out} is there already, and not empty; choose another folder")


@dataclass(frozen=True)
class DiffConfig:
    """Compares two runs: settings, what every step reported, the digests of the weights. Ends with 1 where they differ."""

    one: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """A run's folder (--out), or where it keeps its checkpoints (--checkpoint.url)."""
    two: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Another."""

    def ready(self) -> None:
        if not self.one or not self.two:
            raise ConfigError("two runs are needed: equiav diff RUN RUN")


@dataclass(frozen=True)
class ReportConfig:
    """Writes one page about a run, or about several beside each other: verdict, curves, what evaluations and fine-tuning have
    found, examples to look at and listen to. It reads what `equiav eval` left in the runs' folders."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Folders of runs: paths, s3://..., or any others that fsspec reads."""
    out: Path = Path()
    """File to write, .html; its data are beside it, .data.json. By default report.html in the first run's folder, or here."""
    title: str = ""
    """Title of the page."""
    patience: float = 600.0
    """Seconds for which a store that does not answer, or refuses for a while, is asked again."""

    def ready(self) -> None:
        if not self.runs:
            raise ConfigError("runs: no run is named. Give its folder: equiav report runs/one")


@dataclass(frozen=True)
class TopConfig:
    """Shows a run: whether it is well, whether it learns, how fast it is, what is saved. Ends with the run, or with
    Ctrl-C."""

    where: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """A run's folder (--out), or what its nodes serve: HOST:PORT, one for each node that is to be looked at."""
    seconds: float = 2.0
    """Between two looks."""
    once: bool = False
    """Print it and end."""

    def __post_init__(self) -> None:
        require(self.seconds > 0, "seconds", self.seconds, "above 0")

    def ready(self) -> None:
        if not self.where:
            raise ConfigError("where: no run is named. Give its folder, or HOST:PORT of its nodes: equiav top runs/one")
