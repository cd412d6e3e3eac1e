"""Triton kernels of patch_embed after the stem: products and the final norm, and what all share."""

# pyright: reportGeneralTypeIssues=false
# Triton's types know no static_range.

# Dimension key: R rows, G rows joined into one, C their width, F output features, S slots of
# features, T tokens, D model width.

from __future__ import annotations

import triton
import triton.language as tl

from .configs import SLOT_SIZE

SLOT = tl.constexpr(SLOT_SIZE)


@triton.constexpr_function
def _slots(features, slot_size):
    """Pitch of a row of partial sums; `configs.num_slots` for the host."""
    return triton.next_power_of_2((features + slot_size - 1) // slot_size)


@triton.constexpr_function
def _log2(size):
    return size.bit_length() - 1


@triton.jit
def gelu(x):
    """x Phi(x), with Phi to 1.5e-7 by Abramowitz and Stegun 7.1.26, here in x / sqrt(2).

    The library's erf selects coefficients by range: twice the registers, and those decide how tall
    a tile the products can activate.
    """
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.23164188 * size)
    tail = t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))
    tail = t * (0.127414796 + t * (-0.142248368 + tail))
    return tl.maximum(x, 0.0) - size * (tail * tl.exp2(-0.72134752 * x * x))


@triton.jit
def load_norm(norm_ptr, offs_c, C: tl.constexpr):
    return tl.load(norm_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)


@triton.jit
def store_rows(out_ptr, r, offs_c, x_c_r, R, C: tl.constexpr):
    mask_c_r = (offs_c < C)[:, None] & (r < R)[None, :]
    tl.store(out_ptr + r[None, :] * C + offs_c[:, None], x_c_r, mask=mask_c_r)


@triton.jit
def _sum_pairwise(x_r_c, LEVELS: tl.constexpr):
    """Sums of 2 ** LEVELS neighbours of a row, [R, C >> LEVELS]; one order for every layout."""
    for _ in tl.static_range(LEVELS):
        x_r_c = tl.sum(tl.reshape(x_r_c, [x_r_c.shape[0], x_r_c.shape[1] // 2, 2]), axis=2)
    return x_r_c


@triton.jit
def _row_scale(ssq_ptr, r, mask_r, C: tl.constexpr, eps):
    """1 / rms of rows whose squares another product summed by slots of their C features."""
    NUM_SLOTS: tl.constexpr = _slots(C, SLOT)
    offs_s = tl.arange(0, NUM_SLOTS)
    mask_r_s = mask_r[:, None] & (offs_s * SLOT < C)[None, :]
    ssq_r_s = tl.load(ssq_ptr + r[:, None] * NUM_SLOTS + offs_s[None, :], mask=mask_r_s, other=0.0)
    ssq_r = tl.reshape(_sum_pairwise(ssq_r_s, _log2(NUM_SLOTS)), [r.shape[0]])
    return tl.rsqrt(ssq_r / C + eps)


@triton.jit(do_not_specialize=["R"])
def product_kernel(
    x_ptr,                    # in   [R, G * C]
    x_ssq_ptr,                # in   [R * G, S]  of x, when ACTIVATE
    norm_ptr,                 # in   [C]         of x, when ACTIVATE
    weight_ptr,               # in   [F, G * C]
    y_ptr,                    # out  [R, F]
    y_ssq_ptr,                # out  [R, S]      squares of y summed by SLOT features
    R, eps,
    F: tl.constexpr, G: tl.constexpr, C: tl.constexpr, ACTIVATE: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_r = tl.cdiv(R, BLOCK_R)  # programs that share weights follow each other
    tile_f = tl.program_id(0) // num_r
    r = (tl.program_id(0) % num_r).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = r < R
    offs_f = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    x_ptr_r = x_ptr + r * (G * C)
    weight_ptr_f = weight_ptr + offs_f.to(tl.int64) * (G * C)

    acc_f_r = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
    for g in range(G):
        if ACTIVATE:
            scale_r = _row_scale(x_ssq_ptr, r * G + g, mask_r, C, eps)
        for start in range(0, C, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < C
            x_ptr_r_k = x_ptr_r[:, None] + (g * C + offs_k)[None, :]
            x_r_k = tl.load(x_ptr_r_k, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            if ACTIVATE:
                norm_k = load_norm(norm_ptr, offs_k, C)
                normed_r_k = x_r_k.to(tl.float32) * scale_r[:, None] * norm_k[None, :]
                x_r_k = gelu(normed_r_k).to(x_r_k.dtype)
            weight_ptr_f_k = weight_ptr_f[:, None] + (g * C + offs_k)[None, :]
            mask_f_k = mask_f[:, None] & mask_k[None, :]
            weight_f_k = tl.load(weight_ptr_f_k, mask=mask_f_k, other=0.0)
            acc_f_r = tl.dot(weight_f_k, tl.trans(x_r_k), acc_f_r, input_precision="ieee")

    store_rows(y_ptr, r, offs_f, acc_f_r, R, F)
    SLOTS: tl.constexpr = BLOCK_F // SLOT
    ssq_r_s = _sum_pairwise(tl.trans(acc_f_r * acc_f_r), _log2(SLOT))
    offs_s = tile_f * SLOTS + tl.arange(0, SLOTS)
    ssq_ptr_r_s = y_ssq_ptr + r[:, None] * _slots(F, SLOT) + offs_s[None, :]
    mask_r_s = mask_r[:, None] & (offs_s * SLOT < F)[None, :]
    tl.store(ssq_ptr_r_s, ssq_r_s, mask=mask_r_s)


@triton.jit
def final_norm_kernel(
    y_ptr,                    # in   [T, D]
    ssq_ptr,                  # in   [T, S]  squares of y summed by SLOT features
    norm_ptr,                 # in   [D]
    out_ptr,                  # out  [T, D]
    eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    NUM_SLOTS: tl.constexpr = _slots(D, SLOT)
    offs_s = tl.arange(0, NUM_SLOTS)
    ssq_s = tl.load(ssq_ptr + t * NUM_SLOTS + offs_s, mask=offs_s * SLOT < D, other=0.0)
    scale = tl.rsqrt(tl.sum(ssq_s, axis=0) / D + eps)
    y_d = tl.load(y_ptr + t * D + offs_d, mask=mask_d, other=0.0)
    out_d = y_d * scale * load_norm(norm_ptr, offs_d, D)
    tl.store(out_ptr + t * D + offs_d, out_d, mask=mask_d)
