"""What planning the page lists gives, and attention reads."""

# Dimension key: S session rows of a call, M page-list columns.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._dims import Dims


class PagePlan(NamedTuple):
    """The pages of every session row by ascending base, the used ones first.

    page, rows: int32 [S, M]; base: int64 [S, M]; count: int32 [S].

    Row s uses places 0..count[s] - 1; behind them page and base are -1 and rows is 0. The base is
    the position of a page's first row, and rows 0..rows - 1 hold keys.
    """

    page_S_M: Tensor
    base_S_M: Tensor
    rows_S_M: Tensor
    count_S: Tensor

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, device: torch.device | str) -> PagePlan:
        """Unwritten tensors for `plan_pages(..., out=)`."""
        shape = (num_rows, num_columns)
        return cls(
            page_S_M=torch.empty(shape, dtype=torch.int32, device=device),
            base_S_M=torch.empty(shape, dtype=torch.int64, device=device),
            rows_S_M=torch.empty(shape, dtype=torch.int32, device=device),
            count_S=torch.empty(num_rows, dtype=torch.int32, device=device),
        )


def check_plan(plan: PagePlan, dims: Dims, device: torch.device, name: str) -> None:
    """TypeError or ValueError naming the field unless each has its shape, dtype and device."""
    if not isinstance(plan, PagePlan):
        raise TypeError(f"{name}: expected a PagePlan, got {type(plan).__name__}")
    dtypes = (torch.int32, torch.int64, torch.int32, torch.int32)
    for field, dtype in zip(plan._fields, dtypes, strict=True):
        named = {f"{name}.{field}": getattr(plan, field)}
        dims.check(dtype=dtype, device=device, contiguous=True, **named)
