"""Triton kernel of paged_attention: one launch, which attends over pages sorted by base.

An item of work is a tile of queries of one session row and KV head, (tokens x query heads of the
group) rows, over one split of the row's pages. Splits begin at fixed places: at every
SPLIT_PAGES-th page of the plan, or with a window, where pages leave the list, at multiples of
SPLIT_PAGES * R positions. Within a split pages go by ascending base with an online softmax; splits
are folded in ascending order, by the program that writes the last partial result of a tile. A page
of which a query sees nothing, and an empty split, leave its values as they were, bitwise. So a
query's bits follow from the keys it sees and the pages they lie in, not from the rows, the tile or
the append it comes with: sums over keys are products with ones, and no sum can be contracted in one
kernel only. That a row's bits do not depend on its place in the tile is for a test on a GPU to
confirm.
"""

# Dimension key: T tokens, S session rows, N = S + 1 rows with the padding as the last, H query
# heads, G KV heads, C head width, P pages, R rows in a page, M page-list columns, K splits,
# B features, X extent; q rows of a tile.

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .products import fold, split_softmax


@triton.jit
def _first_split(length, num_tokens, SPLIT_KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """With a window: in which SPLIT_KEYS positions the oldest visible key of a row lies."""
    return tl.maximum(length - num_tokens - WINDOW + 1, 0) // SPLIT_KEYS


@triton.jit
def _rows(
    start_ptr, length_ptr, count_ptr, T, S, WINDOW: tl.constexpr, TILE: tl.constexpr,
    SPLIT_PAGES: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(tiles, splits) of every row; a row without pages has one split, which is empty."""
    offs_n = tl.arange(0, BLOCK_N)
    begin_n = tl.load(start_ptr + offs_n, mask=offs_n <= S, other=0)
    end_n = tl.load(start_ptr + offs_n + 1, mask=offs_n < S, other=0)
    end_n = tl.where(offs_n == S, T, end_n)
    num_tokens_n = end_n - begin_n
    tiles_n = tl.cdiv(num_tokens_n, TILE)
    if WINDOW is None:
        count_n = tl.load(count_ptr + offs_n, mask=offs_n < S, other=0)
        splits_n = tl.maximum(tl.cdiv(count_n, SPLIT_PAGES), 1)
    else:
        length_n = tl.load(length_ptr + offs_n, mask=offs_n < S, other=0)
        last_n = tl.maximum(length_n - 1, 0) // SPLIT_KEYS
        first_n = _first_split(length_n, num_tokens_n, SPLIT_KEYS, WINDOW)
        splits_n = (last_n - first_n).to(tl.int32) + 1
    return tiles_n, splits_n


@triton.jit
def _find_item(item, tiles_n, items_n, items_end_n, splits_n, G: tl.constexpr):
    """(row, tile, number of the tile in the call, KV head, split, number of splits)"""
    offs_n = tl.arange(0, tiles_n.shape[0])
    s = tl.sum((items_end_n <= item).to(tl.int32), axis=0)
    tiles = tl.sum(tl.where(offs_n == s, tiles_n, 0), axis=0)
    splits = tl.sum(tl.where(offs_n == s, splits_n, 0), axis=0)
    local = item - tl.sum(tl.where(offs_n < s, items_n, 0), axis=0)
    tile = local % tiles
    number = tl.sum(tl.where(offs_n < s, tiles_n, 0), axis=0) + tile
    return s, tile, number, local // tiles % G, local // tiles // G, splits


@triton.jit
def _load_rel(
    rel_ptr, stride_t, stride_h, stride_b, t_q, h_q, mask_q, B,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[q, k], the features again for each of a product's tokens."""
    b_k = tl.arange(0, BLOCK_K) % BLOCK_B
    ptrs = rel_ptr + t_q[:, None] * stride_t + h_q[:, None] * stride_h + b_k[None, :] * stride_b
    return tl.load(ptrs, mask=mask_q[:, None] & (b_k < B)[None, :], other=0.0)


@triton.jit
def _combine(
    part_ml_ptr, part_acc_ptr, part_q, splits, mask_q, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr
):
    """(sum, weighted values) of a tile from its splits' partial results."""
    m_q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l_q_1 = tl.zeros([BLOCK_Q, 1], tl.float32)
    acc_q_c = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    offs_c = tl.arange(0, BLOCK_C)
    for split in tl.range(0, splits, num_stages=6):
        ml_ptrs = part_ml_ptr + (part_q + split) * 2
        next_m_q = tl.load(ml_ptrs, mask=mask_q, other=float("-inf"), cache_modifier=".cg")
        next_l_q = tl.load(ml_ptrs + 1, mask=mask_q, other=0.0, cache_modifier=".cg")
        acc_ptrs = part_acc_ptr + (part_q + split)[:, None] * BLOCK_C + offs_c[None, :]
        next_acc_q_c = tl.load(acc_ptrs, mask=mask_q[:, None], other=0.0, cache_modifier=".cg")
        m_q, l_q_1, acc_q_c = fold(m_q, l_q_1, acc_q_c, next_m_q, next_l_q[:, None], next_acc_q_c)
    return tl.max(l_q_1, axis=1), acc_q_c


@triton.jit
def _write(out_ptr, out_row_q, mask_q, l_q, acc_q_c, C: tl.constexpr):
    """A query that sees nothing has a sum of zero and gives zeros."""
    offs_c = tl.arange(0, acc_q_c.shape[1])
    y_q_c = acc_q_c / tl.where(l_q == 0.0, 1.0, l_q)[:, None]
    mask_q_c = mask_q[:, None] & (offs_c < C)[None, :]
    tl.store(out_ptr + out_row_q[:, None] * C + offs_c[None, :], y_q_c, mask=mask_q_c)


@triton.jit(do_not_specialize=["T", "S", "M", "max_splits", "span"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr,                   # in   [T, H, C], [P, G, R, C] twice
    k_scale_ptr, v_scale_ptr,              # in   [P, G, R] or None
    page_ptr, base_ptr, rows_ptr, count_ptr,  # in   [S, M] three times, [S]  the plan
    position_ptr,                          # in   [P, R] or None
    start_ptr, length_ptr,                 # in   [S + 1], [S]
    rel_ptr, stride_rel_t, stride_rel_h, stride_rel_b,  # in   [T, H, B] or None
    table_ptr,                             # in   [B, X] or None
    counter_ptr, part_ml_ptr, part_acc_ptr,  # work, see `scratch_buffers`
    out_ptr,                               # out  [T, H, C]
    T, S, M, max_splits, span, B, scale, tau_floor, tau_alpha, softcap,
    G: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
    WINDOW: tl.constexpr, TAU: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SPLIT_KEYS: tl.constexpr = SPLIT_PAGES * R
    offs_q, offs_c = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_C)
    tiles_n, splits_n = _rows(start_ptr, length_ptr, count_ptr, T, S, WINDOW, TILE,
                              SPLIT_PAGES, SPLIT_KEYS, BLOCK_N)  # fmt: skip
    items_n = tiles_n * G * splits_n
    items_end_n = tl.cumsum(items_n, axis=0)
    for item in range(tl.program_id(0), tl.sum(items_n, axis=0), tl.num_programs(0)):
        s, tile, number, g, split, splits = _find_item(item, tiles_n, items_n, items_end_n,
                                                       splits_n, G)  # fmt: skip
        begin = tl.load(start_ptr + s)
        end = tl.load(start_ptr + s + 1, mask=s < S, other=0)
        end = tl.where(s < S, end, T)
        length = tl.load(length_ptr + s, mask=s < S, other=0)
        count = tl.load(count_ptr + s, mask=s < S, other=0)
        num_tokens = tl.minimum(end - begin - tile * TILE, TILE)
        pq = length - (end - begin) + tile * TILE  # position of the tile's first token
        first_split = 0
        if WINDOW is not None:
            first_split = _first_split(length, end - begin, SPLIT_KEYS, WINDOW)
        i_q = offs_q // GROUP
        mask_q = i_q < num_tokens
        t_q = (begin + tile * TILE + i_q).to(tl.int64)
        h_q = g * GROUP + offs_q % GROUP
        row_q = t_q * (G * GROUP) + h_q
        q_q_c = tl.load(q_ptr + row_q[:, None] * C + offs_c[None, :],
                        mask=mask_q[:, None] & (offs_c < C)[None, :], other=0.0)  # fmt: skip
        rel_q_k, tau_q = None, None
        if X > 0:
            rel_q_k = _load_rel(rel_ptr, stride_rel_t, stride_rel_h, stride_rel_b, t_q, h_q,
                                mask_q, B, BLOCK_B, BLOCK_K)  # fmt: skip
        if TAU:
            grown_q = tl.maximum((pq + i_q + 1).to(tl.float32) / tau_floor, 1.0)
            tau_q = tl.fma(tl.log(grown_q), tl.full([BLOCK_Q], tau_alpha, tl.float32), 1.0)
        list_start = s.to(tl.int64) * M
        m_q, l_q_16, acc_q_c = split_softmax(
            q_q_c, rel_q_k, tau_q, i_q, num_tokens, pq, split, first_split, count, g,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_ptr + list_start, base_ptr + list_start,
            rows_ptr + list_start, position_ptr, table_ptr, span, scale, softcap, B,
            G, C, R, X, WINDOW, TAU, SOFTCAP, SPLIT_PAGES, TILE, BLOCK_R, BLOCK_B,
        )  # fmt: skip
        _finish(m_q, tl.max(l_q_16, axis=1), acc_q_c, row_q, mask_q, split, splits, max_splits,
                counter_ptr + number * G + g, part_ml_ptr, part_acc_ptr, out_ptr, C)  # fmt: skip


@triton.jit
def _finish(
    m_q, l_q, acc_q_c, row_q, mask_q, split, splits, max_splits,
    counter_ptr, part_ml_ptr, part_acc_ptr, out_ptr, C: tl.constexpr,
):  # fmt: skip
    """Write the only split of a tile, or leave it for the last program of the tile to add up; that
    one leaves the counter at zero for the next call."""
    BLOCK_Q: tl.constexpr = acc_q_c.shape[0]
    BLOCK_C: tl.constexpr = acc_q_c.shape[1]
    if splits == 1:
        _write(out_ptr, row_q, mask_q, l_q, acc_q_c, C)
    else:
        offs_c = tl.arange(0, BLOCK_C)
        part_q = row_q * max_splits
        tl.store(part_ml_ptr + (part_q + split) * 2, m_q, mask=mask_q)
        tl.store(part_ml_ptr + (part_q + split) * 2 + 1, l_q, mask=mask_q)
        acc_ptrs = part_acc_ptr + (part_q + split)[:, None] * BLOCK_C + offs_c[None, :]
        tl.store(acc_ptrs, acc_q_c, mask=mask_q[:, None])
        tl.debug_barrier()  # every thread's values are written before one thread counts them
        before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
        tl.debug_barrier()
        if before == splits - 1:
            l_q, acc_q_c = _combine(part_ml_ptr, part_acc_ptr, part_q, splits, mask_q,
                                    BLOCK_Q, BLOCK_C)  # fmt: skip
            _write(out_ptr, row_q, mask_q, l_q, acc_q_c, C)
            tl.store(counter_ptr, 0)
