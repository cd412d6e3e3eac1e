"""Triton kernels of flow_head: a block of the network in two launches, no host in between.

The noise, the condition and the modulation of all steps and blocks come first: they do not depend
on x. Then each step is an input product, per block `norm_product_kernel` (LN, modulate, up, SiLU)
and `product_kernel` (down, gate, residual), and `velocity_kernel`, which also moves x.

Features are the tall side of a tile and rows the narrow one, so that a row's sum is its own column,
over K in steps of one size. Products are float32 of three tf32 ones.
"""

# pyright: reportGeneralTypeIssues=false
# A jitted function's type is not that of what it returns.

# Dimension key: S session rows, N Euler steps, Q rows evaluated together: S, or 2 S when guided,
# W head width, U inner width of a block's MLP, L blocks, B output values (mel bins); of a product:
# R rows, F features, K columns; r, f, k of a tile.

from __future__ import annotations

import triton
import triton.language as tl

from ..._philox import FLOW_STREAM
from .reference import EPS

STREAM: tl.constexpr = tl.constexpr(FLOW_STREAM)
LN_EPS: tl.constexpr = tl.constexpr(EPS)
QUARTER_TURN: tl.constexpr = tl.constexpr(1.5707963267948966)
ROWS = ["R", "S", "Q"]  # change from tick to tick: one compiled kernel serves all


@triton.jit
def _uniform(bits):
    """As `_philox.uniform`."""
    u = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return tl.minimum(u, 0.99999994039535522)


@triton.jit
def _turn(u):
    """(cos, sin) of 2 pi u for u in 0..1, by Cephes' polynomials for a quarter turn.

    The library's reduce any angle, by a table in local memory.
    """
    quarter = tl.floor(4.0 * u + 0.5)
    angle = (4.0 * u - quarter) * QUARTER_TURN
    z = angle * angle
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    cos = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    cos = cos * z * z - 0.5 * z + 1.0
    q = quarter.to(tl.int32) % 4
    is_odd = q % 2 == 1
    cos_u = tl.where(is_odd, sin, cos)
    sin_u = tl.where(is_odd, cos, sin)
    return tl.where((q == 1) | (q == 2), -cos_u, cos_u), tl.where(q >= 2, -sin_u, sin_u)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _dot(weight_f_k, x_r_k, acc_f_r):
    weight_f_k = weight_f_k.to(tl.float32)
    return tl.dot(weight_f_k, tl.trans(x_r_k), acc_f_r, input_precision="tf32x3")


@triton.jit
def _load_weight(weight_ptr, offs_f, offs_k, F, K):
    ptr_f_k = weight_ptr + offs_f.to(tl.int64)[:, None] * K + offs_k[None, :]
    return tl.load(ptr_f_k, mask=(offs_f < F)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def _load_rows(x_ptr, r, stride_r, offs_k, mask_r, K):
    ptr_r_k = x_ptr + r.to(tl.int64)[:, None] * stride_r + offs_k[None, :]
    return tl.load(ptr_r_k, mask=mask_r[:, None] & (offs_k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_features(vector_ptr, offs_f, F):
    return tl.load(vector_ptr + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)


@triton.jit
def _tile(R, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr):
    """(features, rows) of this program; programs that share weights follow each other."""
    num_r = tl.cdiv(R, BLOCK_R)
    r = (tl.program_id(0) % num_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    return (tl.program_id(0) // num_r) * BLOCK_F + tl.arange(0, BLOCK_F), r


@triton.jit
def _norm_product(
    h_ptr, mod_ptr, stride_mod_r, weight_ptr, r, mask_r, offs_f, F, K,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[f, r]: weight times (LN(h) (1 + scale) + shift); mod holds shift and scale one by one."""
    sum_r = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        h_r_k = _load_rows(h_ptr, r, K, start + tl.arange(0, BLOCK_K), mask_r, K)
        sum_r += tl.sum(h_r_k, axis=1)
    mean_r = sum_r / K
    square_r = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):  # around the mean: no cancellation
        offs_k = start + tl.arange(0, BLOCK_K)
        h_r_k = _load_rows(h_ptr, r, K, offs_k, mask_r, K) - mean_r[:, None]
        square_r += tl.sum(tl.where((offs_k < K)[None, :], h_r_k * h_r_k, 0.0), axis=1)
    scale_r = 1.0 / tl.sqrt(square_r / K + LN_EPS)

    acc_f_r = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        h_r_k = _load_rows(h_ptr, r, K, offs_k, mask_r, K)
        shift_r_k = _load_rows(mod_ptr, r, stride_mod_r, offs_k, mask_r, K)
        scale_r_k = _load_rows(mod_ptr + K, r, stride_mod_r, offs_k, mask_r, K)
        y_r_k = (h_r_k - mean_r[:, None]) * scale_r[:, None] * (1.0 + scale_r_k) + shift_r_k
        acc_f_r = _dot(_load_weight(weight_ptr, offs_f, offs_k, F, K), y_r_k, acc_f_r)
    return acc_f_r


@triton.jit(do_not_specialize=["B"])
def noise_kernel(
    seed_ptr, counter_ptr,            # in   [S]
    x_ptr,                            # out  [S, B]
    B, BLOCK_I: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr + s)
    counter = tl.load(counter_ptr + s)
    offs_i = tl.arange(0, BLOCK_I)
    low_i = tl.full([BLOCK_I], counter & 0xFFFFFFFF, tl.int64).to(tl.uint32)
    high_i = tl.full([BLOCK_I], (counter >> 32) & 0xFFFFFFFF, tl.int64).to(tl.uint32)
    stream_i = tl.full([BLOCK_I], STREAM, tl.uint32)
    words = tl.philox(seed, offs_i.to(tl.uint32), low_i, high_i, stream_i)
    x_ptr += s * B
    for pair in tl.static_range(2):
        radius_i = tl.sqrt(-2.0 * tl.log(_uniform(words[2 * pair])))
        cos_i, sin_i = _turn(_uniform(words[2 * pair + 1]))
        column_i = 4 * offs_i + 2 * pair
        tl.store(x_ptr + column_i, radius_i * cos_i, mask=column_i < B)
        tl.store(x_ptr + column_i + 1, radius_i * sin_i, mask=column_i + 1 < B)


@triton.jit(do_not_specialize=[*ROWS, "X"])
def product_kernel(
    x_ptr,                            # in      [X, K]  row r takes x of r % X
    weight_ptr, bias_ptr,             # in      [F, K], [F]
    gate_ptr, stride_gate_r,          # in      [R, F]  when GATED
    y_ptr,                            # in out  [R, F]  y += gate * product, when GATED
    R, X, F, K,
    SILU: tl.constexpr, GATED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_f, r = _tile(R, BLOCK_F, BLOCK_R)
    mask_r = r < R
    acc_f_r = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x_r_k = _load_rows(x_ptr, r % X, K, offs_k, mask_r, K)
        acc_f_r = _dot(_load_weight(weight_ptr, offs_f, offs_k, F, K), x_r_k, acc_f_r)
    acc_f_r += _load_features(bias_ptr, offs_f, F)[:, None]
    mask_f_r = (offs_f < F)[:, None] & mask_r[None, :]
    y_ptr_f_r = y_ptr + r.to(tl.int64)[None, :] * F + offs_f[:, None]
    if SILU:
        acc_f_r = _silu(acc_f_r)
    if GATED:
        gate_ptr_f_r = gate_ptr + r.to(tl.int64)[None, :] * stride_gate_r + offs_f[:, None]
        gate_f_r = tl.load(gate_ptr_f_r, mask=mask_f_r, other=0.0)
        acc_f_r = tl.load(y_ptr_f_r, mask=mask_f_r, other=0.0) + gate_f_r * acc_f_r
    tl.store(y_ptr_f_r, acc_f_r, mask=mask_f_r)


@triton.jit(do_not_specialize=ROWS)
def modulation_kernel(
    time_ptr,                         # in   [N, K]
    cond_ptr, null_ptr,               # in   [S, K], [K]  rows S .. Q - 1 take null
    weight_ptr, bias_ptr,             # in   [F, K], [F]
    y_ptr,                            # out  [R, F]  R = N * Q
    R, S, Q, F, K,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_f, r = _tile(R, BLOCK_F, BLOCK_R)
    mask_r = r < R
    n, q = r // Q, r % Q
    acc_f_r = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        time_r_k = _load_rows(time_ptr, n, K, offs_k, mask_r, K)
        cond_r_k = _load_rows(cond_ptr, q, K, offs_k, mask_r & (q < S), K)
        cond_r_k += _load_rows(null_ptr, q * 0, K, offs_k, mask_r & (q >= S), K)
        weight_f_k = _load_weight(weight_ptr, offs_f, offs_k, F, K)
        acc_f_r = _dot(weight_f_k, _silu(time_r_k + cond_r_k), acc_f_r)
    acc_f_r += _load_features(bias_ptr, offs_f, F)[:, None]
    y_ptr_f_r = y_ptr + r.to(tl.int64)[None, :] * F + offs_f[:, None]
    tl.store(y_ptr_f_r, acc_f_r, mask=(offs_f < F)[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=ROWS)
def norm_product_kernel(
    h_ptr,                            # in   [R, K]
    mod_ptr, stride_mod_r,            # in   [R, 2, K]  shift, scale
    weight_ptr, bias_ptr,             # in   [F, K], [F]
    y_ptr,                            # out  [R, F]
    R, F, K,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_f, r = _tile(R, BLOCK_F, BLOCK_R)
    mask_r = r < R
    acc_f_r = _norm_product(
        h_ptr, mod_ptr, stride_mod_r, weight_ptr, r, mask_r, offs_f, F, K,
        BLOCK_F, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    acc_f_r = _silu(acc_f_r + _load_features(bias_ptr, offs_f, F)[:, None])
    y_ptr_f_r = y_ptr + r.to(tl.int64)[None, :] * F + offs_f[:, None]
    tl.store(y_ptr_f_r, acc_f_r, mask=(offs_f < F)[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=ROWS)
def velocity_kernel(
    h_ptr,                            # in      [Q, K]
    mod_ptr, stride_mod_r,            # in      [Q, 2, K]  shift, scale
    weight_ptr, bias_ptr,             # in      [F, K], [F]
    x_ptr,                            # in out  [S, F]  x += v / num_steps
    S, F, K, guidance, num_steps,
    GUIDED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_f, r = _tile(S, BLOCK_F, BLOCK_R)
    mask_r = r < S
    bias_f_r = _load_features(bias_ptr, offs_f, F)[:, None]
    v_f_r = bias_f_r + _norm_product(
        h_ptr, mod_ptr, stride_mod_r, weight_ptr, r, mask_r, offs_f, F, K,
        BLOCK_F, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    if GUIDED:
        null_f_r = bias_f_r + _norm_product(
            h_ptr, mod_ptr, stride_mod_r, weight_ptr, r + S, mask_r, offs_f, F, K,
            BLOCK_F, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        v_f_r = null_f_r + guidance * (v_f_r - null_f_r)
    mask_f_r = (offs_f < F)[:, None] & mask_r[None, :]
    x_ptr_f_r = x_ptr + r.to(tl.int64)[None, :] * F + offs_f[:, None]
    x_f_r = tl.load(x_ptr_f_r, mask=mask_f_r, other=0.0)
    tl.store(x_ptr_f_r, x_f_r + v_f_r / num_steps, mask=mask_f_r)
