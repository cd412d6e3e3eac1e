"""Inputs of apply_deltas for tests and benchmarks, and what each must move at least."""

# Dimension key: U deltas, Q keys of the page table, Z positions, W rows of all pages.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...testing import Cost


@dataclass(frozen=True)
class Case:
    """padding: how many deltas, and how many positions, are padding, somewhere among the others."""

    num_deltas: int  # U
    num_positions: int  # Z
    num_keys: int  # Q
    num_rows: int  # W
    padding: int = 0

    def __str__(self) -> str:
        return (
            f"U{self.num_deltas}-Z{self.num_positions}-Q{self.num_keys}-W{self.num_rows}-"
            f"pad{self.padding}"
        )

    def make_inputs(self, device: str) -> dict[str, Tensor]:
        def index(count: int, size: int) -> Tensor:
            """Distinct, without order."""
            live = torch.randperm(size)[: count - self.padding]
            padded = torch.cat([live, torch.full((count - len(live),), -1)])
            return padded[torch.randperm(count)]

        def values(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.randint(low, high, shape, dtype=dtype)

        num_deltas, num_keys = self.num_deltas, self.num_keys
        delta = [
            index(num_deltas, num_keys),
            values(-1, 2**31 - 1, num_deltas),
            values(0, 2**62, num_deltas),
            values(0, 65, num_deltas),
        ]
        inputs = {
            "delta_U_4": torch.stack(delta, 1),
            "row_Z": index(self.num_positions, self.num_rows),
            "position_Z": values(0, 2**62, self.num_positions),
            "page_Q": values(-1, 2**31 - 1, num_keys, dtype=torch.int32),
            "base_Q": values(0, 2**62, num_keys),
            "rows_Q": values(0, 65, num_keys, dtype=torch.int32),
            "row_position_W": values(-1, 2**62, self.num_rows),
        }
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def cost(self) -> Cost:
        read = 32 * self.num_deltas + 16 * self.num_positions
        written = 16 * (self.num_deltas - self.padding) + 8 * (self.num_positions - self.padding)
        return Cost(bytes=read + written, flops=0)


EDGE = [
    Case(0, 0, 0, 0),  # nothing at all
    Case(0, 0, 5, 7),  # nothing changed
    Case(1, 0, 1, 0),  # one key, no rows
    Case(0, 1, 0, 1),  # one row, no keys
    Case(2, 2, 0, 0, padding=2),  # padding beside tables that are empty
    Case(7, 5, 9, 11, padding=5),  # mostly padding, all of the positions
    Case(129, 127, 200, 131, padding=3),  # one past a block, across deltas and positions
]
MODEL = [
    Case(96, 128, 1088, 4096, padding=64),  # one session's tick of 200 ms
]
BENCH = [
    Case(96, 128, 1088, 1 << 16),
    Case(1024, 2048, 32 * 1088, 1 << 21),  # 32 sessions
    Case(4096, 8192, 64 * 1088, 1 << 22),
]
