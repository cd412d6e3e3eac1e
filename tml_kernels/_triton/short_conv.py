"""The arithmetic of short_conv, of which every kernel must make the same bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def conv_of(x_0, x_1, x_2, x_3, weight_0, weight_1, weight_2, weight_3):
    """x + conv(x) in float32 from four inputs, oldest first, and their weights, all of one shape.

    Each product meets its sum in one fma, so that no compiler chooses in one kernel only.
    """
    sum = x_0 * weight_0
    sum = tl.fma(x_1, weight_1, sum)
    sum = tl.fma(x_2, weight_2, sum)
    return x_3 + tl.fma(x_3, weight_3, sum)
