"""`equiav pretrain`: starts a run, goes on with it, or says that it is finished; alone, or as one of torchrun's processes."""

from __future__ import annotations

from equiav.commands.settings import PretrainConfig
from equiav.tasks import Pretraining
from equiav.train.carry import carry_out


def run_pretrain(config: PretrainConfig) -> None:
    carry_out("pretrain", config, Pretraining(config))
