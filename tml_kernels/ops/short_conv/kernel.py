"""Triton kernel of short_conv: one launch for conv, residual, norm and state.

One program per token, except that the program of a session's first token does its first three,
which read the old state, and then writes the new one: nobody else touches it, so nothing races.
"""

# pyright: reportCallIssue=false
# Triton's types know no launch options.

# Dimension key: T tokens, S session rows, N state slots, D model width.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from ..._triton.ragged import session_of
from ..._triton.short_conv import conv_of
from .configs import SHIPPED, Config, Problem, choose_config

BLOCK_S = 128  # session ends compared at a time
SIZES = ["T", "S", "N"]  # change from tick to tick: one compiled kernel serves all


@triton.jit
def _row_ptr(x_ptr, state_ptr, first, slot, i, D):
    """Where input i of a session lies: i >= 0 in this call's tokens, -3..-1 in its state."""
    return tl.where(i >= 0, x_ptr + (first + i) * D, state_ptr + (slot * 3 + i + 3) * D)


@triton.jit
def _conv(x_ptr, weight_ptr, state_ptr, first, slot, i, offs_d, mask_d, D):
    """x + conv(x) of token i of a session, float32, oldest tap first."""
    offs_w = offs_d[:, None] * 4 + tl.arange(0, 4)[None, :]
    weight_d_4 = tl.load(weight_ptr + offs_w, mask=mask_d[:, None], other=0.0)
    even_d_2, odd_d_2 = tl.split(tl.reshape(weight_d_4, (offs_d.shape[0], 2, 2)))
    weight_0, weight_2 = tl.split(even_d_2)
    weight_1, weight_3 = tl.split(odd_d_2)

    row_0 = _row_ptr(x_ptr, state_ptr, first, slot, i - 3, D)
    row_1 = _row_ptr(x_ptr, state_ptr, first, slot, i - 2, D)
    row_2 = _row_ptr(x_ptr, state_ptr, first, slot, i - 1, D)
    x_0 = tl.load(row_0 + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    x_1 = tl.load(row_1 + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    x_2 = tl.load(row_2 + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    x_3 = tl.load(x_ptr + (first + i) * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    return conv_of(x_0, x_1, x_2, x_3, weight_0, weight_1, weight_2, weight_3)


@triton.jit
def _token(
    x_ptr, weight_ptr, state_ptr, residual_ptr, norm_weight_ptr, out_ptr,
    first, slot, i, D, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, LATE_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Token i of a session: residual and out. The sum is computed again for every use of a block
    unless the row is one block."""
    row = (first + i) * D
    scale = 1.0
    if HAS_NORM and not LATE_NORM and NUM_BLOCKS > 1:
        square_d = tl.zeros([BLOCK_D], tl.float32)
        for block in range(NUM_BLOCKS):
            offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            h_d = _conv(x_ptr, weight_ptr, state_ptr, first, slot, i, offs_d, mask_d, D)
            h_d += tl.load(residual_ptr + row + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            square_d += h_d * h_d
        scale = 1.0 / tl.sqrt(tl.sum(square_d, axis=0) / D + eps)

    for block in range(NUM_BLOCKS):
        offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        h_d = _conv(x_ptr, weight_ptr, state_ptr, first, slot, i, offs_d, mask_d, D)
        out_d = h_d
        if HAS_RESIDUAL:
            h_d += tl.load(residual_ptr + row + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            tl.store(residual_ptr + row + offs_d, h_d, mask=mask_d)
        if HAS_NORM:
            if not LATE_NORM and NUM_BLOCKS == 1:
                scale = 1.0 / tl.sqrt(tl.sum(h_d * h_d, axis=0) / D + eps)
            weight_d = tl.load(norm_weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            out_d = h_d * weight_d if LATE_NORM else h_d * scale * weight_d
        tl.store(out_ptr + row + offs_d, out_d, mask=mask_d)


@triton.jit
def _write_state(
    x_ptr, state_ptr, first, slot, num_inputs, D, BLOCK_D: tl.constexpr, NUM_BLOCKS: tl.constexpr
):
    """The session's last three inputs become its state; with one or two new ones, rows move up."""
    for block in range(NUM_BLOCKS):
        offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        row_0 = _row_ptr(x_ptr, state_ptr, first, slot, num_inputs - 3, D)
        row_1 = _row_ptr(x_ptr, state_ptr, first, slot, num_inputs - 2, D)
        row_2 = _row_ptr(x_ptr, state_ptr, first, slot, num_inputs - 1, D)
        x_0 = tl.load(row_0 + offs_d, mask=mask_d, other=0.0)
        x_1 = tl.load(row_1 + offs_d, mask=mask_d, other=0.0)
        x_2 = tl.load(row_2 + offs_d, mask=mask_d, other=0.0)
        tl.debug_barrier()  # every thread has read the old state
        new_ptr = state_ptr + slot * 3 * D + offs_d
        tl.store(new_ptr, x_0, mask=mask_d)
        tl.store(new_ptr + D, x_1, mask=mask_d)
        tl.store(new_ptr + 2 * D, x_2, mask=mask_d)


@triton.jit(do_not_specialize=SIZES)
def short_conv_kernel(
    x_ptr,                    # in      [T, D]
    weight_ptr,               # in      [D, 4]
    start_ptr, slot_ptr,      # in      [S + 1], [S]
    norm_weight_ptr,          # in      [D], when HAS_NORM
    state_ptr,                # in out  [N, 3, D]
    residual_ptr,             # in out  [T, D], when HAS_RESIDUAL
    out_ptr,                  # out     [T, D]
    T, S, N, D, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, LATE_NORM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    session = session_of(start_ptr, t, S, BLOCK_S)
    slot = tl.load(slot_ptr + session, mask=session < S, other=-1).to(tl.int64)
    first = tl.load(start_ptr + session).to(tl.int64)
    end = tl.load(start_ptr + session + 1, mask=session < S, other=0).to(tl.int64)
    i = t - first
    num_inputs = tl.minimum(end, T) - first

    if (slot < 0) | (slot >= N) | (i < 0):
        for block in range(NUM_BLOCKS):
            offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            zero_d = tl.zeros([BLOCK_D], tl.float32)
            tl.store(out_ptr + t.to(tl.int64) * D + offs_d, zero_d, mask=offs_d < D)
    elif (i == 0) | (i >= 3):
        stop = tl.where(i == 0, tl.minimum(num_inputs, 3), i + 1)
        for k in range(i, stop):
            _token(
                x_ptr, weight_ptr, state_ptr, residual_ptr, norm_weight_ptr, out_ptr,
                first, slot, k, D, eps,
                HAS_RESIDUAL, HAS_NORM, LATE_NORM, BLOCK_D, NUM_BLOCKS,
            )  # fmt: skip
        if i == 0:
            _write_state(x_ptr, state_ptr, first, slot, num_inputs, D, BLOCK_D, NUM_BLOCKS)


def launch_short_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    start: Tensor,
    slot: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    late_norm: bool,
    out: Tensor,
) -> None:
    num_tokens, width = x.shape
    config = choose_config(Problem(width))
    short_conv_kernel[(num_tokens,)](
        x, weight, start, slot, weight if norm_weight is None else norm_weight,
        state, x if residual is None else residual, out,
        num_tokens, slot.shape[0], state.shape[0], width, eps,
        HAS_RESIDUAL=residual is not None, HAS_NORM=norm_weight is not None, LATE_NORM=late_norm,
        BLOCK_S=BLOCK_S, BLOCK_D=config.block_d, NUM_BLOCKS=config.num_blocks,
        num_warps=config.num_warps,
    )  # fmt: skip


def aot_specs() -> list[AotSpec]:
    """Every shipped configuration as the tick uses it: bf16 rows, fp32 weights, residual, norm;
    the model's width also with the norm left to its reader."""

    def spec(config: Config, late_norm: bool = False) -> AotSpec:
        return AotSpec(
            kernel=short_conv_kernel,
            config=config,
            signature={
                "x_ptr": "*bf16",
                "weight_ptr": "*fp32",
                "start_ptr": "*i32",
                "slot_ptr": "*i32",
                "norm_weight_ptr": "*fp32",
                "state_ptr": "*bf16",
                "residual_ptr": "*bf16",
                "out_ptr": "*bf16",
                "T": "i32",
                "S": "i32",
                "N": "i32",
                "D": "i32",
                "eps": "fp32",
            },
            constexprs={
                "HAS_RESIDUAL": True,
                "HAS_NORM": True,
                "LATE_NORM": late_norm,
                "BLOCK_S": BLOCK_S,
                "BLOCK_D": config.block_d,
                "NUM_BLOCKS": config.num_blocks,
            },
            num_warps=config.num_warps,
            label="late_norm" if late_norm else "",
        )

    wide = choose_config(Problem(4096))
    return [spec(wide, late_norm=True), *(spec(config) for config in SHIPPED)]
