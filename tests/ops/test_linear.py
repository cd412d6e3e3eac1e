from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from tml_kernels.ops.linear import linear
from tml_kernels.ops.linear.api import flatten
from tml_kernels.ops.linear.cases import EDGE, MODEL, Case
from tml_kernels.ops.linear.reference import linear_ref
from tml_kernels.quant import PackedExperts, dequantize, pack_matrix
from tml_kernels.testing import assert_bitwise, assert_matches, randn


def check(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    out = linear(**inputs, out_dtype=case.out_dtype)
    expected = linear_ref(**inputs)
    valid = case.num_valid if case.num_valid is not None else out.shape[1]
    assert out.dtype == (case.out_dtype or case.dtype)
    assert_matches(out[:, :valid], expected[:, :valid])
    assert (out[:, valid:] == float("-inf")).all()
    assert (expected[:, valid:] == float("-inf")).all()


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_gpu(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_with_wide_output(dtype: torch.dtype) -> None:
    case = Case(5, 96, 40, bias=True, residual=True, dtype=dtype)
    check(case, "cpu")
    inputs = case.make_inputs("cpu")
    wide = linear(**inputs, out_dtype=torch.float32)
    assert_matches(wide, linear_ref(**inputs))  # nothing was rounded to dtype on the way
    assert_bitwise(wide.to(dtype), linear(**inputs))


def test_reference_agrees_with_torch_functions() -> None:
    x, weight, residual = randn(7, 24).double(), randn(10, 24).double(), randn(7, 5).double()
    gate, up = weight[0::2], weight[1::2]
    expected = functional.silu(functional.linear(x, gate)) * functional.linear(x, up) + residual
    out = linear_ref(x, weight, residual_T_F=residual, activation="swiglu")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("width", [128, 77])
def test_row_does_not_depend_on_neighbours(activation: str | None, width: int) -> None:
    x, weight = randn(29, width), randn(2 * width, width)
    together = linear(x, weight, activation=activation)
    alone = [linear(x[t : t + 1].clone(), weight, activation=activation) for t in range(29)]
    assert_bitwise(together, torch.cat(alone))


def test_nan_row_stays_in_its_row() -> None:
    x, weight = randn(12, 64), randn(32, 64)
    expected = linear(x, weight)
    x[5] = float("nan")
    out = linear(x, weight)
    others = [t for t in range(12) if t != 5]
    assert out[5].isnan().all()
    assert_bitwise(out[others], expected[others])


def test_output_may_be_the_residual() -> None:
    x, weight, residual = randn(3, 16), randn(8, 16), randn(3, 8)
    expected = linear(x, weight, residual_T_F=residual)
    out = linear(x, weight, residual_T_F=residual, out_T_F=residual)
    assert out.data_ptr() == residual.data_ptr()
    assert_bitwise(out, expected)


def test_padding_columns_hide_whatever_the_weight_holds() -> None:
    x, weight = randn(2, 16), randn(8, 16)
    weight[5:] = float("nan")
    out = linear(x, weight, num_valid=5)
    assert out[:, :5].isfinite().all()
    assert (out[:, 5:] == float("-inf")).all()


PLAIN = (None, None, "plain")
TWO = replace(pack_matrix(torch.ones(6, 8), "fp8"), data=torch.zeros(2, 1, 6, 64).short())


def test_opcheck_of_a_packed_weight() -> None:
    args = (randn(3, 300), *flatten(pack_matrix(randn(10, 300), "int4")))
    more = (randn(10), None, 0.5, "swiglu", None, torch.empty(3, 5), None)
    torch.library.opcheck(torch.ops.tml_kernels.linear.default, (*args, *more))


@pytest.mark.parametrize("precision", ["fp8", "fp8_channel", "int4", "int4_f16"])
def test_packed_weight_is_what_it_stands_for(precision: str) -> None:
    x, packed = randn(5, 300), pack_matrix(randn(130, 300), precision)
    assert_bitwise(linear(x, packed), linear(x, dequantize(packed, 0)))


def test_packed_form_of_a_plain_weight_is_that_weight() -> None:
    x, weight = randn(5, 30), randn(7, 30)
    packed = pack_matrix(weight, "fp32")
    assert isinstance(packed, PackedExperts)
    assert_bitwise(linear(x, packed), linear(x, weight))


@pytest.mark.parametrize(
    ("weight", "precision", "error", "words"),
    [
        (torch.zeros(3, 4), "fp5", ValueError, "precision: 'fp5'"),
        (torch.zeros(3), "fp8", ValueError, "weight_R_K: expected 2 axes"),
        (torch.zeros(3, 4).double(), "fp8", TypeError, "weight_R_K.*float64"),
        (torch.zeros(3, 0), "fp8", ValueError, "weight_R_K: is empty"),
        (torch.full((3, 4), float("nan")), "fp8", ValueError, "weight_R_K.*NaN"),
    ],
)
def test_pack_matrix_refuses(weight: torch.Tensor, precision: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        pack_matrix(weight, precision)


def test_opcheck() -> None:
    x, weight = randn(3, 16), randn(8, 16)
    for args in (
        (x, weight, *PLAIN, None, None, 1.0, None, None, torch.empty(3, 8), None),
        (x, weight, *PLAIN, randn(8), randn(3, 4), 0.5, "swiglu", None, torch.empty(3, 4), None),
        (x, weight, *PLAIN, None, None, 1.0, None, 6, torch.empty(3, 8), None),
    ):
        torch.library.opcheck(torch.ops.tml_kernels.linear.default, args)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_T_D": torch.zeros(3)}, ValueError, "x_T_D: expected 2 axes"),
        ({"x_T_D": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "torch.float64"),
        ({"x_T_D": torch.zeros(8, 3).T}, ValueError, "x_T_D: must be contiguous"),
        ({"weight_F_D": torch.zeros(6, 9)}, ValueError, "weight_F_D: D=9, but D=8"),
        ({"weight_F_D": torch.zeros(6, 8).half()}, TypeError, "weight_F_D.*float16"),
        ({"bias_F": torch.zeros(5)}, ValueError, "bias_F: F=5, but F=6"),
        ({"residual_T_F": torch.zeros(3, 3)}, ValueError, "residual_T_F: F=3, but F=6"),
        (
            {"residual_T_F": torch.zeros(3, 6), "activation": "swiglu"},
            ValueError,
            "residual_T_F: F=6, but F=3",
        ),
        (
            {"weight_F_D": pack_matrix(torch.ones(6, 9), "fp8")},
            ValueError,
            "weight_F_D: D=9, but D=8",
        ),
        (
            {"weight_F_D": pack_matrix(torch.ones(6, 8), "mxfp4")},
            ValueError,
            "weight_F_D.*int4.*got mxfp4",
        ),
        (
            {"weight_F_D": pack_matrix(torch.ones(6, 8), "int4"), "bias_F": torch.zeros(5)},
            ValueError,
            "bias_F: F=5, but F=6",
        ),
        ({"weight_F_D": TWO}, ValueError, "weight_F_D: expected one matrix, got E=2"),
        ({"activation": "gelu"}, ValueError, "activation.*'gelu'"),
        ({"activation": "swiglu", "num_valid": 3}, ValueError, "num_valid.*got 3"),
        (
            {"activation": "swiglu", "weight_F_D": torch.zeros(5, 8)},
            ValueError,
            "weight_F_D.*even.*F=5",
        ),
        ({"num_valid": 7}, ValueError, "num_valid: expected 1..6, got 7"),
        ({"num_valid": 0}, ValueError, "num_valid: expected 1..6, got 0"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype.*int32"),
        ({"out_T_F": torch.zeros(2, 6)}, ValueError, "out_T_F: T=2, but T=3"),
        (
            {"out_T_F": torch.zeros(3, 6), "out_dtype": torch.bfloat16},
            TypeError,
            "out_T_F: expected torch.bfloat16",
        ),
        ({"x_T_D": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
        ({"scratch_B": torch.zeros(8)}, TypeError, "scratch_B.*float32"),
        ({"scratch_B": torch.zeros(9, dtype=torch.uint8)[1:]}, ValueError, "scratch_B.*16"),
        (
            {
                "x_T_D": torch.zeros(3, 2048),
                "weight_F_D": torch.zeros(6, 2048),
                "scratch_B": torch.zeros(8, dtype=torch.uint8),
            },
            ValueError,
            "scratch_B: 10240 bytes.*B=8",
        ),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    inputs: dict[str, Any] = {"x_T_D": torch.zeros(3, 8), "weight_F_D": torch.zeros(6, 8)}
    inputs |= change
    with pytest.raises(error, match=words):
        linear(**inputs)


def test_output_may_not_be_the_input() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="out_T_F: must not be the same memory as x_T_D"):
        linear(x, torch.zeros(8, 8), out_T_F=x)
