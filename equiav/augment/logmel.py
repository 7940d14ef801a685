"""Waveform -> Kaldi-compatible log-mel spectrogram, in batches, on the device the batch is on."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchaudio.compliance.kaldi import get_mel_banks

from equiav.config import DataConfig, ModelConfig

PREEMPHASIS = 0.97
LOWEST_HZ = 20.0


def log_mel(waveform: Tensor, mels: int = 128, sample_rate: int = 16000) -> Tensor:
    """(B, L) in [-1, 1] -> (B, 1 + (L - window) // hop, mels), windows of 25 ms every 10 ms.

    What Kaldi's `compute-fbank-feats` gives with a Hanning window, htk-compat, no dither and no energy. Steps and their
    order are torchaudio's `kaldi.fbank`, so that quiet bins, where rounding shows, agree too.
    """
    window, hop = window_and_hop(sample_rate)
    if waveform.dim() != 2 or waveform.shape[1] < window:
        raise ValueError(f"waveform is {tuple(waveform.shape)}, expected (B, L) with L >= {window} (one window)")
    if not waveform.is_floating_point():
        raise ValueError(f"waveform is {waveform.dtype}, expected floating point in [-1, 1]")
    n_fft = 1 << (window - 1).bit_length()
    frames = waveform.unfold(1, window, hop)  # (B, frames, window)
    frames = frames - frames.mean(dim=2, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
    frames = (frames - PREEMPHASIS * previous) * _hann(window, frames)
    power = torch.view_as_real(torch.fft.rfft(frames, n=n_fft)).square().sum(dim=-1)  # (B, frames, n_fft / 2 + 1)
    with waveform.device:  # made where they are used: a copy would wait for the device
        banks, _ = get_mel_banks(mels, n_fft, sample_rate, LOWEST_HZ, 0.0, 100.0, -500.0, 1.0)  # (mels, n_fft / 2)
    energy = power @ F.pad(banks, (0, 1)).to(power).T
    return energy.clamp(min=torch.finfo(torch.float32).eps).log()


def _hann(window: int, like: Tensor) -> Tensor:
    """`torch.hann_window(window, periodic=False)`, to the bit, in operations that programs for elsewhere have, too."""
    turn = torch.arange(window, dtype=like.dtype, device=like.device) * (2 * math.pi / (window - 1))
    return turn.cos() * -0.5 + 0.5


def normalised_spectrogram(waveform: Tensor, lengths: Tensor, model: ModelConfig, data: DataConfig) -> Tensor:
    """waveform (B, L) int16 or float, of which lengths (B,) samples count -> (B, T, F).

    Log-mel, cut or padded with zeros to T frames, then (x - mean) / std, in float32 under any autocast. What stands behind
    a clip's own length is padding, however the batch was filled up.
    """
    with torch.autocast(waveform.device.type, enabled=False):
        if waveform.dtype == torch.int16:
            waveform = waveform.float() / 32768
        spectrogram = log_mel(waveform, model.spectrogram_mels, data.sample_rate)[:, : model.spectrogram_frames]
        window, hop = window_and_hop(data.sample_rate)
        own = 1 + (lengths - window) // hop  # (B,) frames
        beyond = torch.arange(spectrogram.shape[1], device=own.device) >= own[:, None]
        spectrogram = spectrogram.masked_fill(beyond[:, :, None], 0.0)
        spectrogram = F.pad(spectrogram, (0, 0, 0, model.spectrogram_frames - spectrogram.shape[1]))
        return (spectrogram - data.audio_mean) / data.audio_std


def moments(waveform: Tensor, model: ModelConfig, data: DataConfig) -> tuple[int, float, float]:
    """Of the spectrogram of a clip (L,) int16, as far as the model hears it and without padding: the number of its values, their
    sum, the sum of their squares."""
    spectrogram = log_mel(waveform[None].float() / 32768, model.spectrogram_mels, data.sample_rate)
    heard = spectrogram[:, : model.spectrogram_frames].double()  # (1, T, F)
    return heard.numel(), float(heard.sum()), float(heard.square().sum())


def window_and_hop(sample_rate: int) -> tuple[int, int]:
    """25 ms and 10 ms, samples."""
    return int(sample_rate * 0.025), int(sample_rate * 0.010)
