"""Inputs of rms_norm for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...testing import Cost, randn


@dataclass(frozen=True)
class Case:
    num_tokens: int
    width: int
    residual: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        kind = "add" if self.residual else "norm"
        return f"T{self.num_tokens}-D{self.width}-{kind}-{str(self.dtype).removeprefix('torch.')}"

    def make_inputs(self, device: str) -> dict:
        shape = (self.num_tokens, self.width)
        return {
            "x_T_D": randn(*shape, device=device, dtype=self.dtype),
            "weight_D": 1 + 0.1 * randn(self.width, device=device),
            "residual_T_D": randn(*shape, device=device, dtype=self.dtype)
            if self.residual
            else None,
        }

    def cost(self) -> Cost:
        row = self.width * self.dtype.itemsize
        rows_moved = 4 if self.residual else 2  # read x (and residual), write out (and residual)
        return Cost(
            bytes=self.num_tokens * row * rows_moved + 4 * self.width,
            flops=4 * self.num_tokens * self.width,
        )


EDGE = [
    Case(0, 128),  # no tokens
    Case(1, 128),  # one token
    Case(3, 1),  # one column: the norm is the sign
    Case(5, 77),  # odd width, partly masked block
    Case(2, 130, residual=True),  # one step past a power of two
]
MODEL = [
    Case(8, 128, residual=True),  # tiny preset
    Case(64, 128),  # q and k heads, flattened to rows
    Case(4, 4096, residual=True),  # inkling-small
]
BENCH = [Case(t, 4096, residual=True, dtype=torch.bfloat16) for t in (1, 8, 32, 64, 256, 1024)]
