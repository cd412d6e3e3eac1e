"""Some rows of a matrix, plain or packed: what one of several ranks keeps of it."""

# Dimension key: E experts, R rows, N rows taken, B blocks of 128 rows.

from __future__ import annotations

from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from .packed import PackedExperts

SCALE_ROWS = 128  # that share a scale in fp8


@overload
def take_rows(matrix: Tensor, row_N: Tensor) -> Tensor: ...
@overload
def take_rows(matrix: PackedExperts, row_N: Tensor) -> PackedExperts: ...
def take_rows(matrix: Tensor | PackedExperts, row_N: Tensor) -> Tensor | PackedExperts:
    """Rows `row_N` (int64, where the matrix is) of a matrix [R, K], or of every expert: a copy.

    The same bits stand for the same numbers: nothing is rounded again. Raises ValueError where
    fp8 rows that would share a scale come from blocks with different ones.
    """
    if isinstance(matrix, Tensor):
        return matrix.index_select(-2, row_N)
    scale = matrix.scale
    if scale is not None and matrix.format.name == "fp8":
        scale = scale.index_select(1, _blocks(row_N))
    elif scale is not None:
        scale = scale.index_select(-1, row_N)
    return replace(
        matrix,
        data=matrix.data.index_select(-2, row_N),
        scale=scale,
        zero=None if matrix.zero is None else matrix.zero.index_select(-1, row_N),
        num_rows=row_N.shape[0],
    )


def _blocks(row_N: Tensor) -> Tensor:
    """The block of fp8 scales that each 128 of the rows taken come from."""
    blocks_B = []
    for part in (row_N // SCALE_ROWS).split(SCALE_ROWS):
        if part.min() != part.max():
            raise ValueError(
                f"rows: fp8 has a scale for {SCALE_ROWS} rows, and {len(part)} that would share "
                f"one come from blocks {int(part.min())} to {int(part.max())}; fp8_channel has a "
                "scale for every row"
            )
        blocks_B.append(part[:1])
    return torch.cat(blocks_B)
