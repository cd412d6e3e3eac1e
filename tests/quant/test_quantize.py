"""Rounding: nearest codes, scales by their rules, bounded errors, extreme weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tml_kernels.moe_weights import CheckpointScales, prepare_moe_weights
from tml_kernels.quant import FORMATS, PackedExperts, dequantize, pack_matrix
from tml_kernels.quant.codes import CLIPS, choose_scales, encode, extremes
from tml_kernels.quant.fill import FloatSource, convert_experts, pack_experts
from tml_kernels.quant.pack import unpack_scales
from tml_kernels.testing import randn, relative_l2

PACKED = [name for name, fmt in FORMATS.items() if fmt.packed]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# (least, most) relative error on Gaussian weights and on Student's t with 3 degrees of freedom:
# measured over 12 seeds and these sizes, and a tenth of room on both sides.
ERRORS = {
    "fp8": ((0.023, 0.030), (0.017, 0.030)),
    "fp8_channel": ((0.021, 0.030), (0.012, 0.029)),
    "int4": ((0.083, 0.114), (0.125, 0.224)),
    "int4_f16": ((0.083, 0.114), (0.125, 0.224)),
    "mxfp4": ((0.102, 0.131), (0.104, 0.177)),
    "nvfp4": ((0.081, 0.107), (0.069, 0.103)),
}


def quantized(name: str, weights: Tensor) -> PackedExperts:
    return pack_experts(FloatSource("w", weights, FORMATS[name], False), FORMATS[name])


def heavy_tailed(*shape: int) -> Tensor:
    chi_square = randn(*shape, 3).square().sum(-1)
    return randn(*shape) / (chi_square / 3).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(33, 77), (257, 704), (64, 2880)])
@pytest.mark.parametrize("name", PACKED)
def test_error_is_bounded_and_reported(
    name: str, num_rows: int, num_columns: int, dtype: torch.dtype
) -> None:
    for draw, (least, most) in zip((randn, heavy_tailed), ERRORS[name], strict=True):
        weights = draw(2, num_rows, num_columns).to(dtype)
        packed = quantized(name, weights)
        for expert in range(2):
            error = relative_l2(dequantize(packed, expert), weights[expert])
            assert least < error < most
            assert packed.error_E is not None and packed.error_E.dtype == torch.float32
            assert packed.error_E[expert].item() == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_every_value_goes_to_its_nearest_code(name: str) -> None:
    """Within half a step of the grid, in float64, for the scale that is stored."""
    weights = heavy_tailed(1, 130, 300)
    packed = quantized(name, weights)
    scales = unpack_scales(packed, 0)
    scale = scales.scale
    scale = (scale.view(torch.float8_e8m0fnu) if name == "mxfp4" else scale).double()
    if name == "fp8_channel":
        scale = scale[:, None]
    elif name == "fp8":
        scale = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :300]
    else:
        scale = scale.repeat_interleave(FORMATS[name].group or 0, 1)[:, :300]
    if scales.outer is not None:
        scale = scale * scales.outer.double()
    if name.startswith("int4"):
        grid = torch.arange(-8, 8, dtype=torch.float64)
    elif name.startswith("fp8"):
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        grid = codes[codes.isfinite()].unique()
    else:
        grid = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64).unique()
    x = torch.where(scale == 0, 0, weights[0].double() / scale)
    index = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
    nearest = torch.minimum((x - grid[index - 1]).abs(), (grid[index] - x).abs())
    actual = torch.where(scale == 0, 0, dequantize(packed, 0).double() / scale)
    # A scale, a quotient and a value may be off by a float32 rounding each.
    assert ((actual - x).abs() <= nearest + 5e-7 * x.abs()).all()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_fp4_ties_go_to_even(name: str) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0] * 4)
    fmt = FORMATS[name]
    weights = torch.stack([ties, -ties])
    scales = choose_scales(extremes(weights, fmt), fmt)
    if scales.outer is not None:  # 6 is the largest: global * scale is 1 but for its own rounding
        scales = type(scales)(scales.scale.new_full((2, 2), 1.0), outer=torch.tensor(1.0))
    codes = encode(weights, scales, fmt)
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    assert torch.equal(values[codes.int()], torch.stack([even, -even]))


def test_fp8_codes_are_torchs_cast() -> None:
    weights = randn(1, 128, 128)
    weights[0, 3, 5] = 448 / 64  # scale 2^-6
    weights.clamp_(-7, 7)
    packed = quantized("fp8", weights)
    assert packed.scale is not None and packed.scale.item() == 2.0**-6
    expected = (weights * 64).to(torch.float8_e4m3fn).float() / 64
    assert torch.equal(dequantize(packed, slice(None)), expected)


def test_int4_uses_all_codes() -> None:
    """The largest magnitude is code 0 whatever its sign; its scale is bfloat16(extreme / -8)."""
    weights = torch.linspace(-1, 0.875, 128).repeat(2, 1)[None] * torch.tensor([[1.0], [-1.0]])
    packed = quantized("int4", weights)
    values = dequantize(packed, 0)
    assert torch.equal(values[0].unique(), torch.arange(-8, 8) / 8)
    assert torch.equal(values[1].unique(), torch.arange(-7, 9) / 8)


@pytest.mark.parametrize(("extreme", "scale"), [(6.0, 1), (4.0, 1), (7.99, 1), (8.0, 2), (1e-3, 0)])
def test_mxfp4_scale_rule(extreme: float, scale: float) -> None:
    """2^(floor(log2 extreme) - 2), from the standard."""
    weights = torch.zeros(1, 1, 32)
    weights[0, 0, 7] = -extreme
    scale = scale or 2.0 ** (math.floor(math.log2(extreme)) - 2)
    expected = max((v for v in E2M1), key=lambda v: -abs(v - extreme / scale)) * scale
    assert dequantize(quantized("mxfp4", weights), 0)[0, 7].item() == -expected


@pytest.mark.parametrize("name", PACKED)
def test_values_on_the_grid_survive(name: str) -> None:
    """What was dequantised quantises to itself; in nvfp4 too, as its extremes stay."""
    weights = dequantize(quantized(name, randn(2, 64, 200)), slice(None))
    again = dequantize(quantized(name, weights), slice(None))
    # fp8 and nvfp4 divide by 448 or 6 anew, which may move a scale by its last bit.
    limit = 1e-6 if name.startswith("fp8") else 3e-2 if name == "nvfp4" else 0.0
    assert relative_l2(again, weights) <= limit


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30, 1e-10, 1e10, 1e30, 3e38])
@pytest.mark.parametrize("name", PACKED)
def test_extreme_weights_stay_finite(name: str, magnitude: float) -> None:
    weights = (randn(1, 33, 77).clamp(-1, 1) * magnitude).contiguous()
    weights[0, 0, 0] = magnitude
    if name == "int4_f16" and magnitude >= 1e10:
        with pytest.raises(ValueError, match=r"w: expert 0 needs scales that torch.float16 cannot"):
            quantized(name, weights)
        return
    packed = quantized(name, weights)
    values = dequantize(packed, 0)
    assert values.isfinite().all()
    assert (values.abs() <= 1.2 * weights.abs().max()).all()
    assert packed.error_E is not None and packed.error_E.isfinite().all()
    if magnitude >= 1e-30 and name != "int4_f16":
        assert packed.error_E.item() < 0.18  # mxfp4 saturates when the extreme is just under 2^n


@pytest.mark.parametrize("name", PACKED)
def test_zeros_stay_zero(name: str) -> None:
    """A zero expert, a zero group beside a large one, and a zero weight in a group."""
    weights = randn(2, 130, 300)
    weights[0] = 0
    weights[1, :, :128] = 0
    weights[1, 5, 200] = 0
    packed = quantized(name, weights)
    values = dequantize(packed, slice(None))
    assert (values[weights == 0] == 0).all()
    assert packed.error_E is not None and packed.error_E[0] == 0
    assert 0 < packed.error_E[1] < 0.15


@pytest.mark.parametrize("name", PACKED)
def test_a_small_group_beside_a_huge_one(name: str) -> None:
    """Each group has its own scale, as far as the format's scales reach."""
    weights = randn(1, 256, 512)
    weights[:, :128, :256] *= 1e-4 if name == "nvfp4" else 1e-6
    values = dequantize(quantized(name, weights), 0)
    if name == "fp8_channel":
        assert values[:128, :256].abs().max() < 1e-2  # one scale per row: lost
    elif name == "nvfp4":
        assert relative_l2(values[:128, :256], weights[0, :128, :256]) < 0.7
    else:
        assert relative_l2(values[:128, :256], weights[0, :128, :256]) < 0.13


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PACKED)
def test_a_bad_weight_is_refused(name: str, bad: float) -> None:
    weights = randn(3, 140, 77)
    weights[2, 139, 76] = bad
    with pytest.raises(ValueError, match=r"w: expert 2 holds NaN or Inf"):
        quantized(name, weights)


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in slabs of rows gives the bits of work on the whole expert."""
    weights = randn(2, 700, 90)
    whole = {name: quantized(name, weights) for name in PACKED}
    monkeypatch.setattr("tml_kernels.quant.fill.FP8_BLOCK", 1024)
    for name, expected in whole.items():
        actual = quantized(name, weights)
        assert torch.equal(actual.data, expected.data)
        assert actual.scale is not None and expected.scale is not None
        assert torch.equal(actual.scale, expected.scale)
        assert actual.error_E is not None and expected.error_E is not None
        torch.testing.assert_close(actual.error_E, expected.error_E)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_formats(name: str, dtype: torch.dtype) -> None:
    fmt, weights = FORMATS[name], randn(3, 33, 77).to(dtype)
    packed = convert_experts(FloatSource("w", weights, fmt, False), fmt)
    assert (packed.data is weights) == (dtype == fmt.dtype)
    assert torch.equal(packed.data, weights.to(fmt.dtype))
    assert torch.equal(dequantize(packed, slice(0, 3, 2)), weights[::2].to(fmt.dtype).float())
    turned = weights.transpose(1, 2).contiguous()
    packed = convert_experts(FloatSource("w", turned, fmt, True), fmt)
    assert torch.equal(packed.data, weights.to(fmt.dtype)) and packed.data.is_contiguous()


def test_what_float16_cannot_hold_is_refused() -> None:
    weights = randn(2, 3, 4)
    weights[1, 0, 0] = 1e5
    with pytest.raises(ValueError, match="w: expert 1 holds NaN or Inf as fp16"):
        convert_experts(FloatSource("w", weights, FORMATS["fp16"], False), FORMATS["fp16"])


def group_errors(packed: PackedExperts, weights: Tensor) -> Tensor:
    """float64 [R, G] of one matrix."""
    lost = (dequantize(packed, 0).double() - weights.double()).square()
    return torch.stack([part.sum(-1).sqrt() for part in lost.split(128, dim=1)], dim=1)


SEARCHED = {
    "gaussian": lambda: randn(300, 704),  # several slabs, and a group that is not full
    "heavy": lambda: heavy_tailed(33, 300),
    "one column": lambda: randn(5, 1),
    "bf16": lambda: randn(130, 256).bfloat16(),
    "zeros": lambda: torch.zeros(3, 200),
    "zero groups": lambda: torch.cat([torch.zeros(4, 128), randn(4, 128)], dim=1),
    "small": lambda: randn(4, 256) * 1e-4,
    "tiny": lambda: randn(4, 256) * 1e-22,
    "large": lambda: randn(4, 256) * 1e4,
}


@pytest.mark.parametrize("name", ["int4", "int4_f16"])
@pytest.mark.parametrize("case", SEARCHED)
def test_search_makes_no_group_worse(case: str, name: str) -> None:
    weights = SEARCHED[case]()
    plain = pack_matrix(weights, name)
    searched = pack_matrix(weights, name, search=True)
    before, after = group_errors(plain, weights), group_errors(searched, weights)
    assert (after <= before * (1 + 1e-9)).all()
    assert searched.data.shape == plain.data.shape and searched.zero is None
    assert searched.nbytes == plain.nbytes
    if case in ("gaussian", "heavy"):
        assert (after < before).any() and after.norm() < 0.97 * before.norm()


def test_search_finds_the_best_of_its_scales() -> None:
    weights = randn(7, 256)
    searched = pack_matrix(weights, "int4", search=True)
    extreme, errors = extremes(weights, FORMATS["int4"]), []
    for clip in (1.0, *CLIPS):
        scale = (extreme * clip / -8).to(torch.bfloat16).double().repeat_interleave(128, 1)
        stored = (weights.double() / scale).round().clamp(-8, 7) * scale
        errors.append((stored - weights).square().unflatten(1, (2, 128)).sum(-1).sqrt())
    best = torch.stack(errors).amin(0)
    torch.testing.assert_close(group_errors(searched, weights), best, rtol=1e-5, atol=0)


def test_search_is_of_each_row_alone_and_repeats() -> None:
    weights = heavy_tailed(300, 256)
    whole = pack_matrix(weights, "int4", search=True)
    again = pack_matrix(weights, "int4", search=True)
    assert torch.equal(whole.data, again.data)
    values = dequantize(whole, 0)
    assert torch.equal(values, dequantize(again, 0))
    rows = dequantize(pack_matrix(weights[140:143], "int4", search=True), 0)
    assert torch.equal(values[140:143], rows)


@pytest.mark.parametrize("layout", ["interleaved", "interleaved_kn"])
@pytest.mark.parametrize("inplace", [False, True])
def test_search_of_experts(inplace: bool, layout: str) -> None:
    w13, w2 = heavy_tailed(2, 256, 128), heavy_tailed(2, 128, 128)
    given = [w.transpose(1, 2).contiguous() if "kn" in layout else w.clone() for w in (w13, w2)]
    found = prepare_moe_weights(
        *given, layout=layout, precision="int4", inplace=inplace, search=True
    )
    for packed, source in ((found.w13, w13), (found.w2, w2)):
        assert packed.error_E is not None
        for expert in range(2):
            alone = pack_matrix(source[expert], "int4", search=True)
            values = dequantize(packed, expert)
            assert torch.equal(values, dequantize(alone, 0))
            error = relative_l2(values, source[expert])
            assert packed.error_E[expert].item() == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("int4")])
def test_only_int4_scales_are_searched_for(name: str) -> None:
    with pytest.raises(ValueError, match=f"search: int4 and int4_f16 .* not {name}'s"):
        pack_matrix(randn(3, 8), name, search=True)
    with pytest.raises(ValueError, match=f"search: int4 and int4_f16 .* not {name}'s"):
        prepare_moe_weights(
            randn(1, 4, 4), randn(1, 4, 2), layout="gate_up", precision=name, search=True
        )


def test_scales_that_are_given_are_not_searched_for() -> None:
    words, scale = torch.zeros(1, 4, 16, dtype=torch.int32), torch.ones(1, 4, 1).bfloat16()
    with pytest.raises(ValueError, match="search: scales are given with the weights"):
        prepare_moe_weights(
            words, words, layout="gate_up", precision="int4", packing="rows", search=True,
            scales=CheckpointScales(scale, scale),
        )  # fmt: skip


def test_a_matrix_that_needs_no_change_is_copied() -> None:
    weight = torch.randn(8, 16, dtype=torch.bfloat16)
    packed = pack_matrix(weight, "bf16")
    weight.zero_()
    assert packed.data.any()
