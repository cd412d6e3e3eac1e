"""What the chip is, as far as configurations follow from it."""

from __future__ import annotations

import functools

import torch

ARCHS = (80, 90)  # as `arch_of` has them


def max_shared(arch: int) -> int:
    """Bytes of dynamic shared memory that a program may have. arch: 80, 90 or 100."""
    return (163 if arch < 90 else 227) * 1024


@functools.lru_cache(maxsize=64)
def arch_of(device: torch.device) -> int:
    """80 before sm_90, else 90; also where there is no GPU, as in the interpreter."""
    if device.type != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability(device) >= (9, 0) else 80
