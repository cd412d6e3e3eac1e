"""What packed experts mean, as plain numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import decode
from .pack import unpack_scales, unpack_words
from .packed import PackedExperts


def dequantize(packed: PackedExperts, experts: slice | int) -> Tensor:
    """float32 weights [R, K] of one expert, or [n, R, K] of a slice of them.

    The exact values: an e2m1, int4 or plain value times its scale fits a float32. Times a float32
    scale (fp8, and nvfp4's outer) it is rounded once.
    """
    if isinstance(experts, slice):
        chosen = range(*experts.indices(packed.num_experts))
        shape = (len(chosen), packed.num_rows, packed.num_columns)
        out = torch.empty(shape, dtype=torch.float32, device=packed.device)
        for i, expert in enumerate(chosen):
            out[i] = dequantize(packed, expert)
        return out
    if not packed.format.packed:
        return packed.data[experts].float()
    codes_R_K = unpack_words(packed.data[experts], packed.format, packed.num_columns)
    return decode(codes_R_K, unpack_scales(packed, experts), packed.format)
