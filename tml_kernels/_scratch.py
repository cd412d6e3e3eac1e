"""The scratch of an op: one uint8 tensor, cut in buffers."""

# Dimension key: B bytes.

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dims import Dims

ALIGN = 256  # bytes: where a buffer begins


@dataclass(frozen=True)
class Buffer:
    """A piece of the scratch: `shape` of `dtype` at byte `offset`."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def of(self, scratch: Tensor) -> Tensor:
        return scratch[self.offset : self.end].view(self.dtype).view(self.shape)


def lay_out(shapes: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> tuple[Buffer, ...]:
    """Buffers of these shapes and dtypes, one behind the other."""
    buffers, end = [], 0
    for shape, dtype in shapes:
        buffers.append(Buffer(-(-end // ALIGN) * ALIGN, shape, dtype))
        end = buffers[-1].end
    return tuple(buffers)


def is_aligned(tensor: Tensor) -> bool:
    """Whether it begins at a multiple of 16 bytes, as asynchronous copies want."""
    return tensor.data_ptr() % 16 == 0


def check_scratch(scratch_B: Tensor, needed: int, device: torch.device, *, align: int) -> None:
    """TypeError or ValueError unless it is `needed` bytes or more, aligned within its storage."""
    Dims().check(scratch_B=scratch_B, dtype=torch.uint8, device=device)
    if scratch_B.numel() < needed:
        raise ValueError(f"scratch_B: {needed} bytes are needed, got B={scratch_B.numel()}")
    if scratch_B.storage_offset() % align:
        raise ValueError(
            f"scratch_B: starts {scratch_B.storage_offset()} bytes into its storage, "
            f"which is not a multiple of {align}"
        )
