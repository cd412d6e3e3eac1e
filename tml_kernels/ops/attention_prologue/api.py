"""attention_prologue: check, choose, launch."""

# Dimension key: T tokens, S session rows, N state slots, H query heads, G KV heads, C head width,
# P pages, R rows in a page, B relative-position features per head, J columns of qkvr.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._ragged import check_below, check_slots, check_start
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .reference import attention_prologue_ref


def _plain(
    qkvr: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    conv_state: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_row: Tensor,
    start: Tensor,
    slot: Tensor,
    num_heads: int,
    eps: float,
    out: Tensor,
) -> None:
    num_pages, _, page_rows, _ = k_pages.shape
    check_start(start, qkvr.shape[0])
    check_slots(slot, conv_state.shape[0])
    check_below(num_pages * page_rows, kv_row_T=kv_row)
    result = attention_prologue_ref(
        qkvr,
        k_conv,
        v_conv,
        q_norm,
        k_norm,
        conv_state,
        start,
        slot,
        num_heads=num_heads,
        eps=eps,
        dtype=torch.float32,
    )
    out.copy_(result.q_T_H_C)
    written = (result.live_T & (kv_row >= 0)).nonzero().squeeze(1)
    page, row = kv_row[written] // page_rows, kv_row[written] % page_rows
    k_pages[page, :, row] = result.k_T_G_C[written].to(k_pages.dtype)
    v_pages[page, :, row] = result.v_T_G_C[written].to(v_pages.dtype)
    active = (slot >= 0).nonzero().squeeze(1)
    conv_state[slot[active].long()] = result.state_S_2_3_GC[active].to(conv_state.dtype)


_op = register_op(
    "attention_prologue(Tensor qkvr, Tensor k_conv, Tensor v_conv, Tensor q_norm, Tensor k_norm, "
    "Tensor(a!) conv_state, Tensor(b!) k_pages, Tensor(c!) v_pages, Tensor kv_row, Tensor start, "
    "Tensor slot, int num_heads, float eps, Tensor(d!) out) -> ()",
    plain=_plain,
)


def attention_prologue(
    qkvr_T_J: Tensor,
    k_conv_GC_4: Tensor,
    v_conv_GC_4: Tensor,
    q_norm_C: Tensor,
    k_norm_C: Tensor,
    conv_state_N_2_3_GC: Tensor,
    k_pages_P_G_R_C: Tensor,
    v_pages_P_G_R_C: Tensor,
    kv_row_T: Tensor,
    start_S1: Tensor,
    slot_S: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-6,
    out_T_H_C: Tensor | None = None,
) -> Tensor:
    """From the joint projection to normalised queries, and keys and values in their pages.

    Columns of qkvr: q [H * C], k [G * C], v [G * C], then the relative-position features [H * B],
    not read here. k and v go through y = x + conv(x) (causal, depthwise, 4 taps, weight[:, 3] is
    the current token's), q and k are then RMS-normalised per head. Token t's k and v are written to
    row kv_row[t] % R of page kv_row[t] // R; -1 writes nothing. Returns q [T, H, C].

    Session row s owns tokens start[s]..start[s + 1] and state row slot[s] (state[:, 0] is K's last
    3 inputs, oldest first, state[:, 1] V's), updated in place. slot -1 is idle: no state and no
    page is touched. Queries of idle rows and of tokens outside every row are zero, whatever their
    input holds, NaN included. Two live rows must not share a slot, nor two tokens a kv_row.

    qkvr, state and out of one dtype, float32, bfloat16 or float16; the pages of one dtype, any of
    the three; convolution weights float32; norm weights float32 or qkvr's dtype; kv_row int64;
    start and slot int32. Accumulates in float32, k is normalised unrounded, everything is rounded
    once. Deterministic; a session's bits do not depend on the other rows. Raises TypeError or
    ValueError naming the argument; on CPU tensors also for values out of range, before any write.

    Source: `InklingAttention` and `InklingShortConvolution` of transformers 5.17.
    """
    dims = Dims(H=num_heads)
    dims.check(k_pages_P_G_R_C=k_pages_P_G_R_C, dtype=ACTIVATIONS)
    dims.check(qkvr_T_J=qkvr_T_J, dtype=ACTIVATIONS)
    dtype, device = qkvr_T_J.dtype, qkvr_T_J.device
    dims.check(v_pages_P_G_R_C=v_pages_P_G_R_C, dtype=k_pages_P_G_R_C.dtype, device=device)
    dims.check(k_conv_GC_4=k_conv_GC_4, v_conv_GC_4=v_conv_GC_4, dtype=torch.float32, device=device)
    norms = (torch.float32, dtype)
    dims.check(q_norm_C=q_norm_C, k_norm_C=k_norm_C, dtype=norms, device=device)
    dims.check(conv_state_N_2_3_GC=conv_state_N_2_3_GC, dtype=dtype, device=device)
    dims.check(kv_row_T=kv_row_T, dtype=torch.int64, device=device)
    dims.check(start_S1=start_S1, slot_S=slot_S, dtype=torch.int32, device=device)
    _check_columns(dims)
    if out_T_H_C is None:
        out_T_H_C = qkvr_T_J.new_empty(dims["T"], num_heads, dims["C"])
    else:
        dims.check(out_T_H_C=out_T_H_C, dtype=dtype, device=device)
    refuse_grad(qkvr_T_J, k_conv_GC_4, v_conv_GC_4, q_norm_C, k_norm_C)
    if dims["S"] == 0 or dims["T"] == 0:
        return out_T_H_C.zero_()
    _op(
        qkvr_T_J, k_conv_GC_4, v_conv_GC_4, q_norm_C, k_norm_C,
        conv_state_N_2_3_GC, k_pages_P_G_R_C, v_pages_P_G_R_C, kv_row_T, start_S1, slot_S,
        num_heads, eps, out_T_H_C,
    )  # fmt: skip
    return out_T_H_C


def _check_columns(dims: Dims) -> None:
    heads, kv_heads, width = dims["H"], dims["G"], dims["C"]
    if heads <= 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"num_heads: expected a multiple of G={kv_heads}, got {heads}")
    qkv = (heads + 2 * kv_heads) * width
    if dims["J"] < qkv or (dims["J"] - qkv) % heads:
        raise ValueError(
            f"qkvr_T_J: expected J = (H + 2 G) C + H B = {qkv} + {heads} B columns, "
            f"got J={dims['J']}"
        )
