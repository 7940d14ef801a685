"""Evaluations of a pretrained model on a dataset: what each looks at, and what is said of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from equiav.augment import Clips, normalised_spectrogram, original_image, sampled_vectors
from equiav.config import Config, ConfigError, LabelsConfig, ModelSettings, TrainConfig
from equiav.data import survey
from equiav.data.clips import DECODE_AUDIO, BadClipError, decode_frame
from equiav.data.labels import keys_of
from equiav.data.synthetic import World
from equiav.evaluate import attention, centroid, examples, localize
from equiav.evaluate.examples import evenly
from equiav.evaluate.look import Features, look
from equiav.evaluate.paper import retrieval_table, similarity_table
from equiav.evaluate.pictures import Titled, coloured, overlaid, seen, sheet
from equiav.evaluate.retrieval import both_directions
from equiav.evaluate.settings import EvalConfig
from equiav.evaluate.sides import SEED, needs_predictions
from equiav.evaluate.similarity import columns, similarities
from equiav.model import EquiAV
from equiav.parallel import Ranks
from streaming import Dataset, DatasetError

CHECKED = 8  # clips
SYNTHETIC = re.compile(r"synthetic-(\d+)-(\d+)")  # key of a clip -> seed of its world, number


@dataclass(frozen=True)
class Pictures(LabelsConfig):
    """How `look` looks: at sound and pictures."""

    section = "eval"


class Evaluated(NamedTuple):
    said: dict[str, Any]
    table: str  # Markdown
    picture: Image.Image | None = None


class FeatureReader(NamedTuple):
    """A model, and the clips that it looks at."""

    config: EvalConfig
    model: EquiAV
    settings: ModelSettings
    dataset: Dataset
    ranks: Ranks
    chosen: np.ndarray  # (samples,) bool

    def look(
        self, compute: Callable[[Clips, torch.autocast], Tensor], frames: int = 1, chosen: np.ndarray | None = None
    ) -> Features:
        return look(
            as_run(self.config, self.settings, self.ranks),
            Pictures(test_frames=frames),
            self.dataset,
            self.ranks,
            self.chosen if chosen is None else chosen,
            compute,
        )

    def vectors(self, seed: int, samples: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The centroid's, where the model compares centroids."""
        count = self.settings.objective.sampled_in_evaluation
        return sampled_vectors(self.settings, seed, 0, samples, count) if count else (None, None)

    def spectrogram(self, clips: Clips) -> Tensor:
        return normalised_spectrogram(clips.waveform, clips.lengths, self.settings.model, self.settings.data)

    def image(self, clips: Clips) -> Tensor:
        return original_image(clips.frames, self.settings.model.image_size)

    def embeddings(self, clips: Clips, computes: torch.autocast) -> Tensor:
        """-> (b, 2 d) float64: the sound's and the picture's, with the vectors of seed 0, the same for every clip."""
        t_a, t_v = self.vectors(0, torch.zeros_like(clips.samples[:1]))
        with computes:
            both = self.model.embed_audio(self.spectrogram(clips), t_a), self.model.embed_image(self.image(clips), t_v)
        return torch.cat(both, dim=1).double()


def retrieve(looker: FeatureReader) -> Evaluated:
    config, settings, model = looker.config, looker.settings, looker.model
    trained = config.embedding == "trained"
    seeds = range(config.seeds if trained and settings.objective.sampled_in_evaluation else 1)

    def compute(clips: Clips, computes: torch.autocast) -> Tensor:
        """-> (b, seeds x 2 d): the audio's and the image's embedding for each seed"""
        spectrogram, image, found = looker.spectrogram(clips), looker.image(clips), []
        for seed in seeds:
            samples = clips.samples if config.vectors == "own" else torch.zeros_like(clips.samples[:1])
            t_a, t_v = looker.vectors(seed, samples)
            with computes:
                if trained:
                    found += [model.embed_audio(spectrogram, t_a), model.embed_image(image, t_v)]
                else:
                    h_a, h_v = model.encode_audio(spectrogram).mean(dim=1), model.encode_image(image).mean(dim=1)
                    found += [side.inter_head(h) for side, h in ((model.audio, h_a), (model.image, h_v))]
        return torch.cat(found, dim=1).double()

    found = looker.look(compute, config.frames)
    values = torch.from_numpy(found.values).view(len(found.samples), len(seeds), 2, -1)
    values = F.normalize(values, dim=-1).float()
    spread = both_directions([(values[:, k, 0], values[:, k, 1]) for k in range(len(seeds))])
    said = {name: {"mean": mean, "half spread": half} for name, (mean, half) in spread.items()}
    table = retrieval_table(config.benchmark, spread, len(found.samples), len(seeds))
    return Evaluated(
        {"clips": len(found.samples), "benchmark": config.benchmark, **said, "bad": dict(found.bad)}, table
    )


def compare(looker: FeatureReader) -> Evaluated:
    needs_predictions(looker.settings)
    strengths = looker.config.strengths
    found = looker.look(
        lambda clips, computes: similarities(looker.model, looker.settings, clips, SEED, computes, strengths)
    )
    several(found)
    means = found.values.mean(axis=0)
    errors = found.values.std(axis=0, ddof=1) / np.sqrt(len(found.values))
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for (side, kind, number), mean, error in zip(columns(strengths), means.tolist(), errors.tolist(), strict=True):
        rows.setdefault(side, {}).setdefault(kind, {})[number] = mean
        rows[side][kind][f"{number} error"] = error
    table = similarity_table(rows, len(found.samples))
    return Evaluated({"clips": len(found.samples), **rows, "bad": dict(found.bad)}, table)


def centre(looker: FeatureReader) -> Evaluated:
    needs_predictions(looker.settings)
    views = looker.config.views
    found = looker.look(
        lambda clips, computes: centroid.distances(looker.model, looker.settings, clips, views, computes)
    )
    several(found)
    said = centroid.summary(found.values)
    table = centroid.table(said, len(found.samples), views)
    return Evaluated({"clips": len(found.samples), **said, "bad": dict(found.bad)}, table)


def attend(looker: FeatureReader) -> Evaluated:
    needs_predictions(looker.settings)
    attention.needs_attention(looker.settings)
    model, settings = looker.model, looker.settings
    found = looker.look(lambda clips, computes: attention.attentions(model, settings, clips, computes))
    said = attention.summary(found.values, settings)
    table = attention.table(said, len(found.samples))
    return Evaluated(
        {"clips": len(found.samples), **said, "bad": dict(found.bad)}, table, attended(looker, found.samples)
    )


def attended(looker: FeatureReader, usable: np.ndarray) -> Image.Image | None:
    """A row a clip: picture and spectrogram, then what is looked at for each kind of augmentation."""
    settings, side = looker.settings, looker.settings.model.image_size

    def compute(clips: Clips, computes: torch.autocast) -> Tensor:
        given = looker.image(clips).flatten(1), looker.spectrogram(clips).flatten(1)
        maps = attention.attentions(looker.model, settings, clips, computes)
        return torch.cat([*(x.double() for x in given), maps], dim=1)

    found = shown(looker, usable, compute)
    if found is None:
        return None
    T, M = settings.model.spectrogram_frames, settings.model.spectrogram_mels
    images, spectrograms, values = np.split(found.values, np.cumsum([3 * side * side, T * M]), axis=1)
    rows: list[list[Titled]] = []
    for k in range(len(found.samples)):
        frame = seen(torch.from_numpy(images[k]).view(3, side, side))
        heard = coloured(torch.from_numpy(spectrograms[k]).view(T, M))
        row: list[Titled] = [("picture", frame)]
        maps = attention.split(values[k : k + 1], settings)
        row += [(kind, overlaid(frame, one[2][0])) for (of, kind), one in maps.items() if of == "image"]
        row += [("sound", heard)]
        row += [(kind, overlaid(heard, one[2][0][::-1])) for (of, kind), one in maps.items() if of == "audio"]
        rows.append(row)
    return sheet(rows, 112)


def localized(looker: FeatureReader) -> Evaluated:
    model, settings = looker.model, looker.settings
    d, (rows, cells) = settings.model.head_width, settings.model.image_grid
    sounds = looker.look(looker.embeddings).values[:, :d].mean(axis=0)
    masks = Masks.of(looker)

    def compute(clips: Clips, computes: torch.autocast) -> Tensor:
        """-> (b, 2 x patches): the heat map, and how much each patch stands out by itself"""
        maps = heat_maps(looker, clips, sounds, computes)
        objects = localize.objectness(looker.image(clips), settings.model.image_patch)
        return torch.cat([maps.flatten(1), objects.flatten(1)], dim=1).double()

    found = looker.look(compute)
    several(found)
    maps, objects = (x.reshape(-1, rows, cells) for x in np.split(found.values, 2, axis=1))
    known = (masks(found.samples), masks.choose(found.samples)) if masks else (None, None)
    said = localize.said_of(maps, objects, *known)
    table = localize.table(said, len(found.samples))

    def pictures(clips: Clips, computes: torch.autocast) -> Tensor:
        image = looker.image(clips)
        t = localize.nearest_to_centroid(model, settings, image, clips.samples)
        view = localize.as_centroid(settings, clips.frames, t)
        maps = heat_maps(looker, clips, sounds, computes), heat_maps(looker, clips, sounds, computes, view)
        return torch.cat([x.flatten(1) for x in (image, view, *maps)], dim=1).double()

    sheet_of = None
    if (
        few := shown(looker, found.samples, pictures if settings.objective.sampled_in_evaluation else None)
    ) is not None:
        side = settings.model.image_size
        parts = np.split(few.values, np.cumsum([3 * side * side] * 2 + [rows * cells]), axis=1)
        lines: list[list[Titled]] = []
        for image, view, own, of_view in zip(*parts, strict=True):
            frames = [seen(torch.from_numpy(x).view(3, side, side)) for x in (image, view)]
            heats = [overlaid(frame, x.reshape(rows, cells)) for frame, x in zip(frames, (own, of_view), strict=True)]
            titles = ("picture", "what sounds", "nearest to centroid", "what sounds")
            lines.append(list(zip(titles, (frames[0], heats[0], frames[1], heats[1]), strict=True)))
        sheet_of = sheet(lines, 112)
    return Evaluated({"clips": len(found.samples), **said, "bad": dict(found.bad)}, table, sheet_of)


def heat_maps(
    looker: FeatureReader, clips: Clips, sounds: np.ndarray, computes: torch.autocast, image: Tensor | None = None
) -> Tensor:
    """Of what each sound has of its own, beside `sounds` (d,), the mean of all -> (b, rows, columns)"""
    t_a, t_v = looker.vectors(0, torch.zeros_like(clips.samples[:1]))
    with computes:
        own = looker.model.embed_audio(looker.spectrogram(clips), t_a)
        own = own - torch.from_numpy(sounds).to(own)
        return localize.heat(looker.model, looker.image(clips) if image is None else image, own, t_v)


class Masks(NamedTuple):
    """Where something sounds, of clips of the synthetic world."""

    world: World
    keys: list[str]

    @classmethod
    def of(cls, looker: FeatureReader) -> Masks | None:
        """None: what sounds is not known."""
        keys = list(keys_of(looker.dataset))
        if not all(SYNTHETIC.fullmatch(key) for key in keys):
            return None
        found = cls(World(rules=looker.config.world), keys)
        return found._replace(world=found.checked(looker))

    def checked(self, looker: FeatureReader) -> World:
        """-> the world as it was packed, found from some clips; its rules may be other ones than are told."""
        data, world = looker.settings.data, None
        for one in survey.spread(looker.dataset, 0, CHECKED):
            names = survey.pictures_of(one.sample)
            sound = next(name for name in one.sample.members if name in DECODE_AUDIO)
            seen, heard = (survey.member(looker.dataset.store, one, name) for name in (names[len(names) // 2], sound))
            try:
                picture = decode_frame(seen, one.sample.key)  # (H, H, 3)
                wave = DECODE_AUDIO[sound](heard, one.sample.key, data)
            except BadClipError:  # of which what looks at the clips will tell
                continue
            world = World(
                0, len(picture), len(names), len(wave) / data.sample_rate, data.sample_rate, rules=self.world.rules
            )
            of, number = self._replace(world=world).place(one.number)
            clip = of.clip(number)
            apart = np.abs(clip.frames[len(names) // 2].astype(float) - picture).mean()
            if apart > 8 or not np.array_equal(clip.audio, wave):
                raise ConfigError(
                    f"world: {one.sample.key} is not the clip of that name; give --world.* as `equiav pack` had them"
                )
        if world is None:
            raise DatasetError(f"stream.url: none of {CHECKED} clips of {looker.dataset.store.url} can be decoded")
        return world

    def place(self, sample: int) -> tuple[World, int]:
        seed, number = SYNTHETIC.fullmatch(self.keys[sample]).groups()  # type: ignore[union-attr]
        return dataclasses.replace(self.world, seed=int(seed)), int(number)

    def choose(self, samples: np.ndarray) -> np.ndarray:
        """-> (n,) bool: what sounds is in sight, and something that does not"""
        there = (world.there(number) for world, number in map(self.place, samples.tolist()))
        return np.array([bool((seen & heard).any() and (seen & ~heard).any()) for seen, heard in there])

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """-> (n, H, W) bool, of the middle frame"""
        places = map(self.place, samples.tolist())
        return np.stack([world.masks(number)[world.frames // 2] for world, number in places])


def shown(
    looker: FeatureReader, usable: np.ndarray, compute: Callable[[Clips, torch.autocast], Tensor] | None
) -> Features | None:
    """usable: numbers of clips -> of some of them only."""
    few = few_of(looker, usable)
    return looker.look(compute, chosen=few) if compute and few.any() else None


def few_of(looker: FeatureReader, usable: np.ndarray) -> np.ndarray:
    """-> (samples,) bool: those that are shown"""
    there = np.zeros_like(looker.chosen)
    there[usable] = True
    return evenly(there, looker.config.examples)


def collect(looker: FeatureReader) -> Evaluated:
    found = looker.look(looker.embeddings)
    several(found)
    keys = np.array(list(keys_of(looker.dataset)), object)[found.samples]
    d = looker.settings.model.head_width
    audio, image = (torch.from_numpy(x).float() for x in np.split(found.values, [d], axis=1))
    chosen = few_of(looker, found.samples)[found.samples]
    rows = np.flatnonzero(chosen)
    of_sound, of_picture = (examples.nearest(one, other, rows) for one, other in ((audio, image), (image, audio)))
    ranked = [of[rows] for of in examples.places(audio, image)]
    thumbs, sounds = (
        thumbs_of(looker, found.samples, np.union1d(of_sound, of_picture)),
        found.values[:, :d].mean(axis=0),
    )

    def score(sound: int, picture: int) -> float:
        return float(audio[sound].double() @ image[picture].double())

    told = []
    for k, shows in enumerate(pictures_of(looker, found.samples[rows], sounds) if len(rows) else []):
        row = rows[k]
        told.append(shows | {
            "name": str(keys[row]),
            "score": score(row, row),
            "place of the picture": int(ranked[0][k]),
            "place of the sound": int(ranked[1][k]),
            "pictures found": [
                {"name": str(keys[n]), "score": score(row, n), "picture": thumbs[n]} for n in of_sound[k].tolist()
            ],
            "sounds found": [
                {"name": str(keys[n]), "score": score(n, row), "picture": thumbs[n]} for n in of_picture[k].tolist()
            ],
        })  # fmt: skip
    some = np.flatnonzero(evenly(np.ones(len(keys), bool), examples.POINTS))
    said = {
        "clips": len(keys),
        "examples": told,
        "map": examples.placed(audio, image, some) | {"names": keys[some].tolist()},
    }
    table = f"{len(told)} of {len(keys):,} clips, with what is found by their sounds and by their pictures: `equiav report`.\n"
    return Evaluated({**said, "bad": dict(found.bad)}, table)


def thumbs_of(looker: FeatureReader, samples: np.ndarray, rows: np.ndarray) -> dict[int, str]:
    """Of some rows of what was looked at -> row: small picture."""
    if not len(rows):
        return {}
    chosen = np.zeros_like(looker.chosen)
    chosen[samples[rows]] = True
    size = min(examples.THUMB, looker.settings.data.frame_size)

    def compute(clips: Clips, _: torch.autocast) -> Tensor:
        small = F.interpolate(clips.frames.float(), (size, size), mode="area")
        return small.permute(0, 2, 3, 1).flatten(1).double()

    values = looker.look(compute, chosen=chosen).values.round().astype(np.uint8).reshape(-1, size, size, 3)
    return {int(row): examples.picture(pixels) for row, pixels in zip(rows, values, strict=True)}


def pictures_of(looker: FeatureReader, samples: np.ndarray, sounds: np.ndarray) -> list[dict[str, Any]]:
    """What is seen and heard of each."""
    model, settings = looker.model, looker.settings
    m, side, views = settings.model, settings.model.image_size, bool(settings.objective.sampled_in_evaluation)

    def compute(clips: Clips, computes: torch.autocast) -> Tensor:
        image = looker.image(clips)
        found = [image, looker.spectrogram(clips), heat_maps(looker, clips, sounds, computes)]
        if views:
            t = localize.nearest_to_centroid(model, settings, image, clips.samples)
            view = localize.as_centroid(settings, clips.frames, t)
            found += [view, heat_maps(looker, clips, sounds, computes, view)]
        parts = [*(x.flatten(1) for x in found), clips.lengths[:, None], clips.waveform]
        return torch.cat([x.double() for x in parts], dim=1)

    chosen = np.zeros_like(looker.chosen)
    chosen[samples] = True
    (rows, cells), pixels = m.image_grid, 3 * side * side
    widths = [
        pixels,
        m.spectrogram_frames * m.spectrogram_mels,
        rows * cells,
        *([pixels, rows * cells] if views else []),
        1,
    ]
    told = []
    for values in looker.look(compute, chosen=chosen).values:
        image, spectrogram, heat, *more, length, wave = np.split(values, np.cumsum(widths))
        shows = {
            "picture": examples.picture(seen(torch.from_numpy(image).view(3, side, side))),
            "spectrogram": examples.picture(
                coloured(torch.from_numpy(spectrogram).view(m.spectrogram_frames, m.spectrogram_mels))
            ),
            "sound": examples.sound(wave[: int(length[0])].astype(np.int16), settings.data.sample_rate),
            "heat": examples.warm(heat.reshape(rows, cells)),
        }
        if more:
            shows["nearest to centroid"] = examples.picture(seen(torch.from_numpy(more[0]).view(3, side, side)))
            shows["its heat"] = examples.warm(more[1].reshape(rows, cells))
        told.append(shows)
    return told


EVALUATIONS = {
    "retrieval": retrieve,
    "similarity": compare,
    "centroid": centre,
    "localize": localized,
    "attention": attend,
    "examples": collect,
}


def several(found: Features) -> None:
    if len(found.samples) < 2:
        raise DatasetError("stream.url: one clip can be used; measuring the spread needs two or more")


def as_run(config: EvalConfig, settings: ModelSettings, ranks: Ranks) -> Config:
    """The settings of a run that looks at its clips as this does."""
    train = TrainConfig(batch_size=2 * config.batch * ranks.size, micro_batch=config.batch, precision=config.precision)
    own = {name: getattr(settings, name) for name in ("model", "augment", "objective", "data")}
    return Config(**own, device=config.device, stream=config.stream, train=train)


def applicable(settings: ModelSettings) -> list[str]:
    """What can be evaluated of a model: predictors may not have been trained, or have no attention."""
    left_out = {"similarity", "centroid", "attention"} if settings.objective.intra != "equivariant" else set()
    left_out |= {"attention"} if settings.model.predictor != "attention" else set()
    return [what for what in EVALUATIONS if what not in left_out]
