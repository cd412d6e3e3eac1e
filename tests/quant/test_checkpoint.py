"""Ready checkpoints: the packed experts mean what the checkpoint's own definition says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tml_kernels.quant import FORMATS, dequantize
from tml_kernels.quant.checkpoint import MatrixScales, read_checkpoint
from tml_kernels.quant.fill import pack_experts
from tml_kernels.quant.packed import PackedExperts
from tml_kernels.testing import randn

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of nibble i, from AutoAWQ's packer


def read(
    name: str,
    data: Tensor,
    scale: Tensor,
    *,
    zero: Tensor | None = None,
    outer: Tensor | None = None,
    kn: bool = False,
    packing: str | None = None,
    inplace: bool = False,
) -> PackedExperts:
    fmt, given = FORMATS[name], MatrixScales(scale, zero, outer)
    source = read_checkpoint("w13", data, fmt, given, kn=kn, packing=packing)
    return pack_experts(source, fmt, inplace=inplace)


def random_fp8(*shape: int) -> Tensor:
    byte = torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.where((byte & 0x7F) == 0x7F, 0, byte).view(torch.float8_e4m3fn)


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def nibble(words: Tensor, i: int) -> Tensor:
    return (words.long() >> (4 * i)) & 15


@pytest.mark.parametrize("kn", [False, True])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(256, 384), (130, 704), (33, 77), (1, 1)])
def test_fp8_blocks(num_rows: int, num_columns: int, kn: bool) -> None:
    data = random_fp8(3, num_rows, num_columns)
    scale = torch.rand(3, -(-num_rows // 128), -(-num_columns // 128)) + 0.1
    whole = scale.repeat_interleave(128, 1)[:, :num_rows]
    whole = whole.repeat_interleave(128, 2)[:, :, :num_columns]
    expected = data.float() * whole
    if kn:
        data = data.view(torch.uint8).transpose(1, 2).contiguous().view(torch.float8_e4m3fn)
        scale = scale.transpose(1, 2).contiguous()
    packed = read("fp8", data, scale, kn=kn)
    assert torch.equal(dequantize(packed, slice(None)), expected)
    assert packed.error_E is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trailing", [False, True])
def test_fp8_channels(trailing: bool, dtype: torch.dtype) -> None:
    data, scale = random_fp8(2, 33, 77), (torch.rand(2, 33) + 0.1).to(dtype)
    packed = read("fp8_channel", data, scale[..., None] if trailing else scale)
    expected = data.float() * scale.float()[..., None]
    assert torch.equal(dequantize(packed, slice(None)), expected)
    turned = data.view(torch.uint8).transpose(1, 2).contiguous().view(torch.float8_e4m3fn)
    for given in (scale[:, None], scale[..., None]) if trailing else (scale,):
        packed = read("fp8_channel", turned, given, kn=True)
        assert torch.equal(dequantize(packed, slice(None)), expected)


@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks of 16 bytes"])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(64, 256), (33, 2880), (1, 32)])
def test_mxfp4_is_what_transformers_reads(num_rows: int, num_columns: int, blocked: bool) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    data = torch.randint(0, 256, (2, num_rows, num_columns // 32, 16), dtype=torch.uint8)
    scale = torch.randint(100, 140, (2, num_rows, num_columns // 32), dtype=torch.uint8)
    expected_E_K_R = convert_moe_packed_tensors(data, scale, dtype=torch.float32)
    packed = read("mxfp4", data if blocked else data.flatten(2), scale)
    assert torch.equal(dequantize(packed, slice(None)), expected_E_K_R.transpose(1, 2))
    packed = read("mxfp4", data, scale.view(torch.float8_e8m0fnu))
    assert torch.equal(dequantize(packed, 1), expected_E_K_R[1].T)


def test_mxfp4_scales_from_end_to_end() -> None:
    """All 253 exponents in one expert: 2^-127 to 2^125."""
    data = torch.randint(0, 256, (1, 3, 253 * 16), dtype=torch.uint8)
    scale = torch.arange(253, dtype=torch.uint8).repeat(1, 3, 1)
    values = torch.tensor(E2M1, dtype=torch.float64)
    expected = torch.stack((values[(data & 15).int()], values[(data >> 4).int()]), -1).flatten(-2)
    expected *= 2.0 ** (scale.double() - 127).repeat_interleave(32, -1)
    packed = read("mxfp4", data, scale)
    assert torch.equal(dequantize(packed, 0).double(), expected[0])


@pytest.mark.parametrize("outer_shape", [(3,), (1,), ()])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(64, 256), (33, 208), (1, 16)])
def test_nvfp4(num_rows: int, num_columns: int, outer_shape: tuple[int, ...]) -> None:
    data = torch.randint(0, 256, (3, num_rows, num_columns // 2), dtype=torch.uint8)
    byte = torch.randint(0, 0x7F, (3, num_rows, num_columns // 16), dtype=torch.uint8)
    byte[:, 0, 0] = torch.tensor([0, 1, 0x7E])
    scale, outer = byte.view(torch.float8_e4m3fn), torch.rand(outer_shape) + 1e-4
    values = torch.tensor(E2M1, dtype=torch.float64)
    expected = torch.stack((values[(data & 15).int()], values[(data >> 4).int()]), -1).flatten(-2)
    expected *= scale.double().repeat_interleave(16, -1)
    expected *= outer.double().expand(3)[:, None, None]
    packed = read("nvfp4", data, scale, outer=outer)
    assert torch.equal(dequantize(packed, slice(None)), expected.float())


@pytest.mark.parametrize("name", ["int4", "int4_f16"])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(64, 256), (33, 200), (40, 384), (8, 8)])
@pytest.mark.parametrize("packing", ["rows", "awq", "gptq"])
def test_int4(packing: str, num_rows: int, num_columns: int, name: str) -> None:
    if packing != "rows":
        num_rows = -(-num_rows // 8) * 8
    groups = -(-num_columns // 128)
    n = torch.zeros(3, num_rows, num_columns)
    zero = torch.full((3, num_rows, groups), 8)
    zero_words = None
    if packing == "rows":
        words = random_words(3, num_rows, num_columns // 8)
        for k in range(num_columns):
            n[:, :, k] = nibble(words[:, :, k // 8], k % 8)
    else:
        zero_words = random_words(3, groups, num_rows // 8)
        awq = packing == "awq"
        shape = (num_columns, num_rows // 8) if awq else (num_columns // 8, num_rows)
        words = random_words(3, *shape)
        for k in range(num_columns):
            if not awq:
                n[:, :, k] = nibble(words[:, k // 8], k % 8)
                continue
            for i, column in enumerate(AWQ_ORDER):
                n[:, column::8, k] = nibble(words[:, k], i).float()
        for i in range(8):
            row = AWQ_ORDER[i] if awq else i
            zero[:, row::8] = nibble(zero_words, i).transpose(1, 2) + (0 if awq else 1)
    dtype = torch.bfloat16 if name == "int4" else torch.float16
    scale = (torch.rand(3, num_rows, groups) * 0.02).to(dtype)
    expected = n - zero.repeat_interleave(128, -1)[..., :num_columns]
    expected *= scale.float().repeat_interleave(128, -1)[..., :num_columns]
    stored = scale if packing == "rows" else scale.transpose(1, 2).contiguous()
    packed = read(name, words, stored, zero=zero_words, packing=packing)
    assert (packed.zero is None) == (packing == "rows")
    assert torch.equal(dequantize(packed, slice(None)), expected)


@pytest.mark.parametrize(("packing", "word"), [("awq", 0x88888888 - 2**32), ("gptq", 0x77777777)])
def test_zeros_that_are_all_eight_are_dropped(packing: str, word: int) -> None:
    shape = (2, 256, 4) if packing == "awq" else (2, 32, 32)
    words, scale = random_words(*shape), torch.rand(2, 2, 32).half()
    zero = torch.full((2, 2, 4), word, dtype=torch.int32)
    with_zero = read("int4_f16", words, scale, zero=zero, packing=packing)
    without = read("int4_f16", words, scale, packing=packing)
    assert with_zero.zero is None
    assert torch.equal(dequantize(with_zero, slice(None)), dequantize(without, slice(None)))
    zero[1, 1, 3] ^= 1 << 28
    other = read("int4_f16", words, scale, zero=zero, packing=packing)
    assert other.zero is not None
    changed = dequantize(other, slice(None)) != dequantize(without, slice(None))
    assert changed[1, :, 128:].any(1).sum() == 1 and not changed[0].any()


@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "mxfp4", "nvfp4", "int4_f16"])
def test_slabs_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, num_columns = 264, 256
    data = torch.randint(0, 256, (2, num_rows, num_columns // 2), dtype=torch.uint8)
    options = {}
    if name.startswith("fp8"):
        data = random_fp8(2, num_rows, num_columns)
        scale = torch.rand(2, 3, 2) if name == "fp8" else torch.rand(2, num_rows)
    elif name == "mxfp4":
        scale = torch.randint(90, 130, (2, num_rows, 8), dtype=torch.uint8)
    elif name == "nvfp4":
        scale, options["outer"] = random_fp8(2, num_rows, 16).float().abs(), torch.tensor(0.5)
        scale = scale.to(torch.float8_e4m3fn)
    else:
        data, scale = random_words(2, num_columns, num_rows // 8), torch.rand(2, 2, num_rows).half()
        options = {"packing": "awq", "zero": random_words(2, 2, num_rows // 8)}
    whole = dequantize(read(name, data, scale, **options), slice(None))
    monkeypatch.setattr("tml_kernels.quant.fill.FP8_BLOCK", 1024)
    assert torch.equal(dequantize(read(name, data, scale, **options), slice(None)), whole)


U8, I32, FP8 = torch.uint8, torch.int32, torch.float8_e4m3fn


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "fp8 of bf16": (
        ("fp8", zeros(2, 4, 8, dtype=torch.bfloat16), zeros(2, 1, 1)),
        {}, TypeError, r"w13: expected torch.float8_e4m3fn, got torch.bfloat16",
    ),
    "fp8 rank": (
        ("fp8", zeros(4, 8, dtype=FP8), zeros(1, 1)), {}, ValueError, r"w13: expected 3 axes",
    ),
    "fp8 blocks of 64": (
        ("fp8", zeros(2, 128, 256, dtype=FP8), zeros(2, 2, 4)),
        {}, ValueError, r"scales.w13: .*\(2, 1, 2\).* got shape \(2, 2, 4\), blocks of 64 x 64",
    ),
    "fp8 channel scales": (
        ("fp8_channel", zeros(2, 128, 256, dtype=FP8), zeros(2, 256)),
        {}, ValueError, r"scales.w13: one scale per row is \(2, 128\)",
    ),
    "fp8 scale dtype": (
        ("fp8", zeros(2, 128, 256, dtype=FP8), zeros(2, 1, 2, dtype=I32)),
        {}, TypeError, r"scales.w13: expected torch.float32 or .*, got torch.int32",
    ),
    "mxfp4 with groups of 16": (
        ("mxfp4", zeros(2, 4, 64, dtype=U8), zeros(2, 4, 8, dtype=U8)),
        {}, ValueError, r"scales.w13: .*\(2, 4, 4\), got \(2, 4, 8\): groups of 16 columns, mxfp4",
    ),
    "mxfp4 turned": (
        ("mxfp4", zeros(2, 4, 64, dtype=U8), zeros(2, 4, 4, dtype=U8)),
        {"kn": True}, ValueError, r"layout: '_kn' .* w13 in mxfp4",
    ),
    "mxfp4 with a global scale": (
        ("mxfp4", zeros(2, 4, 64, dtype=U8), zeros(2, 4, 4, dtype=U8)),
        {"outer": torch.ones(2)}, ValueError, r"scales.w13_global: precision 'mxfp4' does not have",
    ),
    "nvfp4 without one": (
        ("nvfp4", zeros(2, 4, 64, dtype=U8), zeros(2, 4, 8, dtype=FP8)),
        {}, ValueError, r"scales.w13_global: precision 'nvfp4' needs a global scale",
    ),
    "nvfp4 with two": (
        ("nvfp4", zeros(2, 4, 64, dtype=U8), zeros(2, 4, 8, dtype=FP8)),
        {"outer": torch.ones(2, 2)}, ValueError, r"scales.w13_global: .*\(2, 2\); gate and up rows",
    ),
    "nvfp4 global nan": (
        ("nvfp4", zeros(2, 4, 64, dtype=U8), zeros(2, 4, 8, dtype=FP8)),
        {"outer": torch.tensor([1, math.nan])}, ValueError, r"w13_global: expert 1 has nan",
    ),
    "nvfp4 with groups of 32": (
        ("nvfp4", zeros(2, 4, 64, dtype=U8), zeros(2, 4, 4, dtype=FP8)),
        {"outer": torch.ones(2)}, ValueError, r"groups of 32 columns, nvfp4 has groups of 16",
    ),
    "awq with groups of 64": (
        ("int4_f16", zeros(2, 256, 4, dtype=I32), zeros(2, 4, 32, dtype=torch.float16)),
        {"packing": "awq"}, ValueError, r"got \(2, 4, 32\): groups of 64 columns, int4_f16 has",
    ),
    "bf16 scales for int4_f16": (
        ("int4_f16", zeros(2, 256, 4, dtype=I32), zeros(2, 2, 32, dtype=torch.bfloat16)),
        {"packing": "awq"}, TypeError, r"scales.w13: expected torch.float16, got torch.bfloat16",
    ),
    "no packing": (
        ("int4_f16", zeros(2, 256, 4, dtype=I32), zeros(2, 2, 32, dtype=torch.float16)),
        {}, ValueError, r"packing: precision 'int4_f16' needs one of awq, gptq, rows, got None",
    ),
    "unknown packing": (
        ("int4_f16", zeros(2, 256, 4, dtype=I32), zeros(2, 2, 32, dtype=torch.float16)),
        {"packing": "marlin"}, ValueError, r"packing: .*awq, gptq, rows, got 'marlin'",
    ),
    "packing for fp8": (
        ("fp8", zeros(2, 128, 256, dtype=FP8), zeros(2, 1, 2)),
        {"packing": "awq"}, ValueError, r"packing: precision 'fp8' needs None, got 'awq'",
    ),
    "zeros of rows": (
        ("int4_f16", zeros(2, 4, 16, dtype=I32), zeros(2, 4, 1, dtype=torch.float16)),
        {"packing": "rows", "zero": zeros(2, 1, 1, dtype=I32)}, ValueError, r"scales.w13_zero: ",
    ),
    "shape of zeros": (
        ("int4_f16", zeros(2, 256, 4, dtype=I32), zeros(2, 2, 32, dtype=torch.float16)),
        {"packing": "awq", "zero": zeros(2, 2, 32, dtype=I32)},
        ValueError, r"scales.w13_zero: expected \[E, G, R / 8\] = \(2, 2, 4\) .*\(2, 2, 32\)",
    ),
    "zeros for fp8": (
        ("fp8", zeros(2, 128, 256, dtype=FP8), zeros(2, 1, 2)),
        {"zero": zeros(2, 2, 4, dtype=I32)}, ValueError, r"scales.w13_zero: precision 'fp8' has no",
    ),
    "scales for bf16": (
        ("bf16", zeros(2, 128, 256), zeros(2, 1, 2)), {}, ValueError, r"scales: precision 'bf16'",
    ),
    "scales on another device": (
        ("fp8", zeros(2, 128, 256, dtype=FP8), torch.zeros(2, 1, 2, device="meta")),
        {}, ValueError, r"scales.w13: expected device cpu, got meta",
    ),
    "strided scales": (
        ("fp8_channel", zeros(2, 4, 8, dtype=FP8), zeros(4, 2).T),
        {}, ValueError, r"scales.w13: must be contiguous",
    ),
    "scales are no tensor": (
        ("fp8", zeros(2, 128, 256, dtype=FP8), [1.0]),
        {}, TypeError, r"scales.w13: expected a tensor, got list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_names_what_is_wrong(case: str) -> None:
    args, options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        read(*args, **options)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nvfp4", "int4_f16"])
def test_a_bad_scale_names_its_expert(name: str) -> None:
    options = {}
    if name == "fp8":
        data, scale = random_fp8(3, 4, 128), randn(3, 1, 1)
        scale[1] = math.nan
    elif name == "mxfp4":
        data, scale = zeros(3, 4, 64, dtype=U8), zeros(3, 4, 4, dtype=U8)
        scale[1, 2, 3] = 253
    elif name == "nvfp4":
        data, scale = zeros(3, 4, 64, dtype=U8), zeros(3, 4, 8, dtype=U8)
        scale[1, 2, 3] = 0x81
        scale, options["outer"] = scale.view(FP8), torch.ones(())
    else:
        data, scale = zeros(3, 4, 16, dtype=I32), zeros(3, 4, 1, dtype=torch.float16)
        scale[1, 3, 0], options["packing"] = math.inf, "rows"
    with pytest.raises(ValueError, match=r"scales.w13: expert 1 holds "):
        read(name, data, scale, **options)


def test_a_nan_in_fp8_data_names_its_expert() -> None:
    data = random_fp8(3, 4, 128)
    data.view(U8)[2, 3, 127] = 0xFF
    with pytest.raises(ValueError, match="w13: expert 2 holds NaN"):
        read("fp8", data, torch.ones(3, 1, 1))
