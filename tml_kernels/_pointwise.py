"""Smooth functions whose bits depend on the element alone, for the CPU paths.

torch's own CPU sigmoid and silu take another code path for the last elements of a vector, so a
value's bits depend on where it stands in memory. Its exp does not (measured over 70,001 offsets),
nor do exactly rounded operations; so both are written with these.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def swiglu(y_T_J: Tensor) -> Tensor:
    """silu(gate) * up [T, J / 2] of interleaved columns g0, u0, g1, u1, ..."""
    return silu(y_T_J[:, 0::2]) * y_T_J[:, 1::2]
