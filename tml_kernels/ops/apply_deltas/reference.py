"""The oracle of apply_deltas: entry by entry."""

# Dimension key: U deltas, Q keys of the page table, Z positions, W rows of all pages.

from __future__ import annotations

import torch
from torch import Tensor


def apply_deltas_ref(
    delta_U_4: Tensor,
    row_Z: Tensor,
    position_Z: Tensor,
    *,
    page_Q: Tensor,
    base_Q: Tensor,
    rows_Q: Tensor,
    row_position_W: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(page, base, rows, row_position) afterwards, as new tensors.

    Entry (key, page, base, rows) is written to place `key` of three tables, position[z] to place
    row[z] of the fourth; places that are not there are skipped.
    """
    tables = (page_Q, base_Q, rows_Q, row_position_W)
    page, base, rows, row_position = (table.tolist() for table in tables)
    for key, *values in delta_U_4.tolist():
        if 0 <= key < len(page):
            page[key], base[key], rows[key] = values
    for row, position in zip(row_Z.tolist(), position_Z.tolist(), strict=True):
        if 0 <= row < len(row_position):
            row_position[row] = position

    def made(values: list[int], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)

    return (
        made(page, page_Q),
        made(base, base_Q),
        made(rows, rows_Q),
        made(row_position, row_position_W),
    )
