"""Fine-tuning: the labels of a clip from its sound, its picture, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equiav.augment import Clips
from equiav.augment.draws import Purpose, uniforms
from equiav.augment.logmel import normalised_spectrogram
from equiav.augment.transforms import original_image
from equiav.config import Config, TuneConfig
from equiav.model.arithmetic import encoders
from equiav.model.classifier import Classifier
from equiav.objective import Rows, aligned
from equiav.tasks.task import Metrics

Targets = Callable[[np.ndarray], np.ndarray]
"""Ids of samples (b,), below 0 where there is none -> (b, classes) float32, 1 where a clip has the class."""
ALPHA = 10  # lambda ~ Beta(ALPHA, ALPHA): the ALPHA-th of 2 ALPHA - 1 numbers in order


class Logits(NamedTuple):
    z: Tensor  # (b, classes)


class Mixture(NamedTuple):
    """Whom each clip is mixed with. Partners are of its micro-batch: the same at any number of processes."""

    partner: Tensor  # (b,) row
    share: Tensor  # (b,) float32, of the clip itself

    def of(self, x: Tensor) -> Tensor:
        share = self.share.view(-1, *[1] * (x.dim() - 1))
        return share * x + (1 - share) * x[self.partner]


class Classification:
    fewest = 1

    def __init__(
        self,
        config: Config,
        tune: TuneConfig,
        classes: int,
        targets: Targets,
        learns_from: Mapping[str, str] | None = None,
        often: np.ndarray | None = None,
    ):
        self.config, self.tune, self.classes, self.targets, self.often = config, tune, classes, targets, often
        self.learns_from = learns_from or {}
        self.hears, self.sees = tune.hears, tune.sees

    def build(self) -> Classifier:
        return Classifier(self.config.model, self.classes, self.hears, self.sees)

    def blocks(self, model: nn.Module) -> Iterator[nn.Module]:
        assert isinstance(model, Classifier)
        for side in model.sides:
            yield from side.encoder.blocks

    def prepared(self, clips: Clips) -> Clips:
        return clips._replace(targets=torch.from_numpy(self.targets(clips.samples.numpy())))

    def forward(self, model: nn.Module, clips: Clips, computes: Callable[[], Any]) -> Logits:
        mixture, keep = self.mixture(clips), self.kept(clips)
        audio, image = self.inputs(clips, mixture)
        if audio is not None and self.tune.time_roll:
            audio = self.rolled(audio, clips)
        with computes():
            return Logits(model(audio, image, keep))

    def inputs(self, clips: Clips, mixture: Mixture | None = None) -> tuple[Tensor | None, Tensor | None]:
        """-> (B, T, F), (B, 3, H, W); None for what this run does not use."""
        audio = image = None
        if self.hears:
            waveform = clips.waveform
            if mixture:
                sound = waveform.float() / 32768
                own = torch.arange(sound.shape[1], device=sound.device) < clips.lengths[:, None]
                sound = sound - (sound * own).sum(1, keepdim=True) / clips.lengths[:, None].clamp(min=1)
                waveform = mixture.of(sound * own) * own
            audio = normalised_spectrogram(waveform, clips.lengths, self.config.model, self.config.data)
        if self.sees:
            image = original_image(clips.frames, self.config.model.image_size)
            image = mixture.of(image) if mixture else image
        return audio, image

    def loss(self, whole: Logits, clips: Clips, rows: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        right = clips.targets  # (b, classes)
        mixed = [self.mixture(clips.rows(piece)) for piece in rows.pieces]
        wanted = torch.cat(
            [m.of(right[piece]) if m else right[piece] for m, piece in zip(mixed, rows.pieces, strict=True)]
        )
        of_rows = torch.cat(
            [self.of_rows(aligned(whole.z[piece]).float(), aligned(wanted[piece])) for piece in rows.pieces]
        )
        counted = rows.own.double() / rows.N
        shares = of_rows.where(rows.own, 0).double() * counted
        best = right.gather(1, whole.z.argmax(dim=1, keepdim=True))[:, 0]  # of the clip itself, where it is mixed
        loss = shares.detach()
        return shares.sum(), {"loss": loss, "loss_class": loss, "accuracy_class": best.double() * counted}

    def of_rows(self, z: Tensor, wanted: Tensor) -> Tensor:
        """(b, classes) each -> (b,)."""
        if self.tune.loss == "one":
            return -(wanted * F.log_softmax(z, dim=1)).sum(dim=1)
        return F.binary_cross_entropy_with_logits(z, wanted, reduction="none").mean(dim=1)

    def mixture(self, clips: Clips) -> Mixture | None:
        if not self.tune.mixup:
            return None
        b, valid = len(clips.samples), clips.valid if clips.there is None else clips.there
        draws = uniforms(self.config.seed, clips.epoch, clips.samples, Purpose.MIXUP, 2 * ALPHA + 1)
        partner = (torch.arange(b, device=valid.device) + 1 + (draws[:, 0] * max(1, b - 1)).long()) % b
        share = draws[:, 2:].sort(dim=1).values[:, ALPHA - 1].float()
        mixes = (draws[:, 1] < self.tune.mixup) & valid & valid[partner]
        return Mixture(partner, share.where(mixes, 1.0))

    def kept(self, clips: Clips) -> Tensor | None:
        """(B, sides, 2 x depth): 0 where a clip passes a part of a block by, growing with depth as usual."""
        if not self.tune.drop_path:
            return None
        depth, sides = self.config.model.depth, self.hears + self.sees
        with clips.samples.device:  # made where it is used: a copy would wait for the device
            share = 1 - torch.linspace(0, self.tune.drop_path, depth, dtype=torch.float64).repeat_interleave(2)
        count = sides * 2 * depth
        draws = uniforms(self.config.seed, clips.epoch, clips.samples, Purpose.DROP_PATH, count).view(
            -1, sides, 2 * depth
        )
        return ((draws < share) / share).float()

    def rolled(self, audio: Tensor, clips: Clips) -> Tensor:
        """(B, T, F), each by some frames, round and round."""
        T = audio.shape[1]
        by = (uniforms(self.config.seed, clips.epoch, clips.samples, Purpose.TIME_ROLL, 1) * T).long()  # (B, 1)
        source = (torch.arange(T, device=audio.device) - by) % T
        return audio.gather(1, source[:, :, None].expand_as(audio))

    def updated(self, model: nn.Module) -> None: ...

    def reported(self, sums: Metrics) -> Metrics:
        return sums

    def chance(self, step: int, clips: float) -> Metrics:
        loss = math.log(self.classes) if self.tune.loss == "one" else math.log(2)
        return {"class": loss, "total": loss}

    def untrained(self, step: int) -> set[str]:
        return set()

    def flops(self) -> int:
        return encoders(self.config.model, self.hears, self.sees)
