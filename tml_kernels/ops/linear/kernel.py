"""Triton kernel of linear: a tile of weight rows times a block of tokens, then all that follows.

Weights are the matrix unit's tall side, so each is read once for up to 128 tokens. The columns are
summed in parts whose places follow from the weight's shape; the parts are added in order, by one
program that makes them all or by the last of several to arrive. The sum that a token gets, and what
is done with it, are the same operations either way: where a product meets a sum it is written as
one fma, so that no compiler chooses in one kernel only.

Where every token is a session's only one, the convolution behind an attention layer has its taps in
the session's state alone: whoever has a tile's sums then convolves them, and adds the residual.
"""

# Dimension key: T tokens, D input width, F rows of the weight, O output width; M weight rows of a
# tile, N tokens of a block, H output columns of a tile.

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton.short_conv import conv_of
from ..._triton.weight_tile import accumulate


@triton.jit(do_not_specialize=["T", "num_valid", "N", "slot_ptr"])
def linear_kernel(
    x_ptr,                              # in   [T, D]
    w_ptr, w_scale_ptr, w_zero_ptr,     # in   [F, D] in its format
    bias_ptr, residual_ptr,             # in   [F], [T, O] or None; in out with a convolution
    counter_ptr, part_ptr,              # work [tiles * blocks] all zero; a tile for each program
    out_ptr,                            # out  [T, O]
    T, D, F, num_valid, scale,
    conv_ptr, norm_weight_ptr,          # in   [F, 4], [F]; all four or None
    slot_ptr,                           # in   [T]
    state_ptr,                          # in out [N, 3, F]
    N,
    FORMAT: tl.constexpr, SWIGLU: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_D: tl.constexpr, PARALLEL: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_M // 2
    # The blocks of a tile are neighbours: they read one piece of the weight.
    blocks = tl.cdiv(T, BLOCK_N)
    number = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    split = 0
    if PARALLEL:
        split = number % SPLITS
        number = number // SPLITS
    t_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = t_n < T
    t_n = tl.where(mask_n, t_n, 0).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    row_m = number.to(tl.int64) * BLOCK_M + offs_m
    if SWIGLU:  # gates above, ups below
        row_m = number.to(tl.int64) * BLOCK_M + 2 * (offs_m % HALF) + offs_m // HALF

    if PARALLEL:
        sum_m_n = _part(x_ptr, t_n, mask_n, w_ptr, w_scale_ptr, w_zero_ptr, row_m, split, D, F,
                        FORMAT, SPLIT_D, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip
        offs_m_n = offs_m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tile = (number * blocks + block).to(tl.int64)
        part_ptrs = part_ptr + tile * SPLITS * BLOCK_M * BLOCK_N + offs_m_n
        mask_m_n = tl.broadcast_to(mask_n[None, :], [BLOCK_M, BLOCK_N])
        tl.store(part_ptrs + split * BLOCK_M * BLOCK_N, sum_m_n, mask=mask_m_n)
        tl.debug_barrier()  # every thread's values are written before one thread counts them
        before = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        tl.debug_barrier()
        if before == SPLITS - 1:
            sum_m_n = _parts(part_ptrs, mask_m_n, SPLITS, BLOCK_M, BLOCK_N)
            _finish(sum_m_n, number, t_n, mask_n, row_m, w_scale_ptr, bias_ptr, residual_ptr,
                    out_ptr, F, num_valid, scale, conv_ptr, norm_weight_ptr, slot_ptr, state_ptr,
                    N, FORMAT, SWIGLU)  # fmt: skip
            tl.store(counter_ptr + tile, 0)
    else:
        sum_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(SPLITS):
            sum_m_n += _part(x_ptr, t_n, mask_n, w_ptr, w_scale_ptr, w_zero_ptr, row_m, i, D, F,
                             FORMAT, SPLIT_D, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N)  # fmt: skip
        _finish(sum_m_n, number, t_n, mask_n, row_m, w_scale_ptr, bias_ptr, residual_ptr,
                out_ptr, F, num_valid, scale, conv_ptr, norm_weight_ptr, slot_ptr, state_ptr,
                N, FORMAT, SWIGLU)  # fmt: skip


@triton.jit
def _part(
    x_ptr, t_n, mask_n, w_ptr, w_scale_ptr, w_zero_ptr, row_m, split, D, F,
    FORMAT: tl.constexpr, SPLIT_D: tl.constexpr, EVEN_M: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums over one part of the columns, [M, N]."""
    first = split * SPLIT_D
    return accumulate(
        x_ptr, t_n * D, mask_n, w_ptr, w_scale_ptr, w_zero_ptr, row_m,
        first, tl.minimum(first + SPLIT_D, D), F, D,
        FORMAT, False, EVEN_M, EVEN_W, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _parts(part_ptrs, mask_m_n, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of all parts in order; all are read at once where registers hold them."""
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    sum_m_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if SPLITS * SIZE <= 4 * 64 * 64:
        for i in tl.static_range(SPLITS):
            ptrs = part_ptrs + i * SIZE
            sum_m_n += tl.load(ptrs, mask=mask_m_n, other=0.0, cache_modifier=".cg")
    else:
        for i in range(SPLITS):
            ptrs = part_ptrs + i * SIZE
            sum_m_n += tl.load(ptrs, mask=mask_m_n, other=0.0, cache_modifier=".cg")
    return sum_m_n


@triton.jit
def _finish(
    sum_m_n, number, t_n, mask_n, row_m, w_scale_ptr, bias_ptr, residual_ptr, out_ptr,
    F, num_valid, scale, conv_ptr, norm_weight_ptr, slot_ptr, state_ptr, N,
    FORMAT: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """The last scale of a tile's sums, and what follows them."""
    if FORMAT == "fp8_channel":
        w_scale_m = tl.load(w_scale_ptr + row_m, mask=row_m < F, other=0.0)
        sum_m_n *= w_scale_m[:, None]
    if conv_ptr is not None:
        tl.static_assert(bias_ptr is None and num_valid is None and not SWIGLU, "a sum alone")
        _convolve(sum_m_n, t_n, mask_n, row_m, conv_ptr, norm_weight_ptr, slot_ptr, state_ptr,
                  residual_ptr, out_ptr, F, N)  # fmt: skip
    else:
        _store(sum_m_n, number, t_n, mask_n, row_m, bias_ptr, residual_ptr, out_ptr,
               F, num_valid, scale, SWIGLU)  # fmt: skip


@triton.jit
def _store(
    sum_m_n, number, t_n, mask_n, row_m, bias_ptr, residual_ptr, out_ptr, F, num_valid, scale,
    SWIGLU: tl.constexpr,
):  # fmt: skip
    """act(scale * sum + bias) + residual of a tile to out."""
    BLOCK_M: tl.constexpr = sum_m_n.shape[0]
    BLOCK_H: tl.constexpr = BLOCK_M // 2 if SWIGLU else BLOCK_M
    scale_m_n = tl.full(sum_m_n.shape, scale, tl.float32)
    if bias_ptr is not None:
        bias_m = tl.load(bias_ptr + row_m, mask=row_m < F, other=0.0).to(tl.float32)
        sum_m_n = tl.fma(sum_m_n, scale_m_n, tl.broadcast_to(bias_m[:, None], sum_m_n.shape))
        scale_m_n = tl.full(sum_m_n.shape, 1.0, tl.float32)
    if SWIGLU:
        gate_h_n, up_h_n = _halves(sum_m_n * scale_m_n)
        left_h_n, right_h_n = gate_h_n / (1.0 + tl.exp(-gate_h_n)), up_h_n
    else:
        left_h_n, right_h_n = sum_m_n, scale_m_n

    width = F // 2 if SWIGLU else F
    o_h = number.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_h_n = t_n[None, :] * width + o_h[:, None]
    mask_h_n = mask_n[None, :] & (o_h < width)[:, None]
    if residual_ptr is not None:
        residual_h_n = tl.load(residual_ptr + offs_h_n, mask=mask_h_n, other=0.0).to(tl.float32)
        y_h_n = tl.fma(left_h_n, right_h_n, residual_h_n)
    else:
        y_h_n = left_h_n * right_h_n
    if num_valid is not None:
        y_h_n = tl.where((o_h < num_valid)[:, None], y_h_n, float("-inf"))
    tl.store(out_ptr + offs_h_n, y_h_n, mask=mask_h_n)


@triton.jit
def _convolve(
    x_m_n, t_n, mask_n, row_m, conv_ptr, norm_weight_ptr, slot_ptr, state_ptr, residual_ptr,
    out_ptr, F, N,
):  # fmt: skip
    """residual += x + conv(x) of a tile whose tokens are their sessions' only ones, and the
    residual times the norm's weight to out: the bits of short_conv of what linear would store."""
    x_m_n = x_m_n.to(out_ptr.dtype.element_ty)
    slot_n = tl.load(slot_ptr + t_n, mask=mask_n, other=-1).to(tl.int64)
    live_n = mask_n & (slot_n >= 0) & (slot_n < N)
    mask_m = row_m < F
    mask_m_n = mask_m[:, None] & live_n[None, :]
    state_ptrs = state_ptr + (slot_n * 3 * F)[None, :] + row_m[:, None]
    x_0 = tl.load(state_ptrs, mask=mask_m_n, other=0.0)
    x_1 = tl.load(state_ptrs + F, mask=mask_m_n, other=0.0)
    x_2 = tl.load(state_ptrs + 2 * F, mask=mask_m_n, other=0.0)
    offs_m_n = t_n[None, :] * F + row_m[:, None]
    residual_m_n = tl.load(residual_ptr + offs_m_n, mask=mask_m_n, other=0.0).to(tl.float32)
    conv_ptr += row_m * 4
    y_m_n = conv_of(
        x_0.to(tl.float32), x_1.to(tl.float32), x_2.to(tl.float32), x_m_n.to(tl.float32),
        _rows(conv_ptr, mask_m, x_m_n), _rows(conv_ptr + 1, mask_m, x_m_n),
        _rows(conv_ptr + 2, mask_m, x_m_n), _rows(conv_ptr + 3, mask_m, x_m_n),
    )  # fmt: skip
    h_m_n = y_m_n + residual_m_n
    z_m_n = h_m_n * _rows(norm_weight_ptr + row_m, mask_m, x_m_n)
    tl.debug_barrier()  # every thread has read the old state and the residual
    tl.store(state_ptrs, x_1, mask=mask_m_n)
    tl.store(state_ptrs + F, x_2, mask=mask_m_n)
    tl.store(state_ptrs + 2 * F, x_m_n, mask=mask_m_n)
    tl.store(residual_ptr + offs_m_n, h_m_n, mask=mask_m_n)
    z_m_n = tl.where(live_n[None, :], z_m_n, 0.0)
    tl.store(out_ptr + offs_m_n, z_m_n, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _rows(ptr_m, mask_m, like_m_n):
    """A value of each row, in float32, for every column of a tile."""
    value_m = tl.load(ptr_m, mask=mask_m, other=0.0).to(tl.float32)
    return tl.broadcast_to(value_m[:, None], like_m_n.shape)


@triton.jit
def _halves(x_m_n):
    """The upper and the lower half of the rows."""
    pair_h_n_2 = tl.permute(tl.reshape(x_m_n, [2, x_m_n.shape[0] // 2, x_m_n.shape[1]]), [1, 2, 0])
    return tl.split(pair_h_n_2)
