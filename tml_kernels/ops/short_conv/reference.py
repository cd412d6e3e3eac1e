"""The oracle of short_conv, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, S session rows, N state slots, D model width.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._ragged import states_of, taps_of


class ShortConvResult(NamedTuple):
    out_T_D: Tensor
    state_N_3_D: Tensor  # in the dtype of the state that was given: its rows are copies of inputs
    residual_T_D: Tensor | None
    live_T: Tensor  # bool: the token belongs to a session that is not idle


def short_conv_ref(
    x_T_D: Tensor,
    weight_D_4: Tensor,
    state_N_3_D: Tensor,
    start_S1: Tensor,
    slot_S: Tensor,
    *,
    residual_T_D: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    late_norm: bool = False,
    dtype: torch.dtype = torch.float64,
) -> ShortConvResult:
    """What short_conv computes, in `dtype`, as new tensors; rows that are not live are zero.

    With x' = state rows followed by the session's inputs, and input i at x'[i + 3]:
        y[i] = x[i] + sum over j of weight[:, j] * x'[i + j],   new state = the last 3 rows of x';
        residual[i] += y[i];   out[i] = residual[i] / sqrt(mean(residual[i]^2) + eps) * norm_weight,
        without the division with `late_norm`.

    Worked example, start = [0, 2, 2, 3], slot = [5, 0, -1]: session row 0 has tokens 0 and 1 and
    state slot 5, row 1 has no token this time, row 2 is idle, so token 2 gives zeros.
    """
    live_T, tap_T_4, active_A, tail_A_3 = taps_of(start_S1, slot_S, x_T_D.shape[0])
    # All that a tap can read: three state rows of every session, then the inputs.
    source_R_D = torch.cat([states_of(state_N_3_D, slot_S).flatten(0, 1), x_T_D])
    tap_T_4_D = source_R_D[tap_T_4].to(dtype)
    y_T_D = tap_T_4_D[:, 3] + (tap_T_4_D * weight_D_4.T.to(dtype)).sum(1)
    y_T_D = y_T_D.masked_fill(~live_T[:, None], 0.0)

    out_T_D, residual_out = y_T_D, None
    if residual_T_D is not None:
        residual_T_D = residual_T_D.to(dtype)
        residual_out = torch.where(live_T[:, None], residual_T_D + y_T_D, residual_T_D)
        if norm_weight_D is not None:
            out_T_D = residual_out
            if not late_norm:
                out_T_D = out_T_D * torch.rsqrt(out_T_D.square().mean(-1, keepdim=True) + eps)
            out_T_D = out_T_D * norm_weight_D.to(dtype)
            out_T_D = out_T_D.masked_fill(~live_T[:, None], 0.0)

    state_N_3_D = state_N_3_D.clone()
    state_N_3_D[slot_S[active_A].long()] = source_R_D[tail_A_3]
    return ShortConvResult(out_T_D, state_N_3_D, residual_out, live_T)
