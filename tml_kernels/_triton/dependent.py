"""Programmatic dependent launch: with TML_PDL=1 the GPU sets a kernel up while the one before it
still runs, so that its programs wait where they begin instead of in the stream.

Nothing else changes, no bit of what is computed either. Every kernel begins with `wait_for_inputs`,
in all of its programs, also those that then have nothing to do: one that returned without waiting
would let the kernel after the next one begin before this one's inputs are there.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .._env import dependent_launch


def _has_it() -> bool:
    """Hopper and newer; also where there is no GPU, since kernels may be compiled for one."""
    if knobs.runtime.interpret:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)


WANTED = dependent_launch() and _has_it()
LAUNCH: dict[str, Any] = {"launch_pdl": True} if WANTED else {}  # options of every launch
_WANTED = tl.constexpr(WANTED)


@triton.jit
def wait_for_inputs():
    """The first statement of every kernel: memory is as the kernels before have left it. From then
    on the next kernel's programs may be set up, which wait here for the end of this one."""
    if _WANTED:
        gdc_wait()
        gdc_launch_dependents()
