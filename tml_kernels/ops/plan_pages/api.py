"""plan_pages: check, choose, launch."""

# Dimension key: N table rows, S session rows, M page-list columns.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._page_plan import PagePlan, check_plan
from ..._ragged import check_below
from ..._registry import register_op
from .reference import plan_pages_ref


def _plain(
    page: Tensor,
    base: Tensor,
    rows: Tensor,
    slot: Tensor,
    out_page: Tensor,
    out_base: Tensor,
    out_rows: Tensor,
    count: Tensor,
) -> None:
    check_below(page.shape[0], slot_S=slot)
    plan = plan_pages_ref(page, base, rows, slot)
    for out, value in zip((out_page, out_base, out_rows, count), plan, strict=True):
        out.copy_(value)


def _kernel(*args) -> None:
    from .kernel import launch_plan_pages

    launch_plan_pages(*args)


_op = register_op(
    "plan_pages(Tensor page, Tensor base, Tensor rows, Tensor slot, Tensor(a!) out_page, "
    "Tensor(b!) out_base, Tensor(c!) out_rows, Tensor(d!) count) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def plan_pages(
    page_N_M: Tensor,
    base_N_M: Tensor,
    rows_N_M: Tensor,
    slot_S: Tensor,
    *,
    out: PagePlan | None = None,
) -> PagePlan:
    """The page lists of a call's session rows in the order in which `paged_attention` takes them.

    Row s of the plan is table row slot[s] (-1: idle, no pages): its used entries, those with a page
    id of 0 or more and at least one row, by ascending base, ties by column; then -1, -1 and 0. It
    depends on the lists alone, so one plan serves every layer with these pages, and every step
    until a list changes.

    N = 2, M = 3, S = 2, slot = [1, -1]:
        page = [[4, -1, -1], [7, -1, 3]]   base = [[0, 0, 0], [64, 0, 0]]
        rows = [[9, 0, 0], [6, 0, 64]]
        plan.page = [[3, 7, -1], [-1, -1, -1]]   plan.base = [[0, 64, -1], [-1, -1, -1]]
        plan.rows = [[64, 6, 0], [0, 0, 0]]      plan.count = [2, 0]

    page, rows int32 and base int64, [N, M]; slot int32 [S], a table row may be named twice.
    Integers, so every backend gives the same; one launch. Allocates only when `out` is None; `out`
    must not overlap the lists. Raises TypeError or ValueError naming the argument; on the plain
    path also for slots of N and more, which a GPU takes as idle.
    """
    dims = Dims()
    device = page_N_M.device if isinstance(page_N_M, Tensor) else None
    dims.check(page_N_M=page_N_M, rows_N_M=rows_N_M, dtype=torch.int32, device=device)
    dims.check(base_N_M=base_N_M, dtype=torch.int64, device=device)
    dims.check(slot_S=slot_S, dtype=torch.int32, device=device)
    if out is None:
        out = PagePlan.empty(dims["S"], dims["M"], page_N_M.device)
    else:
        check_plan(out, dims, page_N_M.device, "out")
    if dims["S"] > 0:
        _op(page_N_M, base_N_M, rows_N_M, slot_S, *out)
    return out
