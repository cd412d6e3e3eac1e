"""Inputs of shift_keys for tests and benchmarks, and what each must move at least."""

# Dimension key: L layers, I keys, G KV heads, C head width, P pages, R rows in a page.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._pages import FP8
from ..._rope import rope_increments
from ...testing import Cost, randn

FURTHEST = 2**62  # positions


@dataclass(frozen=True)
class Case:
    """skipped: how many of the keys have row -1. The pages hold NaN before, when `poison`."""

    num_layers: int  # L
    num_keys: int  # I
    num_kv_heads: int  # G
    head_width: int  # C
    skipped: int = 0
    num_pages: int = 3  # P
    page_rows: int = 64  # R
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None
    poison: bool = True

    def __str__(self) -> str:
        dtypes = [self.dtype] + [self.page_dtype] * (self.page_dtype is not None)
        return (
            f"L{self.num_layers}-I{self.num_keys}-G{self.num_kv_heads}-C{self.head_width}-"
            f"skip{self.skipped}-{'-'.join(str(d).removeprefix('torch.') for d in dtypes)}"
        )

    def make_inputs(self, device: str) -> dict[str, Tensor]:
        page_dtype = self.page_dtype or self.dtype
        pool = (self.num_layers, self.num_pages, self.num_kv_heads, self.page_rows)
        keys = (self.num_layers, self.num_keys, self.num_kv_heads, self.head_width)
        row_I = torch.randperm(self.num_pages * self.page_rows)[: self.num_keys]
        row_I[torch.randperm(self.num_keys)[: self.skipped]] = -1
        fill = float("nan") if self.poison else 0.0
        inputs = {
            "source_L_I_G_C": randn(*keys, device=device, dtype=self.dtype),
            "k_pages_L_P_G_R_C": torch.full(
                (*pool, self.head_width), fill, device=device, dtype=page_dtype
            ),
            "row_I": row_I.to(device),
            "shift_I": torch.randint(FURTHEST, (self.num_keys,)).to(device),
            "rope_phase_B": rope_increments(10_000.0, self.head_width, device),
        }
        if page_dtype == FP8:
            inputs["k_scale_L_P_G_R"] = torch.full(pool, fill, device=device)
        return inputs

    def cost(self) -> Cost:
        page_dtype = self.page_dtype or self.dtype
        heads = self.num_layers * (self.num_keys - self.skipped) * self.num_kv_heads
        values = heads * self.head_width
        return Cost(
            bytes=values * (self.dtype.itemsize + page_dtype.itemsize)
            + 4 * heads * (page_dtype == FP8)
            + 16 * self.num_keys
            + 4 * self.head_width,
            flops=3 * values,
        )


EDGE = [
    Case(2, 0, 1, 32),  # no keys
    Case(0, 2, 1, 32),  # no layers
    Case(1, 1, 1, 2),  # one pair
    Case(2, 3, 1, 32, skipped=1),
    Case(2, 3, 2, 34, skipped=3),  # all skipped
    Case(3, 5, 3, 34, page_rows=3),  # half a head is no power of two, odd pages
    Case(2, 4, 33, 32),  # one head past a block
    Case(2, 4, 2, 6, skipped=1, page_rows=3, page_dtype=FP8),
]
MODEL = [
    Case(6, 4, 2, 32),  # tiny
    Case(4, 4, 8, 128),  # heads as in Llama
    Case(3, 4, 8, 128, skipped=1, page_dtype=FP8),
    Case(2, 4, 1, 256),  # Gemma
]
BENCH = [
    Case(64, n, 8, 128, dtype=torch.bfloat16, page_dtype=page_dtype, poison=False)
    for n in (4, 128)  # the sinks of one session, and of 32
    for page_dtype in (None, FP8)
]
