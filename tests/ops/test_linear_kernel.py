"""The Triton kernel of linear: on the GPU, or in float32 through the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tml_kernels.ops.linear import linear
from tml_kernels.ops.linear.api import flatten
from tml_kernels.ops.linear.cases import EDGE, MODEL, Case
from tml_kernels.ops.linear.configs import (
    FULL,
    MAX_COUNTERS,
    STEP,
    Config,
    Problem,
    choose_config,
    kernel_why_not,
    problem_of,
    scratch_bytes,
)
from tml_kernels.ops.linear.launch import launch_linear
from tml_kernels.ops.linear.reference import linear_ref
from tml_kernels.quant import take_rows
from tml_kernels.testing import assert_bitwise, assert_matches, randn

NARROW = (torch.bfloat16, torch.float16)
SPLIT = Case(5, 2100, 70, bias=True, residual=True, scale=0.5)  # two parts, the last one shorter
GATED = Case(5, 2100, 70, activation="swiglu", bias=True, residual=True)
FP8 = replace(SPLIT, precision="fp8")
CHANNEL = replace(GATED, precision="fp8_channel")
INT4 = replace(GATED, precision="int4")
CUT = [SPLIT, GATED, FP8, CHANNEL, INT4, replace(SPLIT, precision="int4_f16")]


def launch(
    inputs: dict[str, Any],
    config: Config | None = None,
    scratch: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    x = inputs["x_T_D"]
    rows = problem_of(x, inputs["weight_F_D"]).rows
    width = rows // 2 if inputs["activation"] == "swiglu" else rows
    out = torch.full((x.shape[0], width), float("nan"), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel():
        launch_linear(*arguments(inputs), out=out, scratch=scratch, config=config)
    return out


def arguments(inputs: dict[str, Any]) -> list[Any]:
    x, weight, *rest = inputs.values()
    return [x, *flatten(weight), *rest]


def on(case: Case, device: str) -> Case:
    """As the kernel takes it there: the interpreter does not round as the hardware does."""
    return replace(case, dtype=torch.bfloat16) if device == "cuda" else case


def rows(inputs: dict[str, Any], index: Any) -> dict[str, Any]:
    """The same call for some of the tokens."""
    names = [name for name in ("x_T_D", "residual_T_F") if inputs[name] is not None]
    return inputs | {name: inputs[name][index].contiguous() for name in names}


def check(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    out, expected = launch(inputs, out_dtype=case.out_dtype), linear_ref(**inputs)
    valid = case.num_valid if case.num_valid is not None else out.shape[1]
    assert_matches(out[:, :valid], expected[:, :valid])
    assert (out[:, valid:] == float("-inf")).all()


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MODEL if case.rows > 6000]


@pytest.mark.parametrize("case", [*EDGE, *CUT, *MODEL[:3], MODEL[4], *SLOW], ids=str)
def test_kernel(case: Case, device: str) -> None:
    check(on(case, device), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("num_tokens", [1, 17, 64, 65, 200])
@pytest.mark.parametrize("case", [*EDGE[1:], *CUT, *MODEL], ids=str)
def test_gpu_every_block(case: Case, num_tokens: int, dtype: torch.dtype) -> None:
    if case.precision:
        dtype = torch.bfloat16  # what packed weights are decoded to
    check(replace(case, num_tokens=num_tokens, dtype=dtype), "cuda")


def configs_of(p: Problem) -> list[Config]:
    """Every way the kernel cuts this weight, with the block that is chosen for so many tokens."""
    config = choose_config(p)
    return [
        replace(config, block_m=block_m, parallel=parallel)
        for block_m in ((64, 128) if p.format == "plain" else (128,))
        for parallel in (False, True)
    ]


@pytest.mark.parametrize("case", CUT, ids=str)
def test_who_adds_the_parts_does_not_change_the_bits(case: Case, device: str) -> None:
    inputs = on(case, device).make_inputs(device)
    p = problem_of(inputs["x_T_D"], inputs["weight_F_D"])
    assert p.splits == 2
    for block_m in (64, 128) if case.precision is None else (128,):
        alone, together = (
            launch(inputs, replace(choose_config(p), block_m=block_m, parallel=parallel))
            for parallel in (False, True)
        )
        assert_bitwise(together, alone)


@pytest.mark.parametrize("case", [SPLIT, INT4, Case(5, 77, 33)], ids=str)
def test_row_does_not_depend_on_its_place_or_neighbours(case: Case, device: str) -> None:
    """Of one block size: numpy's products have other bits for other numbers of columns."""
    inputs = on(replace(case, num_tokens=23), device).make_inputs(device)
    p = problem_of(inputs["x_T_D"], inputs["weight_F_D"])
    config = replace(choose_config(p), block_n=16)
    together = launch(inputs, config)
    for t in (0, 7, 22):
        alone = launch(rows(inputs, slice(t, t + 1)), config)
        assert_bitwise(alone, together[t : t + 1])
    order = torch.randperm(23)
    assert_bitwise(launch(rows(inputs, order), config), together[order])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(1024, 4096, 6656, residual=True),
        Case(1024, 4096, 4096, bias=True, scale=0.3),
        Case(1024, 16384, 4096, scale=0.3, residual=True),
        Case(1024, 4096, 8192, activation="swiglu", residual=True),
        Case(1024, 1100, 334, bias=True),
        Case(1024, 4096, 4096, bias=True, scale=0.3, precision="fp8"),
        Case(1024, 4096, 6656, residual=True, precision="fp8_channel"),
        Case(1024, 4096, 8192, activation="swiglu", residual=True, precision="int4"),
    ],
    ids=str,
)
def test_gpu_rows_have_the_same_bits_in_any_number(case: Case) -> None:
    inputs = replace(case, dtype=torch.bfloat16).make_inputs("cuda")
    together = launch(inputs)
    assert_matches(together[:256], linear_ref(**rows(inputs, slice(0, 256))))
    for count in (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 512, 1000):
        for first in (0, 1024 - count):
            some = slice(first, first + count)
            assert_bitwise(launch(rows(inputs, some)), together[some])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "fp8", "fp8_channel", "int4"])
def test_gpu_configurations_have_the_same_bits(precision: str | None) -> None:
    case = Case(64, 4096, 4096, residual=True, scale=0.3, precision=precision)
    inputs = on(case, "cuda").make_inputs("cuda")
    p = problem_of(inputs["x_T_D"], inputs["weight_F_D"])
    expected = launch(inputs)
    for config in configs_of(p):
        for block_n in (16, 32, 64, 128):
            num_warps = 8 if config.block_m == 128 and block_n >= 64 else 4
            cut = replace(config, block_n=block_n, num_warps=num_warps, num_stages=3)
            if cut.why_not(p) is None:
                assert_bitwise(launch(inputs, cut), expected)


@pytest.mark.gpu
def test_gpu_weight_past_two_billion_elements() -> None:
    """The last rows of 524,416 x 4,096 begin past element 2^31."""
    weight = torch.zeros(524416, 4096, dtype=torch.bfloat16, device="cuda")
    weight[-200:] = randn(200, 4096, device="cuda", dtype=torch.bfloat16)
    x = randn(3, 4096, device="cuda", dtype=torch.bfloat16)
    out = linear(x, weight)
    assert_matches(out[:, -200:], linear_ref(x, weight[-200:]))
    assert (out[:, :-200] == 0).all()


def test_nan_row_stays_in_its_row(device: str) -> None:
    inputs = on(replace(SPLIT, num_tokens=7), device).make_inputs(device)
    expected = launch(inputs)
    inputs["x_T_D"][5] = float("nan")
    out = launch(inputs)
    assert out[5].isnan().all()
    others = [0, 1, 2, 3, 4, 6]
    assert_bitwise(out[others], expected[others])


def test_nan_of_a_weight_stays_in_its_column(device: str) -> None:
    inputs = on(Case(3, 80, 20, num_valid=15), device).make_inputs(device)
    inputs["weight_F_D"][3] = inputs["weight_F_D"][17] = float("nan")
    out = launch(inputs)
    assert out[:, 3].isnan().all()
    assert out[:, [0, 1, 2, *range(4, 15)]].isfinite().all()
    assert (out[:, 15:] == float("-inf")).all()


def test_output_may_be_the_residual(device: str) -> None:
    for case in (SPLIT, GATED):
        inputs = on(case, device).make_inputs(device)
        expected, residual = launch(inputs), inputs["residual_T_F"]
        launch_linear(*arguments(inputs), out=residual)
        assert_bitwise(residual, expected)


def test_one_scratch_serves_calls_of_any_shape(device: str) -> None:
    """Nothing but zeros is left where programs are counted, nothing is written behind its end."""
    calls = [on(case, device).make_inputs(device) for case in (SPLIT, GATED, Case(20, 4096, 8))]
    problems = [problem_of(inputs["x_T_D"], inputs["weight_F_D"]) for inputs in calls]
    needed, guard = max(scratch_bytes(p) for p in problems), 4096
    scratch = torch.full((needed + guard,), 0xA5, dtype=torch.uint8, device=device)
    scratch[: 4 * MAX_COUNTERS] = 0
    for _ in range(2):
        for inputs, p in zip(calls, problems, strict=True):
            assert choose_config(p).parallel
            assert_bitwise(launch(inputs, scratch=scratch[: scratch_bytes(p)]), launch(inputs))
            assert (scratch[: 4 * MAX_COUNTERS] == 0).all()
    assert (scratch[needed:] == 0xA5).all()


@pytest.mark.parametrize("format", STEP)
@pytest.mark.parametrize(
    ("width", "rows"),
    [(1, 1), (128, 320), (1100, 64), (4096, 4096), (4096, 6656), (16384, 4096), (4096, 32768),
     (4096, 201024), (6144, 49152), (8193, 512), (2049, 70)],
)  # fmt: skip
def test_parts_follow_from_the_weight_alone(width: int, rows: int, format: str) -> None:
    first = Problem(1, width, rows, format)
    assert first.split_d % 256 == 0
    assert (first.splits - 1) * first.split_d < width <= first.splits * first.split_d
    for num_tokens in (1, 7, 16, 17, 33, 64, 65, 128, 200, 500, 1024, 5000):
        p = replace(first, num_tokens=num_tokens)
        config = choose_config(p)
        assert (p.splits, p.split_d) == (first.splits, first.split_d)
        assert config.why_not(p) is None
        assert config.block_m in (64, 128)  # the widest instruction's rows: one order of adding
        assert config.block_m == 128 or format == "plain"
        assert config.num_warps in (4, 8)
        assert config.num_warps == 4 or config.block_m * config.block_n >= 128 * 64
        assert not config.parallel or p.splits > 1
        assert config.tiles(p) * config.block_m >= rows
        assert config.blocks(p) * config.block_n >= num_tokens
        assert scratch_bytes(p) <= 4 * (MAX_COUNTERS + FULL * 128 * 128)


@pytest.mark.parametrize("format", STEP)
@pytest.mark.parametrize("num_parts", [2, 4, 8])
@pytest.mark.parametrize(("width", "rows"), [(4096, 6656), (16384, 4096), (4096, 4096), (128, 320)])
def test_some_rows_are_cut_as_the_whole_matrix(
    width: int, rows: int, num_parts: int, format: str
) -> None:
    whole = Problem(7, width, rows, format)
    share = replace(whole, rows=rows // num_parts, parts=num_parts)
    assert (share.splits, share.split_d) == (whole.splits, whole.split_d)
    assert choose_config(share).why_not(share) is None


def test_some_rows_alone_are_cut_otherwise() -> None:
    """Why `parts` is there."""
    assert Problem(7, 4096, 6656 // 8, "plain").splits > Problem(7, 4096, 6656, "plain").splits


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "fp8", "fp8_channel", "int4"])
@pytest.mark.parametrize("num_tokens", [1, 33, 200])
def test_gpu_some_rows_have_the_bits_of_the_whole(num_tokens: int, precision: str | None) -> None:
    case = Case(num_tokens, 4096, 2048, dtype=torch.bfloat16, precision=precision)
    inputs = case.make_inputs("cuda")
    x, weight = inputs["x_T_D"], inputs["weight_F_D"]
    shares = torch.arange(2048, device="cuda").chunk(8)
    parts = [linear(x, take_rows(weight, rows), parts=8) for rows in shares]
    assert_bitwise(torch.cat(parts, dim=1), linear(x, weight))


def test_choice() -> None:
    few = choose_config(Problem(1, 4096, 4096, "plain"))
    assert (few.block_m, few.block_n, few.parallel) == (64, 16, True)
    assert few.programs(Problem(1, 4096, 4096, "plain")) == 256
    many = choose_config(Problem(1024, 4096, 4096, "plain"))
    assert (many.block_m, many.block_n, many.parallel) == (128, 128, False)
    wide = choose_config(Problem(1, 4096, 32768, "plain"))
    assert (wide.block_m, wide.block_n, wide.parallel) == (128, 16, False)


def test_too_many_counters_are_refused() -> None:
    p = Problem(1, 2048, 70000, "plain")
    config = replace(choose_config(p), parallel=True)
    assert "over 512" in (config.why_not(p) or "")


def test_too_wide_blocks_are_refused() -> None:
    p = Problem(64, 4096, 4096, "int4")
    assert "over 32" in (replace(choose_config(p), block_n=64).why_not(p) or "")


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "format", "width", "words"),
    [
        (torch.float32, torch.float32, "plain", 64, "float32 rows"),
        (torch.bfloat16, torch.float32, "plain", 64, "torch.float32 with rows of torch.bfloat16"),
        (torch.bfloat16, torch.bfloat16, "plain", 0, "D=0"),
        (torch.float16, torch.int16, "fp8", 64, "fp8 weights are multiplied in bfloat16"),
        (torch.bfloat16, torch.int16, "int4", 2**25, "64 x 33554432 has over"),
    ],
)
def test_why_not(
    dtype: torch.dtype, weight_dtype: torch.dtype, format: str, width: int, words: str
) -> None:
    assert words in (kernel_why_not(dtype, weight_dtype, format, width, 64) or "")
    assert kernel_why_not(torch.float16, torch.float16, "plain", 64, 64) is None
    assert kernel_why_not(torch.bfloat16, torch.int16, format, 4096, 64) is None or (
        format == "plain"
    )
