"""The oracle of attention_prologue, and its plain path: the same lines in two precisions."""

# Dimension key: T tokens, S session rows, N state slots, H query heads, G KV heads, C head width,
# W = 2 * G * C columns of K and V together, J columns of qkvr.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TAPS_BEFORE = 3  # the convolution sees the token and the three before it


class Prologue(NamedTuple):
    """What the op computes, before anything is written. Rows that are not live hold anything,
    q excepted, which is zero there."""

    q_T_H_C: Tensor
    k_T_G_C: Tensor
    v_T_G_C: Tensor
    state_S_2_3_GC: Tensor
    live_T: Tensor


def attention_prologue_ref(
    qkvr_T_J: Tensor,
    k_conv_GC_4: Tensor,
    v_conv_GC_4: Tensor,
    q_norm_C: Tensor,
    k_norm_C: Tensor,
    conv_state_N_2_3_GC: Tensor,
    start_S1: Tensor,
    slot_S: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> Prologue:
    """q = rms(q); k = rms(k + conv(k)); v = v + conv(v); the state is each session's last 3 inputs.

    conv(x)[t] = sum over j = 0..3 of weight[:, j] x[t - 3 + j]; the inputs before the session's
    first token of this call are its state, oldest first.
    """
    num_tokens, width, head_width = qkvr_T_J.shape[0], k_conv_GC_4.shape[0], q_norm_C.shape[0]
    q_end = num_heads * head_width
    q_T_H_C = qkvr_T_J[:, :q_end].to(dtype).unflatten(1, (num_heads, head_width))
    kv_T_W = qkvr_T_J[:, q_end : q_end + 2 * width].to(dtype)
    state_S_2_3_GC = conv_state_N_2_3_GC[slot_S.clamp(min=0).long()].to(dtype)
    live_T, tap_T_3, tail_S_3 = _plan(start_S1, slot_S, num_tokens)

    state_rows = state_S_2_3_GC.transpose(1, 2).reshape(-1, 2 * width)
    source = torch.cat([state_rows, kv_T_W])
    conv_W_4 = torch.cat([k_conv_GC_4, v_conv_GC_4]).to(dtype)
    mixed_T_W = kv_T_W * conv_W_4[:, TAPS_BEFORE]
    before_T_3_W = source[tap_T_3]
    for j in range(TAPS_BEFORE):
        mixed_T_W += before_T_3_W[:, j] * conv_W_4[:, j]
    mixed_T_W += kv_T_W
    new_state = source[tail_S_3].unflatten(2, (2, width)).transpose(1, 2)

    k_T_G_C = mixed_T_W[:, :width].unflatten(1, (-1, head_width))
    v_T_G_C = mixed_T_W[:, width:].unflatten(1, (-1, head_width))
    q_T_H_C = _rms(q_T_H_C, q_norm_C, eps).masked_fill(~live_T[:, None, None], 0.0)
    return Prologue(q_T_H_C, _rms(k_T_G_C, k_norm_C, eps), v_T_G_C, new_state, live_T)


def _rms(x_T_H_C: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    scale_T_H_1 = torch.rsqrt(x_T_H_C.square().mean(-1, keepdim=True) + eps)
    return x_T_H_C * scale_T_H_1 * weight_C.to(x_T_H_C.dtype)


def _plan(start_S1: Tensor, slot_S: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(live_T, tap_T_3, tail_S_3): which tokens belong to a session that is not idle, and rows of
    `source` (3 state rows per session row, then the tokens): the 3 inputs before each token, and
    the last 3 inputs of each session.

    start = [0, 2], one session: source rows 0, 1, 2 are its state, 3 and 4 its tokens;
    tap = [[0, 1, 2], [1, 2, 3]], tail = [[2, 3, 4]].
    """
    num_rows, device = slot_S.shape[0], slot_S.device
    start_S1 = start_S1.long()
    t = torch.arange(num_tokens, device=device)
    back_3 = torch.arange(TAPS_BEFORE, device=device) - TAPS_BEFORE

    row_T = torch.searchsorted(start_S1[1:], t, right=True)  # num_rows for padding
    is_padding_T = row_T == num_rows
    row_T = row_T.clamp(max=num_rows - 1)
    live_T = ~is_padding_T & (slot_S[row_T] >= 0)

    def rows(row: Tensor, place: Tensor) -> Tensor:
        """Source row of the input at `place` in its session; negative places are the state."""
        in_state = row * TAPS_BEFORE + TAPS_BEFORE + place
        in_call = num_rows * TAPS_BEFORE + start_S1[row] + place
        return torch.where(place < 0, in_state, in_call)

    tap_T_3 = rows(row_T[:, None], (t - start_S1[row_T])[:, None] + back_3)
    s = torch.arange(num_rows, device=device)
    tail_S_3 = rows(s[:, None], (start_S1[1:] - start_S1[:-1])[:, None] + back_3)
    return live_T, tap_T_3, tail_S_3
