"""Activation dtypes the kernels take, and how far each may be from the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    name: str
    dtype: torch.dtype
    rel_l2: float  # largest |out - ref| / |ref| that still counts as the same function


# Limits: about four units in the last place of the stored result, grown by the longest sums we do.
F32 = Precision("f32", torch.float32, 5e-6)
BF16 = Precision("bf16", torch.bfloat16, 8e-3)
F16 = Precision("f16", torch.float16, 1e-3)

BY_DTYPE = {p.dtype: p for p in (F32, BF16, F16)}
ACTIVATIONS = tuple(BY_DTYPE)
