"""Triton kernel of plan_pages: every page's rank among those of its list, by comparison."""

# Dimension key: N table rows, S session rows, M page-list columns; m pages that a program ranks, j
# pages they are compared with.

# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from .configs import LONG, SHORT, Config, Problem, choose_config


@triton.jit(do_not_specialize=["N", "M"])
def plan_pages_kernel(
    page_ptr, base_ptr, rows_ptr,  # in   [N, M]
    slot_ptr,                      # in   [S]
    out_page_ptr, out_base_ptr, out_rows_ptr,  # out  [S, M]
    count_ptr,                     # out  [S]
    N, M, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + s).to(tl.int64)
    is_live = (slot >= 0) & (slot < N)
    row = slot * M
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M) & is_live
    page_m = tl.load(page_ptr + row + offs_m, mask=mask_m, other=-1)
    base_m = tl.load(base_ptr + row + offs_m, mask=mask_m, other=0)
    rows_m = tl.load(rows_ptr + row + offs_m, mask=mask_m, other=0)
    rank_m = tl.zeros([BLOCK_M], tl.int32)
    count = 0
    for begin in range(0, M, BLOCK_J):
        m_j = begin + tl.arange(0, BLOCK_J)
        mask_j = (m_j < M) & is_live
        page_j = tl.load(page_ptr + row + m_j, mask=mask_j, other=-1)
        base_j = tl.load(base_ptr + row + m_j, mask=mask_j, other=0)
        rows_j = tl.load(rows_ptr + row + m_j, mask=mask_j, other=0)
        used_j = (page_j >= 0) & (rows_j > 0)
        before_m_j = base_j[None, :] < base_m[:, None]
        before_m_j |= (base_j[None, :] == base_m[:, None]) & (m_j[None, :] < offs_m[:, None])
        rank_m += tl.sum((before_m_j & used_j[None, :]).to(tl.int32), axis=1)
        count += tl.sum(used_j.to(tl.int32), axis=0)
    used_m = (page_m >= 0) & (rows_m > 0)
    out = s * M
    tl.store(out_page_ptr + out + rank_m, page_m, mask=used_m)
    tl.store(out_base_ptr + out + rank_m, base_m, mask=used_m)
    tl.store(out_rows_ptr + out + rank_m, rows_m, mask=used_m)
    # Places behind the used ones: no page has their rank, so no other program writes them.
    spare_m = (offs_m >= count) & (offs_m < M)
    tl.store(out_page_ptr + out + offs_m, -1, mask=spare_m)
    tl.store(out_base_ptr + out + offs_m, -1, mask=spare_m)
    tl.store(out_rows_ptr + out + offs_m, 0, mask=spare_m)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + s, count)


def launch_plan_pages(
    page: Tensor,
    base: Tensor,
    rows: Tensor,
    slot: Tensor,
    out_page: Tensor,
    out_base: Tensor,
    out_rows: Tensor,
    count: Tensor,
    config: Config | None = None,
) -> None:
    """Arguments as of the op."""
    num_rows, num_columns = out_page.shape
    config = config or choose_config(Problem(num_rows, num_columns))
    grid = (num_rows, max(1, triton.cdiv(num_columns, config.block_m)))
    plan_pages_kernel[grid](
        page, base, rows, slot, out_page, out_base, out_rows, count,
        page.shape[0], num_columns,
        BLOCK_M=config.block_m, BLOCK_J=config.block_j, num_warps=config.num_warps,
    )  # fmt: skip


def aot_specs() -> list[AotSpec]:
    signature = dict.fromkeys(plan_pages_kernel.arg_names[:8], "*i32") | {"N": "i32", "M": "i32"}
    signature |= {"base_ptr": "*i64", "out_base_ptr": "*i64"}
    return [
        AotSpec(
            kernel=plan_pages_kernel,
            config=config,
            signature=signature,
            constexprs={"BLOCK_M": config.block_m, "BLOCK_J": config.block_j},
            num_warps=config.num_warps,
        )
        for config in (SHORT, LONG)
    ]
