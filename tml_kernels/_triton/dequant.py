"""Decoders of packed weights: int16 words to values, in registers, in front of a matrix product.

One word holds two (fp8) or four (4-bit) values of columns that lie a half or a quarter block apart,
so that value i of neighbouring words makes a tile of neighbouring columns. The layouts are those of
`tml_kernels.quant`. With 16-bit products two words are decoded in one 32-bit register, in the
instructions written out below; with float32 products, which tests run in Triton's interpreter, the
same values come from plain shifts. NARROW says which.
"""

# Dimension key: M weight rows, Q words of a row in one block.

from __future__ import annotations

import triton
import triton.language as tl

# A bf16 with exponent 134 counts in ones: 128 + n is 0x4300 | n, and subtracting 128 + zero is
# exact. 0xEA is (a & b) | c.
_INT4 = """{{
    .reg .b32 t, one, minus;
    mov.b32 one, 0x3F803F80;
    {minus}
    shr.u32 t, $1, {shift};
    lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, t, one, minus;
}}"""
_EIGHT = "mov.b32 minus, 0xC308C308;"  # -(128 + 8)
_GIVEN = "xor.b32 minus, $2, 0x80008000;"
INT4_EIGHT: tl.constexpr = tl.constexpr(
    tuple(_INT4.format(minus=_EIGHT, shift=4 * i) for i in range(4))
)
INT4_GIVEN: tl.constexpr = tl.constexpr(
    tuple(_INT4.format(minus=_GIVEN, shift=4 * i) for i in range(4))
)

# Sign to bit 15, exponent and mantissa to bits 8..6: the value times 2^-126, subnormal or not. The
# group's scale comes times 2^126. Adding -0 changes nothing.
_FP4 = """{{
    .reg .b32 t, u, zero;
    mov.b32 zero, 0x80008000;
    {bits}
    fma.rn.bf16x2 $0, t, $2, zero;
}}"""
_LAST = """shl.b32 t, $1, 1;
    and.b32 t, t, 0x80008000;
    shr.u32 u, $1, 3;
    lop3.b32 t, u, 0x01800180, t, 0xEA;
    shr.u32 u, $1, 7;
    lop3.b32 t, u, 0x00400040, t, 0xEA;"""
FP4: tl.constexpr = tl.constexpr(
    (
        *(_FP4.format(bits=f"shl.b32 t, $1, {3 * i};\n    and.b32 t, t, 0x81C081C0;")
          for i in range(3)),
        _FP4.format(bits=_LAST),
    )
)  # fmt: skip

# Sign to bit 15, exponent and mantissa to bits 10..4: the value times 2^-120, then times 2^120.
_FP8 = """{{
    .reg .b32 t, u, scale, zero;
    mov.b32 scale, 0x7B807B80;
    mov.b32 zero, 0x80008000;
    shl.b32 t, $1, {sign};
    and.b32 t, t, 0x80008000;
    {move} u, $1, 4;
    lop3.b32 t, u, 0x07F007F0, t, 0xEA;
    fma.rn.bf16x2 $0, t, scale, zero;
}}"""
FP8: tl.constexpr = tl.constexpr(
    (_FP8.format(sign=8, move="shl.b32"), _FP8.format(sign=0, move="shr.u32"))
)


@triton.jit
def decode_int4(w_m_q, zero_m, PART: tl.constexpr, HAS_ZERO: tl.constexpr, NARROW: tl.constexpr):
    """n - zero, exact. zero_m: the bf16 bits of 128 + zero as an integer, read when HAS_ZERO."""
    if not NARROW:
        n_m_q = ((w_m_q >> (4 * PART)) & 15).to(tl.float32)
        if HAS_ZERO:
            return n_m_q - ((zero_m << 16).to(tl.float32, bitcast=True) - 128.0)[:, None]
        else:
            return n_m_q - 8.0
    elif HAS_ZERO:
        zero_m_1 = zero_m.to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None]
        return tl.inline_asm_elementwise(
            INT4_GIVEN[PART], "=r,r,r", [w_m_q, zero_m_1], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            INT4_EIGHT[PART], "=r,r", [w_m_q], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def decode_fp4(w_m_q, scale_m, PART: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr):
    """value * scale, exact in bf16. scale_m: int32, byte PART is the scale of its group of
    GROUP columns: 32 has a bf16 exponent (mxfp4), 16 an unsigned e5m3 (nvfp4)."""
    byte_m = (scale_m >> (8 * PART)) & 0xFF
    if GROUP == 32:
        bits_m = byte_m << 7
    else:
        bits_m = (byte_m << 4) + (223 << 7)
    if not NARROW:
        w_m_q = w_m_q.to(tl.int32)
        if PART == 3:
            sign_m_q = (w_m_q << 1) & 0x8000
            code_m_q = (w_m_q >> 3) & 0x0180 | (w_m_q >> 7) & 0x0040
        else:
            sign_m_q = (w_m_q << (3 * PART)) & 0x8000
            code_m_q = (w_m_q << (3 * PART)) & 0x01C0
        # Exponent 0 counts in halves of the least normal; 2^126 is split, as both overflow alone.
        mantissa_m_q = ((code_m_q >> 6) & 1).to(tl.float32)
        power_m_q = (code_m_q >> 7).to(tl.float32)
        normal_m_q = tl.exp2(power_m_q - 1.0) * (1.0 + 0.5 * mantissa_m_q)
        value_m_q = tl.where(power_m_q == 0.0, 0.5 * mantissa_m_q, normal_m_q)
        scale_m_1 = ((bits_m << 16).to(tl.float32, bitcast=True) * 2.0**-126)[:, None]
        return tl.where(sign_m_q != 0, -value_m_q, value_m_q) * scale_m_1
    else:
        scale_m_1 = bits_m.to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None]
        return tl.inline_asm_elementwise(
            FP4[PART], "=r,r,r", [w_m_q, scale_m_1], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def decode_fp8(w_m_q, PART: tl.constexpr, NARROW: tl.constexpr):
    """The e4m3 value of the low (0) or the high (1) byte, exact."""
    if not NARROW:
        byte_m_q = (w_m_q >> (8 * PART)) & 0xFF
        code_m_q = (byte_m_q & 0x7F).to(tl.int32)
        mantissa_m_q = (code_m_q & 7).to(tl.float32) * 0.125
        power_m_q = (code_m_q >> 3).to(tl.float32)
        normal_m_q = tl.exp2(power_m_q - 7.0) * (1.0 + mantissa_m_q)
        value_m_q = tl.where(power_m_q == 0.0, 2.0**-6 * mantissa_m_q, normal_m_q)
        return tl.where((byte_m_q & 0x80) != 0, -value_m_q, value_m_q)
    else:
        return tl.inline_asm_elementwise(
            FP8[PART], "=r,r", [w_m_q], dtype=tl.bfloat16, is_pure=True, pack=2
        )
