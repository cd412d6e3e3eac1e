"""Triton kernels of flow_head: a block of the network in two launches, no host in between.

The noise and the modulation of all steps and blocks come first: they do not depend on x. Then each
step is an input product, per block `norm_product_kernel` (LN, modulate, up, SiLU) and
`product_kernel` (down, gate, residual), and `velocity_kernel`, which also moves x.

A tile of features is summed by several programs, each over a fixed part of the columns: at few rows
a launch waits for weights, and takes as long as the longest chain of loads. The last to arrive adds
the parts in order. Who writes h leaves the mean and the squares of each row's values in its tile,
so that its readers take their columns once, already knowing the norm. Rows are the narrow side of a
tile, and each its own line of the product.
"""

# pyright: reportGeneralTypeIssues=false
# A jitted function's type is not that of what it returns.

# Dimension key: S session rows, N Euler steps, Q rows evaluated together: S, or 2 S when guided,
# W head width, U inner width of a block's MLP, L blocks, B output values (mel bins), A counters of
# arrivals; of a product: R rows, F features, K columns; r, f, k of a tile, t tiles of features.

from __future__ import annotations

import triton
import triton.language as tl

from ..._philox import FLOW_STREAM
from ..._triton.arrival import is_last
from .reference import EPS

STREAM: tl.constexpr = tl.constexpr(FLOW_STREAM)
LN_EPS: tl.constexpr = tl.constexpr(EPS)
QUARTER_TURN: tl.constexpr = tl.constexpr(1.5707963267948966)
ZEROS: tl.constexpr = tl.constexpr(128)  # counters that a program clears at a time


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
def _load_rows(x_ptr, row_r, stride_r, offs_k, mask_r, K):
    ptr_r_k = x_ptr + row_r.to(tl.int64)[:, None] * stride_r + offs_k[None, :]
    return tl.load(ptr_r_k, mask=mask_r[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def _load_features(vector_ptr, offs_f, F):
    return tl.load(vector_ptr + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(weight_ptr, offs_f, offs_k, F, K):
    """Transposed, [k, f]."""
    ptr_f_k = weight_ptr + offs_f.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask_f_k = (offs_f < F)[:, None] & (offs_k < K)[None, :]
    return tl.trans(tl.load(ptr_f_k, mask=mask_f_k, other=0.0))


@triton.jit
def _top(x):
    """(the upper 8 of x's 24 bits in bfloat16, the others), without the slow conversions."""
    bits = x.to(tl.int32, bitcast=True)
    top = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return top, x - (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _dot(x_r_k, weight_k_f, acc_r_f):
    """acc + x W. A bfloat16 weight times three bfloat16 parts of x, whose sum it is; else three
    tf32 products."""
    if weight_k_f.dtype == tl.bfloat16:
        if x_r_k.dtype == tl.bfloat16:
            acc_r_f = tl.dot(x_r_k, weight_k_f, acc_r_f)
        else:
            high_r_k, rest_r_k = _top(x_r_k.to(tl.float32))
            middle_r_k, rest_r_k = _top(rest_r_k)
            acc_r_f = tl.dot(_top(rest_r_k)[0], weight_k_f, acc_r_f)
            acc_r_f = tl.dot(middle_r_k, weight_k_f, acc_r_f)
            acc_r_f = tl.dot(high_r_k, weight_k_f, acc_r_f)
    else:
        weight_k_f = weight_k_f.to(tl.float32)
        acc_r_f = tl.dot(x_r_k.to(tl.float32), weight_k_f, acc_r_f, input_precision="tf32x3")
    return acc_r_f


@triton.jit
def _place(R, SPLITS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr):
    """(rows, features, split, tile) of a program. Programs that share weights are neighbours."""
    num_r = tl.cdiv(R, BLOCK_R)
    number, block = tl.program_id(0) // num_r, tl.program_id(0) % num_r
    tile_f = number // SPLITS
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_f = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    return r, offs_f, number % SPLITS, tile_f * num_r + block


@triton.jit
def _product(
    x_ptr, stride_x_part, row_r, mask_r, weight_ptr, offs_f, split, F, K,
    X_PARTS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[r, f]: x W^T over one split of the columns; x is the sum of its parts."""
    acc_r_f = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    first = split * SPLIT_K
    for start in range(first, tl.minimum(first + SPLIT_K, K), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        weight_k_f = _load_weight(weight_ptr, offs_f, offs_k, F, K)
        for part in tl.static_range(X_PARTS):
            x_r_k = _load_rows(x_ptr + part * stride_x_part, row_r, K, offs_k, mask_r, K)
            acc_r_f = _dot(x_r_k, weight_k_f, acc_r_f)
    return acc_r_f


@triton.jit
def _norm_product(
    h_ptr, mod_ptr, stride_mod_r, r, mask_r, mean_r, scale_r, weight_ptr, offs_f, split, F, K,
    SPLIT_K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `_product`, of LN(h) (1 + scale) + shift; mod holds shift and scale one by one."""
    acc_r_f = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    first = split * SPLIT_K
    for start in range(first, tl.minimum(first + SPLIT_K, K), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        h_r_k = _load_rows(h_ptr, r, K, offs_k, mask_r, K)
        shift_r_k = _load_rows(mod_ptr, r, stride_mod_r, offs_k, mask_r, K)
        scale_r_k = _load_rows(mod_ptr + K, r, stride_mod_r, offs_k, mask_r, K)
        y_r_k = (h_r_k - mean_r[:, None]) * scale_r[:, None] * (1.0 + scale_r_k) + shift_r_k
        acc_r_f = _dot(y_r_k, _load_weight(weight_ptr, offs_f, offs_k, F, K), acc_r_f)
    return acc_r_f


@triton.jit
def _part_ptrs(part_ptr, tile, SLOTS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of the first of a tile's parts, which lie one after another."""
    offs_r, offs_f = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_F)
    part_ptr += tile.to(tl.int64) * (SLOTS * BLOCK_R * BLOCK_F)
    return part_ptr + offs_r[:, None] * BLOCK_F + offs_f[None, :]


@triton.jit
def _sum_parts(part_ptrs, mask_r, SPLITS: tl.constexpr):
    """In order, all asked for at once."""
    SIZE: tl.constexpr = part_ptrs.shape[0] * part_ptrs.shape[1]
    sum_r_f = tl.zeros(part_ptrs.shape, tl.float32)
    for i in tl.static_range(SPLITS):
        ptrs = part_ptrs + i * SIZE
        sum_r_f += tl.load(ptrs, mask=mask_r[:, None], other=0.0, cache_modifier=".cg")
    return sum_r_f


@triton.jit
def _store_stats(stat_ptr, h_r_f, r, mask_r, offs_f, tile_f, F):
    """Mean of a row's values in this tile, and the sum of their squares around it."""
    count = tl.minimum(F - tile_f * h_r_f.shape[1], h_r_f.shape[1])
    mask_f = (offs_f < F)[None, :]
    mean_r = tl.sum(tl.where(mask_f, h_r_f, 0.0), axis=1) / count
    h_r_f = tl.where(mask_f, h_r_f - mean_r[:, None], 0.0)
    tiles = tl.cdiv(F, h_r_f.shape[1])
    stat_ptr_r = stat_ptr + r.to(tl.int64) * (2 * tiles) + tile_f
    tl.store(stat_ptr_r, mean_r, mask=mask_r)
    tl.store(stat_ptr_r + tiles, tl.sum(h_r_f * h_r_f, axis=1), mask=mask_r)


@triton.jit
def _load_stats(stat_ptr, r, mask_r, K, STAT_F: tl.constexpr, BLOCK_T: tl.constexpr):
    """(mean, 1 / deviation) of rows of K values from what `_store_stats` left of tiles of STAT_F.
    Squares are around means: no cancellation."""
    tiles = tl.cdiv(K, STAT_F)
    offs_t = tl.arange(0, BLOCK_T)
    mask_r_t = mask_r[:, None] & (offs_t < tiles)[None, :]
    stat_ptr_r_t = stat_ptr + r.to(tl.int64)[:, None] * (2 * tiles) + offs_t[None, :]
    mean_r_t = tl.load(stat_ptr_r_t, mask=mask_r_t, other=0.0)
    square_r_t = tl.load(stat_ptr_r_t + tiles, mask=mask_r_t, other=0.0)
    count_t = tl.minimum(tl.maximum(K - offs_t * STAT_F, 0), STAT_F).to(tl.float32)[None, :]
    mean_r = tl.sum(mean_r_t * count_t, axis=1) / K
    mean_r_t -= mean_r[:, None]
    square_r = tl.sum(square_r_t + count_t * mean_r_t * mean_r_t, axis=1)
    return mean_r, 1.0 / tl.sqrt(square_r / K + LN_EPS)


@triton.jit(do_not_specialize=["B", "A"])
def noise_kernel(
    seed_ptr, counter_ptr,            # in   [S]
    x_ptr,                            # out  [S, B]
    arrived_ptr,                      # out  [A]  all zero: counters of the launches that follow
    B, A, BLOCK_I: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    for start in range(tl.program_id(0) * ZEROS, A, tl.num_programs(0) * ZEROS):
        offs_a = start + tl.arange(0, ZEROS)
        tl.store(arrived_ptr + offs_a, tl.zeros([ZEROS], tl.int32), mask=offs_a < A)
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


@triton.jit(do_not_specialize=["S", "Q", "N"])
def condition_kernel(
    x_ptr,                            # in   [S, K]
    weight_ptr, bias_ptr,             # in   [F, K], [F]
    time_ptr, null_ptr,               # in   [N, F], [F]
    counter_ptr, part_ptr,            # work [tiles] all zero; a tile for each program
    act_ptr,                          # out  [N, Q, F]  rows S .. Q - 1 take null, when GUIDED
    S, Q, N, F, K,
    GUIDED: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SiLU of the sums of every step's time and every row's condition."""
    r, offs_f, split, tile = _place(S, SPLITS, BLOCK_F, BLOCK_R)
    mask_r = r < S
    sum_r_f = _product(x_ptr, 0, r, mask_r, weight_ptr, offs_f, split, F, K,
                       1, SPLIT_K, BLOCK_F, BLOCK_R, BLOCK_K)  # fmt: skip
    bias_f = _load_features(bias_ptr, offs_f, F)
    part_ptrs = _part_ptrs(part_ptr, tile, SPLITS, BLOCK_F, BLOCK_R)
    tl.store(part_ptrs + split * (BLOCK_R * BLOCK_F), sum_r_f, mask=mask_r[:, None])
    if is_last(counter_ptr + tile, SPLITS):
        cond_r_f = _sum_parts(part_ptrs, mask_r, SPLITS) + bias_f[None, :]
        mask_r_f = mask_r[:, None] & (offs_f < F)[None, :]
        act_ptr_r_f = act_ptr + r.to(tl.int64)[:, None] * F + offs_f[None, :]
        for n in range(N):
            time_f = _load_features(time_ptr + n * F, offs_f, F)[None, :]
            tl.store(act_ptr_r_f, _silu(time_f + cond_r_f), mask=mask_r_f)
            if GUIDED:
                null_f = time_f + _load_features(null_ptr, offs_f, F)[None, :]
                null_r_f = tl.broadcast_to(_silu(null_f), [BLOCK_R, BLOCK_F])
                tl.store(act_ptr_r_f + S.to(tl.int64) * F, null_r_f, mask=mask_r_f)
            act_ptr_r_f += Q.to(tl.int64) * F


@triton.jit(do_not_specialize=["R", "X"])
def product_kernel(
    x_ptr,                            # in      [X_PARTS, X, K]  row r takes x of r, or of r - X
    weight_ptr, bias_ptr,             # in      [F, K], [F]
    gate_ptr, stride_gate_r,          # in      [R, F]  or None
    counter_ptr, part_ptr,            # work    [tiles] all zero; a tile for each program
    y_ptr,                            # in out  [R, F]  y += gate * product, with a gate
    stat_ptr,                         # out     [R, 2, tiles of F]  see _store_stats; or None
    R, X, F, K,
    SILU: tl.constexpr, X_PARTS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    r, offs_f, split, tile = _place(R, SPLITS, BLOCK_F, BLOCK_R)
    mask_r = r < R
    y_r_f = _product(x_ptr, X.to(tl.int64) * K, tl.where(r < X, r, r - X), mask_r, weight_ptr,
                     offs_f, split, F, K, X_PARTS, SPLIT_K, BLOCK_F, BLOCK_R, BLOCK_K)  # fmt: skip
    # What the last program needs arrives while parts are exchanged.
    mask_r_f = mask_r[:, None] & (offs_f < F)[None, :]
    y_ptr_r_f = y_ptr + r.to(tl.int64)[:, None] * F + offs_f[None, :]
    bias_f = _load_features(bias_ptr, offs_f, F)
    if gate_ptr is not None:
        gate_ptr_r_f = gate_ptr + r.to(tl.int64)[:, None] * stride_gate_r + offs_f[None, :]
        gate_r_f = tl.load(gate_ptr_r_f, mask=mask_r_f, other=0.0)
        before_r_f = tl.load(y_ptr_r_f, mask=mask_r_f, other=0.0)
    last = True
    if SPLITS > 1:
        part_ptrs = _part_ptrs(part_ptr, tile, SPLITS, BLOCK_F, BLOCK_R)
        tl.store(part_ptrs + split * (BLOCK_R * BLOCK_F), y_r_f, mask=mask_r[:, None])
        last = is_last(counter_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            y_r_f = _sum_parts(part_ptrs, mask_r, SPLITS)
        y_r_f += bias_f[None, :]
        if SILU:
            y_r_f = _silu(y_r_f)
        if gate_ptr is not None:
            y_r_f = before_r_f + gate_r_f * y_r_f
        tl.store(y_ptr_r_f, y_r_f, mask=mask_r_f)
        if stat_ptr is not None:
            _store_stats(stat_ptr, y_r_f, r, mask_r, offs_f, tile // tl.cdiv(R, BLOCK_R), F)


@triton.jit(do_not_specialize=["R"])
def norm_product_kernel(
    h_ptr, stat_ptr,                  # in   [R, K], [R, 2, tiles of K]
    mod_ptr, stride_mod_r,            # in   [R, 2, K]  shift, scale
    weight_ptr, bias_ptr,             # in   [F, K], [F]
    counter_ptr, part_ptr,            # work [tiles] all zero; a tile for each program
    y_ptr,                            # out  [R, F], or [3, R, F] of parts in bfloat16
    R, F, K,
    STAT_F: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    r, offs_f, split, tile = _place(R, SPLITS, BLOCK_F, BLOCK_R)
    mask_r = r < R
    mean_r, scale_r = _load_stats(stat_ptr, r, mask_r, K, STAT_F, BLOCK_T)
    part_r_f = _norm_product(
        h_ptr, mod_ptr, stride_mod_r, r, mask_r, mean_r, scale_r, weight_ptr, offs_f, split, F, K,
        SPLIT_K, BLOCK_F, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    bias_f = _load_features(bias_ptr, offs_f, F)
    part_ptrs = _part_ptrs(part_ptr, tile, SPLITS, BLOCK_F, BLOCK_R)
    tl.store(part_ptrs + split * (BLOCK_R * BLOCK_F), part_r_f, mask=mask_r[:, None])
    if is_last(counter_ptr + tile, SPLITS):
        y_r_f = _silu(_sum_parts(part_ptrs, mask_r, SPLITS) + bias_f[None, :])
        y_ptr_r_f = y_ptr + r.to(tl.int64)[:, None] * F + offs_f[None, :]
        mask_r_f = mask_r[:, None] & (offs_f < F)[None, :]
        if y_ptr.dtype.element_ty == tl.bfloat16:  # the smallest first, which is added first
            high_r_f, rest_r_f = _top(y_r_f)
            middle_r_f, rest_r_f = _top(rest_r_f)
            tl.store(y_ptr_r_f, _top(rest_r_f)[0], mask=mask_r_f)
            tl.store(y_ptr_r_f + R.to(tl.int64) * F, middle_r_f, mask=mask_r_f)
            tl.store(y_ptr_r_f + R.to(tl.int64) * (2 * F), high_r_f, mask=mask_r_f)
        else:
            tl.store(y_ptr_r_f, y_r_f, mask=mask_r_f)


@triton.jit(do_not_specialize=["S"])
def velocity_kernel(
    h_ptr, stat_ptr,                  # in      [Q, K], [Q, 2, tiles of K]
    mod_ptr, stride_mod_r,            # in      [Q, 2, K]  shift, scale
    weight_ptr, bias_ptr,             # in      [F, K], [F]
    counter_ptr, part_ptr,            # work    [tiles] all zero; a tile, or two, for each program
    x_ptr,                            # in out  [S, F]  x += v / num_steps
    S, F, K, guidance, num_steps,
    BRANCHES: tl.constexpr,  # 1, or 2 when guided: conditioned, then unconditioned
    STAT_F: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = BLOCK_R * BLOCK_F
    r, offs_f, split, tile = _place(S, SPLITS, BLOCK_F, BLOCK_R)
    mask_r = r < S
    part_ptrs = _part_ptrs(part_ptr, tile, BRANCHES * SPLITS, BLOCK_F, BLOCK_R)
    for branch in tl.static_range(BRANCHES):
        row_r = r + branch * S
        mean_r, scale_r = _load_stats(stat_ptr, row_r, mask_r, K, STAT_F, BLOCK_T)
        part_r_f = _norm_product(
            h_ptr, mod_ptr, stride_mod_r, row_r, mask_r, mean_r, scale_r, weight_ptr, offs_f,
            split, F, K, SPLIT_K, BLOCK_F, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        slot = branch * SPLITS + split
        tl.store(part_ptrs + slot * SIZE, part_r_f, mask=mask_r[:, None])
    bias_f = _load_features(bias_ptr, offs_f, F)
    mask_r_f = mask_r[:, None] & (offs_f < F)[None, :]
    x_ptr_r_f = x_ptr + r.to(tl.int64)[:, None] * F + offs_f[None, :]
    x_r_f = tl.load(x_ptr_r_f, mask=mask_r_f, other=0.0)
    if is_last(counter_ptr + tile, SPLITS):
        v_r_f = _sum_parts(part_ptrs, mask_r, SPLITS) + bias_f[None, :]
        if BRANCHES == 2:
            null_r_f = _sum_parts(part_ptrs + SPLITS * SIZE, mask_r, SPLITS) + bias_f[None, :]
            v_r_f = null_r_f + guidance * (v_r_f - null_r_f)
        tl.store(x_ptr_r_f, x_r_f + v_r_f / num_steps, mask=mask_r_f)
