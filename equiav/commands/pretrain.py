"""`equiav pretrain`: starts a run, goes on with it, or says that it is finished; alone, or as one of torchrun's processes."""

from __future__ import annotations

from dataclasses import dataclass

from equiav.config import RunConfig
from equiav.tasks import Pretraining
from equiav.train.carry import carry_out


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrains on a packed dataset. The same command starts the run, goes on where it was, or says that it is finished."""


def run_pretrain(config: PretrainConfig) -> None:
    carry_out("pretrain", config, Pretraining(config))
