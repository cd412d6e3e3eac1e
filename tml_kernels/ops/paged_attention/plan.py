"""The plan of paged_attention: page lists sorted by position, and counters cleared."""

# Dimension key: S session rows, N = S + 1 rows with the padding as the last, R rows in a page,
# M page-list columns; m pages that a program ranks, j pages they are compared with.

# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S", "M", "num_counters"])
def plan_kernel(
    page_ptr, base_ptr,         # in   [S, M]
    start_ptr, length_ptr,      # in   [S + 1], [S]
    sorted_page_ptr, sorted_base_ptr, count_ptr,  # out  [N, M], [N, M], [N]
    counter_ptr,                # out  [num_counters] cleared
    S, M, num_counters,
    R: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Every page's rank among those of its row that some query sees (without a window: that begin
    before the row's end)."""
    s = tl.program_id(0)
    program = tl.program_id(1) * tl.num_programs(0) + s
    offs_j = tl.arange(0, BLOCK_J)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for begin in range(program * BLOCK_J, num_counters, programs * BLOCK_J):
        tl.store(counter_ptr + begin + offs_j, 0, mask=begin + offs_j < num_counters)

    is_row = s < S
    end = tl.load(length_ptr + s, mask=is_row, other=0)
    first = end - tl.load(start_ptr + s + 1, mask=is_row, other=0) + tl.load(start_ptr + s)
    row = s.to(tl.int64) * M
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M) & is_row
    page_m = tl.load(page_ptr + row + offs_m, mask=mask_m, other=-1)
    base_m = tl.load(base_ptr + row + offs_m, mask=mask_m, other=0)
    rank_m = tl.zeros([BLOCK_M], tl.int32)
    count = 0
    for begin in range(0, M, BLOCK_J):
        m_j = begin + offs_j
        mask_j = (m_j < M) & is_row
        page_j = tl.load(page_ptr + row + m_j, mask=mask_j, other=-1)
        base_j = tl.load(base_ptr + row + m_j, mask=mask_j, other=0)
        seen_j = _is_seen(page_j, base_j, first, end, R, WINDOW)
        before_m_j = base_j[None, :] < base_m[:, None]
        before_m_j |= (base_j[None, :] == base_m[:, None]) & (m_j[None, :] < offs_m[:, None])
        rank_m += tl.sum((before_m_j & seen_j[None, :]).to(tl.int32), axis=1)
        count += tl.sum(seen_j.to(tl.int32), axis=0)
    seen_m = _is_seen(page_m, base_m, first, end, R, WINDOW)
    tl.store(sorted_page_ptr + row + rank_m, page_m, mask=seen_m)
    tl.store(sorted_base_ptr + row + rank_m, base_m, mask=seen_m)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + s, count)


@triton.jit
def _is_seen(page, base, first, end, R: tl.constexpr, WINDOW: tl.constexpr):
    seen = (page >= 0) & (base < end)
    if WINDOW is not None:
        seen = seen & (base + R + WINDOW > first + 1)
    return seen
