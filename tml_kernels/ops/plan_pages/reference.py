"""The oracle of plan_pages, and its plain path."""

# Dimension key: N table rows, S session rows, M page-list columns.

from __future__ import annotations

import torch
from torch import Tensor

from ..._page_plan import PagePlan


def plan_pages_ref(
    page_N_M: Tensor, base_N_M: Tensor, rows_N_M: Tensor, slot_S: Tensor
) -> PagePlan:
    """Integers: there is one right answer, and every backend gives it."""
    if page_N_M.shape[0] == 0:
        plan = PagePlan.empty(slot_S.shape[0], page_N_M.shape[1], page_N_M.device)
        for tensor, unused in zip(plan, (-1, -1, 0, 0), strict=True):
            tensor.fill_(unused)
        return plan
    slot_S_long = slot_S.long().clamp(min=0)
    page_S_M, base_S_M, rows_S_M = (x[slot_S_long] for x in (page_N_M, base_N_M, rows_N_M))
    used_S_M = (page_S_M >= 0) & (rows_S_M > 0) & (slot_S >= 0)[:, None]
    by_base_S_M = base_S_M.argsort(dim=1, stable=True)
    unused_S_M = (~used_S_M).gather(1, by_base_S_M).byte()
    order_S_M = by_base_S_M.gather(1, unused_S_M.argsort(dim=1, stable=True))
    used_S_M = used_S_M.gather(1, order_S_M)
    return PagePlan(
        page_S_M=torch.where(used_S_M, page_S_M.gather(1, order_S_M), -1),
        base_S_M=torch.where(used_S_M, base_S_M.gather(1, order_S_M), -1),
        rows_S_M=torch.where(used_S_M, rows_S_M.gather(1, order_S_M), 0),
        count_S=used_S_M.sum(dim=1).int(),
    )
