from __future__ import annotations

import pytest
import torch

from tml_kernels import rms_norm
from tml_kernels._pages import quantize_ref
from tml_kernels.ops.rms_norm.cases import BENCH, EDGE, MODEL, Case
from tml_kernels.ops.rms_norm.configs import SHIPPED, Problem, choose_config
from tml_kernels.ops.rms_norm.kernel import launch_rms_norm
from tml_kernels.ops.rms_norm.reference import rms_norm_ref
from tml_kernels.testing import assert_bitwise, assert_matches, randn

FP8 = torch.float8_e4m3fn


def check(case: Case, run, device: str) -> None:
    inputs = case.make_inputs(device)
    expected, expected_sum = rms_norm_ref(**inputs)
    out = run(inputs)
    assert_matches(out, expected, dtype=case.dtype)
    if case.residual:
        assert_matches(inputs["residual_T_D"], expected_sum, dtype=case.dtype)


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, lambda inputs: rms_norm(**inputs), "cpu")


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_kernel(case: Case, device: str) -> None:
    def run(inputs: dict) -> torch.Tensor:
        out = torch.empty_like(inputs["x_T_D"])
        if case.num_tokens:
            launch_rms_norm(inputs["x_T_D"], inputs["weight_D"], inputs["residual_T_D"], 1e-6, out)
        return out

    check(case, run, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH, ids=str)
def test_gpu(case: Case) -> None:
    check(case, lambda inputs: rms_norm(**inputs), "cuda")


def run_fp8(inputs: dict, place: str, run=rms_norm) -> tuple[torch.Tensor, torch.Tensor]:
    x = inputs["x_T_D"]
    out = torch.empty_like(x, dtype=FP8)
    scale = torch.empty(len(x), device=place)
    if run is rms_norm:
        assert rms_norm(**inputs, out_T_D=out, out_scale_T=scale) is out
    elif len(x) > 0:
        run(x, inputs["weight_D"], inputs["residual_T_D"], 1e-6, out, scale)
    return out, scale


def check_fp8(case: Case, place: str, run=rms_norm) -> None:
    inputs = case.make_inputs(place)
    inputs["x_T_D"][1:2] = 0.0  # with a residual, a row like any other
    expected, expected_sum = rms_norm_ref(**inputs)
    out, scale = run_fp8(inputs, place, run)
    amax = expected.abs().amax(1)
    assert_matches(scale, torch.where(amax == 0, 1.0, amax / 448), dtype=torch.float32)
    # Half a last place of three bits, and below the smallest normal value half of that one's.
    error = (out.double() * scale.double()[:, None] - expected).abs()
    bound = expected.abs() * (2**-4 + 1e-5) + scale.double()[:, None] * (2**-10 + 1e-5)
    assert (error <= bound).all()
    if case.residual:
        assert_matches(inputs["residual_T_D"], expected_sum, dtype=case.dtype)


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_fp8_public(case: Case) -> None:
    check_fp8(case, "cpu")


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_fp8_kernel(case: Case, device: str) -> None:
    check_fp8(case, device, launch_rms_norm)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH, ids=str)
def test_gpu_fp8(case: Case) -> None:
    check_fp8(case, "cuda")


def test_fp8_is_the_norm_rounded_once(device: str) -> None:
    """Bit by bit what torch makes of the float32 norm."""
    inputs = Case(8, 128).make_inputs(device)
    inputs["x_T_D"] *= torch.logspace(-20, 15, 8, device=device)[:, None]
    inputs["weight_D"] *= torch.logspace(-6, 6, 128, device=device)  # down to subnormal values
    out, scale = run_fp8(inputs, device, launch_rms_norm)
    norm = torch.empty_like(inputs["x_T_D"])
    launch_rms_norm(inputs["x_T_D"], inputs["weight_D"], None, 1e-6, norm)
    value, expected_scale = quantize_ref(norm[:, None])
    assert_bitwise(scale, expected_scale[:, 0])
    assert_bitwise(out.view(torch.uint8), value[:, 0].view(torch.uint8))


def test_fp8_of_nan_stays_in_its_row(device: str) -> None:
    inputs = Case(4, 64).make_inputs(device)
    expected, expected_scale = run_fp8(inputs, device, launch_rms_norm)
    inputs["x_T_D"][2, 5] = float("nan")
    out, scale = run_fp8(inputs, device, launch_rms_norm)
    assert out[2].float().isnan().all()
    others = torch.tensor([0, 1, 3], device=device)
    assert_bitwise(out.view(torch.uint8)[others], expected.view(torch.uint8)[others])
    assert_bitwise(scale[others], expected_scale[others])


@pytest.mark.parametrize("path", ["public", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_row_does_not_depend_on_neighbours(path: str) -> None:
    place = "cuda" if path == "gpu" else "cpu"
    x, weight = randn(33, 128, device=place), randn(128, device=place)
    together = rms_norm(x, weight)
    alone = torch.cat([rms_norm(x[t : t + 1].contiguous(), weight) for t in range(33)])
    assert_bitwise(together, alone)


def test_in_place_and_nan_row_stays_in_its_row() -> None:
    x, weight = randn(4, 64), randn(64)
    expected = rms_norm(x, weight)
    x[2] = float("nan")
    out = rms_norm(x, weight, out_T_D=x)
    assert out.data_ptr() == x.data_ptr()
    assert out[2].isnan().all()
    assert_bitwise(out[[0, 1, 3]], expected[[0, 1, 3]])


def test_the_sum_is_not_overwritten_by_the_norm() -> None:
    x, residual = randn(3, 16), randn(3, 16)
    before = residual.clone()
    with pytest.raises(ValueError, match="out_T_D: must not be the same memory as residual_T_D"):
        rms_norm(x, randn(16), residual_T_D=residual, out_T_D=residual)
    assert_bitwise(residual, before)


def test_opcheck() -> None:
    x, weight, residual = randn(3, 16), randn(16), randn(3, 16)
    for given in (None, residual):
        args = (x, weight, given, 1e-6, torch.empty_like(x), None)
        torch.library.opcheck(torch.ops.tml_kernels.rms_norm.default, args)
    # opcheck cannot compare fp8: the op itself takes scales beside any output
    args = (x, weight, None, 1e-6, torch.empty_like(x), torch.empty(3))
    torch.library.opcheck(torch.ops.tml_kernels.rms_norm.default, args)


def test_every_width_has_a_config() -> None:
    for width in [1, 127, 128, 129, 4096, 6144, 16384]:
        problem = Problem(width)
        assert choose_config(problem).why_not(problem) is None
    assert SHIPPED[0].why_not(Problem(129)) is not None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_T_D": torch.zeros(3)}, ValueError, "x_T_D: expected 2 axes"),
        ({"x_T_D": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "torch.float64"),
        ({"x_T_D": [[1.0]]}, TypeError, "list"),
        ({"weight_D": torch.zeros(9)}, ValueError, "D=9, but D=8"),
        ({"weight_D": torch.zeros(8).half()}, TypeError, "weight_D: .*float16"),
        ({"x_T_D": torch.zeros(8, 3).T}, ValueError, "contiguous"),
        ({"residual_T_D": torch.zeros(3, 8, dtype=torch.bfloat16)}, TypeError, "bfloat16"),
        ({"out_T_D": torch.zeros(2, 8)}, ValueError, "T=2, but T=3"),
        ({"out_T_D": torch.zeros(3, 8, dtype=FP8)}, TypeError, "float8_e4m3fn"),
        ({"out_T_D": torch.zeros(3, 8), "out_scale_T": torch.zeros(3)}, TypeError, "float32"),
        ({"out_scale_T": torch.zeros(2)}, ValueError, "T=2, but T=3"),
        ({"out_scale_T": torch.zeros(3, dtype=torch.bfloat16)}, TypeError, "bfloat16"),
        ({"x_T_D": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
        ({"x_T_D": torch.zeros(3, 16385), "weight_D": torch.zeros(16385)}, ValueError, "16385"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    inputs = {"x_T_D": torch.zeros(3, 8), "weight_D": torch.zeros(8)} | change
    with pytest.raises(error, match=words.replace("[", r"\[")):
        rms_norm(**inputs)
