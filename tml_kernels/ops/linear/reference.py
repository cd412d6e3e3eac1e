"""The oracle of linear, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, N state slots, D input width, F rows of the weight, or output width;
# J rows of the weight where the two differ.

from __future__ import annotations

from typing import NamedTuple

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


class LinearConvResult(NamedTuple):
    out_T_F: Tensor
    state_N_3_F: Tensor  # in the dtype of the state that was given
    residual_T_F: Tensor
    live_T: Tensor  # bool: the token's session is not idle


def linear_conv_ref(
    x_T_D: Tensor,
    weight_F_D: Tensor | PackedExperts,
    conv_weight_F_4: Tensor,
    state_N_3_F: Tensor,
    slot_T: Tensor,
    residual_T_F: Tensor,
    norm_weight_F: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> LinearConvResult:
    """What linear_conv computes, in `dtype`, as new tensors; out is zero where a token is not live.

    y = x W^T, which float32 rounds to the state's dtype, as it is between the two ops;
    residual[t] += y[t] + sum over j of weight[:, j] * x'[t, j] with x'[t] = the state's three rows,
    then y[t]: the last three become the state;   out = residual * norm_weight.

    Asks a GPU for nothing, so that a step in plain torch can be captured.
    """
    y_T_F = linear_ref(x_T_D, weight_F_D, dtype=dtype)
    if dtype == torch.float32:
        y_T_F = y_T_F.to(state_N_3_F.dtype)
    num_slots = state_N_3_F.shape[0]
    live_T = (slot_T >= 0) & (slot_T < num_slots)
    row_T = torch.where(live_T, slot_T, num_slots).long()
    # One row more, for the idle, as nobody reads what it holds.
    state_N1_3_F = torch.cat([state_N_3_F, state_N_3_F.new_zeros(1, *state_N_3_F.shape[1:])])
    tap_T_4_F = torch.cat([state_N1_3_F[row_T].to(y_T_F.dtype), y_T_F[:, None]], dim=1)
    state_N1_3_F[row_T] = tap_T_4_F[:, 1:].to(state_N_3_F.dtype)

    tap_T_4_F = tap_T_4_F.to(dtype)
    mixed_T_F = tap_T_4_F[:, 3] + (tap_T_4_F * conv_weight_F_4.T.to(dtype)).sum(1)
    residual_T_F = torch.where(live_T[:, None], residual_T_F.to(dtype) + mixed_T_F, residual_T_F)
    out_T_F = (residual_T_F * norm_weight_F.to(dtype)).masked_fill(~live_T[:, None], 0.0)
    return LinearConvResult(out_T_F, state_N1_3_F[:-1], residual_T_F, live_T)
