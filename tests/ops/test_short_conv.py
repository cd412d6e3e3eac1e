from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tml_kernels.ops.short_conv import short_conv
from tml_kernels.ops.short_conv.cases import BENCH, EDGE, MODEL, Case
from tml_kernels.ops.short_conv.configs import SHIPPED, Problem, choose_config
from tml_kernels.ops.short_conv.kernel import launch_short_conv
from tml_kernels.ops.short_conv.reference import short_conv_ref
from tml_kernels.testing import assert_bitwise, assert_matches, randn


def run_public(inputs: dict) -> Tensor:
    return short_conv(**inputs)


def run_kernel(inputs: dict) -> Tensor:
    out = torch.empty_like(inputs["x_T_D"])
    names = ("x_T_D", "weight_D_4", "state_N_3_D", "start_S1", "slot_S")
    if out.numel():
        launch_short_conv(
            *(inputs[name] for name in names),
            inputs.get("residual_T_D"),
            inputs.get("norm_weight_D"),
            1e-6,
            inputs.get("late_norm", False),
            out,
        )
    return out


PATHS = [
    pytest.param(run_public, "cpu", id="public"),
    pytest.param(run_kernel, None, id="kernel"),
    pytest.param(run_public, "cuda", id="gpu", marks=pytest.mark.gpu),
]


def ints(values: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def check(case: Case, run: Callable[[dict], Tensor], device: str) -> None:
    inputs = case.make_inputs(device)
    expected = short_conv_ref(**inputs)
    residual = inputs["residual_T_D"]
    before = None if residual is None else residual.clone()
    out = run(inputs)

    live = expected.live_T
    assert_matches(out[live], expected.out_T_D[live], dtype=case.dtype)
    assert_bitwise(out[~live], torch.zeros_like(out[~live]))
    assert_bitwise(inputs["state_N_3_D"], expected.state_N_3_D)  # rows are copies
    if residual is not None and before is not None and expected.residual_T_D is not None:
        assert_matches(residual[live], expected.residual_T_D[live], dtype=case.dtype)
        assert_bitwise(residual[~live], before[~live])


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, run_public, "cpu")


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_kernel(case: Case, device: str) -> None:
    check(case, run_kernel, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH, ids=str)
def test_gpu(case: Case) -> None:
    check(case, run_public, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_public_rounds_once(dtype: torch.dtype) -> None:
    check(Case((2, 0, 5), 96, idle=(1,), padding=1, dtype=dtype), run_public, "cpu")


def test_reference_is_conv1d() -> None:
    """Against torch's own convolution over the whole history."""
    x, weight, state = randn(6, 10), randn(10, 4), randn(1, 3, 10)
    result = short_conv_ref(x, weight, state, ints([0, 6]), ints([0]))
    history = torch.cat([state[0], x]).double()
    conv = torch.nn.functional.conv1d(history.T[None], weight.double()[:, None], groups=10)
    assert_matches(result.out_T_D, x.double() + conv[0].T, limit=1e-15)
    assert_bitwise(result.state_N_3_D[0], x[3:])


def make_stream(num_tokens: int, width: int, device: str) -> dict:
    """One session's tokens, with the weights that every session shares."""
    return {
        "x_T_D": randn(num_tokens, width, device=device),
        "residual_T_D": randn(num_tokens, width, device=device),
        "weight_D_4": randn(width, 4, device=device),
        "norm_weight_D": randn(width, device=device),
    }


@pytest.mark.parametrize(("run", "place"), PATHS)
@pytest.mark.parametrize("width", [96, 77, 5000])
def test_any_split_gives_the_same_bits(run, place, width: int, device: str) -> None:
    """A session's tokens in one call, and in calls of 0 to 4."""
    device = place or device
    num_tokens = 11
    whole, split = (make_stream(num_tokens, width, device) for _ in range(2))
    split = {name: tensor.clone() for name, tensor in whole.items()}
    state = torch.zeros(2, 3, width, device=device)
    start, slot = ints([0, num_tokens], device), ints([1], device)
    together = run({**whole, "state_N_3_D": state, "start_S1": start, "slot_S": slot})

    state_split, pieces, at = torch.zeros_like(state), [], 0
    for count in (1, 1, 0, 2, 3, 4):
        piece = {
            **split,
            "x_T_D": split["x_T_D"][at : at + count],
            "residual_T_D": split["residual_T_D"][at : at + count],
            "state_N_3_D": state_split,
            "start_S1": ints([0, count], device),
            "slot_S": slot,
        }
        pieces.append(run(piece))
        at += count
    assert at == num_tokens
    assert_bitwise(torch.cat(pieces), together)
    assert_bitwise(state_split, state)
    assert_bitwise(split["residual_T_D"], whole["residual_T_D"])


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_alone_equals_among_others(run, place, device: str) -> None:
    device = place or device
    counts, width = [3, 1, 0, 5, 2, 4, 1], 96
    start = torch.tensor([0, *counts]).cumsum(0).tolist()
    batch = make_stream(start[-1], width, device)
    state = randn(len(counts), 3, width, device=device)
    rows = list(itertools.pairwise(start))
    alone = []
    for s, (first, end) in enumerate(rows):
        own = {
            **batch,
            "x_T_D": batch["x_T_D"][first:end].clone(),
            "residual_T_D": batch["residual_T_D"][first:end].clone(),
            "state_N_3_D": state[s : s + 1].clone(),
            "start_S1": ints([0, end - first], device),
            "slot_S": ints([0], device),
        }
        alone.append((run(own), own["residual_T_D"], own["state_N_3_D"]))
    slot = ints(list(range(len(counts))), device)
    out = run({**batch, "state_N_3_D": state, "start_S1": ints(start, device), "slot_S": slot})
    for s, (first, end) in enumerate(rows):
        own_out, own_residual, own_state = alone[s]
        assert_bitwise(out[first:end], own_out)
        assert_bitwise(batch["residual_T_D"][first:end], own_residual)
        assert_bitwise(state[s], own_state[0])


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_nan_stays_in_its_session(run, place, device: str) -> None:
    """A NaN input reaches its own four outputs and its state, and no other session."""
    device = place or device
    inputs = make_stream(9, 64, device)
    inputs |= {"start_S1": ints([0, 6, 9], device), "slot_S": ints([0, 1], device)}
    inputs["x_T_D"][2, 7] = float("nan")
    state = torch.zeros(2, 3, 64, device=device)
    out = run({**inputs, "state_N_3_D": state})
    assert out.isnan().any(1).tolist() == [False] * 2 + [True] * 4 + [False] * 3
    assert not state.isnan().any()  # tokens 3, 4 and 5 are finite


def test_a_slot_outside_the_state_is_idle_to_the_kernel(device: str) -> None:
    inputs = make_stream(2, 32, device)
    inputs |= {"start_S1": ints([0, 1, 2], device), "slot_S": ints([7, -9], device)}
    state = torch.zeros(2, 3, 32, device=device)
    out = run_kernel({**inputs, "state_N_3_D": state})
    assert not out.any()
    assert not state.any()


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_no_slots_and_idle_rows_give_zeros(run, place, device: str) -> None:
    inputs = make_stream(3, 32, place or device)
    ends = {"start_S1": ints([0, 2, 3], place or device), "slot_S": ints([-1, -1], place or device)}
    state = torch.zeros(0, 3, 32, device=place or device)
    out = run({**inputs, **ends, "state_N_3_D": state})
    assert_bitwise(out, torch.zeros_like(out))


def test_out_is_used() -> None:
    inputs = make_stream(2, 32, "cpu")
    inputs |= {"start_S1": ints([0, 2]), "slot_S": ints([0]), "state_N_3_D": torch.zeros(1, 3, 32)}
    out = torch.empty(2, 32)
    assert short_conv(**inputs, out_T_D=out) is out
    assert out.isfinite().all()


def test_opcheck() -> None:
    for case in (Case((2, 1), 16, idle=(1,)), Case((3,), 16, residual=False, norm=False)):
        inputs = case.make_inputs("cpu")
        inputs = {k: v.nan_to_num() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        args = (*inputs.values(), torch.zeros_like(inputs["x_T_D"]))
        torch.library.opcheck(torch.ops.tml_kernels.short_conv.default, args)


def test_every_width_has_a_config() -> None:
    for width in [1, 128, 129, 513, 1024, 2049, 4096, 6144, 6145, 8193, 16384]:
        assert choose_config(Problem(width)).why_not(Problem(width)) is None
    assert SHIPPED[0].why_not(Problem(129)) is not None
    with pytest.raises(ValueError, match="16385"):
        choose_config(Problem(16385))


BAD = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_T_D": torch.zeros(3)}, ValueError, "x_T_D: expected 2 axes"),
        ({"x_T_D": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "torch.float64"),
        ({"x_T_D": torch.zeros(8, 3).T}, ValueError, "contiguous"),
        ({"weight_D_4": torch.zeros(8, 3)}, ValueError, "weight_D_4: 4=3"),
        ({"weight_D_4": torch.zeros(8, 4).bfloat16()}, TypeError, "bfloat16"),
        ({"state_N_3_D": torch.zeros(2, 3, 8).half()}, TypeError, "float16"),
        ({"state_N_3_D": torch.zeros(2, 4, 8)}, ValueError, "state_N_3_D: 3=4"),
        ({"start_S1": torch.tensor([0, 3])}, TypeError, "int64"),
        ({"start_S1": ints([])}, ValueError, "at least one row"),
        ({"slot_S": ints([0, 1])}, ValueError, "S=2, but S=1"),
        ({"start_S1": ints([0, 4])}, ValueError, "at most 3, got [0, 4]"),
        ({"start_S1": ints([1, 3])}, ValueError, "ascending values from 0"),
        ({"start_S1": ints([0, 2, 1]), "slot_S": ints([0, 1])}, ValueError, "[0, 2, 1]"),
        ({"slot_S": ints([2])}, ValueError, "or 0..1, got [2]"),
        ({"slot_S": ints([-2])}, ValueError, "got [-2]"),
        ({"start_S1": ints([0, 1, 2]), "slot_S": ints([1, 1])}, ValueError, "named twice"),
        ({"norm_weight_D": torch.ones(8)}, ValueError, "residual_T_D is None"),
        ({"late_norm": True}, ValueError, "norm_weight_D is None"),
        ({"residual_T_D": torch.zeros(2, 8)}, ValueError, "T=2, but T=3"),
        ({"out_T_D": torch.zeros(3, 8).half()}, TypeError, "float16"),
        ({"x_T_D": BAD, "out_T_D": BAD}, ValueError, "same memory as x_T_D"),
        ({"x_T_D": BAD, "residual_T_D": BAD}, ValueError, "same memory as x_T_D"),
        ({"residual_T_D": BAD, "out_T_D": BAD}, ValueError, "same memory as out_T_D"),
        ({"x_T_D": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    state = randn(2, 3, 8)
    inputs = {
        "x_T_D": torch.zeros(3, 8),
        "weight_D_4": torch.zeros(8, 4),
        "state_N_3_D": state,
        "start_S1": ints([0, 3]),
        "slot_S": ints([0]),
    } | change
    before = state.clone()
    with pytest.raises(error, match=words.replace("[", r"\[")):
        short_conv(**inputs)
    assert_bitwise(state, before)


def test_too_wide() -> None:
    x, weight, state = torch.zeros(1, 16385), torch.zeros(16385, 4), torch.zeros(1, 3, 16385)
    with pytest.raises(ValueError, match="16385"):
        short_conv(x, weight, state, ints([0, 1]), ints([0]))
