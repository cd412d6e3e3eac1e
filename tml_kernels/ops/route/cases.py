"""Inputs of route for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...testing import Cost, randn


@dataclass(frozen=True)
class Case:
    num_tokens: int
    width: int  # D
    num_experts: int  # E
    top_k: int
    num_shared: int  # Z
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return (
            f"T{self.num_tokens}-D{self.width}-E{self.num_experts}-K{self.top_k}-"
            f"Z{self.num_shared}-{str(self.dtype).removeprefix('torch.')}"
        )

    def make_inputs(self, device: str) -> dict:
        num_logits = self.num_experts + self.num_shared
        return {
            "x_T_D": randn(self.num_tokens, self.width, device=device, dtype=self.dtype),
            "weight_A_D": randn(
                num_logits, self.width, device=device, dtype=self.dtype, scale=self.width**-0.5
            ),
            "bias_E": randn(self.num_experts, device=device, scale=0.1),
            "global_scale_1": torch.full((1,), 1.25, device=device),
            "top_k": self.top_k,
            "num_shared": self.num_shared,
            "scale": 8.0,
        }

    def cost(self) -> Cost:
        num_logits, size = self.num_experts + self.num_shared, self.dtype.itemsize
        out = self.num_tokens * 4 * (2 * self.top_k + self.num_shared)
        return Cost(
            bytes=size * self.width * (num_logits + self.num_tokens) + 4 * self.num_experts + out,
            flops=2 * self.num_tokens * num_logits * self.width,
        )


EDGE = [
    Case(0, 32, 8, 2, 2),  # no tokens
    Case(1, 32, 8, 2, 2),  # one token
    Case(5, 77, 13, 3, 1),  # odd widths
    Case(4, 32, 8, 2, 0),  # no shared experts
    Case(4, 32, 6, 6, 2),  # every expert is chosen
    Case(3, 32, 1, 1, 0),  # one expert: its weight is the scale
    Case(9, 64, 8, 1, 2),  # one past a block of rows
]
MODEL = [
    Case(23, 128, 8, 2, 2),  # tiny
    Case(32, 4096, 256, 6, 2),  # inkling-small
]
BENCH = [Case(t, 4096, 256, 6, 2, torch.bfloat16) for t in (1, 8, 32, 64, 256, 1024)]
