"""The product of a tile of one expert's rows: where that expert's matrix lies in its format."""

# Dimension key: E experts, M weight rows of a tile, N tokens of a block; R rows and W columns of an
# expert's matrix.

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton.weight_tile import accumulate


@triton.jit
def expert_tile(
    x_ptr, x_row_n, mask_n,                           # in   [., W]  tokens, by their first element
    w_ptr, scale_ptr, zero_ptr, outer_ptr,            # in   [E, R, W] in its format; [E]
    expert,
    row_m,                                            # in   weight rows of the tile
    R, W,
    FORMAT: tl.constexpr, QUANTIZE_X: tl.constexpr, EVEN_M: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w[expert] x of a tile, [M, N] in float32."""
    expert = expert.to(tl.int64)
    if FORMAT == "plain":
        w_ptr += expert * R * W
    elif FORMAT == "int4" or FORMAT == "int4_f16":
        size = expert * tl.cdiv(W, 256) * R
        w_ptr += size * 64
        scale_ptr += size
        if zero_ptr is not None:
            zero_ptr += size
    elif FORMAT == "mxfp4":
        size = expert * tl.cdiv(W, 128) * R
        w_ptr += size * 32
        scale_ptr += size
    elif FORMAT == "nvfp4":
        size = expert * tl.cdiv(W, 64) * R
        w_ptr += size * 16
        scale_ptr += size
    else:
        w_ptr += expert * tl.cdiv(W, 128) * R * 64
        if FORMAT == "fp8":
            scale_ptr += expert * tl.cdiv(R, 128) * tl.cdiv(W, 128)
        else:
            scale_ptr += expert * R
    acc_m_n = accumulate(x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, zero_ptr, row_m, 0, W, R, W,
                         FORMAT, QUANTIZE_X, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip
    if FORMAT == "fp8_channel":
        scale_m = tl.load(scale_ptr + row_m, mask=row_m < R, other=0.0)
        acc_m_n *= scale_m[:, None]
    if outer_ptr is not None:
        acc_m_n *= tl.load(outer_ptr + expert)
    return acc_m_n


@triton.jit
def bias_of(bias_ptr, expert, row_m, R):
    """[M] of a tile; zeros where the experts have none."""
    if bias_ptr is None:
        return tl.zeros([row_m.shape[0]], tl.float32)
    else:
        return tl.load(bias_ptr + expert.to(tl.int64) * R + row_m, mask=row_m < R, other=0.0)


@triton.jit
def either_tile(
    is_shared, x_ptr, x_row_n, mask_n,
    w_ptr, scale_ptr, zero_ptr, outer_ptr,
    shared_w_ptr, shared_scale_ptr, shared_zero_ptr, shared_outer_ptr,
    expert, row_m, R, W,
    ALIKE: tl.constexpr, FORMAT: tl.constexpr, QUANTIZE_X: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`expert_tile` of the routed experts; with ALIKE, of the shared ones where `is_shared`: one
    loop for both, which differ in their pointers only."""
    if ALIKE:
        w_ptr = tl.where(is_shared, shared_w_ptr, w_ptr)
        if scale_ptr is not None:
            scale_ptr = tl.where(is_shared, shared_scale_ptr, scale_ptr)
        if zero_ptr is not None:
            zero_ptr = tl.where(is_shared, shared_zero_ptr, zero_ptr)
        if outer_ptr is not None:
            outer_ptr = tl.where(is_shared, shared_outer_ptr, outer_ptr)
    return expert_tile(x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, zero_ptr, outer_ptr,
                       expert, row_m, R, W,
                       FORMAT, QUANTIZE_X, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit
def either_bias(is_shared, bias_ptr, shared_bias_ptr, expert, row_m, R, ALIKE: tl.constexpr):
    """`bias_of` of the routed experts; with ALIKE, of the shared ones where `is_shared`."""
    if ALIKE and bias_ptr is not None:
        bias_ptr = tl.where(is_shared, shared_bias_ptr, bias_ptr)
    return bias_of(bias_ptr, expert, row_m, R)
