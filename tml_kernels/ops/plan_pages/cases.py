"""Inputs of plan_pages for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...testing import Cost


@dataclass(frozen=True)
class Case:
    """Lists with `used` of their entries in use, at columns and bases in random order.

    ties: bases are drawn from a few values, so that many are equal. idle: every third session row
    has slot -1. far: bases are beyond 2^31.
    """

    num_rows: int  # S
    num_columns: int  # M
    used: float = 0.7
    ties: bool = False
    idle: bool = False
    far: bool = False

    @property
    def num_slots(self) -> int:  # N
        return self.num_rows + 2

    def __str__(self) -> str:
        options = {"ties": self.ties, "idle": self.idle, "far": self.far}
        named = "".join(f"-{name}" for name, on in options.items() if on)
        return f"{self.num_rows}x{self.num_columns}-used{self.used:g}{named}"

    def make_inputs(self, device: str) -> dict[str, Tensor]:
        shape = (self.num_slots, self.num_columns)
        is_used = torch.rand(shape) < self.used
        page = torch.randint(0, 1 << 20, shape).where(is_used, -1)
        base = torch.randint(0, 3 if self.ties else 1 << 30, shape)
        rows = torch.randint(0, 65, shape)  # a page may have no rows yet
        slot = torch.randperm(self.num_slots)[: self.num_rows]
        if self.idle:
            slot[::3] = -1
        inputs = {
            "page_N_M": page.int(),
            "base_N_M": base + (10**12 if self.far else 0),
            "rows_N_M": rows.int(),
            "slot_S": slot.int(),
        }
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def cost(self) -> Cost:
        """Flops are the comparisons of a sort."""
        comparisons = self.num_columns * max(1, (self.num_columns - 1).bit_length())
        return Cost(
            bytes=self.num_rows * (2 * 16 * self.num_columns + 8),
            flops=self.num_rows * comparisons,
        )


EDGE = [
    Case(0, 3),  # no rows
    Case(2, 0),  # no columns
    Case(1, 1, used=1.0),
    Case(2, 5, used=0.0),
    Case(3, 9, used=1.0, far=True),
    Case(4, 17, ties=True, idle=True),
    Case(2, 300, ties=True),  # longer than what is compared at a time
    Case(5, 70, idle=True, far=True),
]
MODEL = [
    Case(8, 9, used=1.0),  # inkling-small: a local ring of 512, and 16 k positions
    Case(8, 256, idle=True),
]
BENCH = [
    *(Case(sessions, 256) for sessions in (1, 8, 32, 64)),
    Case(32, 9, used=1.0),  # a local ring of 512
    *(Case(sessions, 2048) for sessions in (1, 8, 64)),
]
