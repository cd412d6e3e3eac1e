"""move_pages: check, launch."""

# Dimension key: L layers, P pages of the source, N pages of the target, B elements of a page,
# I moves, M of them without padding.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._ragged import check_below, check_distinct
from ..._registry import CUDA, refuse_grad, register_op


def _plain(from_I: Tensor, to_I: Tensor, source: Tensor, target: Tensor) -> None:
    is_same = _check_memory(from_I.device, source, target)
    num_from, num_to = source.shape[1], target.shape[1]
    if not from_I.is_cuda:
        check_below(num_from, from_I=from_I)
        check_below(num_to, to_I=to_I)
    moved_I = (from_I >= 0) & (from_I < num_from) & (to_I >= 0) & (to_I < num_to)
    from_M, to_M = from_I[moved_I], to_I[moved_I]
    if not from_I.is_cuda:
        check_distinct(to_I=to_M)
        if is_same and (both := from_M[torch.isin(from_M, to_M)]).numel() > 0:
            raise ValueError(f"from_I: page {int(both[0])} of the one pool is also in to_I")
    # Bytes: torch has no indexing of some dtypes.
    pages_L_M_B = source.view(torch.uint8)[:, from_M.to(source.device)]
    target.view(torch.uint8)[:, to_M.to(target.device)] = pages_L_M_B.to(target.device)


def _check_memory(device: torch.device, source: Tensor, target: Tensor) -> bool:
    """Whether the two are one pool. ValueError for memory that cannot be reached from `device`, or
    that the two share in part."""
    for name, pool in (("source_L_P_B", source), ("target_L_N_B", target)):
        if pool.device != device and not pool.is_pinned():
            raise ValueError(
                f"{name}: a GPU reaches memory of the host only where it is pinned; allocate with "
                "pin_memory=True"
            )
    begin, begin_to = source.data_ptr(), target.data_ptr()
    end, end_to = begin + source.nbytes, begin_to + target.nbytes
    if begin == begin_to and source.shape == target.shape:
        return True
    if begin < end_to and begin_to < end:
        raise ValueError(
            f"target_L_N_B: shares memory with source_L_P_B and is not the same tensor: shapes "
            f"{tuple(target.shape)} and {tuple(source.shape)}"
        )
    return False


def _kernel(from_I: Tensor, to_I: Tensor, source: Tensor, target: Tensor) -> None:
    from ... import _cuda

    _check_memory(from_I.device, source, target)
    num_layers, num_from, width = source.shape
    _cuda.move_pages(
        source.data_ptr(), num_from, target.data_ptr(), target.shape[1],
        from_I.data_ptr(), to_I.data_ptr(), from_I.shape[0],
        num_layers, width * source.element_size(),
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip


_op = register_op(
    "move_pages(Tensor from_page, Tensor to_page, Tensor source, Tensor(a!) target) -> ()",
    plain=_plain,
    kernel=_kernel,
    needs=CUDA,
)


def move_pages(source_L_P_B: Tensor, target_L_N_B: Tensor, from_I: Tensor, to_I: Tensor) -> None:
    """target[l, to[i]] = source[l, from[i]] in every layer: copy, gather and scatter in one.

    Pages of any dtype, the same in both pools, moved as bytes. -1 in from or to is padding. Two
    moves must not have one `to`. Source and target may be the same tensor, of which then no page
    may be in both from and to; they must not overlap otherwise. from and to are int64 on the device
    that computes; where that is a GPU, source or target may be pinned memory of the host, which
    the kernel reads or writes directly. Such a tensor must be kept until the copy is done: its
    allocator does not know of the kernel.

    One launch for all layers; neither allocates nor waits for the GPU. Deterministic. Raises
    TypeError or ValueError naming the argument, and for values of from and to on CPU tensors only
    (a page that is not there, a `to` twice, a page in both), before any write; a GPU skips pages
    that are not there. Without `tml_kernels._cuda` a GPU takes plain torch, which allocates the
    pages once more and waits for the GPU, so that no graph can hold it.
    """
    dims = Dims()
    dims.check(from_I=from_I, dtype=torch.int64)
    device = from_I.device
    dims.check(to_I=to_I, dtype=torch.int64, device=device)
    dims.check(source_L_P_B=source_L_P_B)
    dims.check(target_L_N_B=target_L_N_B, dtype=source_L_P_B.dtype)
    host = torch.device("cpu")
    if device not in (source_L_P_B.device, target_L_N_B.device):
        raise ValueError(
            f"from_I: on {device}, but the pools are on {source_L_P_B.device} and "
            f"{target_L_N_B.device}"
        )
    for name, pool in (("source_L_P_B", source_L_P_B), ("target_L_N_B", target_L_N_B)):
        if pool.device not in (device, host):
            raise ValueError(f"{name}: expected device {device} or {host}, got {pool.device}")
    refuse_grad(source_L_P_B, target_L_N_B)
    if dims["L"] * dims["I"] * dims["B"] > 0:
        _op(from_I, to_I, source_L_P_B, target_L_N_B)
