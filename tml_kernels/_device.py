"""The only module that asks the driver what the GPU is."""

from __future__ import annotations

import functools

import torch

# Architectures that kernels ship configurations for; a newer chip takes the nearest below it.
ARCHS = (80, 90, 100)
DEFAULT_ARCH = 90


@functools.cache
def arch(index: int = 0) -> int:
    """80, 90 or 100: the newest shipped architecture the device can run; 90 where there is none."""
    if not torch.cuda.is_available():
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    below = [a for a in ARCHS if a <= capability]
    return below[-1] if below else ARCHS[0]


@functools.cache
def num_sms(index: int = 0) -> int:
    """Multiprocessors of the device; an H200's 132 where there is none."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(index).multi_processor_count
