"""linear_conv against its oracle and, bit for bit, against the two ops it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tml_kernels.ops.linear import linear, linear_conv
from tml_kernels.ops.linear.api import flatten
from tml_kernels.ops.linear.cases import CONV, ConvCase
from tml_kernels.ops.linear.configs import (
    MAX_COUNTERS,
    WIDEST_CONV,
    Problem,
    choose_config,
    choose_conv_config,
    problem_of,
    scratch_bytes,
)
from tml_kernels.ops.linear.launch import launch_linear, launch_linear_conv
from tml_kernels.ops.linear.reference import linear_conv_ref
from tml_kernels.ops.short_conv import short_conv
from tml_kernels.ops.short_conv.kernel import launch_short_conv
from tml_kernels.testing import assert_bitwise, assert_matches

Run = Callable[[dict[str, Any]], Tensor]
CHANGED = ("state_N_3_F", "residual_T_F")  # in place
BF16 = torch.bfloat16
GPU = [ConvCase(t, 4096, 4096, idle=(0,) * (t > 1), dtype=BF16) for t in (1, 8, 32, 64, 200)]


def run_public(inputs: dict[str, Any]) -> Tensor:
    return linear_conv(**inputs)


def run_kernel(inputs: dict[str, Any], **more: Any) -> Tensor:
    x, weight, *rest = inputs.values()
    out = torch.full_like(inputs["residual_T_F"], float("nan"))
    if out.numel():
        launch_linear_conv(x, *flatten(weight), *rest, out, **more)
    return out


def in_two(inputs: dict[str, Any], *, kernels: bool) -> Tensor:
    """By linear, then short_conv."""
    x, slot = inputs["x_T_D"], inputs["slot_T"]
    start = torch.arange(len(slot) + 1, dtype=torch.int32, device=x.device)
    conv = (inputs["conv_weight_F_4"], inputs["state_N_3_F"], start, slot)
    add = (inputs["residual_T_F"], inputs["norm_weight_F"])
    if not kernels:
        y = linear(x, inputs["weight_F_D"])
        return short_conv(y, *conv, residual_T_D=add[0], norm_weight_D=add[1], late_norm=True)
    y, out = torch.empty_like(add[0]), torch.empty_like(add[0])
    if out.numel():
        launch_linear(x, *flatten(inputs["weight_F_D"]), None, None, 1.0, None, None, y)
        launch_short_conv(y, *conv, *add, 1e-6, True, out)
    return out


def copy_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {name: inputs[name].clone() for name in CHANGED}


def check(case: ConvCase, run: Run, device: str) -> None:
    inputs = case.make_inputs(device)
    expected, before = linear_conv_ref(**inputs), copy_of(inputs)
    out, live = run(inputs), expected.live_T
    assert_matches(out[live], expected.out_T_F[live], dtype=case.dtype)
    assert_bitwise(out[~live], torch.zeros_like(out[~live]))
    residual, state = inputs["residual_T_F"], inputs["state_N_3_F"]
    assert_matches(residual[live], expected.residual_T_F[live], dtype=case.dtype)
    assert_bitwise(residual[~live], before["residual_T_F"][~live])
    slot = inputs["slot_T"].long()
    named = slot[slot >= 0]
    assert_bitwise(state[named, :2], before["state_N_3_F"][named, 1:])
    assert_matches(state[named, 2], expected.state_N_3_F[named, 2], dtype=case.dtype)
    others = [n for n in range(len(state)) if n not in set(named.tolist())]
    assert_bitwise(state[others], before["state_N_3_F"][others])


def assert_same_as_in_two(case: ConvCase, run: Run, device: str, *, kernels: bool) -> None:
    ours = case.make_inputs(device)
    theirs = copy_of(ours)
    assert_bitwise(run(ours), in_two(theirs, kernels=kernels))
    for name in CHANGED:
        assert_bitwise(ours[name], theirs[name])


@pytest.mark.parametrize("case", CONV, ids=str)
def test_public(case: ConvCase) -> None:
    check(case, run_public, "cpu")
    assert_same_as_in_two(case, run_public, "cpu", kernels=False)
    if case.precision is None:
        assert_same_as_in_two(replace(case, dtype=BF16), run_public, "cpu", kernels=False)


def on(case: ConvCase, device: str) -> ConvCase:
    """As the kernel takes it there: the interpreter does not round as the hardware does."""
    return replace(case, dtype=BF16) if device == "cuda" else case


@pytest.mark.parametrize("case", CONV, ids=str)
def test_kernel(case: ConvCase, device: str) -> None:
    check(on(case, device), run_kernel, device)
    assert_same_as_in_two(on(case, device), run_kernel, device, kernels=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "fp8", "fp8_channel", "int4"])
@pytest.mark.parametrize("case", GPU, ids=str)
def test_gpu_has_the_bits_of_the_two_ops(case: ConvCase, precision: str | None) -> None:
    case = replace(case, precision=precision)
    check(case, run_public, "cuda")
    assert_same_as_in_two(case, run_public, "cuda", kernels=False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "int4"])
def test_gpu_rows_have_the_same_bits_in_any_number(precision: str | None) -> None:
    inputs = ConvCase(300, 4096, 4096, dtype=BF16, precision=precision).make_inputs("cuda")
    together = copy_of(inputs)
    out = linear_conv(**together)
    for count in (1, 2, 8, 16, 17, 33, 64, 65, 129):
        for rows in (slice(0, count), slice(300 - count, 300)):
            some = copy_of(inputs)
            for name in ("x_T_D", "slot_T", "residual_T_F"):
                some[name] = some[name][rows].contiguous()
            assert_bitwise(linear_conv(**some), out[rows])
            assert_bitwise(some["residual_T_F"], together["residual_T_F"][rows])
            slot = some["slot_T"].long()
            assert_bitwise(some["state_N_3_F"][slot], together["state_N_3_F"][slot])


@pytest.mark.gpu
def test_gpu_replays_in_a_graph() -> None:
    """Steps of a stream: each replay finds the state that the last one left."""
    inputs = ConvCase(9, 4096, 4096, idle=(3,), dtype=BF16).make_inputs("cuda")
    inputs["state_N_3_F"].nan_to_num_()
    eager = copy_of(inputs)
    problem = problem_of(inputs["x_T_D"], inputs["weight_F_D"])
    scratch = torch.zeros(scratch_bytes(problem), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(inputs["residual_T_F"])
    linear_conv(**copy_of(inputs), out_T_F=out, scratch_B=scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear_conv(**inputs, out_T_F=out, scratch_B=scratch)
    for _ in range(3):
        inputs["x_T_D"].copy_(torch.randn_like(inputs["x_T_D"]))
        graph.replay()
        expected = linear_conv(**eager | {"x_T_D": inputs["x_T_D"]})
        assert_bitwise(out, expected)
        for name in CHANGED:
            assert_bitwise(inputs[name], eager[name])


def test_who_adds_the_parts_does_not_change_the_bits(device: str) -> None:
    inputs = on(CONV[4], device).make_inputs(device)
    p = problem_of(inputs["x_T_D"], inputs["weight_F_D"])
    assert p.splits == 2
    results = []
    for parallel in (False, True):
        own = copy_of(inputs)
        config = replace(choose_config(p), parallel=parallel)
        results.append((run_kernel(own, config=config), *(own[name] for name in CHANGED)))
    for alone, together in zip(*results, strict=True):
        assert_bitwise(together, alone)


@pytest.mark.parametrize("format", ["plain", "fp8", "int4"])
@pytest.mark.parametrize(("width", "rows"), [(4096, 4096), (8192, 256), (77, 33)])
def test_configurations(width: int, rows: int, format: str) -> None:
    """Legal, narrow enough for the registers, and content with the scratch that linear asks for."""
    for num_tokens in (1, 16, 17, 64, 65, 128, 200, 1000):
        p = Problem(num_tokens, width, rows, format)
        config = choose_conv_config(p)
        assert config.why_not(p) is None
        assert config.block_n <= WIDEST_CONV
        assert config.scratch_bytes(p) <= scratch_bytes(p)


def test_scratch_is_left_fit_for_any_call(device: str) -> None:
    inputs = on(CONV[4], device).make_inputs(device)
    needed = scratch_bytes(problem_of(inputs["x_T_D"], inputs["weight_F_D"]))
    scratch = torch.full((needed + 4096,), 0xA5, dtype=torch.uint8, device=device)
    scratch[: 4 * MAX_COUNTERS] = 0
    expected = run_kernel(copy_of(inputs))
    for _ in range(2):
        assert_bitwise(run_kernel(copy_of(inputs), scratch=scratch[:needed]), expected)
        assert (scratch[: 4 * MAX_COUNTERS] == 0).all()
    assert (scratch[needed:] == 0xA5).all()


def test_nan_stays_in_its_session(device: str) -> None:
    inputs = on(ConvCase(6, 64, 40), device).make_inputs(device)
    clean = copy_of(inputs)
    expected = run_kernel(clean)
    inputs["x_T_D"][4] = float("nan")
    out = run_kernel(inputs)
    assert out[4].isnan().all()
    others = [0, 1, 2, 3, 5]
    assert_bitwise(out[others], expected[others])
    assert_bitwise(inputs["residual_T_F"][others], clean["residual_T_F"][others])


def test_a_slot_outside_the_state_is_idle_to_the_kernel(device: str) -> None:
    inputs = on(ConvCase(2, 32, 16), device).make_inputs(device)
    inputs["slot_T"] = torch.tensor([99, -7], dtype=torch.int32, device=device)
    before = copy_of(inputs)
    assert not run_kernel(inputs).any()
    for name in CHANGED:
        assert_bitwise(inputs[name], before[name])


@pytest.mark.parametrize("case", [CONV[2], CONV[6]], ids=str)
def test_opcheck(case: ConvCase) -> None:
    inputs = case.make_inputs("cpu")
    inputs |= {name: inputs[name].nan_to_num() for name in CHANGED}
    x, weight, *rest = inputs.values()
    args = (x, *flatten(weight), *rest, torch.zeros_like(inputs["residual_T_F"]), None)
    torch.library.opcheck(torch.ops.tml_kernels.linear_conv.default, args)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_T_D": torch.zeros(3, 9)}, ValueError, "weight_F_D: D=8, but D=9"),
        ({"weight_F_D": torch.zeros(5, 8)}, ValueError, "conv_weight_F_4: F=6, but F=5"),
        ({"conv_weight_F_4": torch.zeros(6, 3)}, ValueError, "conv_weight_F_4: 4=3"),
        ({"conv_weight_F_4": torch.zeros(6, 4).half()}, TypeError, "conv_weight_F_4.*float16"),
        ({"state_N_3_F": torch.zeros(4, 3, 6).half()}, TypeError, "state_N_3_F.*float16"),
        ({"state_N_3_F": torch.zeros(4, 2, 6)}, ValueError, "state_N_3_F: 3=2"),
        ({"slot_T": torch.tensor([0, 1, 2])}, TypeError, "slot_T.*int64"),
        ({"slot_T": ints(0, 1)}, ValueError, "slot_T: T=2, but T=3"),
        ({"slot_T": ints(0, 4, 1)}, ValueError, r"or 0..3, got \[0, 4, 1\]"),
        ({"slot_T": ints(0, 2, 2)}, ValueError, "named twice"),
        ({"residual_T_F": torch.zeros(2, 6)}, ValueError, "residual_T_F: T=2, but T=3"),
        ({"norm_weight_F": torch.ones(6).half()}, TypeError, "norm_weight_F.*float16"),
        ({"out_T_F": torch.zeros(3, 6).half()}, TypeError, "out_T_F.*float16"),
        ({"scratch_B": torch.zeros(8)}, TypeError, "scratch_B.*float32"),
        ({"x_T_D": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    state = torch.ones(4, 3, 6)
    inputs = {
        "x_T_D": torch.zeros(3, 8),
        "weight_F_D": torch.zeros(6, 8),
        "conv_weight_F_4": torch.zeros(6, 4),
        "state_N_3_F": state,
        "slot_T": ints(0, -1, 3),
        "residual_T_F": torch.zeros(3, 6),
        "norm_weight_F": torch.ones(6),
    } | change
    with pytest.raises(error, match=words):
        linear_conv(**inputs)
    assert (state == 1).all()


def test_what_is_written_may_not_be_what_is_read() -> None:
    inputs = ConvCase(2, 8, 8).make_inputs("cpu")
    x, residual = inputs["x_T_D"], inputs["residual_T_F"]
    with pytest.raises(ValueError, match=r"out_T_F: .*same memory as residual_T_F"):
        linear_conv(**inputs, out_T_F=residual)
    with pytest.raises(ValueError, match=r"out_T_F: .*same memory as x_T_D"):
        linear_conv(**inputs, out_T_F=x)
    with pytest.raises(ValueError, match=r"residual_T_F: .*same memory as x_T_D"):
        linear_conv(**inputs | {"residual_T_F": x})
