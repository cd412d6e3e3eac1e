"""Triton kernels of paged_attention: the plan sorts the page lists, then one kernel attends.

An item of work is a tile of queries of one session row and KV head, (tokens x query heads of the
group) rows, over one split of the row's pages, or over all of them where there are tiles enough.
Splits begin at fixed places: at every SPLIT_PAGES-th page of the sorted list, or with a
window, where pages leave the list, at multiples of SPLIT_PAGES * R positions. Within a split pages
go by ascending position with an online softmax; splits are folded in ascending order, in registers
or by the program that writes the last partial result of a tile. A page of which a query sees
nothing, and an empty split, leave its values as they were, bitwise. So a query's bits follow from
the keys it sees, not from the rows, the tile or the append it comes with: sums over keys are
products with ones, and no sum can be contracted in one kernel only. That a row's bits do not depend
on the height of its tile and its place in there is for a test on a GPU to confirm.
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
def _first_span(length, num_tokens, SPAN: tl.constexpr, WINDOW: tl.constexpr):
    """With a window: in which span of SPAN positions the oldest visible key of a row lies."""
    return tl.maximum(length - num_tokens - WINDOW + 1, 0) // SPAN


@triton.jit
def _rows(
    start_ptr, length_ptr, count_ptr, T, S, G: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, SPLIT_PAGES: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(tiles, splits) of every row; a row without pages has one split, which is empty."""
    offs_n = tl.arange(0, BLOCK_N)
    begin_n = tl.load(start_ptr + offs_n, mask=offs_n <= S, other=0)
    end_n = tl.load(start_ptr + offs_n + 1, mask=offs_n < S, other=0)
    end_n = tl.where(offs_n == S, T, end_n)
    num_tokens_n = end_n - begin_n
    tiles_n = tl.cdiv(num_tokens_n, TILE)
    if WINDOW is None:
        count_n = tl.load(count_ptr + offs_n, mask=offs_n <= S, other=0)
        splits_n = tl.maximum(tl.cdiv(count_n, SPLIT_PAGES), 1)
    else:
        length_n = tl.load(length_ptr + offs_n, mask=offs_n < S, other=0)
        last_n = tl.maximum(length_n - 1, 0) // SPAN
        splits_n = (last_n - _first_span(length_n, num_tokens_n, SPAN, WINDOW)).to(tl.int32) + 1
    return tiles_n, splits_n


@triton.jit
def _find_item(item, tiles_n, splits_n, items_n, items_end_n, G: tl.constexpr):
    """(row, tile, KV head, split, number of splits)"""
    offs_n = tl.arange(0, tiles_n.shape[0])
    s = tl.sum((items_end_n <= item).to(tl.int32), axis=0)
    tiles = tl.sum(tl.where(offs_n == s, tiles_n, 0), axis=0)
    splits = tl.sum(tl.where(offs_n == s, splits_n, 0), axis=0)
    local = item - tl.sum(tl.where(offs_n < s, items_n, 0), axis=0)
    return s, local % tiles, local // tiles % G, local // tiles // G, splits


@triton.jit
def _load_rel(
    rel_ptr, stride_t, stride_h, stride_b, t_q, h_q, mask_q, B, BLOCK_B: tl.constexpr
):  # fmt: skip
    offs_b = tl.arange(0, BLOCK_B)
    ptrs = rel_ptr + t_q[:, None] * stride_t + h_q[:, None] * stride_h + offs_b[None, :] * stride_b
    return tl.load(ptrs, mask=mask_q[:, None] & (offs_b < B)[None, :], other=0.0)


@triton.jit
def _combine(
    part_ml_ptr, part_acc_ptr, part_q, splits, mask_q, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr
):
    """(sum, weighted values) of a tile from its splits' partial results."""
    m_q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l_q_1 = tl.zeros([BLOCK_Q, 1], tl.float32)
    acc_q_c = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    offs_c = tl.arange(0, BLOCK_C)
    for split in tl.range(0, splits, num_stages=3):
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


@triton.jit(do_not_specialize=["T", "S", "M", "max_splits"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr,                   # in   [T, H, C], [P, G, R, C] twice
    k_scale_ptr, v_scale_ptr,              # in   [P, G, R] or None
    start_ptr, length_ptr,                 # in   [S + 1], [S]
    sorted_page_ptr, sorted_base_ptr, count_ptr,  # in   [N, M], [N, M], [N]  of the plan
    rel_ptr, stride_rel_t, stride_rel_h, stride_rel_b,  # in   [T, H, B] or None
    table_ptr,                             # in   [B, X] or None
    counter_ptr, part_ml_ptr, part_acc_ptr,  # work, see `scratch_buffers`
    out_ptr,                               # out  [T, H, C]
    T, S, M, max_splits, B, scale, tau_floor, tau_alpha, softcap,
    G: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
    WINDOW: tl.constexpr, TAU: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT_PAGES: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_Q // GROUP
    SPAN: tl.constexpr = SPLIT_PAGES * R
    offs_q, offs_c = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_C)
    tiles_n, splits_n = _rows(start_ptr, length_ptr, count_ptr, T, S, G, WINDOW, TILE,
                              SPLIT_PAGES, SPAN, BLOCK_N)  # fmt: skip
    items_n = tiles_n * G if WHOLE else tiles_n * G * splits_n
    items_end_n = tl.cumsum(items_n, axis=0)
    for item in range(tl.program_id(0), tl.sum(items_n, axis=0), tl.num_programs(0)):
        s, tile, g, split, splits = _find_item(item, tiles_n, splits_n, items_n, items_end_n, G)
        begin = tl.load(start_ptr + s)
        end = tl.load(start_ptr + s + 1, mask=s < S, other=0)
        end = tl.where(s < S, end, T)
        length = tl.load(length_ptr + s, mask=s < S, other=0)
        num_tokens = tl.minimum(end - begin - tile * TILE, TILE)
        pq = length - (end - begin) + tile * TILE  # position of the tile's first token
        first_span = 0
        if WINDOW is not None:
            first_span = _first_span(length, end - begin, SPAN, WINDOW)
        i_q = offs_q // GROUP
        mask_q = i_q < num_tokens
        t_q = (begin + tile * TILE + i_q).to(tl.int64)
        h_q = g * GROUP + offs_q % GROUP
        row_q = t_q * (G * GROUP) + h_q
        q_q_c = tl.load(q_ptr + row_q[:, None] * C + offs_c[None, :],
                        mask=mask_q[:, None] & (offs_c < C)[None, :], other=0.0)  # fmt: skip
        rel_q_b, tau_q = None, None
        if X > 0:
            rel_q_b = _load_rel(rel_ptr, stride_rel_t, stride_rel_h, stride_rel_b, t_q, h_q,
                                mask_q, B, BLOCK_B)  # fmt: skip
        if TAU:
            grown_q = tl.maximum((pq + i_q + 1).to(tl.float32) / tau_floor, 1.0)
            tau_q = tl.fma(tl.log(grown_q), tl.full([BLOCK_Q], tau_alpha, tl.float32), 1.0)
        _splits(
            split, splits, max_splits, counter_ptr + (begin + tile * TILE) * G + g,
            row_q, mask_q, q_q_c, rel_q_b, tau_q, i_q, num_tokens, pq, first_span,
            tl.load(count_ptr + s), g,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sorted_page_ptr + s.to(tl.int64) * M,
            sorted_base_ptr + s.to(tl.int64) * M, table_ptr,
            part_ml_ptr, part_acc_ptr, out_ptr, scale, softcap, B,
            G, C, R, X, WINDOW, TAU, SOFTCAP, SPLIT_PAGES, WHOLE, BLOCK_R, BLOCK_W,
        )  # fmt: skip


@triton.jit
def _splits(
    split, splits, max_splits, counter_ptr, row_q, mask_q, q_q_c, rel_q_b, tau_q, i_q,
    num_tokens, pq, first_span, count, g,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sorted_page_ptr, sorted_base_ptr, table_ptr,
    part_ml_ptr, part_acc_ptr, out_ptr, scale, softcap, B,
    G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr, WINDOW: tl.constexpr,
    TAU: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT_PAGES: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One split of a tile; all of them when WHOLE, and then what has been added up waits in the
    scratch while the next split needs the registers."""
    BLOCK_Q: tl.constexpr = q_q_c.shape[0]
    BLOCK_C: tl.constexpr = q_q_c.shape[1]
    offs_c = tl.arange(0, BLOCK_C)
    m_q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l_q_16 = tl.zeros([BLOCK_Q, 16], tl.float32)
    acc_q_c = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    if WHOLE:
        acc_ptrs = part_acc_ptr + row_q[:, None] * BLOCK_C + offs_c[None, :]
        for k in range(splits):
            next_m_q, next_l_q_16, next_acc_q_c = split_softmax(
                q_q_c, rel_q_b, tau_q, i_q, num_tokens, pq, k, first_span, count, g,
                k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sorted_page_ptr, sorted_base_ptr, table_ptr,
                scale, softcap, B, G, C, R, X, WINDOW, TAU, SOFTCAP, SPLIT_PAGES, BLOCK_R, BLOCK_W,
            )  # fmt: skip
            tl.debug_barrier()  # other threads may have written what this one reads
            sum_q_c = tl.load(acc_ptrs, mask=mask_q[:, None] & (k > 0), other=0.0,
                              cache_modifier=".cg")  # fmt: skip
            tl.debug_barrier()
            m_q, l_q_16, sum_q_c = fold(m_q, l_q_16, sum_q_c,
                                        next_m_q, next_l_q_16, next_acc_q_c)  # fmt: skip
            tl.store(acc_ptrs, sum_q_c, mask=mask_q[:, None])
        tl.debug_barrier()
        acc_q_c = tl.load(acc_ptrs, mask=mask_q[:, None], other=0.0, cache_modifier=".cg")
        _write(out_ptr, row_q, mask_q, tl.max(l_q_16, axis=1), acc_q_c, C)
    else:
        next_m_q, next_l_q_16, next_acc_q_c = split_softmax(
            q_q_c, rel_q_b, tau_q, i_q, num_tokens, pq, split, first_span, count, g,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sorted_page_ptr, sorted_base_ptr, table_ptr,
            scale, softcap, B, G, C, R, X, WINDOW, TAU, SOFTCAP, SPLIT_PAGES, BLOCK_R, BLOCK_W,
        )  # fmt: skip
        m_q, l_q_16, acc_q_c = fold(m_q, l_q_16, acc_q_c, next_m_q, next_l_q_16, next_acc_q_c)
        l_q = tl.max(l_q_16, axis=1)
        if splits == 1:
            _write(out_ptr, row_q, mask_q, l_q, acc_q_c, C)
        else:
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
