"""Rotary phases and fp8 pages of attention_prologue."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from exact_turns import exact_turns
from kernel_attention_prologue import PATHS, clone, pool_rows, run_kernel
from torch import Tensor

from tml_kernels._pages import FP8, quantize_ref
from tml_kernels.ops.attention_prologue import rope_increments
from tml_kernels.ops.attention_prologue.cases import FURTHEST, POOLS, SCALES, Case
from tml_kernels.testing import assert_bitwise, assert_matches


@pytest.mark.parametrize(("theta", "width"), [("10000", 64), ("500000", 128), ("1e6", 256)])
@pytest.mark.parametrize("position", [1, 4095, 1_000_003, FURTHEST - 1, FURTHEST])
def test_phases_agree_with_sixty_digits(theta: str, width: int, position: int) -> None:
    increments = rope_increments(float(theta), width, "cpu")
    product = (increments * position).tolist()  # wraps
    for turns, exact in zip(product, exact_turns(theta, width, position), strict=True):
        error = (Decimal(turns % 2**64) - exact * 2**64 + 2**63) % 2**64 - 2**63
        assert abs(error) <= Decimal(position) / 2 + 1


def test_increments_are_the_nearest() -> None:
    """theta 1 turns a radian a position: 2^64 / 2 pi."""
    assert rope_increments(1.0, 4, "cpu").tolist() == [2935890503282001226] * 2
    assert rope_increments(10_000.0, 2, "cpu").dtype == torch.int64


@pytest.mark.parametrize(
    ("theta", "width", "words"),
    [
        (0.5, 64, "theta: .*got 0.5"),
        (math.nan, 64, "theta: .*got nan"),
        (math.inf, 64, "theta: .*got inf"),
        (1e4, 63, "head_width: .*got 63"),
        (1e4, 0, "head_width: .*got 0"),
    ],
)
def test_bad_increments(theta: float, width: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rope_increments(theta, width, "cpu")


@pytest.mark.parametrize(
    ("theta", "width", "name"), [("1e4", 64, "theta"), (1e4, 64.0, "head_width")]
)
def test_increments_of_no_numbers(theta: Any, width: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected an? .*, got "):
        rope_increments(theta, width, "cpu")


def rotary_inputs(phase_B: Tensor, position_T: Tensor, device: str) -> dict:
    """Heads whose first half is one and second half zero: rotated, they hold cosine and sine."""
    num_tokens, half = position_T.shape[0], phase_B.shape[0]
    case = Case((num_tokens,), 1, 1, 2 * half, 0, conv=False, norm=False, rope=True)
    inputs = case.make_inputs(device)
    inputs["qkvr_T_J"] = torch.tensor([1.0, 0.0] * 3).repeat_interleave(half)
    inputs["qkvr_T_J"] = inputs["qkvr_T_J"].repeat(num_tokens, 1).to(device)
    return inputs | {"rope_phase_B": phase_B.to(device), "position_T": position_T.to(device)}


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_sine_and_cosine_of_every_quarter(run, place, device: str) -> None:
    """Every 2^-11 of a turn, and one step of the fixed point beside it: within 2e-7."""
    step = torch.arange(-1024, 1024, dtype=torch.int64) << 53
    for phase_B in torch.cat([step - 1, step, step + 1]).view(-1, 512):
        q = run(rotary_inputs(phase_B, torch.ones(1, dtype=torch.int64), place or device))
        angle = 2 * math.pi * phase_B.double() * 2.0**-64
        expected = torch.cat([angle.cos(), angle.sin()])
        assert (q[0, 0].cpu().double() - expected).abs().max() <= 2e-7


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_rotation_far_from_the_start(run, place, device: str) -> None:
    """Against angles of sixty digits at positions of 10^9, where float32 has lost every digit."""
    position_T = torch.tensor([0, 1, FURTHEST - 1, FURTHEST])
    inputs = rotary_inputs(rope_increments(1e4, 64, "cpu"), position_T, place or device)
    q = run(inputs)
    turns = [[float(t) for t in exact_turns("10000", 64, int(p))] for p in position_T]
    angle = 2 * math.pi * torch.tensor(turns, dtype=torch.float64)
    expected = torch.cat([angle.cos(), angle.sin()], 1)[:, None]
    assert (q.cpu().double() - expected).abs().max() <= 2e-7


def test_rotation_depends_on_the_distance_alone(device: str) -> None:
    """q at i and k at j have the product of q at i - j and k at 0, near the start and far away."""
    phase_B = rope_increments(1e4, 32, "cpu")
    inputs = rotary_inputs(phase_B, torch.tensor([7, 0, FURTHEST, FURTHEST - 7]), device)
    inputs["qkvr_T_J"] = torch.randn(1, 96).repeat(4, 1).to(device)
    inputs["kv_row_T"] = torch.arange(4, device=device)
    q = run_kernel(inputs)[:, 0].double()
    k = pool_rows(inputs["k_pages_P_G_R_C"])[:4, 0].double()
    assert_matches((q[2] * k[3]).sum(), (q[0] * k[1]).sum(), limit=5e-6)


def test_values_are_not_rotated(device: str) -> None:
    inputs = Case((5,), 2, 1, 32, rope=True).make_inputs(device)
    without = {k: v for k, v in clone(inputs).items() if k not in ("rope_phase_B", "position_T")}
    run_kernel(inputs)
    run_kernel(without)
    assert_bitwise(inputs["v_pages_P_G_R_C"], without["v_pages_P_G_R_C"])


def fp8_inputs(value_T_C: Tensor, device: str) -> dict:
    """Values that reach the pages of k and v as they are, of token t in row t."""
    num_tokens, width = value_T_C.shape
    case = Case((num_tokens,), 1, 1, width, 0, conv=False, norm=False, page_dtype=FP8)
    inputs = case.make_inputs(device)
    inputs["qkvr_T_J"] = value_T_C.repeat(1, 3).to(device)
    inputs["kv_row_T"] = torch.arange(num_tokens, device=device)
    return inputs


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_fp8_rounds_as_torch_does(run, place, device: str) -> None:
    """Every finite e4m3 value, the midpoints between them, and the float32 on either side of both,
    under a scale of exactly one."""
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    below, above = (torch.nextafter(points, torch.tensor(to)) for to in (-1.0, 448.0))
    value = torch.cat([points, below, above])
    value = torch.cat([value, -value, torch.zeros(-2 * len(value) % 31)]).view(-1, 31)
    value = torch.cat([value, torch.full((len(value), 1), 448.0)], 1)  # the largest of every head
    inputs = fp8_inputs(value, place or device)
    run(inputs)
    for pages, scale in zip(POOLS, SCALES, strict=True):
        rows = pool_rows(inputs[pages])[: len(value), 0]
        assert (pool_rows(inputs[scale])[: len(value)] == 1).all()
        assert_bitwise(rows.view(torch.uint8), value.to(FP8).view(torch.uint8))


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_fp8_scales_reach_over_all_of_float32(run, place, device: str) -> None:
    """From sizes whose scale is subnormal, or zero, to the largest; a head of zeros has scale 1."""
    size = torch.tensor([0.0, 1e-45, 1e-43, 1e-38, 1e-30, 1.0, 1e30, 3.4e38])
    value = size[:, None] * torch.linspace(-1, 1, 32)
    inputs = fp8_inputs(value, place or device)
    run(inputs)
    expected, expected_scale = quantize_ref(value[:, None])
    rows = pool_rows(inputs["v_pages_P_G_R_C"])[: len(size)].cpu()
    scale = pool_rows(inputs["v_scale_P_G_R"])[: len(size)].cpu()
    assert_bitwise(scale[:, 0], expected_scale[:, 0])
    assert_bitwise(rows, expected)
    assert expected_scale[0] == 1
    assert (rows[0].float() == 0).all()
    big = rows[4:].double() * expected_scale[4:, :, None].double()
    assert_matches(big, value[4:, None], limit=0.04)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize(("run", "place"), PATHS)
def test_fp8_keeps_nan(run, place, device: str) -> None:
    value = torch.randn(3, 32)
    value[1] = float("nan")
    inputs = fp8_inputs(value, place or device)
    run(inputs)
    is_nan = pool_rows(inputs["v_pages_P_G_R_C"])[:3, 0].float().isnan()
    assert is_nan.all(1).tolist() == [False, True, False]
    assert is_nan.any(1).tolist() == [False, True, False]
