"""Device functions of sample that find a row's token under top-k, top-p and min-p, in one program.

What is kept is a prefix of the order, so the best draw of all columns is the token if it is kept.
If not, nothing after it is kept either: the best draw of the columns before it is next. Each look
at the row takes only runs of columns that have one of those, which their maxima tell; and where
the masses of runs tell that top-p keeps a column, there is none.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportIndexIssue=false

# Dimension key: V vocabulary, N runs of RUN columns; n and v of a tile.

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    NO_ID,
    gumbel_tile,
    has_slope,
    in_prefix,
    key_value,
    load_tile,
    order_key,
    scale_logit,
    slope_of,
)

ROUNDING = tl.constexpr(3e-5)  # of float32 sums and of exp2, and more


@triton.jit
def list_runs(max_ptr, list_ptr, least, N, BLOCK_N: tl.constexpr):
    """Write the runs with a logit of `least` or more, in order; returns how many."""
    offs_n = tl.arange(0, BLOCK_N)
    max_n = tl.load(max_ptr + offs_n, mask=offs_n < N, other=0.0, cache_modifier=".cg")
    return list_where(list_ptr, (max_n >= least) & (offs_n < N), BLOCK_N)


@triton.jit
def list_where(list_ptr, mask_n, BLOCK_N: tl.constexpr):
    """Write the runs of a mask, in order; returns how many."""
    offs_n = tl.arange(0, BLOCK_N)
    listed_n = mask_n.to(tl.int32)
    place_n = tl.cumsum(listed_n, axis=0) - listed_n
    tl.debug_barrier()  # others may still be reading the last list
    tl.store(list_ptr + place_n, offs_n, mask=listed_n > 0)
    tl.debug_barrier()
    return tl.sum(listed_n, axis=0)


@triton.jit
def load_listed(list_ptr, begin, num_listed, row, V, RUN: tl.constexpr, TILE_N: tl.constexpr):
    """(runs, logits, columns) of the next TILE_N runs of the list; behind its end all are -inf."""
    i_n = begin + tl.arange(0, TILE_N)
    run_n = tl.load(
        list_ptr + i_n, mask=i_n < num_listed, other=tl.cdiv(V, RUN), cache_modifier=".cg"
    )
    x_n_v, v_n_v = load_tile(row, run_n, V, RUN)
    return run_n, x_n_v, v_n_v


@triton.jit
def largest_maximum(max_ptr, k, N, BLOCK_N: tl.constexpr):
    """The k-th largest of the runs' maxima, which k columns reach; -inf of fewer runs."""
    offs_n = tl.arange(0, BLOCK_N)
    max_n = tl.load(max_ptr + offs_n, mask=offs_n < N, other=0.0, cache_modifier=".cg")
    key_n = order_key(max_n)
    key = tl.full([], 0, tl.uint32)
    step = tl.full([], 1 << 30, tl.uint32)
    for _digit in range(16):
        base = key
        for j in tl.static_range(1, 4):
            count = tl.sum(((key_n >= base + j * step) & (offs_n < N)).to(tl.int32), axis=0)
            key = tl.where(count >= k, base + j * step, key)
        step = step >> 2
    return tl.where(k <= N, key_value(key), float("-inf"))


@triton.jit
def kth_largest(
    list_ptr, num_listed, row, k, V, RUN: tl.constexpr, TILE_N: tl.constexpr
):  # fmt: skip
    """The k-th largest logit of the listed runs, two bits of its key at a time."""
    key = tl.full([], 0, tl.uint32)
    step = tl.full([], 1 << 30, tl.uint32)
    for _digit in range(16):
        count1_n_v = tl.zeros([TILE_N, RUN], tl.int32)
        count2_n_v = tl.zeros([TILE_N, RUN], tl.int32)
        count3_n_v = tl.zeros([TILE_N, RUN], tl.int32)
        for i in range(0, num_listed, TILE_N):
            _run_n, x_n_v, _v_n_v = load_listed(list_ptr, i, num_listed, row, V, RUN, TILE_N)
            key_n_v = order_key(x_n_v)
            count1_n_v += (key_n_v >= key + step).to(tl.int32)
            count2_n_v += (key_n_v >= key + 2 * step).to(tl.int32)
            count3_n_v += (key_n_v >= key + 3 * step).to(tl.int32)
        value = (tl.sum(count1_n_v) >= k).to(tl.uint32) + (tl.sum(count2_n_v) >= k).to(tl.uint32)
        key += (value + (tl.sum(count3_n_v) >= k).to(tl.uint32)) * step
        step = step >> 2
    return key_value(key)


@triton.jit
def last_tie(
    list_ptr, num_listed, row, x, k, V, RUN: tl.constexpr, TILE_N: tl.constexpr
):  # fmt: skip
    """The column at which the columns above x, and those equal to it in order, make k."""
    above_n_v = tl.zeros([TILE_N, RUN], tl.int32)
    for i in range(0, num_listed, TILE_N):
        _run_n, x_n_v, _v_n_v = load_listed(list_ptr, i, num_listed, row, V, RUN, TILE_N)
        above_n_v += (x_n_v > x).to(tl.int32)
    before = tl.sum(above_n_v)
    last = before * 0 - 1
    for i in range(0, num_listed, TILE_N):
        _run_n, x_n_v, v_n_v = load_listed(list_ptr, i, num_listed, row, V, RUN, TILE_N)
        tie_n_v = (x_n_v == x).to(tl.int32)
        ties_n = tl.sum(tie_n_v, axis=1)
        rank_n_v = (tl.cumsum(ties_n, axis=0) - ties_n)[:, None] + tl.cumsum(tie_n_v, axis=1)
        is_last_n_v = (tie_n_v > 0) & (before + rank_n_v == k)
        last = tl.maximum(last, tl.max(tl.where(is_last_n_v, v_n_v, -1)))
        before += tl.sum(ties_n, axis=0)
    return last


@triton.jit
def prefix_mass(
    list_ptr, num_listed, row, last_x, last_id, x_max, temperature, V,
    RUN: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Sum of exp(scaled logit) over a prefix, in float64."""
    mass_n_v = tl.zeros([TILE_N, RUN], tl.float64)
    for i in range(0, num_listed, TILE_N):
        _run_n, x_n_v, v_n_v = load_listed(list_ptr, i, num_listed, row, V, RUN, TILE_N)
        mask_n_v = in_prefix(x_n_v, v_n_v, last_x, last_id) & (x_n_v > float("-inf"))
        p_n_v = tl.exp(scale_logit(x_n_v, x_max, temperature))
        mass_n_v += tl.where(mask_n_v, p_n_v, 0.0).to(tl.float64)
    return tl.sum(mass_n_v)


@triton.jit
def most_before(run_ptr, x, x_max, temperature, N, BLOCK_N: tl.constexpr):
    """A bound of the mass before a column with the logit x: all of each run that reaches x."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    max_n = tl.load(run_ptr + offs_n, mask=mask_n, other=float("-inf"), cache_modifier=".cg")
    mass_n = tl.load(run_ptr + 2 * N + offs_n, mask=mask_n, other=0.0, cache_modifier=".cg")
    mass_n *= tl.exp2((max_n - x_max) * slope_of(temperature))
    most = tl.sum(tl.where(max_n >= x, mass_n, 0.0), axis=0)
    return tl.where(has_slope(temperature), most, float("inf"))


@triton.jit
def best_draw(
    list_ptr, num_listed, row, last_x, last_id, x_max, temperature, seed, counter, V,
    RUN: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """(logit, column) of the largest scaled logit + noise of a prefix."""
    score_n_v = tl.full([TILE_N, RUN], float("-inf"), tl.float32)
    best_x_n_v = tl.full([TILE_N, RUN], float("-inf"), tl.float32)
    best_v_n_v = tl.full([TILE_N, RUN], NO_ID, tl.int32)
    for i in range(0, num_listed, TILE_N):
        run_n, x_n_v, v_n_v = load_listed(list_ptr, i, num_listed, row, V, RUN, TILE_N)
        mask_n_v = in_prefix(x_n_v, v_n_v, last_x, last_id) & (x_n_v > float("-inf"))
        next_n_v = scale_logit(x_n_v, x_max, temperature) + gumbel_tile(seed, counter, run_n, RUN)
        # Columns ascend from tile to tile: of equal draws the first stays.
        better_n_v = mask_n_v & (next_n_v > score_n_v)
        score_n_v = tl.where(better_n_v, next_n_v, score_n_v)
        best_x_n_v = tl.where(better_n_v, x_n_v, best_x_n_v)
        best_v_n_v = tl.where(better_n_v, v_n_v, best_v_n_v)
    is_best_n_v = score_n_v == tl.max(score_n_v)
    best = tl.min(tl.where(is_best_n_v, best_v_n_v, NO_ID))
    return tl.max(tl.where(best_v_n_v == best, best_x_n_v, float("-inf"))), best


@triton.jit
def narrow(
    x, token, mass,           # the best draw of all columns, and the mass of all
    largest, x_max,           # the column of the largest logit, and that
    top_k, top_p, min_p, temperature, seed, counter,
    row,                      # see `load_tile`
    max_ptr,                  # in   [3, N]  maxima of the runs; last their masses where top_p < 1
    list_ptr,                 # work [N]
    V, N,
    RUN: tl.constexpr, TILE_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The best draw of what top-k, top-p and min-p keep."""
    num_listed, last_x, last_id = 0, x, token
    drawing = (top_k > 0) & (top_k < V)
    if drawing:
        least = largest_maximum(max_ptr, top_k, N, BLOCK_N)
        num_listed = list_runs(max_ptr, list_ptr, least, N, BLOCK_N)
        last_x = kth_largest(list_ptr, num_listed, row, top_k, V, RUN, TILE_N)
        last_id = last_tie(list_ptr, num_listed, row, last_x, top_k, V, RUN, TILE_N)
        mass = prefix_mass(list_ptr, num_listed, row, last_x, last_id,
                           x_max, temperature, V, RUN, TILE_N)  # fmt: skip
    searching = True
    while searching:
        if drawing:
            x, token = best_draw(list_ptr, num_listed, row, last_x, last_id,
                                 x_max, temperature, seed, counter, V, RUN, TILE_N)  # fmt: skip
        drawing = (token != largest) & (tl.exp(scale_logit(x, x_max, temperature)) < min_p)
        last_x, last_id = x, token - 1
        num_listed = list_runs(max_ptr, list_ptr, x, N, BLOCK_N)
        if (token != largest) & (top_p < 1.0) & (drawing == 0):
            most = most_before(max_ptr, x, x_max, temperature, N, BLOCK_N)
            if most >= (1.0 - ROUNDING) * top_p * mass.to(tl.float32):  # else it is kept
                before = prefix_mass(list_ptr, num_listed, row, last_x, last_id,
                                     x_max, temperature, V, RUN, TILE_N)  # fmt: skip
                drawing = before >= top_p.to(tl.float64) * mass
        searching = drawing
    return token
