"""attention_prologue: check, choose, launch."""

# Dimension key: T tokens, S session rows, N state slots, H query heads, G KV heads, C head width,
# P pages, R rows in a page, B rotary frequencies, J columns of qkvr.

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._dims import Dims
from ..._head_tiles import MAX_HEAD_WIDTH
from ..._numbers import check_eps, check_int
from ..._pages import FP8, write_rows
from ..._ragged import ANY_SLOT, check_below, check_distinct, check_slots, check_start
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .reference import attention_prologue_ref


def _plain(
    qkvr: Tensor,
    k_conv: Tensor | None,
    v_conv: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    conv_state: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_row: Tensor,
    start: Tensor,
    slot: Tensor,
    rope_phase: Tensor | None,
    position: Tensor | None,
    num_heads: int,
    eps: float,
    out: Tensor,
) -> None:
    num_pages, num_kv_heads, page_rows, head_width = k_pages.shape
    check_start(start, qkvr.shape[0])
    check_slots(slot, ANY_SLOT if conv_state is None else conv_state.shape[0])
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
        num_kv_heads=num_kv_heads,
        head_width=head_width,
        eps=eps,
        rope_phase_B=rope_phase,
        position_T=position,
        dtype=torch.float32,
    )
    written = (result.live_T & (kv_row >= 0)).nonzero().squeeze(1)
    check_distinct(kv_row_T=kv_row[written])
    out.copy_(result.q_T_H_C)
    write_rows(k_pages, k_scale, result.k_T_G_C[written], kv_row[written])
    write_rows(v_pages, v_scale, result.v_T_G_C[written], kv_row[written])
    if conv_state is not None and result.state_A_2_3_GC is not None:
        slot_A = slot[result.active_A].long()
        conv_state[slot_A] = result.state_A_2_3_GC.to(conv_state.dtype)


def _kernel(*args) -> None:
    from .kernel import launch_attention_prologue

    launch_attention_prologue(*args)


_op = register_op(
    "attention_prologue(Tensor qkvr, Tensor? k_conv, Tensor? v_conv, Tensor? q_norm, "
    "Tensor? k_norm, Tensor(a!)? conv_state, Tensor(b!) k_pages, Tensor(c!) v_pages, "
    "Tensor(d!)? k_scale, Tensor(e!)? v_scale, Tensor kv_row, Tensor start, Tensor slot, "
    "Tensor? rope_phase, Tensor? position, int num_heads, float eps, Tensor(f!) out) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def attention_prologue(
    qkvr_T_J: Tensor,
    k_conv_GC_4: Tensor | None,
    v_conv_GC_4: Tensor | None,
    q_norm_C: Tensor | None,
    k_norm_C: Tensor | None,
    conv_state_N_2_3_GC: Tensor | None,
    k_pages_P_G_R_C: Tensor,
    v_pages_P_G_R_C: Tensor,
    kv_row_T: Tensor,
    start_S1: Tensor,
    slot_S: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-6,
    out_T_H_C: Tensor | None = None,
    rope_phase_B: Tensor | None = None,
    position_T: Tensor | None = None,
    k_scale_P_G_R: Tensor | None = None,
    v_scale_P_G_R: Tensor | None = None,
) -> Tensor:
    """From the joint projection to normalised queries, and keys and values in their pages.

    Columns of qkvr: q [H * C], k [G * C], v [G * C], then relative-position features, a multiple of
    H, not read here. k and v go through y = x + conv(x) (causal, depthwise, 4 taps, weight[:, 3] is
    the current token's), q and k are then RMS-normalised per head and rotated: columns b and
    b + C / 2 turn by position[t] * rope_phase[b] / 2^64 of a full turn (`rope_increments`). None
    for both convolutions and their state, both norms, or rope_phase and position leaves that step
    out. Token t's k and v are written to row kv_row[t] % R of page kv_row[t] // R; -1 writes
    nothing. Pages of float8_e4m3fn come with scales: value = fp8 * scale, scale = amax / 448 per
    token and head (1 where that is zero). Returns q [T, H, C].

    Session row s owns tokens start[s]..start[s + 1] and state row slot[s] (state[:, 0] is K's last
    3 inputs, oldest first, state[:, 1] V's), updated in place. slot -1 is idle: no state and no
    page is touched. Queries of idle rows and of tokens outside every row are zero, whatever their
    input holds, NaN included. Two live rows must not share a slot, nor two tokens a kv_row.

    qkvr, state and out of one dtype, float32, bfloat16 or float16; the pages of one dtype, any of
    the three or float8_e4m3fn; convolution weights and scales float32; norm weights float32 or
    qkvr's dtype; kv_row, rope_phase and position int64; start and slot int32; C <= 1024.
    Accumulates in float32 and rounds once. Deterministic; a token depends on its session's inputs
    alone, and has the same bits however they are split over calls. One launch. Allocates only when
    `out_T_H_C` is None. Raises TypeError or ValueError naming the argument, and for values of
    start, slot and kv_row before any write, on CPU tensors only; a GPU takes a slot beyond the
    state as idle and a kv_row beyond the pages as -1.

    Source: `InklingAttention` and `InklingShortConvolution` of transformers 5.17; rotary halves as
    in its `LlamaAttention`.
    """
    check_int("num_heads", num_heads)
    check_eps(eps)
    dims = Dims(H=num_heads)
    dims.check(qkvr_T_J=qkvr_T_J, dtype=ACTIVATIONS)
    dtype, device = qkvr_T_J.dtype, qkvr_T_J.device
    dims.check(k_pages_P_G_R_C=k_pages_P_G_R_C, dtype=(*ACTIVATIONS, FP8), device=device)
    page_dtype = k_pages_P_G_R_C.dtype
    dims.check(v_pages_P_G_R_C=v_pages_P_G_R_C, dtype=page_dtype, device=device)
    dims.check(kv_row_T=kv_row_T, dtype=torch.int64, device=device)
    dims.check(start_S1=start_S1, slot_S=slot_S, dtype=torch.int32, device=device)
    _check_columns(dims)
    check = functools.partial(_check_step, dims, device)
    check((torch.float32, dtype), q_norm_C=q_norm_C, k_norm_C=k_norm_C)
    has_conv = check(torch.float32, k_conv_GC_4=k_conv_GC_4, v_conv_GC_4=v_conv_GC_4)
    if check(dtype, conv_state_N_2_3_GC=conv_state_N_2_3_GC) != has_conv:
        raise ValueError("conv_state_N_2_3_GC: goes with convolution weights, one of them is None")
    has_rope = check(torch.int64, rope_phase_B=rope_phase_B, position_T=position_T)
    if has_rope and 2 * dims["B"] != dims["C"]:
        raise ValueError(f"rope_phase_B: expected C / 2 of C={dims['C']}, got B={dims['B']}")
    has_scales = check(torch.float32, k_scale_P_G_R=k_scale_P_G_R, v_scale_P_G_R=v_scale_P_G_R)
    if has_scales != (page_dtype == FP8):
        raise ValueError(
            f"k_scale_P_G_R: scales go with pages of {FP8} and no others, got {page_dtype} pages "
            f"{'with' if has_scales else 'without'} scales"
        )
    if out_T_H_C is None:
        out_T_H_C = qkvr_T_J.new_empty(dims["T"], num_heads, dims["C"])
    else:
        dims.check(out_T_H_C=out_T_H_C, dtype=dtype, device=device)
    refuse_grad(
        qkvr_T_J, k_conv_GC_4, v_conv_GC_4, q_norm_C, k_norm_C, conv_state_N_2_3_GC,
        k_pages_P_G_R_C, v_pages_P_G_R_C, k_scale_P_G_R, v_scale_P_G_R,
    )  # fmt: skip
    if dims["S"] == 0 or dims["T"] == 0:
        return out_T_H_C.zero_()
    _op(
        qkvr_T_J, k_conv_GC_4, v_conv_GC_4, q_norm_C, k_norm_C, conv_state_N_2_3_GC,
        k_pages_P_G_R_C, v_pages_P_G_R_C, k_scale_P_G_R, v_scale_P_G_R,
        kv_row_T, start_S1, slot_S, rope_phase_B, position_T, num_heads, eps, out_T_H_C,
    )  # fmt: skip
    return out_T_H_C


def _check_step(
    dims: Dims,
    device: torch.device,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    **named: Tensor | None,
) -> bool:
    """Whether the tensors of an optional step are given: all of them, or none."""
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    if given and len(given) < len(named):
        missing = ", ".join(named.keys() - given.keys())
        raise ValueError(f"{missing}: None, but {', '.join(given)} is not")
    for name, tensor in given.items():
        dims.check(dtype=dtype, device=device, contiguous=True, **{name: tensor})
    return len(given) > 0


def _check_columns(dims: Dims) -> None:
    heads, kv_heads, width = dims["H"], dims["G"], dims["C"]
    if not 0 < width <= MAX_HEAD_WIDTH:
        raise ValueError(f"k_pages_P_G_R_C: C={width} is not in 1..{MAX_HEAD_WIDTH}")
    if heads <= 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"num_heads: expected a multiple of G={kv_heads}, got {heads}")
    qkv = (heads + 2 * kv_heads) * width
    if dims["J"] < qkv or (dims["J"] - qkv) % heads:
        raise ValueError(
            f"qkvr_T_J: expected J = (H + 2 G) C + H n = {qkv} + {heads} n columns, "
            f"got J={dims['J']}"
        )
