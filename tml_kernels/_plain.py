"""Plain torch pieces that several ops' CPU paths share."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of every matrix product on the CPU path. BLAS picks another kernel, with another summation
# order, for another row count; with one fixed count a row's bits do not depend on its neighbours.
ROW_BLOCK = 8
# Under 12 output columns, MKL takes a kernel whose rows differ by position where D % 4 != 0.
MIN_COLUMNS = 16


def row_blocked_matmul(x_T_D: Tensor, weight_F_D: Tensor) -> Tensor:
    """x W^T [T, F], where row t is bitwise a function of x[t] and W alone.

    Works in x's dtype and allocates: for the CPU path only. On float64 input (the oracle) it is a
    plain product.
    """
    if x_T_D.dtype == torch.float64:
        return x_T_D @ weight_F_D.T
    num_rows = x_T_D.shape[0]
    num_columns = weight_F_D.shape[0]
    if num_columns < MIN_COLUMNS:
        weight_F_D = torch.nn.functional.pad(weight_F_D, (0, 0, 0, MIN_COLUMNS - num_columns))
    padded_rows = -(-num_rows // ROW_BLOCK) * ROW_BLOCK
    if padded_rows > num_rows:
        padded_P_D = torch.nn.functional.pad(x_T_D, (0, 0, 0, padded_rows - num_rows))
    else:
        padded_P_D = x_T_D.contiguous()
    weight_D_F = weight_F_D.T
    if padded_rows == ROW_BLOCK:  # as in most steps: nothing to cut up
        out_P_F = torch.mm(padded_P_D, weight_D_F)
    else:
        out_P_F = x_T_D.new_empty(padded_rows, weight_F_D.shape[0])
        for begin in range(0, padded_rows, ROW_BLOCK):
            rows = slice(begin, begin + ROW_BLOCK)
            torch.mm(padded_P_D[rows], weight_D_F, out=out_P_F[rows])
    return out_P_F[:num_rows, :num_columns].contiguous()
