"""The bits of packed experts, read here from the layout's table alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tml_kernels.quant import FORMATS, PackedExperts, dequantize
from tml_kernels.quant.codes import Scales
from tml_kernels.quant.fill import FloatSource, pack_experts
from tml_kernels.quant.pack import pack_scales, pack_words, unpack_words
from tml_kernels.testing import randn

PACKED = [name for name, fmt in FORMATS.items() if fmt.packed]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
# Columns below, at and past a group and a block, odd ones, and widths of real models.
SIZES = [(33, 77), (128, 128), (5, 256), (200, 704), (1, 2880), (130, 16)]


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def bits_as(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """16-bit patterns, given as int64, as float64 numbers."""
    return (bits & 0xFFFF).to(torch.uint16).view(dtype).double()


def fp4_value(word_E_R: Tensor, value: int) -> Tensor:
    places = [(15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 11, 10, 13)][value]
    index = sum(((word_E_R >> bit) & 1) << (3 - i) for i, bit in enumerate(places))
    return torch.tensor(E2M1, dtype=torch.float64)[index]


def meaning(packed: PackedExperts) -> Tensor:
    """float64 [E, R, K], column by column."""
    name, num_rows = packed.format.name, packed.num_rows
    data = packed.data.long()
    out = torch.empty(packed.num_experts, num_rows, packed.num_columns, dtype=torch.float64)
    assert packed.scale is not None
    outer_E_1 = torch.ones(1, 1) if packed.outer_E is None else packed.outer_E[:, None]
    bytes_ = torch.tensor([e4m3(b) for b in range(256)], dtype=torch.float64)
    row_block = torch.arange(num_rows) // 128
    for k in range(packed.num_columns):
        if name.startswith("fp8"):
            word = data[:, k // 128, :, k % 64]
            value = bytes_[(word >> (8 * (k % 128 // 64))) & 255]
            whole = packed.scale.double()
            scale = whole if name == "fp8_channel" else whole[:, :, k // 128][:, row_block]
        elif name.startswith("int4"):
            word = data[:, k // 128, :, k % 32]
            value = ((word >> (4 * (k % 128 // 32))) & 15).double()
            half = 16 * (k // 128 % 2)
            zero = 8.0
            if packed.zero is not None:
                bits = packed.zero[:, k // 256].long() >> half
                zero = bits_as(bits, torch.bfloat16) - 128
            value = value - zero
            bits = packed.scale[:, k // 256].long() >> half
            scale = bits_as(bits, torch.bfloat16 if name == "int4" else torch.float16)
        elif name == "mxfp4":
            value = fp4_value(data[:, k // 128, :, k % 32], k % 128 // 32)
            byte = (packed.scale[:, k // 128].long() >> (8 * (k % 128 // 32))) & 255
            assert byte.min() >= 1 and byte.max() <= 254
            scale = outer_E_1.double() * 2.0 ** (byte - 127 - 126).double()
        else:
            value = fp4_value(data[:, k // 64, :, k % 16], k % 64 // 16)
            byte = (packed.scale[:, k // 64].long() >> (8 * (k % 64 // 16))) & 255
            scale = bits_as((byte << 4) + (223 << 7), torch.bfloat16)
            scale = outer_E_1.double() * scale * 2.0**-126
        out[:, :, k] = value * scale
    return out


def quantized(name: str, weights: Tensor) -> PackedExperts:
    return pack_experts(FloatSource("w", weights, FORMATS[name], False), FORMATS[name])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_dequantize_is_what_the_layout_says(name: str, size: tuple[int, int]) -> None:
    packed = quantized(name, randn(3, *size) * torch.tensor([1.0, 1e-3, 50.0])[:, None, None])
    expected = meaning(packed)
    actual = dequantize(packed, slice(None))
    assert actual.dtype == torch.float32
    # One float32 rounding, where the scale is a full float32: then not more than that.
    assert torch.equal(actual, expected.float())
    assert torch.equal(dequantize(packed, 1), actual[1])
    assert torch.equal(dequantize(packed, slice(1, 3)), actual[1:])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_shapes(name: str, size: tuple[int, int]) -> None:
    num_rows, num_columns = size
    packed = quantized(name, randn(2, *size))
    blocks = -(-num_columns // FORMATS[name].block_k)
    sub_blocks = 2 * blocks if name.startswith("int4") else blocks
    words = {"fp8": 64, "fp8_channel": 64, "nvfp4": 16}.get(name, 32)
    scale = {
        "fp8": (2, -(-num_rows // 128), blocks),
        "fp8_channel": (2, num_rows),
    }.get(name, (2, blocks, num_rows))
    assert packed.data.dtype == torch.int16
    assert packed.data.shape == (2, sub_blocks, num_rows, words)
    assert packed.scale is not None and packed.scale.shape == scale
    assert packed.scale.dtype == (torch.float32 if name.startswith("fp8") else torch.int32)
    assert all(t.is_contiguous() for t in (packed.data, packed.scale))
    assert (packed.outer_E is not None) == (name in ("mxfp4", "nvfp4"))
    assert packed.zero is None and packed.num_experts == 2
    outer_bytes = 0 if packed.outer_E is None else 8
    assert packed.nbytes == 2 * packed.data.numel() + 4 * packed.scale.numel() + outer_bytes


@pytest.mark.parametrize("num_columns", [1, 77, 128, 640])
@pytest.mark.parametrize("name", PACKED)
def test_words_hold_every_code(name: str, num_columns: int) -> None:
    fmt = FORMATS[name]
    codes = torch.randint(0, 1 << fmt.bits, (33, num_columns), dtype=torch.uint8)
    words = pack_words(codes, fmt, 5)
    assert torch.equal(unpack_words(words, fmt, num_columns), codes)
    whole = unpack_words(words, fmt, words.shape[0] * fmt.sub_block)
    assert whole.shape[1] % fmt.block_k == 0
    assert (whole[:, num_columns:] == 5).all()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_kernels_view_of_an_fp4_word(name: str) -> None:
    """One shift and one mask of a word are the bfloat16 of a value * 2^-126."""
    fmt = FORMATS[name]
    codes = torch.randint(0, 16, (64, fmt.block_k), dtype=torch.uint8)
    words = pack_words(codes, fmt)[0].int()
    shifted = (words << 3, words << 6)
    last = ((words << 1) & 0x8000) | ((words >> 3) & 0x180) | ((words >> 7) & 0x40)
    for i, word in enumerate((words, *shifted, last)):
        value = bits_as(word & 0x81C0, torch.bfloat16) * 2.0**126
        expected = torch.tensor(E2M1, dtype=torch.float64)[
            codes[:, i * fmt.words : (i + 1) * fmt.words].int()
        ]
        assert torch.equal(value, expected)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 252), (110, 125), (252, 252), (1, 2)])
def test_mxfp4_scales_of_every_size(low: int, high: int) -> None:
    byte = torch.randint(low, high + 1, (7, 12), dtype=torch.uint8)
    byte[0, 0], byte[0, 1] = low, high
    scale, _, outer = pack_scales(Scales(byte), FORMATS["mxfp4"])
    assert outer is not None and outer.isfinite() and outer > 0
    assert math.log2(outer.item()) % 1 == 0
    packed = torch.stack([(scale >> (8 * i)) & 255 for i in range(4)], -1)  # [B, R, 4]
    assert packed.min() >= 1 and packed.max() <= 254
    actual = 2.0 ** (packed.double() - 127) * outer.double() * 2.0**-126
    assert torch.equal(actual.transpose(0, 1).flatten(1), 2.0 ** (byte.double() - 127))


def test_nvfp4_holds_every_e4m3_scale() -> None:
    byte = torch.arange(0x7F, dtype=torch.uint8).view(1, -1)
    scales = Scales(byte.view(torch.float8_e4m3fn), outer=torch.tensor(0.3))
    scale, _, outer = pack_scales(scales, FORMATS["nvfp4"])
    packed = torch.stack([(scale[:, 0] >> (8 * i)) & 255 for i in range(4)], -1).flatten()[:0x7F]
    value = bits_as((packed.long() << 4) + (223 << 7), torch.bfloat16) * 2.0**-126 * 2.0**8
    expected = torch.tensor([e4m3(b) for b in range(0x7F)], dtype=torch.float64)
    assert torch.equal(value[1:], expected[1:])
    assert value.isfinite().all()
    assert outer is not None and torch.equal(outer, torch.tensor(0.3) * 256)


def test_formats() -> None:
    assert list(FORMATS) == [
        "fp32", "bf16", "fp16", "fp8", "fp8_channel", "int4", "int4_f16", "mxfp4", "nvfp4",
    ]  # fmt: skip
    for name, fmt in FORMATS.items():
        assert fmt.name == name
        if fmt.packed:
            assert fmt.per_word * fmt.bits == 16
            assert fmt.block_k % fmt.sub_block == 0
            assert fmt.group is None or fmt.block_k % fmt.group == 0


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8_channel"])
def test_bytes_per_weight(name: str) -> None:
    """Of a matrix without padding, where only an expert's outer factor is not counted."""
    weights = randn(2, 256, 512)
    if FORMATS[name].packed:
        nbytes = quantized(name, weights).nbytes - 8 * (name in ("mxfp4", "nvfp4"))
    else:
        nbytes = weights.to(FORMATS[name].dtype).nbytes
    assert nbytes == weights.numel() * FORMATS[name].bytes_per_weight
