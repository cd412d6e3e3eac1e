"""The oracle of rms_norm, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, D model width.

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_ref(
    x_T_D: Tensor,
    weight_D: Tensor,
    *,
    eps: float = 1e-6,
    residual_T_D: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(out_T_D, residual_T_D), both in `dtype`; residual_T_D is x where none was given.

    h = residual + x;  out = h / sqrt(mean(h^2) + eps) * weight.
    """
    h_T_D = x_T_D.to(dtype)
    if residual_T_D is not None:
        h_T_D = residual_T_D.to(dtype) + h_T_D
    scale_T_1 = torch.rsqrt(h_T_D.square().mean(-1, keepdim=True) + eps)
    return h_T_D * scale_T_1 * weight_D.to(dtype), h_T_D
