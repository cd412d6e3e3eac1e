"""apply_deltas: check, launch."""

# Dimension key: U deltas, Q keys of the page table, Z positions, W rows of all pages.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._ragged import check_below, check_distinct
from ..._registry import CUDA, register_op


def _plain(
    delta: Tensor,
    row: Tensor,
    position: Tensor,
    page: Tensor,
    base: Tensor,
    rows: Tensor,
    row_position: Tensor,
) -> None:
    key = delta[:, 0]
    if delta.is_cuda:
        put = put_no_sync
    else:
        put = _put
        check_below(page.shape[0], **{"delta_U_4[:, 0]": key})
        check_below(2**31, **{"delta_U_4[:, 1]": delta[:, 1], "delta_U_4[:, 3]": delta[:, 3]})
        check_below(row_position.shape[0], row_Z=row)
        check_distinct(**{"delta_U_4[:, 0]": key, "row_Z": row})
    put(page, key, delta[:, 1])
    put(base, key, delta[:, 2])
    put(rows, key, delta[:, 3])
    put(row_position, row, position)


def _put(table_Q: Tensor, index_U: Tensor, value_U: Tensor) -> None:
    kept_U = index_U >= 0
    table_Q[index_U[kept_U]] = value_U[kept_U].to(table_Q.dtype)


def put_no_sync(table_Q: Tensor, index_U: Tensor, value_U: Tensor) -> None:
    """As a captured graph can hold it: what is skipped is written to one more place, cut off."""
    size = table_Q.shape[0]
    inside_U = (index_U >= 0) & (index_U < size)
    longer = torch.cat([table_Q, table_Q.new_zeros(1)])
    longer[torch.where(inside_U, index_U, size)] = value_U.to(table_Q.dtype)
    table_Q.copy_(longer[:size])


def _kernel(
    delta: Tensor,
    row: Tensor,
    position: Tensor,
    page: Tensor,
    base: Tensor,
    rows: Tensor,
    row_position: Tensor,
) -> None:
    from ... import _cuda

    _cuda.apply_deltas(
        delta.data_ptr(), delta.shape[0], row.data_ptr(), position.data_ptr(), row.shape[0],
        page.data_ptr(), base.data_ptr(), rows.data_ptr(), page.shape[0],
        row_position.data_ptr(), row_position.shape[0],
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip


_op = register_op(
    "apply_deltas(Tensor delta, Tensor row, Tensor position, Tensor(a!) page, Tensor(b!) base, "
    "Tensor(c!) rows, Tensor(d!) row_position) -> ()",
    plain=_plain,
    kernel=_kernel,
    needs=CUDA,
)


def apply_deltas(
    delta_U_4: Tensor,
    row_Z: Tensor,
    position_Z: Tensor,
    *,
    page_Q: Tensor,
    base_Q: Tensor,
    rows_Q: Tensor,
    row_position_W: Tensor,
) -> None:
    """Writes what a tick changed into the page table on the device, in place.

    delta[u] = (key, page, base, rows): page[key], base[key] and rows[key] become these.
    row_position[row[z]] becomes position[z]. A key or row below 0 is padding and skipped, so that
    buffers of one size serve every tick of a captured graph. Two entries must not share a key, nor
    a row. delta = [[3, 17, 640, 64], [-1, 0, 0, 0]] gives key 3 the page 17, whose 64 rows begin at
    position 640.

    page and rows int32, everything else int64. One launch; neither allocates nor waits for the GPU.
    Deterministic. Raises TypeError or ValueError naming the argument, and for values on CPU tensors
    only (a key, row, page or count that is too large, a key or row twice), before any write; a GPU
    skips a key or row beyond its table. Without `tml_kernels._cuda` a GPU takes plain torch, which
    allocates and copies the tables, and can be captured as well.
    """
    dims = Dims()
    dims.check(delta_U_4=delta_U_4, dtype=torch.int64)
    device = delta_U_4.device
    dims.check(row_Z=row_Z, position_Z=position_Z, dtype=torch.int64, device=device)
    dims.check(page_Q=page_Q, rows_Q=rows_Q, dtype=torch.int32, device=device)
    dims.check(base_Q=base_Q, row_position_W=row_position_W, dtype=torch.int64, device=device)
    if dims["U"] + dims["Z"] > 0:
        _op(delta_U_4, row_Z, position_Z, page_Q, base_Q, rows_Q, row_position_W)
