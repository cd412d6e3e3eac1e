"""The inner products of expert_mlp and linear: a tile of weight rows times a few tokens.

Weights are the matrix unit's tall side, tokens its narrow one, so a matrix with two tokens is
read once and costs what sixteen would. Every token's sum runs over the columns in one order and in
steps of one size, whatever the tile: its bits depend on its own column alone.
"""

# Dimension key: M weight rows of a tile, N tokens of a block, C columns of a step, Q words of a
# packed row; R rows and W columns of a matrix.

from __future__ import annotations

import triton
import triton.language as tl

from .dequant import decode_fp4, decode_fp8, decode_int4

PLAIN_STEP: tl.constexpr = tl.constexpr(64)  # columns a step: 128 bytes of bf16
E4M3_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def accumulate(
    x_ptr, x_row_n, mask_n,       # in  [., W]   first element of each token's row
    w_ptr, scale_ptr, zero_ptr,   # in           one matrix in its format
    row_m,                        # in           weight rows of the tile
    first, last,                  # in           columns; both multiples of 256, or last = W
    R, W,
    FORMAT: tl.constexpr, QUANTIZE_X: tl.constexpr, EVEN_M: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w x of a tile over the columns first..last, [M, N] in float32; without fp8_channel's scales,
    which are those of whole rows."""
    if FORMAT == "plain":
        acc_m_n = _plain(x_ptr, x_row_n, mask_n, w_ptr, row_m, first, last, R, W,
                         EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip
    elif FORMAT == "int4" or FORMAT == "int4_f16":
        acc_m_n = _int4(x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, zero_ptr, row_m, first, last,
                        R, W, FORMAT, 32, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip
    elif FORMAT == "mxfp4":
        acc_m_n = _fp4(x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, row_m, first, last, R, W,
                       32, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip
    elif FORMAT == "nvfp4":
        acc_m_n = _fp4(x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, row_m, first, last, R, W,
                       16, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip
    else:
        tl.static_assert(FORMAT == "fp8" or FORMAT == "fp8_channel", "unknown format")
        acc_m_n = _fp8(x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, row_m, first, last, R, W,
                       FORMAT, 64, QUANTIZE_X, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip
    return acc_m_n


@triton.jit
def _load_x(x_ptrs, mask_n, begin, offs_c, W, EVEN_W: tl.constexpr):
    """x_c_n, columns begin + offs_c of every token; zeros past the row's end."""
    if EVEN_W:
        return tl.load(x_ptrs + begin, mask=mask_n[None, :], other=0.0)
    mask_c_n = mask_n[None, :] & (begin + offs_c < W)[:, None]
    return tl.load(x_ptrs + begin, mask=mask_c_n, other=0.0)


@triton.jit
def _load_rows(ptrs, row_m, R, EVEN_M: tl.constexpr):
    """A value of every row [M] or [M, Q] of packed weights; zeros past the last row."""
    if EVEN_M:
        return tl.load(ptrs)
    elif len(ptrs.shape) == 2:
        return tl.load(ptrs, mask=(row_m < R)[:, None], other=0)
    else:
        return tl.load(ptrs, mask=row_m < R, other=0)


@triton.jit
def _load_words(ptr, row_m, R, EVEN_M: tl.constexpr):
    """A 32-bit word of every row [M]; zeros past the last row. In two loads, of rows 8 apart, which
    a thread has both of in the product's layout: what is no longer than a program has threads is
    loaded in the layout that it is needed in, without a detour through shared memory."""
    BLOCKS: tl.constexpr = row_m.shape[0] // 16
    low_b_8, high_b_8 = tl.split(tl.permute(tl.reshape(row_m, [BLOCKS, 2, 8]), [0, 2, 1]))
    if EVEN_M:
        low_b_8, high_b_8 = tl.load(ptr + low_b_8), tl.load(ptr + high_b_8)
    else:
        low_b_8 = tl.load(ptr + low_b_8, mask=low_b_8 < R, other=0)
        high_b_8 = tl.load(ptr + high_b_8, mask=high_b_8 < R, other=0)
    return tl.reshape(tl.permute(tl.join(low_b_8, high_b_8), [0, 2, 1]), [16 * BLOCKS])


@triton.jit
def _plain(
    x_ptr, x_row_n, mask_n, w_ptr, row_m, first, last, R, W,
    EVEN_M: tl.constexpr, EVEN_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_c = tl.arange(0, PLAIN_STEP)
    x_ptrs = x_ptr + x_row_n[None, :] + offs_c[:, None]
    w_ptrs = w_ptr + row_m[:, None] * W + offs_c[None, :]
    acc_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(first, last, PLAIN_STEP):
        if EVEN_M and EVEN_W:
            w_m_c = tl.load(w_ptrs + begin)
        else:
            mask_m_c = (row_m < R)[:, None] & (begin + offs_c < W)[None, :]
            w_m_c = tl.load(w_ptrs + begin, mask=mask_m_c, other=0.0)
        x_c_n = _load_x(x_ptrs, mask_n, begin, offs_c, W, EVEN_W)
        if w_m_c.dtype != x_c_n.dtype:
            x_c_n = x_c_n.to(tl.float32)
            w_m_c = w_m_c.to(tl.float32)
        acc_m_n = tl.dot(w_m_c, x_c_n, acc_m_n, input_precision="ieee")
    return acc_m_n


@triton.jit
def _int4(
    x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, zero_ptr, row_m, first, last, R, W,
    FORMAT: tl.constexpr, Q: tl.constexpr, EVEN_M: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Two groups of 128 columns a step: one 32-bit word of a row holds both their scales."""
    offs_q = tl.arange(0, Q)
    x_ptrs = x_ptr + x_row_n[None, :] + offs_q[:, None]
    w_ptrs = w_ptr + row_m[:, None] * Q + offs_q[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin_step, end_step = first // (8 * Q), tl.cdiv(last, 8 * Q)
    # A step ahead: Triton pipelines only what the product reads, and a program would wait for its
    # scales, from memory, in every step.
    next_scale_m = _load_words(scale_ptr + begin_step * R, row_m, R, EVEN_M)
    for step in range(begin_step, end_step):
        scale_m = next_scale_m
        next_step = tl.minimum(step + 1, end_step - 1)
        next_scale_m = _load_words(scale_ptr + next_step * R, row_m, R, EVEN_M)
        zero_m = scale_m
        if zero_ptr is not None:
            zero_m = _load_rows(zero_ptr + step * R + row_m, row_m, R, EVEN_M)
        for half in tl.static_range(2):
            sub = 2 * step + half
            w_m_q = _load_rows(w_ptrs + sub * R * Q, row_m, R, EVEN_M)
            half_zero_m = (zero_m >> (16 * half)) & 0xFFFF
            part_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in tl.static_range(4):
                begin = (4 * sub + i) * Q
                x_q_n = _load_x(x_ptrs, mask_n, begin, offs_q, W, EVEN_W)
                value_m_q = decode_int4(
                    w_m_q, half_zero_m, i, zero_ptr is not None, dtype != tl.float32
                )
                part_m_n = tl.dot(value_m_q, x_q_n, part_m_n, input_precision="ieee")
            acc_m_n += part_m_n * _half_of(scale_m, half, FORMAT)[:, None]
    return acc_m_n


@triton.jit
def _half_of(scale_m, HALF: tl.constexpr, FORMAT: tl.constexpr):
    """One of the two 16-bit floats in a 32-bit word, as float32."""
    if FORMAT == "int4_f16":
        return (scale_m >> (16 * HALF)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif HALF == 0:
        return (scale_m << 16).to(tl.float32, bitcast=True)
    else:
        return (scale_m & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _fp4(
    x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, row_m, first, last, R, W,
    GROUP: tl.constexpr, EVEN_M: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A value of a word is in one group, so its tile takes one scale a row, exact in bf16."""
    SUB: tl.constexpr = 4 * GROUP  # columns of a packed sub-block
    PARTS: tl.constexpr = 256 // SUB
    offs_q = tl.arange(0, GROUP)
    x_ptrs = x_ptr + x_row_n[None, :] + offs_q[:, None]
    w_ptrs = w_ptr + row_m[:, None] * GROUP + offs_q[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(first // 256, tl.cdiv(last, 256)):
        # A sum of its own: chained to the last step's, ptxas puts a wait behind every product.
        part_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for part in tl.static_range(PARTS):
            sub = PARTS * step + part
            # No rows at all past the last sub-block.
            limit = R if EVEN_W else tl.where(sub * SUB < W, R, 0)
            scale_m = _load_rows(scale_ptr + sub * R + row_m, row_m, limit, EVEN_M and EVEN_W)
            w_m_q = _load_rows(w_ptrs + sub * R * GROUP, row_m, limit, EVEN_M and EVEN_W)
            for i in tl.static_range(4):
                x_q_n = _load_x(x_ptrs, mask_n, (4 * sub + i) * GROUP, offs_q, W, EVEN_W)
                value_m_q = decode_fp4(w_m_q, scale_m, i, GROUP, dtype != tl.float32)
                part_m_n = tl.dot(value_m_q, x_q_n, part_m_n, input_precision="ieee")
        acc_m_n += part_m_n
    return acc_m_n


@triton.jit
def _fp8(
    x_ptr, x_row_n, mask_n, w_ptr, scale_ptr, row_m, first, last, R, W,
    FORMAT: tl.constexpr, Q: tl.constexpr, QUANTIZE_X: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """128 columns a step, summed apart and scaled: the block scale's size, and as far as the fp8
    tensor core's accumulator can be trusted."""
    offs_q = tl.arange(0, Q)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    scale_ptrs = scale_ptr + row_m // 128 * tl.cdiv(W, 2 * Q)
    if QUANTIZE_X:
        offs_c = tl.arange(0, 2 * Q)
        fp8_ptr = w_ptr.to(tl.pointer_type(tl.float8e4nv))
        fp8_ptrs = fp8_ptr + row_m[:, None] * (2 * Q) + offs_c[None, :]
    x_ptrs = x_ptr + x_row_n[None, :] + offs_q[:, None]
    w_ptrs = w_ptr + row_m[:, None] * Q + offs_q[None, :]
    for step in range(first // (2 * Q), tl.cdiv(last, 2 * Q)):
        if QUANTIZE_X or EVEN_W:
            x_0_q_n = _load_x(x_ptrs, mask_n, 2 * step * Q, offs_q, W, EVEN_W)
            x_1_q_n = _load_x(x_ptrs, mask_n, (2 * step + 1) * Q, offs_q, W, EVEN_W)
        part_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if QUANTIZE_X:
            x_n_c, x_scale_n = _quantize(x_0_q_n, x_1_q_n)
            if EVEN_M:
                w_m_c = tl.load(fp8_ptrs + step * R * 2 * Q)
            else:
                w_m_c = tl.load(fp8_ptrs + step * R * 2 * Q, mask=(row_m < R)[:, None], other=0.0)
            part_m_n = tl.dot(w_m_c, x_n_c.T, part_m_n) * x_scale_n[None, :]
        else:
            w_m_q = _load_rows(w_ptrs + step * R * Q, row_m, R, EVEN_M)
            if EVEN_W:
                low_m_q = decode_fp8(w_m_q, 0, dtype != tl.float32)
                high_m_q = decode_fp8(w_m_q, 1, dtype != tl.float32)
                part_m_n = tl.dot(low_m_q, x_0_q_n, part_m_n, input_precision="ieee")
                part_m_n = tl.dot(high_m_q, x_1_q_n, part_m_n, input_precision="ieee")
            else:
                # Each half where it is multiplied: x may come by plain stores, and two of these
                # behind the weights' asynchronous copies are not fenced from the product (sm_90).
                for i in tl.static_range(2):
                    x_q_n = _load_x(x_ptrs, mask_n, (2 * step + i) * Q, offs_q, W, EVEN_W)
                    value_m_q = decode_fp8(w_m_q, i, dtype != tl.float32)
                    part_m_n = tl.dot(value_m_q, x_q_n, part_m_n, input_precision="ieee")
        if FORMAT == "fp8":
            scale_m = _load_rows(scale_ptrs + step, row_m, R, EVEN_M)
            part_m_n *= scale_m[:, None]
        acc_m_n += part_m_n
    return acc_m_n


@triton.jit
def _quantize(x_0_q_n, x_1_q_n):
    """e4m3 [N, 2 Q] in the bytes' own order (columns 0, Q, 1, Q + 1, ...), and a scale a token."""
    x_0_n_q = x_0_q_n.to(tl.float32).T
    x_1_n_q = x_1_q_n.to(tl.float32).T
    top_n = tl.maximum(tl.max(tl.abs(x_0_n_q), axis=1), tl.max(tl.abs(x_1_n_q), axis=1))
    scale_n = tl.maximum(top_n, 1e-30) / E4M3_MAX
    x_n_c = tl.reshape(tl.join(x_0_n_q, x_1_n_q), [x_0_n_q.shape[0], 2 * x_0_n_q.shape[1]])
    return (x_n_c / scale_n[:, None]).to(tl.float8e4nv), scale_n
