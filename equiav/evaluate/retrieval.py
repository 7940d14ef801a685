"""Zero-shot audio-visual retrieval (Table 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equiav.augment import normalised_spectrogram, original_image, sampled_vectors
from equiav.config import ModelSettings
from equiav.model import EquiAV

AT = (1, 5, 10)
BLOCK = 1 << 24  # similarities at a time, some bytes each
MANY = 0.05  # of the similarities, which are not looked at one by one


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """queries, candidates (N, d), row k belongs to row k -> (N,) the place of the right candidate, 1 is best.

    By inner product, exactly as in float64: what float32 cannot tell apart is computed anew. A candidate that is not farther
    than the right one counts as nearer: embeddings that have collapsed, or are not finite, retrieve nothing.
    """
    N, d = queries.shape
    found = torch.empty(N, dtype=torch.int64, device=queries.device)
    sizes = queries.double().norm(dim=1), candidates.double().norm(dim=1)
    longest = sizes[1].nan_to_num(0.0, 0.0, 0.0).max()
    doubt = d * 2.0**-22 * sizes[0] * longest  # (N,) beyond what rounding can do, on both sides
    rows = max(1, BLOCK // N)
    for k in range(0, N, rows):
        some = slice(k, min(k + rows, N))
        right = (queries[some].double() * candidates[some].double()).sum(dim=1, keepdim=True)  # (b, 1)
        apart = (queries[some].float() @ candidates.T.float()).double() - right  # (b, N)
        farther = apart < -doubt[some, None]
        doubtful = apart.abs() <= doubt[some, None]
        if doubtful.double().mean() > MANY:  # of a model that has collapsed: what rounding can do counts as equal
            farther = (
                queries[some].double() @ candidates.double().T < right - d * 2.0**-51 * sizes[0][some, None] * longest
            )
            doubtful[:] = False
        unsure = doubtful.nonzero()  # (m, 2); the right ones are among them
        for one in unsure.split(max(1, BLOCK // (4 * d))):
            row, column = one.unbind(1)
            exact = (queries[some][row].double() * candidates[column].double()).sum(dim=1)
            farther[row, column] = exact < right[row, 0]
        found[some] = N - farther.sum(dim=1)
    return found


def recalls(places: Tensor) -> dict[str, float]:
    """places (N,) of the right candidates, 1 is best -> R@k in percent, and the median."""
    return {f"R@{k}": 100 * (places <= k).double().mean().item() for k in AT} | {
        "median rank": places.double().quantile(0.5).item()
    }


class Pairs(NamedTuple):
    """Decoded clips to retrieve among, on the host."""

    frames: Tensor  # (N, 3, H, W) uint8
    waveform: Tensor  # (N, L) int16
    lengths: Tensor  # (N,) samples of each waveform that are its own


@torch.no_grad()
def embed_pairs(
    model: EquiAV, settings: ModelSettings, pairs: Pairs, seed: int, batch: int = 64
) -> tuple[Tensor, Tensor]:
    """-> audio and image embeddings (N, d), L2-normalised.

    The centroid's vectors are drawn once, from `seed`, and are the same for every clip: candidates differ in content only.
    """
    device = next(model.parameters()).device
    t_a = t_v = None
    if settings.objective.sampled_in_evaluation:
        one = torch.zeros(1, dtype=torch.int64, device=device)
        t_a, t_v = sampled_vectors(settings, seed, 0, one, settings.objective.sampled_in_evaluation)
    audio, image = [], []
    for start in range(0, len(pairs.frames), batch):
        frames, waveform, lengths = (x[start : start + batch].to(device) for x in pairs)
        spectrogram = normalised_spectrogram(waveform, lengths, settings.model, settings.data)
        audio.append(model.embed_audio(spectrogram, t_a))
        image.append(model.embed_image(original_image(frames, settings.model.image_size), t_v))
    return torch.cat(audio).float(), torch.cat(image).float()


Spread = dict[str, tuple[float, float]]
"""'audio to image R@1' -> mean over seeds, half their spread."""


def both_directions(of_seeds: list[tuple[Tensor, Tensor]]) -> Spread:
    """Audio and image embeddings (N, d), for each seed of the centroid's vectors."""
    rows: dict[str, list[float]] = {}
    for audio, image in of_seeds:
        for direction, one, other in (("audio to image", audio, image), ("image to audio", image, audio)):
            for name, value in recalls(ranks(one, other)).items():
                rows.setdefault(f"{direction} {name}", []).append(value)
    return {name: (sum(v) / len(v), (max(v) - min(v)) / 2) for name, v in rows.items()}


def zero_shot_retrieval(
    model: EquiAV, settings: ModelSettings, pairs: Pairs, seeds: tuple[int, ...] = (0, 1, 2)
) -> Spread:
    return both_directions([embed_pairs(model, settings, pairs, seed) for seed in seeds])
