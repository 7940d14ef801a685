"""Zero-shot audio-visual retrieval (Table 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equiav.augment import normalised_spectrogram, original_image, sampled_vectors
from equiav.config import ModelSettings
from equiav.model import EquiAV


def recalls(similarity: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """similarity (N queries, N candidates), the diagonal belongs together -> R@k in percent.

    A candidate that is not farther than the right one counts as nearer: embeddings that have collapsed, or are not
    finite, retrieve nothing.
    """
    right = similarity.diagonal().unsqueeze(1)
    rank = len(similarity) - (similarity < right).sum(dim=1)  # 1 is best
    return {f"R@{k}": 100 * (rank <= k).float().mean().item() for k in at}


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


def zero_shot_retrieval(
    model: EquiAV, settings: ModelSettings, pairs: Pairs, seeds: tuple[int, ...] = (0, 1, 2)
) -> dict[str, tuple[float, float]]:
    """-> {'audio to image R@1': (mean over the seeds of the centroid's vectors, half their spread), ...}, percent."""
    rows: dict[str, list[float]] = {}
    for seed in seeds:
        audio, image = embed_pairs(model, settings, pairs, seed)
        similarity = audio @ image.T  # (N, N)
        for direction, matrix in (("audio to image", similarity), ("image to audio", similarity.T)):
            for name, value in recalls(matrix).items():
                rows.setdefault(f"{direction} {name}", []).append(value)
    return {name: (sum(v) / len(v), (max(v) - min(v)) / 2) for name, v in rows.items()}
