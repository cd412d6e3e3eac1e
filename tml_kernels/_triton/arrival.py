"""Device function of kernels whose last program goes on with what all of them stored."""

# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(counter_ptr, num_arrivals):
    """Whether all other programs arrived before. Then it sees all they stored, through loads that
    pass by the L1 cache, and the counter is zero again."""
    tl.debug_barrier()  # one thread arrives for all: their stores come first
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
