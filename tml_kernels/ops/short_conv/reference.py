"""The oracle of short_conv, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, S session rows, N state slots, D model width.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUM_TAPS = 4


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
    dtype: torch.dtype = torch.float64,
) -> ShortConvResult:
    """What short_conv computes, in `dtype`, as new tensors; rows that are not live are zero.

    With x' = state rows followed by the session's inputs, and input i at x'[i + 3]:
        y[i] = x[i] + sum over j of weight[:, j] * x'[i + j],   new state = the last 3 rows of x';
        residual[i] += y[i];   out[i] = residual[i] / sqrt(mean(residual[i]^2) + eps) * norm_weight.

    Worked example, start = [0, 2, 2, 3], slot = [5, 0, -1]: session row 0 has tokens 0 and 1 and
    state slot 5, row 1 has no token this time, row 2 is idle, so token 2 gives zeros.
    """
    num_tokens, num_sessions = x_T_D.shape[0], slot_S.shape[0]
    start_S1, slot_S = start_S1.long(), slot_S.long()
    t_T = torch.arange(num_tokens, device=x_T_D.device)
    session_T = torch.searchsorted(start_S1[1:].contiguous(), t_T, right=True)
    in_session_T = session_T < num_sessions  # the rest is padding
    session_T = session_T.clamp(max=max(num_sessions - 1, 0))
    live_T = in_session_T & (slot_S[session_T] >= 0) if num_sessions else in_session_T
    t_T, session_T = t_T[live_T], session_T[live_T]

    x_A_D = x_T_D[live_T].to(dtype)
    y_A_D = torch.zeros_like(x_A_D)
    for j in range(NUM_TAPS):
        tap_A_D = _row(x_T_D, state_N_3_D, start_S1, slot_S, session_T, t_T - 3 + j)
        y_A_D = y_A_D + tap_A_D.to(dtype) * weight_D_4[:, j].to(dtype)
    y_A_D = x_A_D + y_A_D

    residual_out, out_A_D = None, y_A_D
    if residual_T_D is not None:
        residual_out = residual_T_D.to(dtype, copy=True)
        h_A_D = residual_out[live_T] + y_A_D
        residual_out[live_T] = h_A_D
        if norm_weight_D is not None:
            scale_A_1 = torch.rsqrt(h_A_D.square().mean(-1, keepdim=True) + eps)
            out_A_D = h_A_D * scale_A_1 * norm_weight_D.to(dtype)
    out_T_D = torch.zeros_like(x_T_D, dtype=dtype)
    out_T_D[live_T] = out_A_D
    state_N_3_D = _next_state(x_T_D, state_N_3_D, start_S1, slot_S)
    return ShortConvResult(out_T_D, state_N_3_D, residual_out, live_T)


def _row(
    x_T_D: Tensor,
    state_N_3_D: Tensor,
    start_S1: Tensor,
    slot_S: Tensor,
    session_A: Tensor,
    t_A: Tensor,
) -> Tensor:
    """Input row t of each session; one that lies before its first token comes from its state."""
    before_A = t_A - start_S1[session_A]  # -3..-1: state row before + 3
    from_state_A = before_A < 0
    state_A_D = state_N_3_D[slot_S[session_A], (before_A + 3).clamp(max=2)]
    return torch.where(from_state_A[:, None], state_A_D, x_T_D[t_A.clamp(min=0)])


def _next_state(x_T_D: Tensor, state_N_3_D: Tensor, start_S1: Tensor, slot_S: Tensor) -> Tensor:
    new_N_3_D = state_N_3_D.clone()
    session_A = torch.nonzero((slot_S >= 0) & (start_S1[1:] > start_S1[:-1])).flatten()
    for j in range(NUM_TAPS - 1):
        t_A = start_S1[session_A + 1] - 3 + j
        row_A_D = _row(x_T_D, state_N_3_D, start_S1, slot_S, session_A, t_A)
        new_N_3_D[slot_S[session_A], j] = row_A_D
    return new_N_3_D
