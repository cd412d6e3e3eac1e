"""Triton kernel of attention_prologue: one launch for all that lies between qkv and attention.

One program per token and block of heads of q, k or v. Of k and v, the program of a session's first
token does its first three, which read the old state, and then writes the new one for its heads:
nobody else touches them, so nothing races.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's types know no launch options.

# Dimension key: T tokens, S session rows, N state slots, H query heads, G KV heads, C head width,
# P pages, R rows in a page, B = C / 2 rotary frequencies, J columns of qkvr. A tile [h, b, 2] is
# some heads of one token: column b of each of their two halves.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from ..._head_tiles import SHIPPED, Config, Problem, choose_config
from ..._ragged import ANY_SLOT
from ..._triton.heads import heads, load_heads, rotate, write_page
from ..._triton.ragged import session_of
from .tile import convolve, normalize, write_state

BLOCK_S = 128  # session ends compared at a time
SIZES = ["T", "S", "N", "P"]  # change from tick to tick: one compiled kernel serves all
PER_TOKEN = ["position_ptr", "kv_row_ptr"]  # slices of a tick's, which begin anywhere


@triton.jit
def _keys_or_values(
    x_ptr, conv_ptr, norm_ptr, phase_ptr, position_ptr, kv_row_ptr,
    state_ptr, pages_ptr, scale_ptr,
    first, num_inputs, i, block, P, J, eps,
    G: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    HAS_CONV: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Some heads of input i of a session, of its first three where i is 0, and its state then.

    x_ptr: column 0 of k, or of v, of the session's first token; state_ptr: the slot's row 0.
    """
    stop = i + 1
    if HAS_CONV:
        stop = tl.where(i == 0, tl.minimum(num_inputs, 3), tl.where(i < 3, i, i + 1))
    for k in range(i, stop):
        if HAS_CONV:
            x_h_b_2 = convolve(x_ptr, conv_ptr, state_ptr, k, block, J, G, C, BLOCK_H, BLOCK_B)
        else:
            x_h_b_2 = load_heads(x_ptr + k * J, block, G, C, BLOCK_H, BLOCK_B)
        if HAS_NORM:
            x_h_b_2 = normalize(x_h_b_2, norm_ptr, eps, C, BLOCK_B)
        if HAS_ROPE:
            x_h_b_2 = rotate(x_h_b_2, phase_ptr, tl.load(position_ptr + first + k), C, BLOCK_B)
        write_page(
            x_h_b_2, kv_row_ptr, pages_ptr, scale_ptr, first + k, block, P,
            G, C, R, IS_FP8, BLOCK_H, BLOCK_B,
        )  # fmt: skip
    if HAS_CONV:
        write_state(x_ptr, state_ptr, i, num_inputs, block, J, G, C, BLOCK_H, BLOCK_B)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PER_TOKEN)
def attention_prologue_kernel(
    qkvr_ptr,                              # in      [T, J]
    k_conv_ptr, v_conv_ptr,                # in      [G * C, 4], when HAS_CONV
    q_norm_ptr, k_norm_ptr,                # in      [C], when HAS_NORM
    phase_ptr, position_ptr,               # in      [B], [T], when HAS_ROPE
    kv_row_ptr, start_ptr, slot_ptr,       # in      [T], [S + 1], [S]
    state_ptr,                             # in out  [N, 2, 3, G * C], when HAS_CONV
    k_pages_ptr, v_pages_ptr,              # out     [P, G, R, C], bytes when IS_FP8
    k_scale_ptr, v_scale_ptr,              # out     [P, G, R], when IS_FP8
    out_ptr,                               # out     [T, H, C]
    T, S, N, P, J, eps,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    HAS_CONV: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_FP8: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    tl.static_assert(C <= 2 * BLOCK_B, "a head is wider than a block")
    tl.static_assert(not HAS_ROPE or C % 2 == 0, "rotary heads have an even width")
    Q_PARTS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    KV_PARTS: tl.constexpr = (G + BLOCK_H - 1) // BLOCK_H
    t, part = tl.program_id(0), tl.program_id(1)
    session = session_of(start_ptr, t, S, BLOCK_S)
    slot = tl.load(slot_ptr + session, mask=session < S, other=-1).to(tl.int64)
    first = tl.load(start_ptr + session).to(tl.int64)
    end = tl.load(start_ptr + session + 1, mask=session < S, other=0).to(tl.int64)
    i = t - first
    num_inputs = tl.minimum(end, T) - first
    live = (slot >= 0) & (slot < N) & (i >= 0)

    if part < Q_PARTS:
        head_h, column_b_2, mask_h_b_2 = heads(part, H, C, BLOCK_H, BLOCK_B)
        x_h_b_2 = tl.zeros([BLOCK_H, BLOCK_B, 2], tl.float32)
        if live:
            x_h_b_2 = load_heads(qkvr_ptr + (first + i) * J, part, H, C, BLOCK_H, BLOCK_B)
            if HAS_NORM:
                x_h_b_2 = normalize(x_h_b_2, q_norm_ptr, eps, C, BLOCK_B)
            if HAS_ROPE:
                x_h_b_2 = rotate(x_h_b_2, phase_ptr, tl.load(position_ptr + t), C, BLOCK_B)
        offs_h_b_2 = head_h[:, None, None] * C + column_b_2[None, :, :]
        tl.store(out_ptr + t.to(tl.int64) * H * C + offs_h_b_2, x_h_b_2, mask=mask_h_b_2)
    elif live:
        k_ptr = qkvr_ptr + first * J + H * C
        k_state_ptr = state_ptr + slot * (6 * G * C)
        if part < Q_PARTS + KV_PARTS:
            _keys_or_values(
                k_ptr, k_conv_ptr, k_norm_ptr, phase_ptr, position_ptr, kv_row_ptr,
                k_state_ptr, k_pages_ptr, k_scale_ptr,
                first, num_inputs, i, part - Q_PARTS, P, J, eps,
                G, C, R, HAS_CONV, HAS_NORM, HAS_ROPE, IS_FP8, BLOCK_H, BLOCK_B,
            )  # fmt: skip
        else:
            _keys_or_values(
                k_ptr + G * C, v_conv_ptr, k_norm_ptr, phase_ptr, position_ptr, kv_row_ptr,
                k_state_ptr + 3 * G * C, v_pages_ptr, v_scale_ptr,
                first, num_inputs, i, part - Q_PARTS - KV_PARTS, P, J, eps,
                G, C, R, HAS_CONV, False, False, IS_FP8, BLOCK_H, BLOCK_B,
            )  # fmt: skip


def launch_attention_prologue(
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
    config = choose_config(Problem(head_width))
    parts = triton.cdiv(num_heads, config.block_h) + 2 * triton.cdiv(num_kv_heads, config.block_h)
    if k_scale is not None:
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)

    def given(tensor: Tensor | None) -> Tensor:
        return qkvr if tensor is None else tensor

    attention_prologue_kernel[(qkvr.shape[0], parts)](
        qkvr, given(k_conv), given(v_conv), given(q_norm), given(k_norm),
        given(rope_phase), given(position), kv_row, start, slot,
        given(conv_state), k_pages, v_pages, given(k_scale), given(v_scale), out,
        qkvr.shape[0], slot.shape[0], ANY_SLOT if conv_state is None else conv_state.shape[0],
        num_pages, qkvr.shape[1], eps,
        H=num_heads, G=num_kv_heads, C=head_width, R=page_rows,
        HAS_CONV=conv_state is not None, HAS_NORM=q_norm is not None,
        HAS_ROPE=rope_phase is not None, IS_FP8=k_scale is not None,
        BLOCK_S=BLOCK_S, BLOCK_H=config.block_h, BLOCK_B=config.block_b,
        num_warps=config.num_warps,
    )  # fmt: skip


def aot_specs() -> list[AotSpec]:
    """Every shipped width as the backbone uses it, bf16 pages; its own width with fp8 pages; and
    as a Llama does: no convolution, no norms, rotary frequencies."""
    backbone = {"HAS_CONV": True, "HAS_NORM": True, "HAS_ROPE": False, "IS_FP8": False}
    llama = {"HAS_CONV": False, "HAS_NORM": False, "HAS_ROPE": True, "IS_FP8": False}
    own = choose_config(Problem(128))
    return [
        *(_spec(config, f"C{2 * config.block_b}", backbone) for config in SHIPPED),
        _spec(own, "C128-rope", llama),
        _spec(own, "C128-all-fp8", backbone | {"HAS_ROPE": True, "IS_FP8": True}),
        _spec(own, "C128-fp8", backbone | {"IS_FP8": True}),
    ]


def _spec(config: Config, label: str, parts: dict[str, bool]) -> AotSpec:
    pages = "*u8" if parts["IS_FP8"] else "*bf16"
    signature = {
        "qkvr_ptr": "*bf16",
        **dict.fromkeys(("k_conv_ptr", "v_conv_ptr", "q_norm_ptr", "k_norm_ptr"), "*fp32"),
        **dict.fromkeys(("phase_ptr", "position_ptr", "kv_row_ptr"), "*i64"),
        **dict.fromkeys(("start_ptr", "slot_ptr"), "*i32"),
        "state_ptr": "*bf16",
        **dict.fromkeys(("k_pages_ptr", "v_pages_ptr"), pages),
        **dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32"),
        "out_ptr": "*bf16",
        **dict.fromkeys(("T", "S", "N", "P", "J"), "i32"),
        "eps": "fp32",
    }
    sizes = {"H": 32, "G": 8, "C": 2 * config.block_b, "R": 64}
    blocks = {"BLOCK_S": BLOCK_S, "BLOCK_H": config.block_h, "BLOCK_B": config.block_b}
    return AotSpec(
        kernel=attention_prologue_kernel,
        config=config,
        signature=signature,
        constexprs=sizes | parts | blocks,
        num_warps=config.num_warps,
        aligned=(
            *(n for n, kind in signature.items() if kind.startswith("*") and n not in PER_TOKEN),
            "J",
        ),
        label=label,
    )
