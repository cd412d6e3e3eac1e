"""Rounding to float8 e4m3, bit by bit as torch does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """The bytes of float32 values, rounded to nearest, ties to even; beyond 448 is 448, NaN is NaN.

    In whole numbers, for chips without the instruction and for the interpreter.
    """
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 0x3C0  # 120 off the exponent
    # 2^14 has its last place at 2^-9, the smallest subnormal.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(size < 0x3C800000, small, normal), 0x7E)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_scaled_e4m3(x_d):
    """(bytes [d], scale [1]) of a row: x = value * scale, its largest size / 448 or 1 for zeros."""
    amax_1 = tl.max(tl.abs(x_d), axis=0, keep_dims=True)
    scale_1 = tl.div_rn(amax_1, tl.full([1], 448.0, tl.float32))
    scale_1 = tl.where(scale_1 == 0.0, 1.0, scale_1)
    return to_e4m3(tl.div_rn(x_d, tl.broadcast_to(scale_1, x_d.shape))), scale_1
