"""The expert matrices as the kernels read them."""

# Dimension key: E experts, R rows (outputs), K columns (inputs), B blocks of columns, Q words.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import Format

OUTER = ("mxfp4", "nvfp4")  # formats with a factor for each expert


@dataclass(frozen=True)
class PackedExperts:
    """E matrices [R, K] of one format. Rows keep the source's order; padding columns hold the code
    of 0. What is None is not there in the format.

    fp32 bf16 fp16   data [E, R, K] of that dtype.
    fp8              data int16 [E, ceil(K / 128), R, 64]: low byte = column j of the 128, high
                     byte = column j + 64, both e4m3.
                     scale float32 [E, ceil(R / 128), ceil(K / 128)].
    fp8_channel      data as fp8. scale float32 [E, R].
    int4, int4_f16   data int16 [E, 2 ceil(K / 256), R, 32]: bits 4 i .. 4 i + 3 = n of column
                     32 i + j of the 128; the value is (n - zero) * scale.
                     scale int32 [E, ceil(K / 256), R]: low half = scale of the first 128 columns,
                     high half = of the second, bfloat16 (int4) or float16 (int4_f16) bits.
                     zero int32, same shape: two bfloat16 patterns of 128 + zero. None: zero is 8.
    mxfp4            data int16 [E, ceil(K / 128), R, 32], fp4 words.
                     scale int32 [E, ceil(K / 128), R]: byte i, a bfloat16 exponent field, is of
                     columns 32 i .. 32 i + 31: 2^(byte - 127) = scale * 2^126 / outer.
                     outer: a power of two for which all bytes are 1..254.
    nvfp4            data int16 [E, ceil(K / 64), R, 16], fp4 words.
                     scale int32 [E, ceil(K / 64), R]: byte i is of columns 16 i .. 16 i + 15, as
                     unsigned e5m3: (byte << 4) + (223 << 7) are the bfloat16 bits of
                     scale * 2^126 / outer. outer: the expert's global scale * 2^8.

    fp4 word, of an e2m1 value (s, e1, e0, m):
    value 0: s bit 15, (e1, e0, m) bits 8..6;   value 1: s bit 12, (e1, e0, m) bits 5..3;
    value 2: s bit 9, (e1, e0, m) bits 2..0;    value 3: s bit 14, e1 bit 11, e0 bit 10, m bit 13.
    Bits 15 and 8..6 alone are the bfloat16 of value * 2^-126, so value * scale / outer is one
    product, exact down to 2^-126; the largest are at most 12.
    Where a group's scale is 0 the codes are 0 and the scale byte is any finite one.
    """

    format: Format
    data: Tensor
    scale: Tensor | None
    zero: Tensor | None
    outer_E: Tensor | None  # float32
    num_rows: int  # R
    num_columns: int  # K
    error_E: Tensor | None = None  # float32, |w - stored| / |w| where this package rounded

    @property
    def num_experts(self) -> int:
        return self.data.shape[0]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes a kernel can read: data and scales, padding included."""
        tensors = (self.data, self.scale, self.zero, self.outer_E)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def data_shape(fmt: Format, num_rows: int, num_columns: int) -> tuple[int, ...]:
    """Shape of one expert's data."""
    if not fmt.packed:
        return num_rows, num_columns
    num_blocks = -(-num_columns // fmt.block_k) * (fmt.block_k // fmt.sub_block)
    return num_blocks, num_rows, fmt.words


def scale_shape(fmt: Format, num_rows: int, num_columns: int) -> tuple[int, ...]:
    """Shape of one expert's scales, in a packed format."""
    if fmt.name == "fp8_channel":
        return (num_rows,)
    num_blocks = -(-num_columns // fmt.block_k)
    if fmt.name == "fp8":
        return -(-num_rows // 128), num_blocks
    return num_blocks, num_rows


def packed_bytes(fmt: Format, num_experts: int, num_rows: int, num_columns: int) -> int:
    """`PackedExperts.nbytes` of matrices that this package rounds or converts: they have no zero
    points."""
    size = math.prod(data_shape(fmt, num_rows, num_columns)) * fmt.dtype.itemsize
    if fmt.packed:
        size += math.prod(scale_shape(fmt, num_rows, num_columns)) * scale_dtype(fmt).itemsize
    if fmt.name in OUTER:
        size += torch.float32.itemsize
    return num_experts * size


def scale_dtype(fmt: Format) -> torch.dtype:
    return torch.float32 if fmt.name.startswith("fp8") else torch.int32
