"""Rotary frequencies as 64-bit fixed point: a position of 10^9 costs no precision."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def rope_increments(theta: float, head_width: int, device: torch.device | str) -> Tensor:
    """int64 [C / 2]: turns of frequency theta^(-2 b / C) per position, times 2^64, rounded.

    The turns at position n are n * increment / 2^64, whose whole part falls off the top of the
    wrapping product. An increment is off by at most 2^-65 turns: 2e-10 rad at position 10^9.
    Raises ValueError for theta < 1 and for a head width that is not a positive even number.

    Source: Su et al., "RoFormer", 2021, section 3.2.2.
    """
    if not 1 <= theta < float("inf"):
        raise ValueError(f"theta: expected a finite value of at least 1, got {theta}")
    if head_width <= 0 or head_width % 2:
        raise ValueError(f"head_width: expected a positive even number, got {head_width}")
    with localcontext(Context(prec=60)):
        first = Decimal(2) ** 64 / (2 * _PI)
        exact = [first * Decimal(theta) ** (Decimal(-b) / head_width)
                 for b in range(0, head_width, 2)]  # fmt: skip
        increments = [int(value.to_integral_value()) for value in exact]
    return torch.tensor(increments, dtype=torch.int64, device=device)
