"""Some heads of one token in registers: load, rotate, round, write to a page.

A tile [h, b, 2] holds column b of the first and of the second half of every head: a rotary pair is
two neighbours. Columns beyond an odd width, and heads beyond the last, are zero.
"""

# pyright: reportGeneralTypeIssues=false

# Dimension key: H heads, G KV heads, C head width, B = C / 2 rotary frequencies, P pages, R rows in
# a page.

from __future__ import annotations

import triton
import triton.language as tl

from .e4m3 import to_e4m3


@triton.jit
def heads(block, H: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Head numbers [h], columns in a head [b, 2], and the tile's mask."""
    HALF: tl.constexpr = (C + 1) // 2
    head_h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = tl.arange(0, BLOCK_B)
    column_b_2 = offs_b[:, None] + HALF * tl.arange(0, 2)[None, :]
    mask_b_2 = (offs_b < HALF)[:, None] & (column_b_2 < C)
    return head_h, column_b_2, (head_h < H)[:, None, None] & mask_b_2[None, :, :]


@triton.jit
def load_heads(
    x_ptr, block,
    H: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """float32; x_ptr: column 0 of head 0."""
    head_h, column_b_2, mask_h_b_2 = heads(block, H, C, BLOCK_H, BLOCK_B)
    offs_h_b_2 = head_h[:, None, None] * C + column_b_2[None, :, :]
    return tl.load(x_ptr + offs_h_b_2, mask=mask_h_b_2, other=0.0).to(tl.float32)


@triton.jit
def rotate(x_h_b_2, phase_ptr, position, C: tl.constexpr, BLOCK_B: tl.constexpr):
    """Every pair turns by position * phase[b] / 2^64 of a full turn.

    The wrapping product is cut at 2^62 into quarter turns and a signed rest of at most an eighth,
    in whole numbers: float32 rounds the rest alone. Sine and cosine of the rest are the polynomials
    of Cephes' sinf and cosf, within 1e-7; the same instructions for every token.
    """
    offs_b = tl.arange(0, BLOCK_B)
    phase_b = tl.load(phase_ptr + offs_b, mask=offs_b < C // 2, other=0)
    turns_b = phase_b * position
    quarter_b = (turns_b + (1 << 61)) >> 62  # -2..1, modulo four
    angle_b = ((turns_b << 2) >> 32).to(tl.int32).to(tl.float32) * 3.657295198e-10  # pi / 2 / 2^32
    z_b = angle_b * angle_b
    sine_b = ((-1.9515295891e-4 * z_b + 8.3321608736e-3) * z_b - 1.6666654611e-1) * z_b
    sine_b = sine_b * angle_b + angle_b
    cosine_b = (2.443315711809948e-5 * z_b - 1.388731625493765e-3) * z_b + 4.166664568298827e-2
    cosine_b = cosine_b * z_b * z_b - 0.5 * z_b + 1.0

    is_odd_b = (quarter_b & 1) != 0
    sin_b = tl.where(is_odd_b, cosine_b, sine_b)
    cos_b = tl.where(is_odd_b, sine_b, cosine_b)
    sin_b = tl.where((quarter_b & 2) != 0, -sin_b, sin_b)
    cos_b = tl.where(((quarter_b + 1) & 2) != 0, -cos_b, cos_b)
    low_h_b, high_h_b = tl.split(x_h_b_2)
    turned_low_h_b = low_h_b * cos_b[None, :] - high_h_b * sin_b[None, :]
    turned_high_h_b = high_h_b * cos_b[None, :] + low_h_b * sin_b[None, :]
    return tl.join(turned_low_h_b, turned_high_h_b)


@triton.jit
def write_page(
    x_h_b_2, kv_row_ptr, pages_ptr, scale_ptr, t, block, P,
    G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, IS_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Some heads' keys or values of token t to row kv_row[t] of the pool."""
    head_h, column_b_2, mask_h_b_2 = heads(block, G, C, BLOCK_H, BLOCK_B)
    kv_row = tl.load(kv_row_ptr + t)
    page = kv_row // R
    written = (kv_row >= 0) & (page < P)
    row_h = (page * G + head_h) * R + kv_row % R
    if IS_FP8:
        amax_h = tl.max(tl.max(tl.abs(x_h_b_2), axis=2), axis=1)
        scale_h = tl.div_rn(amax_h, tl.full([BLOCK_H], 448.0, tl.float32))
        scale_h = tl.where(scale_h == 0.0, 1.0, scale_h)
        tl.store(scale_ptr + row_h, scale_h, mask=(head_h < G) & written)
        scale_h_b_2 = tl.broadcast_to(scale_h[:, None, None], x_h_b_2.shape)
        x_h_b_2 = to_e4m3(tl.div_rn(x_h_b_2, scale_h_b_2))
    offs_h_b_2 = row_h[:, None, None] * C + column_b_2[None, :, :]
    tl.store(pages_ptr + offs_h_b_2, x_h_b_2, mask=mask_h_b_2 & written)
