"""Inputs of expert_mlp for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...testing import Cost, randn


@dataclass(frozen=True)
class Case:
    """skew: "uniform" draws K distinct experts per token; "one" sends every assignment to expert
    0, "skip" mixes in ids that are skipped (-1, E and beyond)."""

    num_tokens: int
    width: int  # D
    expert_width: int  # F
    num_experts: int  # E
    top_k: int
    num_shared: int = 0  # Z
    skew: str = "uniform"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return (
            f"T{self.num_tokens}-D{self.width}-F{self.expert_width}-E{self.num_experts}-"
            f"K{self.top_k}-Z{self.num_shared}-{self.skew}-"
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    def expert_ids(self) -> Tensor:
        """expert_T_K on the CPU, the same for every run: cost() counts the experts it touches."""
        generator = torch.Generator().manual_seed(self.num_tokens)
        score = torch.rand(self.num_tokens, self.num_experts, generator=generator)
        expert_T_K = score.argsort(dim=1)[:, : self.top_k].to(torch.int32)
        if self.skew == "one":
            expert_T_K.zero_()
        if self.skew == "skip":
            expert_T_K[::2, 0] = -1
            expert_T_K[1::2, -1] = self.num_experts
            expert_T_K[2:3] = torch.iinfo(torch.int32).max
        return expert_T_K

    def make_inputs(self, device: str) -> dict:
        wide, narrow = self.width**-0.5, self.expert_width**-0.5

        def weights(count: int) -> tuple[Tensor, Tensor]:
            # Drawn on the device: 256 experts of the model are 6.4 G values.
            gate_up = (count, 2 * self.expert_width, self.width)
            down = (count, self.width, self.expert_width)
            w13 = torch.randn(gate_up, device=device, dtype=self.dtype).mul_(wide)
            return w13, torch.randn(down, device=device, dtype=self.dtype).mul_(narrow)

        w13, w2 = weights(self.num_experts)
        shared_w13, shared_w2 = weights(self.num_shared) if self.num_shared else (None, None)
        return {
            "x_T_D": randn(self.num_tokens, self.width, device=device, dtype=self.dtype),
            "w13_E_J_D": w13,
            "w2_E_D_F": w2,
            "expert_T_K": self.expert_ids().to(device),
            "weight_T_K": randn(self.num_tokens, self.top_k, device=device).abs(),
            "shared_w13_Z_J_D": shared_w13,
            "shared_w2_Z_D_F": shared_w2,
            "shared_weight_T_Z": randn(self.num_tokens, self.num_shared, device=device).abs()
            if self.num_shared
            else None,
        }

    def cost(self) -> Cost:
        ids = self.expert_ids()
        valid = ids[(ids >= 0) & (ids < self.num_experts)]
        params = 3 * self.width * self.expert_width
        touched = valid.unique().numel() + self.num_shared
        rows = 2 * self.num_tokens * self.width
        tables = self.num_tokens * (8 * self.top_k + 4 * self.num_shared)
        return Cost(
            bytes=self.dtype.itemsize * (touched * params + rows) + tables,
            flops=2 * params * (valid.numel() + self.num_tokens * self.num_shared),
        )


EDGE = [
    Case(0, 32, 16, 4, 2),  # no tokens
    Case(1, 32, 16, 4, 2, num_shared=1),  # one token: experts without a token
    Case(5, 77, 33, 5, 3, num_shared=2),  # odd widths
    Case(3, 8, 1, 4, 2),  # one hidden column
    Case(19, 32, 16, 4, 2, skew="one"),  # every assignment on one expert, over two row blocks
    Case(6, 32, 16, 4, 3, num_shared=1, skew="skip"),  # ids that are skipped, one token entirely
    Case(4, 32, 16, 1, 1, num_shared=3),  # one expert
    Case(9, 32, 16, 3, 3),  # every expert by every token, one row past a block
]
MODEL = [
    Case(23, 128, 128, 8, 2, num_shared=2),  # tiny
    Case(2, 4096, 256, 6, 6, num_shared=2),  # inkling-small: its widths, few experts, narrow ones
]
BENCH = [
    Case(t, 4096, 2048, 256, 6, num_shared=shared, dtype=torch.bfloat16)
    for shared in (0, 2)
    for t in (1, 8, 16, 32, 64, 256, 1024)
]
