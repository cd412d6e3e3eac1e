"""The oracle of attention_prologue, and its plain path: the same lines in two precisions."""

# Dimension key: T tokens, S session rows, N state slots, H query heads, G KV heads, C head width,
# B = C / 2 rotary frequencies, W = 2 * G * C columns of K and V together, J columns of qkvr.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._rope import rotate_ref

TAPS_BEFORE = 3  # the convolution sees the token and the three before it


class Prologue(NamedTuple):
    """What the op computes, before anything is written. Rows that are not live hold anything,
    q excepted, which is zero there."""

    q_T_H_C: Tensor
    k_T_G_C: Tensor
    v_T_G_C: Tensor
    state_S_2_3_GC: Tensor | None
    live_T: Tensor


def attention_prologue_ref(
    qkvr_T_J: Tensor,
    k_conv_GC_4: Tensor | None,
    v_conv_GC_4: Tensor | None,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    conv_state_N_2_3_GC: Tensor | None,
    start_S1: Tensor,
    slot_S: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_width: int,
    eps: float = 1e-6,
    rope_phase_B: Tensor | None = None,
    position_T: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Prologue:
    """q = rope(rms(q)); k = rope(rms(k + conv(k))); v = v + conv(v); the state is each session's
    last 3 inputs. Steps without weights, or without frequencies, are left out.

    conv(x)[t] = sum over j = 0..3 of weight[:, j] x[t - 3 + j]; the inputs before the session's
    first token of this call are its state, oldest first.
    """
    q_end, width = num_heads * head_width, num_kv_heads * head_width
    q_T_H_C = qkvr_T_J[:, :q_end].to(dtype).unflatten(1, (num_heads, head_width))
    kv_T_W = qkvr_T_J[:, q_end : q_end + 2 * width].to(dtype)
    live_T, tap_T_3, tail_S_3 = _plan(start_S1, slot_S, qkvr_T_J.shape[0])

    new_state = None
    if conv_state_N_2_3_GC is not None and k_conv_GC_4 is not None and v_conv_GC_4 is not None:
        state_S_2_3_GC = conv_state_N_2_3_GC[slot_S.clamp(min=0).long()].to(dtype)
        source = torch.cat([state_S_2_3_GC.transpose(1, 2).reshape(-1, 2 * width), kv_T_W])
        new_state = source[tail_S_3].unflatten(2, (2, width)).transpose(1, 2)
        kv_T_W = _conv(kv_T_W, source[tap_T_3], torch.cat([k_conv_GC_4, v_conv_GC_4]).to(dtype))

    k_T_G_C = kv_T_W[:, :width].unflatten(1, (num_kv_heads, head_width))
    v_T_G_C = kv_T_W[:, width:].unflatten(1, (num_kv_heads, head_width))
    if q_norm_C is not None and k_norm_C is not None:
        q_T_H_C, k_T_G_C = _rms(q_T_H_C, q_norm_C, eps), _rms(k_T_G_C, k_norm_C, eps)
    if rope_phase_B is not None and position_T is not None:
        q_T_H_C = rotate_ref(q_T_H_C, rope_phase_B, position_T)
        k_T_G_C = rotate_ref(k_T_G_C, rope_phase_B, position_T)
    q_T_H_C = q_T_H_C.masked_fill(~live_T[:, None, None], 0.0)
    return Prologue(q_T_H_C, k_T_G_C, v_T_G_C, new_state, live_T)


def _conv(x_T_W: Tensor, before_T_3_W: Tensor, weight_W_4: Tensor) -> Tensor:
    mixed_T_W = x_T_W * weight_W_4[:, TAPS_BEFORE]
    for j in range(TAPS_BEFORE):
        mixed_T_W += before_T_3_W[:, j] * weight_W_4[:, j]
    return mixed_T_W + x_T_W


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
