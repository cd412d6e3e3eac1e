"""The oracle of linear, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, D input width, F rows of the weight, or output width; J rows of the
# weight where the two differ.

from __future__ import annotations

import torch
from torch import Tensor

from ..._plain import row_blocked_matmul
from ..._pointwise import swiglu
from ...quant import PackedExperts, dequantize


def linear_ref(
    x_T_D: Tensor,
    weight_F_D: Tensor | PackedExperts,
    *,
    bias_F: Tensor | None = None,
    residual_T_F: Tensor | None = None,
    scale: float = 1.0,
    activation: str | None = None,
    num_valid: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """out_T_F in `dtype`: act(scale * x W^T + bias) + residual, columns >= num_valid at -inf.

    act is the identity, or "swiglu": silu(y[2f]) * y[2f + 1], half as wide as the weight has rows.
    """
    if isinstance(weight_F_D, PackedExperts):
        weight_F_D = dequantize(weight_F_D, 0)
    y_T_J = row_blocked_matmul(x_T_D.to(dtype), weight_F_D.to(dtype))
    if scale != 1.0:
        y_T_J *= scale
    if bias_F is not None:
        y_T_J += bias_F.to(dtype)
    out_T_F = swiglu(y_T_J) if activation == "swiglu" else y_T_J
    if residual_T_F is not None:
        out_T_F += residual_T_F.to(dtype)
    if num_valid is not None:
        out_T_F[:, num_valid:] = float("-inf")
    return out_T_F
