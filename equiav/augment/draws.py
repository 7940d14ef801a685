"""Counter-based random numbers: a pure function of (seed, epoch, sample id, purpose), the same on every device.

SplitMix64 over a key: integer arithmetic modulo 2^64, then one exact conversion to float64.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

GOLDEN, MIX_1, MIX_2, WORD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 2**64


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every run's result: never reuse or renumber one."""

    VIEW_IMAGE = 1
    VIEW_AUDIO = 2
    CENTROID_IMAGE = 3
    CENTROID_AUDIO = 4
    FRAME = 5
    ORDER = 6
    MIXUP = 7
    DROP_PATH = 8
    TIME_ROLL = 9
    UNSEEN = 10


def uniforms(seed: int, epoch: int, samples: Tensor, purpose: Purpose, count: int) -> Tensor:
    """samples (B,) int64 -> (B, count) float64, uniform in [0, 1)."""
    if samples.dtype != torch.int64 or samples.dim() != 1:
        raise ValueError(f"sample ids are {samples.dtype} {tuple(samples.shape)}, expected int64 (B,)")
    key = _mix_int(_mix_int(_mix_int(seed + GOLDEN) ^ epoch) ^ int(purpose))
    state = _mix(samples ^ _signed(key))  # (B,)
    steps = torch.arange(1, count + 1, device=samples.device) * _signed(GOLDEN)  # (count,), wraps
    return _shift(_mix(state[:, None] + steps), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, in place; two's complement products are the unsigned ones modulo 2^64."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(MIX_1))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(MIX_2))
    return x.bitwise_xor_(_shift(x, 31))


def _mix_int(x: int) -> int:
    x %= WORD
    x = ((x ^ (x >> 30)) * MIX_1) % WORD
    x = ((x ^ (x >> 27)) * MIX_2) % WORD
    return x ^ (x >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64's own copies the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - WORD if x >= WORD // 2 else x
