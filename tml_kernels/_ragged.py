"""Checks of the ragged descriptor's values, for the plain paths: a kernel trusts its caller."""

from __future__ import annotations

from torch import Tensor


def check_start(start_S1: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless start_S1 ascends within 0..num_tokens. Synchronises."""
    start = start_S1.tolist()
    if start != sorted(start) or start[0] < 0 or start[-1] > num_tokens:
        raise ValueError(f"start_S1: expected ascending values in 0..{num_tokens}, got {start}")


def check_below(limit: int, **named: Tensor) -> None:
    """Raise ValueError where an index tensor holds a value >= limit. Synchronises."""
    for name, index in named.items():
        if index.numel() > 0 and (highest := int(index.max())) >= limit:
            raise ValueError(f"{name}: expected values below {limit}, got {highest}")
