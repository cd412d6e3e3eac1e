"""Codes and scales to the form the kernels read, and back; `PackedExperts` has the layouts."""

# Dimension key: R rows, K columns, G groups of columns that share a scale, B blocks of columns,
# Q words of one row in a sub-block.

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Scales
from .formats import Format
from .packed import PackedExperts

# Of each value of an fp4 word: (mask of the code, bits to shift it left by).
_FP4_FIELDS = (
    ((8, 12), (7, 6)),
    ((8, 9), (7, 3)),
    ((8, 6), (7, 0)),
    ((8, 11), (6, 9), (1, 13)),
)
# e5m3 and float32 exponents differ: byte = (float32 bits >> 20) - this, for nvfp4's e4m3 scales.
_E5M3_BIAS = 105 << 3


def _fields(fmt: Format) -> tuple[tuple[tuple[int, int], ...], ...]:
    if fmt.name in ("mxfp4", "nvfp4"):
        return _FP4_FIELDS
    mask = (1 << fmt.bits) - 1
    return tuple(((mask, fmt.bits * i),) for i in range(fmt.per_word))


def reinterpret(x_R_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits in each row as another dtype, whatever the strides."""
    return x_R_N.clone(memory_format=torch.contiguous_format).view(dtype)


def pack_words(codes_R_K: Tensor, fmt: Format, pad_R_1: Tensor | int = 0) -> Tensor:
    """Words int16 [B, R, Q] of codes uint8 [R, K], filled up to whole blocks with `pad_R_1`."""
    num_rows, num_columns = codes_R_K.shape
    missing = -num_columns % fmt.block_k
    if missing:
        padded = codes_R_K.new_empty(num_rows, num_columns + missing)
        padded[:, :num_columns] = codes_R_K
        padded[:, num_columns:] = pad_R_1
        codes_R_K = padded
    values_R_B_V_Q = codes_R_K.view(num_rows, -1, fmt.per_word, fmt.words)
    words_B_R_Q = codes_R_K.new_zeros(
        values_R_B_V_Q.shape[1], num_rows, fmt.words, dtype=torch.int16
    )
    for i, fields in enumerate(_fields(fmt)):
        code_B_R_Q = values_R_B_V_Q[:, :, i].transpose(0, 1).to(torch.int16)
        for mask, shift in fields:
            words_B_R_Q |= (code_B_R_Q & mask) << shift
    return words_B_R_Q


def unpack_words(words_B_R_Q: Tensor, fmt: Format, num_columns: int) -> Tensor:
    """Codes uint8 [R, K] of words [B, R, Q]."""
    num_blocks, num_rows, num_words = words_B_R_Q.shape
    codes = words_B_R_Q.new_empty(num_rows, num_blocks, fmt.per_word, num_words, dtype=torch.uint8)
    for i, fields in enumerate(_fields(fmt)):
        code_B_R_Q = torch.zeros_like(words_B_R_Q)
        for mask, shift in fields:  # the sign that >> brings in from the left is masked off
            code_B_R_Q |= (words_B_R_Q >> shift) & mask
        codes[:, :, i] = code_B_R_Q.transpose(0, 1).to(torch.uint8)
    return codes.view(num_rows, -1)[:, :num_columns].contiguous()


def pack_scales(scales: Scales, fmt: Format) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, zero, outer) of one expert, as `PackedExperts` holds them."""
    if fmt.name.startswith("fp8"):
        return scales.scale, None, None
    if fmt.name.startswith("int4"):
        zero = None
        if scales.zero_R_G is not None:
            zero = _pack_pairs((128 + scales.zero_R_G.float()).to(torch.bfloat16), repeat=True)
        return _pack_pairs(scales.scale), zero, None
    if fmt.name == "mxfp4":
        byte_R_G = scales.scale.to(torch.int32)
        exponent = (byte_R_G.max() - 128).clamp_(min=-126)  # of outer: the highest byte is <= 254
        byte_R_G = _in_blocks(byte_R_G, 4) + (126 - exponent)
        outer = ((exponent + 127) << 23).view(torch.float32)
    else:
        assert scales.outer is not None
        bits_R_G = scales.scale.float().view(torch.int32)
        byte_R_G = _in_blocks(((bits_R_G >> 20) - _E5M3_BIAS).clamp_(min=0), 4)
        outer = scales.outer * 2.0**8
    return reinterpret(byte_R_G.to(torch.uint8), torch.int32).T, None, outer


def unpack_scales(packed: PackedExperts, expert: int) -> Scales:
    """What `pack_scales` was given; but the scale of a zero group of nvfp4 is its least one."""
    fmt = packed.format
    assert packed.scale is not None
    scale = packed.scale[expert]
    if fmt.name.startswith("fp8"):
        return Scales(scale)
    assert fmt.group is not None
    num_groups = -(-packed.num_columns // fmt.group)
    if fmt.name.startswith("int4"):
        dtype = torch.bfloat16 if fmt.name == "int4" else torch.float16
        zero_R_G = None
        if packed.zero is not None:
            zero_R_G = reinterpret(packed.zero[expert].T, torch.bfloat16).float() - 128
            zero_R_G = zero_R_G[:, :num_groups].to(torch.uint8)
        return Scales(reinterpret(scale.T, dtype)[:, :num_groups], zero_R_G)
    assert packed.outer_E is not None
    outer = packed.outer_E[expert]
    byte_R_G = reinterpret(scale.T, torch.uint8)[:, :num_groups].to(torch.int32)
    if fmt.name == "mxfp4":
        exponent = (outer.view(torch.int32) >> 23) - 127
        return Scales((byte_R_G - 126 + exponent).to(torch.uint8))
    scale_R_G = ((byte_R_G + _E5M3_BIAS) << 20).view(torch.float32)
    return Scales(scale_R_G.to(torch.float8_e4m3fn), outer=outer * 2.0**-8)


def _in_blocks(x_R_G: Tensor, count: int, repeat: bool = False) -> Tensor:
    """Columns filled up to a multiple of count: with zeros, or by repeating the last one."""
    missing = -x_R_G.shape[1] % count
    if missing == 0:
        return x_R_G
    fill = x_R_G[:, -1:] if repeat else x_R_G.new_zeros(1, 1)
    return torch.cat([x_R_G, fill.expand(x_R_G.shape[0], missing)], dim=1)


def _pack_pairs(scale_R_G: Tensor, repeat: bool = False) -> Tensor:
    """int32 [ceil(G / 2), R]: two 16-bit patterns, the first in the low half."""
    return reinterpret(_in_blocks(scale_R_G, 2, repeat), torch.int32).T
