"""Plain torch pieces that several ops' CPU paths share."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of every matrix product on the CPU path. BLAS picks another kernel, with another summation
# order, for another row count; with one fixed count a row's bits do not depend on its neighbours.
ROW_BLOCK = 8


def row_blocked_matmul(x_T_D: Tensor, weight_F_D: Tensor) -> Tensor:
    """x W^T [T, F], where row t is bitwise a function of x[t] and W alone.

    Works in x's dtype and allocates: for the CPU path only. On float64 input (the oracle) it is a
    plain product.
    """
    if x_T_D.dtype == torch.float64:
        return x_T_D @ weight_F_D.T
    num_rows, width = x_T_D.shape
    out_T_F = x_T_D.new_empty(num_rows, weight_F_D.shape[0])
    weight_D_F = weight_F_D.T
    for start in range(0, num_rows, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, num_rows)
        block = x_T_D.new_zeros(ROW_BLOCK, width)
        block[: stop - start] = x_T_D[start:stop]
        out_T_F[start:stop] = torch.mm(block, weight_D_F)[: stop - start]
    return out_T_F
