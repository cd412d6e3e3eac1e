"""Rotary frequencies as 64-bit fixed point: a position of 10^9 costs no precision."""

# Dimension key: T tokens, H heads, C head width, B = C / 2 rotary frequencies.

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor

from ._numbers import check_int, check_number

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def rope_increments(theta: float, head_width: int, device: torch.device | str) -> Tensor:
    """int64 [C / 2]: turns of frequency theta^(-2 b / C) per position, times 2^64, rounded.

    The turns at position n are n * increment / 2^64, whose whole part falls off the top of the
    wrapping product. An increment is off by at most 2^-65 turns: 2e-10 rad at position 10^9.
    Raises ValueError for theta < 1 and for a head width that is not a positive even number.

    Source: Su et al., "RoFormer", 2021, section 3.2.2.
    """
    check_number("theta", theta)
    check_int("head_width", head_width)
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


def rotate_ref(x_T_H_C: Tensor, phase_B: Tensor, position_T: Tensor) -> Tensor:
    """Column b and column b + C / 2 turn by position * phase[b] / 2^64 of a full turn."""
    turns_T_1_B = (position_T[:, None, None] * phase_B).double() * 2.0**-64  # the product wraps
    angle_T_1_B = 2 * math.pi * turns_T_1_B
    cos, sin = angle_T_1_B.cos().to(x_T_H_C.dtype), angle_T_1_B.sin().to(x_T_H_C.dtype)
    low_T_H_B, high_T_H_B = x_T_H_C.chunk(2, -1)
    turned = (low_T_H_B * cos - high_T_H_B * sin, high_T_H_B * cos + low_T_H_B * sin)
    return torch.cat(turned, -1)
