"""Triton kernel of patch_embed's first two folds: uint8 pixels to activated rows."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# Triton's types know neither static_range nor constexpr tuples.

# Dimension key: N frame groups, L frames in a group, H and W pixels, R rows of the second fold,
# K pixels and channels under the first fold, C1 and C2 widths of the two layers.

from __future__ import annotations

import math

import triton
import triton.language as tl

from .products import gelu, load_norm, store_rows

SIZES = ["R", "H", "W", "num_y", "num_x"]  # change from call to call: one compiled kernel for all


@triton.constexpr_function
def _side(folds):
    """Rows of the second fold along one side of a patch."""
    return math.prod(folds[2:])


@triton.constexpr_function
def _tile(size):
    """The least tile a dot takes that holds `size`."""
    return max(16, triton.next_power_of_2(size))


@triton.constexpr_function
def _low_part(size):
    """The largest power of two in `size`, or the least tile: 320 is a tile of 256 and one of 64."""
    return max(16, triton.next_power_of_2(size + 1) // 2)


@triton.jit
def _norm_gelu(x_r_c, ssq_r, norm_c, C: tl.constexpr, eps):
    return gelu(x_r_c * tl.rsqrt(ssq_r / C + eps)[:, None] * norm_c[None, :])


@triton.jit
def _corner(r, num_y, num_x, L: tl.constexpr, FOLDS: tl.constexpr):
    """Frame, y and x of row r of the second fold; y and x count its blocks across the frame."""
    SIDE: tl.constexpr = _side(FOLDS)
    place = r % (SIDE * SIDE)
    patch = r // (SIDE * SIDE)
    token = patch // L
    y = token // num_x % num_y * SIDE
    x = token % num_x * SIDE
    step = 1
    for i in tl.static_range(2, len(FOLDS)):
        x += place % FOLDS[i] * step
        y += place // FOLDS[i] % FOLDS[i] * step
        place = place // (FOLDS[i] * FOLDS[i])
        step = step * FOLDS[i]
    return token // (num_x * num_y) * L + patch % L, y, x


@triton.jit
def _first_weights(
    weight_ptr, offs_c, offs_k,
    FOLD: tl.constexpr, C1: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr,
):  # fmt: skip
    """Weights [C1, K] of pixels on the scale of 0..255, and what normalisation subtracts, [C1].

    w ((pixel - mean) / std) = (w / std) pixel - (w / std) mean: a byte is exact in every operand
    type, and the mean is weighed with the rounded w / std, so that only that rounding is left.
    """
    K: tl.constexpr = FOLD * FOLD * 3
    mask_c_k = (offs_c < C1)[:, None] & (offs_k < K)[None, :]
    w_c_k = tl.load(weight_ptr + offs_c[:, None] * K + offs_k[None, :], mask=mask_c_k, other=0.0)
    channel_k = offs_k % 3
    mean_k = tl.where(channel_k == 0, MEAN[0], tl.where(channel_k == 1, MEAN[1], MEAN[2])) * 255.0
    std_k = tl.where(channel_k == 0, STD[0], tl.where(channel_k == 1, STD[1], STD[2])) * 255.0
    w_c_k = (w_c_k.to(tl.float32) / std_k[None, :]).to(w_c_k.dtype)
    return w_c_k, tl.sum(w_c_k.to(tl.float32) * mean_k[None, :], axis=1)


@triton.jit
def _load_pixels(
    frame_ptr_r, y_r, x_r, mask_r, extent_ptr_r, offs_k, H, W,
    FOLD: tl.constexpr, RAGGED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Bytes [R, K] of the first fold's blocks (y, x), K ordered (dy, dx, channel)."""
    dy_k = offs_k // (FOLD * 3)
    run_k = offs_k % (FOLD * 3)
    inside_r_k = mask_r[:, None] & (dy_k < FOLD)[None, :]
    if RAGGED:
        inside_r_k &= dy_k[None, :] + y_r[:, None] * FOLD < H
        inside_r_k &= run_k[None, :] + x_r[:, None] * (FOLD * 3) < W * 3
    if CUT:
        end_y_r = tl.load(extent_ptr_r, mask=mask_r, other=0)
        end_x_r = tl.load(extent_ptr_r + 1, mask=mask_r, other=0)
        inside_r_k &= dy_k[None, :] + y_r[:, None] * FOLD < end_y_r[:, None]
        inside_r_k &= run_k[None, :] + x_r[:, None] * (FOLD * 3) < end_x_r[:, None] * 3
    ptr_r = frame_ptr_r + (y_r * W + x_r) * (FOLD * 3)
    ptr_r_k = ptr_r[:, None] + (dy_k * (W * 3) + run_k)[None, :]
    return tl.load(ptr_r_k, mask=inside_r_k, other=0), inside_r_k


@triton.jit
def _second_weights(
    weight_ptr, offs_f, offs_c, q, C1: tl.constexpr, C2: tl.constexpr, Q: tl.constexpr
):
    """Weights [C2, C1] of place q of the Q that the second fold joins."""
    ptr_f_c = weight_ptr + offs_f[:, None] * (Q * C1) + q * C1 + offs_c[None, :]
    return tl.load(ptr_f_c, mask=(offs_f < C2)[:, None] & (offs_c < C1)[None, :], other=0.0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["frames_ptr"])
def stem_kernel(
    frames_ptr,               # in   [N, L, H, W, 3]  uint8
    weight_1_ptr,             # in   [C1, K]
    norm_1_ptr,               # in   [C1]
    weight_2_ptr,             # in   [C2, FOLDS[1]^2 * C1]
    norm_2_ptr,               # in   [C2]
    extent_ptr,               # in   [N, 2]  or None
    out_ptr,                  # out  [R, C2]
    R, H, W, num_y, num_x, eps,
    L: tl.constexpr, FOLDS: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    MEAN: tl.constexpr, STD: tl.constexpr, RAGGED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = weight_1_ptr.dtype.element_ty
    FOLD_1: tl.constexpr = FOLDS[0]
    FOLD_2: tl.constexpr = FOLDS[1]
    Q: tl.constexpr = FOLD_2 * FOLD_2
    PART_A: tl.constexpr = _low_part(C2)  # C2 in two tiles: one would be padded up to twofold
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    frame_r, y_r, x_r = _corner(r, num_y, num_x, L, FOLDS)
    frame_ptr_r = frames_ptr + frame_r * H * W * 3
    CUT: tl.constexpr = extent_ptr is not None
    extent_ptr_r = extent_ptr + frame_r // L * 2 if CUT else None
    offs_k = tl.arange(0, _tile(FOLD_1 * FOLD_1 * 3))
    offs_c = tl.arange(0, _tile(C1))
    offs_a = tl.arange(0, PART_A)
    weight_c_k, shift_c = _first_weights(weight_1_ptr, offs_c, offs_k, FOLD_1, C1, MEAN, STD)
    norm_c = load_norm(norm_1_ptr, offs_c, C1)

    # Rows are the products' M side: BLOCK_R < 64 keeps them off wgmma, which must not read h: it is
    # stored to shared memory, and Triton fences it only after the barrier of the weights' copies.
    tl.static_assert(BLOCK_R < 64)
    acc_r_a = tl.zeros([BLOCK_R, PART_A], tl.float32)
    if C2 > PART_A:
        offs_b = PART_A + tl.arange(0, _tile(C2 - PART_A))
        acc_r_b = tl.zeros([BLOCK_R, _tile(C2 - PART_A)], tl.float32)
    for q in range(Q):
        y_q_r, x_q_r = y_r * FOLD_2 + q // FOLD_2, x_r * FOLD_2 + q % FOLD_2
        byte_r_k, inside_r_k = _load_pixels(
            frame_ptr_r, y_q_r, x_q_r, r < R, extent_ptr_r, offs_k, H, W, FOLD_1, RAGGED, CUT
        )
        pixel_r_k = tl.where(inside_r_k, byte_r_k.to(dtype), -1.0)
        h_r_c = tl.dot(pixel_r_k, tl.trans(weight_c_k), input_precision="ieee") - shift_c[None, :]
        h_r_c = _norm_gelu(h_r_c, tl.sum(h_r_c * h_r_c, axis=1), norm_c, C1, eps).to(dtype)
        weight_a_c = _second_weights(weight_2_ptr, offs_a, offs_c, q, C1, C2, Q)
        acc_r_a = tl.dot(h_r_c, tl.trans(weight_a_c), acc_r_a, input_precision="ieee")
        if C2 > PART_A:
            weight_b_c = _second_weights(weight_2_ptr, offs_b, offs_c, q, C1, C2, Q)
            acc_r_b = tl.dot(h_r_c, tl.trans(weight_b_c), acc_r_b, input_precision="ieee")

    ssq_r = tl.sum(acc_r_a * acc_r_a, axis=1)
    if C2 > PART_A:
        ssq_r += tl.sum(acc_r_b * acc_r_b, axis=1)
        norm_b = load_norm(norm_2_ptr, offs_b, C2)
        out_r_b = _norm_gelu(acc_r_b, ssq_r, norm_b, C2, eps)
        store_rows(out_ptr, r, offs_b, tl.trans(out_r_b), R, C2)
    out_r_a = _norm_gelu(acc_r_a, ssq_r, load_norm(norm_2_ptr, offs_a, C2), C2, eps)
    store_rows(out_ptr, r, offs_a, tl.trans(out_r_a), R, C2)
