"""Batch -> views -> embeddings -> loss -> step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from equiav.augment import Batch, make_views
from equiav.config import Config
from equiav.model import EquiAV
from equiav.objective import Embeddings, equiav_loss, weights_at
from equiav.train.schedule import learning_rate


def train(config: Config, batches: Iterable[Batch], report: Callable[[int, dict[str, float]], None]) -> EquiAV:
    """The whole run: `config.train.steps` updates; `report(step, metrics)` after each."""
    device = torch.device(config.device)
    with torch.device("meta"):
        model = EquiAV(config.model, config.objective)
    model.to_empty(device=device).init_weights(config.seed)
    model.train()
    settings = config.train
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr_start, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    low_precision = settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")

    step = -1
    for step, batch in zip(range(settings.steps), batches, strict=False):
        if int(batch.valid.sum()) < 2:
            continue  # the end of an epoch, or quarantined: nothing to contrast with
        views = make_views(config, batch.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            embeddings = Embeddings(*model(*views)).only(batch.valid)
        loss, terms = equiav_loss(embeddings, weights_at(step, settings.steps, config.objective), config.objective)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        terms["gradient_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        metrics = dict(zip(terms, torch.stack([value.float() for value in terms.values()]).tolist(), strict=True))
        if not all(math.isfinite(value) for value in metrics.values()):
            bad = [name for name, value in metrics.items() if not math.isfinite(value)]
            raise FloatingPointError(
                f"step {step}: {', '.join(bad)} not finite before the update; samples {batch.samples.tolist()}. "
                "Lower train.lr or train.clip, or set train.precision=float32"
            )
        optimizer.step()
        model.clamp_temperature()
        report(step, {**metrics, "lr": learning_rate(step, settings)})
    if step + 1 != settings.steps:
        raise RuntimeError(f"the data ended after {step + 1} batches, expected train.steps={settings.steps}")
    return model.eval()
