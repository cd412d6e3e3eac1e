"""The oracle of attention_prologue, and its plain path: the same lines in two precisions."""

# Dimension key: T tokens, S session rows, A of them that are not idle, N state slots, H query
# heads, G KV heads, C head width, B = C / 2 rotary frequencies, W = 2 * G * C columns of K and V
# together, J columns of qkvr.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._ragged import states_of, taps_of
from ..._rope import rotate_ref

TAPS_BEFORE = 3  # the convolution sees the token and the three before it


class Prologue(NamedTuple):
    """What the op computes, before anything is written. Rows that are not live hold anything,
    q excepted, which is zero there."""

    q_T_H_C: Tensor
    k_T_G_C: Tensor
    v_T_G_C: Tensor
    state_A_2_3_GC: Tensor | None  # of the session rows that are not idle
    active_A: Tensor
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
    live_T, tap_T_4, active_A, tail_A_3 = taps_of(start_S1, slot_S, qkvr_T_J.shape[0])

    new_state = None
    if conv_state_N_2_3_GC is not None and k_conv_GC_4 is not None and v_conv_GC_4 is not None:
        state_S_2_3_GC = states_of(conv_state_N_2_3_GC, slot_S).to(dtype)
        source = torch.cat([state_S_2_3_GC.transpose(1, 2).reshape(-1, 2 * width), kv_T_W])
        new_state = source[tail_A_3].unflatten(2, (2, width)).transpose(1, 2)
        kv_T_W = _conv(
            kv_T_W, source[tap_T_4[:, :3]], torch.cat([k_conv_GC_4, v_conv_GC_4]).to(dtype)
        )

    k_T_G_C = kv_T_W[:, :width].unflatten(1, (num_kv_heads, head_width))
    v_T_G_C = kv_T_W[:, width:].unflatten(1, (num_kv_heads, head_width))
    if q_norm_C is not None and k_norm_C is not None:
        q_T_H_C, k_T_G_C = _rms(q_T_H_C, q_norm_C, eps), _rms(k_T_G_C, k_norm_C, eps)
    if rope_phase_B is not None and position_T is not None:
        q_T_H_C = rotate_ref(q_T_H_C, rope_phase_B, position_T)
        k_T_G_C = rotate_ref(k_T_G_C, rope_phase_B, position_T)
    q_T_H_C = q_T_H_C.masked_fill(~live_T[:, None, None], 0.0)
    return Prologue(q_T_H_C, k_T_G_C, v_T_G_C, new_state, active_A, live_T)


def _conv(x_T_W: Tensor, before_T_3_W: Tensor, weight_W_4: Tensor) -> Tensor:
    mixed_T_W = x_T_W * weight_W_4[:, TAPS_BEFORE]
    for j in range(TAPS_BEFORE):
        mixed_T_W += before_T_3_W[:, j] * weight_W_4[:, j]
    return mixed_T_W + x_T_W


def _rms(x_T_H_C: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    scale_T_H_1 = torch.rsqrt(x_T_H_C.square().mean(-1, keepdim=True) + eps)
    return x_T_H_C * scale_T_H_1 * weight_C.to(x_T_H_C.dtype)
