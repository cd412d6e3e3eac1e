"""Contents of pages on their way: between pages, to host memory and back."""

# Dimension key: L layers of a group, P pages, B elements of a page in one layer, I pages moved.

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .._core import CopyCommand, PageRef
from ..ops.move_pages import move_pages
from .pools import GroupPages

Contents = list[dict[str, Tensor]]  # of each group, what its pages hold: [layers, pages, elements]


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy, int64, without waiting: the caller may use its buffer again."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.int64))
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_pages(
    groups: Sequence[GroupPages], copies: Iterable[CopyCommand], device: torch.device
) -> None:
    """Whole pages: rows that are not used yet may hold anything."""
    copies = list(copies)
    for g in sorted({copy.group for copy in copies}):
        pairs = [(copy.source, copy.target) for copy in copies if copy.group == g]
        source_I, target_I = to_device(np.array(pairs).T, device)
        for x_L_P_B in groups[g].contents().values():
            move_pages(x_L_P_B, x_L_P_B, source_I, target_I)


def gather(
    groups: Sequence[GroupPages], refs: Iterable[PageRef], device: torch.device, *, to_host: bool
) -> Contents:
    """Copies of the pages, in the order of `refs`. On a GPU, host memory is pinned and written by
    the kernel: it holds the contents once the stream has come that far."""
    contents: Contents = []
    try:
        for group, page_I in _by_group(groups, refs, device):
            place_I, part = torch.arange(len(page_I), device=device), {}
            contents.append(part)
            for name, x_L_P_B in group.contents().items():
                part[name] = torch.empty(
                    (x_L_P_B.shape[0], len(page_I), x_L_P_B.shape[2]),
                    dtype=x_L_P_B.dtype,
                    device="cpu" if to_host else device,
                    pin_memory=to_host and device.type == "cuda",
                )
                move_pages(x_L_P_B, part[name], page_I, place_I)
    except BaseException:
        if device.type == "cuda":  # kernels that are queued write to pinned memory, now let go of
            torch.cuda.synchronize(device)
        raise
    return contents


def scatter(
    groups: Sequence[GroupPages],
    refs: Iterable[PageRef],
    contents: Contents,
    device: torch.device,
) -> None:
    """Contents to the pages of `refs`. Pinned memory must be kept until the stream has read it."""
    for (group, page_I), part in zip(_by_group(groups, refs, device), contents, strict=True):
        place_I = torch.arange(len(page_I), device=device)
        for name, x_L_P_B in group.contents().items():
            move_pages(part[name], x_L_P_B, place_I, page_I)


def _by_group(
    groups: Sequence[GroupPages], refs: Iterable[PageRef], device: torch.device
) -> list[tuple[GroupPages, Tensor]]:
    ids: list[list[int]] = [[] for _ in groups]
    for ref in refs:
        ids[ref.group].append(ref.page)
    return [
        (group, to_device(np.array(page_ids, np.int64), device))
        for group, page_ids in zip(groups, ids, strict=True)
    ]
