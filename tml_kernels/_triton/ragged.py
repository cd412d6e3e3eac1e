"""The ragged descriptor in kernels: whose token is this?"""

# Dimension key: S session rows.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def session_of(start_ptr, t, S, BLOCK_S: tl.constexpr):
    """How many sessions end at or before token t: its session row, or S for padding."""
    session = 0
    for s in range(0, S, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        end_s = tl.load(start_ptr + 1 + offs_s, mask=offs_s < S, other=2147483647)
        session += tl.sum((end_s <= t).to(tl.int32), axis=0)
    return session
