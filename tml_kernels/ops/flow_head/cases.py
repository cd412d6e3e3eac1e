"""Inputs of flow_head for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...testing import Cost, randn
from .reference import FlowWeights


@dataclass(frozen=True)
class Case:
    num_rows: int  # S
    model_width: int  # D
    width: int  # W
    num_blocks: int  # L
    num_bins: int  # B
    num_steps: int = 4
    guidance: float = 1.0
    inner: int = 4  # U / W
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return (
            f"S{self.num_rows}-D{self.model_width}-W{self.width}-L{self.num_blocks}-"
            f"B{self.num_bins}-N{self.num_steps}-g{self.guidance:g}-"
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    def make_weights(self, device: str) -> FlowWeights:
        """Every output has unit scale, the blocks' contributions a tenth of it."""

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return randn(*shape, device=device, dtype=self.dtype, scale=scale * shape[-1] ** -0.5)

        def bias(*shape: int) -> Tensor:
            return randn(*shape, device=device, dtype=self.dtype, scale=0.1)

        w, blocks, inner = self.width, self.num_blocks, self.inner * self.width
        return FlowWeights(
            cond_W_D=draw(w, self.model_width),
            cond_bias_W=bias(w),
            null_W=randn(w, device=device, dtype=self.dtype),
            time_in_W_W=draw(w, w),
            time_in_bias_W=bias(w),
            time_out_W_W=draw(w, w),
            time_out_bias_W=bias(w),
            input_W_B=draw(w, self.num_bins),
            input_bias_W=bias(w),
            mod_L_3_W_W=draw(blocks, 3, w, w, scale=0.5),
            mod_bias_L_3_W=bias(blocks, 3, w),
            up_L_U_W=draw(blocks, inner, w),
            up_bias_L_U=bias(blocks, inner),
            down_L_W_U=draw(blocks, w, inner, scale=0.2),
            down_bias_L_W=bias(blocks, w),
            final_mod_2_W_W=draw(2, w, w, scale=0.5),
            final_mod_bias_2_W=bias(2, w),
            output_B_W=draw(self.num_bins, w),
            output_bias_B=bias(self.num_bins),
        )

    def make_inputs(self, device: str) -> dict:
        s = torch.arange(self.num_rows, device=device)
        return {
            "cond_S_D": randn(self.num_rows, self.model_width, device=device, dtype=self.dtype),
            "weights": self.make_weights(device),
            "seed_S": 1000 - 300 * s,
            "counter_S": 4 * s,
            "num_steps": self.num_steps,
            "guidance": self.guidance,
        }

    def cost(self) -> Cost:
        w, d, bins = self.width, self.model_width, self.num_bins
        block = 3 * w * w + 2 * self.inner * w * w
        per_step = self.num_blocks * block + 2 * w * w + 2 * bins * w
        once = w * d
        rows = self.num_rows * (2 if self.guidance != 1.0 else 1)
        return Cost(
            bytes=self.dtype.itemsize * (per_step + once + 2 * w * w + self.num_rows * d)
            + self.num_rows * (4 * bins + 16),
            flops=2 * (self.num_rows * once + rows * self.num_steps * per_step),
        )


EDGE = [
    Case(0, 32, 16, 2, 8),  # no rows
    Case(1, 32, 16, 2, 8),  # one row
    Case(3, 32, 16, 2, 8, num_steps=1),  # one step: time 0 alone
    Case(3, 33, 18, 2, 7, inner=3),  # odd widths
    Case(2, 32, 16, 1, 1),  # one block, one bin
    Case(2, 32, 2, 2, 8),  # one frequency
    Case(5, 32, 16, 2, 8, guidance=2.5),  # ten rows evaluated: past a block of rows
    Case(2, 32, 16, 2, 8, guidance=0.0),  # the unconditioned branch alone
]
MODEL = [
    Case(4, 128, 128, 6, 80),  # tiny
    Case(1, 4096, 512, 6, 80, num_steps=2, guidance=1.5),  # inkling-small, the narrow head
]
BENCH = [
    *(
        Case(s, 4096, 1024, 6, 80, guidance=guidance, dtype=torch.bfloat16)
        for guidance in (1.0, 1.5)
        for s in (1, 8, 32)
    ),
    # 10 M parameters beside those of the condition, in eight steps: small enough for L2
    Case(32, 4096, 512, 3, 80, num_steps=8, dtype=torch.bfloat16),
]
