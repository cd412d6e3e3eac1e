"""Philox-4x32-10 on int64 tensors: random numbers that are a function of their names alone.

A number is named by (seed, counter, column, stream): the same on every device, in every row, in
any company. Key = the seed's low and high word; counter words = (column // 4, the counter's low
word, its high word, the stream), and column % 4 picks the output word. The stream keeps the draws
of two ops apart when they share a seed. Integers equal Random123's philox4x32-10 and
triton.language.philox(seed, c0, c1, c2, c3). Nothing synchronises.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

# Dimension key: S rows, B columns.

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLE_STREAM = 1
FLOW_STREAM = 2

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def _pair(values: tuple[int, int], like: Tensor) -> Tensor:
    """[2, 1, 1, ...] int64, made on the device: a copy from the host would synchronise."""
    first, second = values
    pair_2 = torch.arange(2, device=like.device) * (second - first) + first
    return pair_2.view(2, *[1] * (like.dim() - 1))


def philox_4x32(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Ten rounds. even, odd: [2, ...] counter words (0, 2) and (1, 3); key: [2, ...], broadcast.

    int64 holding 0..2^32 - 1, in and out; returns the output words (0, 2) and (1, 3). The 64-bit
    products wrap around as int64, which leaves their bits right.
    """
    multiplier, step = _pair(_MULTIPLIERS, even), _pair(_KEY_STEPS, even)
    for n in range(_NUM_ROUNDS):
        product = (even * multiplier).flip(0)
        even = ((product >> 32) & _MASK) ^ odd ^ ((key + n * step) & _MASK)
        odd = product & _MASK
    return even, odd


def random_bits(seed_S: Tensor, counter_S: Tensor, num_columns: int, stream: int) -> Tensor:
    """bits_S_B, int64 holding 0..2^32 - 1. seed, counter: int64, any value."""
    num_blocks = -(-num_columns // 4)
    shape = (seed_S.shape[0], num_blocks)
    block = torch.arange(num_blocks, device=seed_S.device).expand(shape)
    counter_S_1 = counter_S[:, None].expand(shape)
    even = torch.stack([block, (counter_S_1 >> 32) & _MASK])
    odd = torch.stack([counter_S_1 & _MASK, torch.full_like(block, stream)])
    key = torch.stack([seed_S & _MASK, (seed_S >> 32) & _MASK])[:, :, None]
    even, odd = philox_4x32(even, odd, key)
    words = torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1)
    return words.flatten(1)[:, :num_columns]


def uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """min((bits + 1/2) 2^-32, 1 - 2^-24): inside (0, 1) in float32 too, and fine near 0."""
    return (bits.to(dtype) * 2.0**-32 + 2.0**-33).clamp(max=1.0 - 2.0**-24)


def gumbel(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """-ln(-ln(1 - u)). Large values, which decide an arg max, come from small u: they are exact
    to the last bit of `bits`, and every value is finite, -2.9..22.9."""
    return -torch.log(-torch.log1p(-uniform(bits, dtype)))


def normal(
    seed_S: Tensor, counter_S: Tensor, num_columns: int, stream: int, dtype: torch.dtype
) -> Tensor:
    """noise_S_B: standard normal by Box-Muller, columns 2i and 2i + 1 from words 2i and 2i + 1."""
    num_pairs = (num_columns + 1) // 2
    bits = random_bits(seed_S, counter_S, 2 * num_pairs, stream)
    u = uniform(bits, dtype).unflatten(1, (num_pairs, 2))
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0]))
    angle = (2.0 * math.pi) * u[..., 1]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :num_columns]
