"""Checks of descriptors' and indices' values, for the plain paths: a kernel trusts its caller."""

from __future__ import annotations

from torch import Tensor

ANY_SLOT = 2**31 - 1  # number of slots where there is no state to have rows for


def check_start(start_S1: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless start_S1 ascends from 0 to at most num_tokens. Synchronises."""
    start = start_S1.tolist()
    if start[0] != 0 or start != sorted(start) or start[-1] > num_tokens:
        raise ValueError(
            f"start_S1: expected ascending values from 0 to at most {num_tokens}, got {start}"
        )


def check_slots(slot_S: Tensor, num_slots: int) -> None:
    """Raise ValueError unless each is idle (-1) or a slot that no other names. Synchronises."""
    slot = slot_S.tolist()
    if any(not -1 <= n < num_slots for n in slot):
        raise ValueError(f"slot_S: expected -1 (idle) or 0..{num_slots - 1}, got {slot}")
    live = [n for n in slot if n >= 0]
    if len(set(live)) != len(live):
        raise ValueError(f"slot_S: a slot is named twice in {slot}")


def check_below(limit: int, **named: Tensor) -> None:
    """Raise ValueError where an index tensor holds a value >= limit. Synchronises."""
    for name, index in named.items():
        if index.numel() > 0 and (highest := int(index.max())) >= limit:
            raise ValueError(f"{name}: expected values below {limit}, got {highest}")


def check_distinct(**named: Tensor) -> None:
    """Raise ValueError where an index tensor holds a value twice, -1 excepted. Synchronises."""
    for name, index in named.items():
        value, count = index[index >= 0].unique(return_counts=True)
        if (count > 1).any():
            raise ValueError(f"{name}: {int(value[count > 1][0])} is named twice")
