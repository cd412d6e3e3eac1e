from __future__ import annotations

import pytest
import torch
from kernel_attention_prologue import (
    PATHS,
    assert_same_writes,
    check,
    clone,
    op_args,
    pool_rows,
    run_kernel,
    run_public,
    tokens_of,
)
from torch.nn import functional

from tml_kernels._head_tiles import SHIPPED, Problem, choose_config
from tml_kernels._pages import FP8
from tml_kernels.ops.attention_prologue import attention_prologue
from tml_kernels.ops.attention_prologue.cases import (
    BENCH,
    CONV,
    EDGE,
    MODEL,
    NORMS,
    POOLS,
    SCALES,
    Case,
)
from tml_kernels.testing import assert_bitwise, assert_matches, randn


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    check(Case((4, 1), 4, 2, 32, dtype=dtype), run_public, "cpu")
    check(Case((4, 1), 4, 2, 32, dtype=torch.float32, page_dtype=dtype), run_public, "cpu")


def test_reference_is_the_convolution_of_the_whole_sequence() -> None:
    """Against torch's conv1d and rms_norm, over two appends of one session."""
    case = Case((11,), 4, 2, 8, poison=False)
    inputs = case.make_inputs("cpu")
    slot = int(inputs["slot_S"][0])
    x, width = inputs["qkvr_T_J"].double(), 16
    expected = {}
    for i, name in enumerate(("k", "v")):
        past = inputs["conv_state_N_2_3_GC"][slot, i].double()
        columns = x[:, 32 + i * width : 32 + (i + 1) * width]
        taps = inputs[f"{name}_conv_GC_4"].double()[:, None]
        stream = torch.cat([past, columns]).T[None]
        mixed = functional.conv1d(stream, taps, groups=width)[0].T + columns
        expected[name] = mixed.view(11, 2, 8)
    expected["k"] = functional.rms_norm(expected["k"], (8,), inputs["k_norm_C"].double(), 1e-6)
    expected["q"] = functional.rms_norm(
        x[:, :32].view(11, 4, 8), (8,), inputs["q_norm_C"].double(), 1e-6
    )

    inputs["kv_row_T"] = torch.arange(11) + 60
    for tokens in (slice(0, 2), slice(2, 11)):
        piece = inputs | {name: inputs[name][tokens].clone() for name in ("qkvr_T_J", "kv_row_T")}
        piece["start_S1"] = torch.tensor([0, tokens.stop - tokens.start], dtype=torch.int32)
        assert_matches(attention_prologue(**piece), expected["q"][tokens])
    for name, pages in zip(("k", "v"), POOLS, strict=True):
        assert_matches(pool_rows(inputs[pages])[60:71], expected[name])


EVERY_STEP = {"rope": True, "page_dtype": FP8}


@pytest.mark.parametrize(("run", "place"), PATHS)
@pytest.mark.parametrize("steps", [{}, EVERY_STEP], ids=["conv-norm", "all"])
def test_any_split_of_an_append_is_bitwise_the_same(run, place, steps: dict, device: str) -> None:
    whole = Case((13,), 4, 2, 32, **steps).make_inputs(place or device)
    first = clone(whole)
    q = run(first)
    for sizes in ((1,) * 13, (2, 11), (5, 1, 3, 4), (12, 0, 1)):
        pieces, parts, start = clone(whole), [], 0
        for size in sizes:
            parts.append(run(tokens_of(pieces, start, start + size)))
            start += size
        assert_bitwise(torch.cat(parts), q)
        assert_same_writes(pieces, first)


@pytest.mark.parametrize(("run", "place"), PATHS)
@pytest.mark.parametrize("steps", [{}, EVERY_STEP], ids=["conv-norm", "all"])
def test_session_does_not_depend_on_the_other_rows(run, place, steps: dict, device: str) -> None:
    case = Case((4, 1, 7, 2), 4, 2, 32, idle=(1,), padding=2, **steps)
    inputs = case.make_inputs(place or device)
    together, apart = clone(inputs), clone(inputs)
    q = run(together)
    start = inputs["start_S1"].tolist()
    for s in range(4):
        alone = tokens_of(apart, start[s], start[s + 1], s)
        assert_bitwise(run(alone), q[start[s] : start[s + 1]])
    assert_same_writes(apart, together)


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_more_rows_than_one_block_of_session_ends(run, place, device: str) -> None:
    check(Case((1, 0) * 65 + (3,), 1, 1, 4, idle=(2,)), run, place or device)


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_nan_token_stays_in_its_session(run, place, device: str) -> None:
    inputs = Case((3, 4, 2), 2, 1, 32).make_inputs(place or device)
    clean = clone(inputs)
    expected = run(clean)
    inputs["qkvr_T_J"][4] = float("nan")
    q = run(inputs)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert q[4].isnan().all()
    assert_bitwise(q[others], expected[others])
    slots = inputs["slot_S"][[0, 2]].long()
    assert_bitwise(inputs["conv_state_N_2_3_GC"][slots], clean["conv_state_N_2_3_GC"][slots])
    kv_row = inputs["kv_row_T"][[0, 1, 7, 8]]
    for name in POOLS:
        assert_bitwise(pool_rows(inputs[name])[kv_row], pool_rows(clean[name])[kv_row])


def test_the_kernel_takes_what_is_out_of_range_as_idle(device: str) -> None:
    """A slot beyond the state writes no state and no page, a row beyond the pool no page."""
    inputs = Case((1, 1, 1), 2, 1, 32, poison=False).make_inputs(device)
    inputs["slot_S"][0], inputs["slot_S"][1] = 5, -7
    inputs["kv_row_T"][2] = inputs["k_pages_P_G_R_C"].shape[0] * 64
    before = clone(inputs)
    q = run_kernel(inputs)
    assert (q[:2] == 0).all()
    assert (q[2] != 0).any()
    for name in POOLS:
        assert_bitwise(inputs[name], before[name])
    slot = int(inputs["slot_S"][2])
    expected = before["conv_state_N_2_3_GC"].roll(-1, 2)
    expected[slot, :, 2] = inputs["qkvr_T_J"][2, 64:128].view(2, 32)
    state = before["conv_state_N_2_3_GC"].clone()
    state[slot] = expected[slot]
    assert_bitwise(inputs["conv_state_N_2_3_GC"], state)


@pytest.mark.parametrize(("run", "place"), PATHS)
def test_no_slots_and_idle_rows_give_zeros(run, place, device: str) -> None:
    inputs = Case((1, 2), 2, 1, 32, idle=(0, 1)).make_inputs(place or device)
    inputs["conv_state_N_2_3_GC"] = inputs["conv_state_N_2_3_GC"][:0]
    inputs["kv_row_T"].fill_(1)  # of tokens that write nothing, as often as one likes
    before = clone(inputs)
    assert not run(inputs).any()
    assert_same_writes(inputs, before)


@pytest.mark.parametrize("leave", ["conv", "norm", "both"])
def test_steps_left_out_are_identities(leave: str, device: str) -> None:
    """No taps is a convolution with zero weights; no norms leave q alone."""
    given = Case((3, 2), 2, 1, 32, poison=False).make_inputs(device)
    for name in ("k_conv_GC_4", "v_conv_GC_4"):
        given[name] = torch.zeros_like(given[name])
    without = clone(given)
    if leave != "norm":
        without |= dict.fromkeys(CONV)
    if leave != "conv":
        without |= dict.fromkeys(NORMS)
    q, expected = run_kernel(without), run_kernel(given)
    if leave == "conv":
        assert_bitwise(q, expected)
        assert_bitwise(without["k_pages_P_G_R_C"], given["k_pages_P_G_R_C"])
    else:
        assert_bitwise(q, given["qkvr_T_J"][:, :64].view(5, 2, 32))
    assert_bitwise(without["v_pages_P_G_R_C"], given["v_pages_P_G_R_C"])


def test_relative_columns_are_not_read() -> None:
    inputs = Case((3,), 2, 1, 32, num_features=4).make_inputs("cpu")
    expected = attention_prologue(**clone(inputs))
    inputs["qkvr_T_J"][:, -8:] = float("nan")
    assert_bitwise(attention_prologue(**inputs), expected)


def test_writes_into_out() -> None:
    inputs = Case((3,), 2, 1, 32).make_inputs("cpu")
    out = torch.empty(3, 2, 32)
    assert attention_prologue(**clone(inputs), out_T_H_C=out) is out
    assert_bitwise(out, attention_prologue(**inputs))


@pytest.mark.parametrize("steps", [{}, {"rope": True}, {"conv": False, "norm": False}], ids=str)
def test_opcheck(steps: dict) -> None:
    inputs = Case((3, 2), 2, 1, 8, idle=(1,), poison=False, **steps).make_inputs("cpu")
    if "rope" in steps:  # opcheck cannot compare fp8 pages: scales are declared for any
        inputs |= {name: torch.zeros_like(inputs[POOLS[0]][..., 0]) for name in SCALES}
    args = op_args(inputs, torch.zeros(5, 2, 8))
    torch.library.opcheck(torch.ops.tml_kernels.attention_prologue.default, args)


def test_every_width_has_a_config() -> None:
    for width in [1, 32, 33, 64, 96, 128, 256, 512, 1024]:
        assert choose_config(Problem(width)).why_not(Problem(width)) is None
    assert SHIPPED[0].why_not(Problem(33)) is not None
    with pytest.raises(ValueError, match="1025"):
        choose_config(Problem(1025))


def test_cost_counts_every_row_once() -> None:
    cost = BENCH[0].cost()  # one token: q in and out, k and v in, pages, state both ways
    assert cost.bytes == 2 * (2 * 4096 + 2048 + 12 * 1024 + 2048) + 4 * (8192 + 256) + 8


ROPE = {"rope_phase_B": torch.arange(4), "position_T": torch.arange(5)}
SCALE = {"k_scale_P_G_R": torch.zeros(2, 1, 4), "v_scale_P_G_R": torch.zeros(2, 1, 4)}
FP8_POOLS = dict.fromkeys(POOLS, torch.zeros(2, 1, 4, 8).to(FP8))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qkvr_T_J": torch.zeros(5, 39)}, ValueError, r"qkvr_T_J: .*32 \+ 2 n.*J=39"),
        ({"qkvr_T_J": torch.zeros(5, 30)}, ValueError, "J=30"),
        ({"qkvr_T_J": torch.zeros(5, 40).double()}, TypeError, "qkvr_T_J.*float64"),
        ({"num_heads": 0}, ValueError, "num_heads.*got 0"),
        ({"k_conv_GC_4": torch.zeros(9, 4)}, ValueError, "k_conv_GC_4: GC=9, but GC=8"),
        ({"v_conv_GC_4": torch.zeros(8, 4).half()}, TypeError, "v_conv_GC_4.*float16"),
        ({"k_norm_C": torch.zeros(7)}, ValueError, "k_norm_C: C=7, but C=8"),
        ({"conv_state_N_2_3_GC": torch.zeros(3, 2, 4, 8)}, ValueError, "conv_state.*3=4"),
        ({"conv_state_N_2_3_GC": torch.zeros(3, 2, 3, 8).half()}, TypeError, "conv_state.*float16"),
        ({"k_pages_P_G_R_C": torch.zeros(2, 1, 4, 8).long()}, TypeError, "k_pages.*int64"),
        ({"v_pages_P_G_R_C": torch.zeros(2, 1, 5, 8)}, ValueError, "v_pages_P_G_R_C: R=5, but R=4"),
        ({"kv_row_T": torch.zeros(5).int()}, TypeError, "kv_row_T.*int32"),
        ({"kv_row_T": torch.tensor([0, 1, 2, 8, -1])}, ValueError, "kv_row_T: .*below 8, got 8"),
        ({"kv_row_T": torch.tensor([7, -1, 3, -1, 7])}, ValueError, "kv_row_T: 7 is named twice"),
        ({"slot_S": torch.tensor([0, 3]).int()}, ValueError, r"slot_S: .*0..2, got \[0, 3"),
        ({"slot_S": torch.zeros(3).int()}, ValueError, "slot_S: S=3, but S=2"),
        (
            {"start_S1": torch.tensor([0, 3, 6]).int()},
            ValueError,
            r"start_S1: .*at most 5, got \[0, 3, 6",
        ),
        ({"start_S1": torch.tensor([0, 4, 3]).int()}, ValueError, "start_S1: .*ascending"),
        ({"start_S1": torch.tensor([1, 3, 5]).int()}, ValueError, "start_S1: .*ascending"),
        ({"slot_S": torch.tensor([1, 1]).int()}, ValueError, "slot_S: .*named twice"),
        ({"out_T_H_C": torch.zeros(5, 3, 8)}, ValueError, "out_T_H_C: H=3, but H=2"),
        ({"qkvr_T_J": torch.zeros(5, 40, requires_grad=True)}, RuntimeError, "no backward"),
        (
            {"v_pages_P_G_R_C": torch.zeros(2, 1, 4, 8, requires_grad=True)},
            RuntimeError,
            "no backward",
        ),
        ({"k_conv_GC_4": None}, ValueError, "k_conv_GC_4: None, but v_conv_GC_4 is not"),
        ({"q_norm_C": None}, ValueError, "q_norm_C: None, but k_norm_C is not"),
        ({"conv_state_N_2_3_GC": None}, ValueError, "conv_state_N_2_3_GC: .*None"),
        ({"position_T": torch.arange(5)}, ValueError, "rope_phase_B: None, but position_T"),
        (ROPE | {"position_T": torch.arange(4)}, ValueError, "position_T: T=4, but T=5"),
        (ROPE | {"position_T": torch.arange(5).int()}, TypeError, "position_T.*int32"),
        (ROPE | {"rope_phase_B": torch.arange(8)}, ValueError, "rope_phase_B: .*C=8, got B=8"),
        (SCALE, ValueError, "k_scale_P_G_R: .*float32 pages with scales"),
        (FP8_POOLS, ValueError, "k_scale_P_G_R: .*float8_e4m3fn pages without scales"),
        (
            FP8_POOLS | SCALE | {"v_scale_P_G_R": torch.zeros(2, 1, 4).half()},
            TypeError,
            "v_scale_P_G_R.*float16",
        ),
        (FP8_POOLS | {"k_scale_P_G_R": torch.zeros(2, 1, 4)}, ValueError, "v_scale_P_G_R: None"),
    ],
)
def test_bad_input_changes_nothing(change: dict, error: type, words: str) -> None:
    inputs = {
        "qkvr_T_J": torch.zeros(5, 40),
        "k_conv_GC_4": torch.zeros(8, 4),
        "v_conv_GC_4": torch.zeros(8, 4),
        "q_norm_C": torch.ones(8),
        "k_norm_C": torch.ones(8),
        "conv_state_N_2_3_GC": randn(3, 2, 3, 8),
        "k_pages_P_G_R_C": randn(2, 1, 4, 8),
        "v_pages_P_G_R_C": randn(2, 1, 4, 8),
        "kv_row_T": torch.arange(5),
        "start_S1": torch.tensor([0, 3, 5]).int(),
        "slot_S": torch.tensor([2, 0]).int(),
        "num_heads": 2,
    } | change
    before = clone(inputs)
    with pytest.raises(error, match=words):
        attention_prologue(**inputs)
    assert_same_writes(inputs, before)


def test_too_wide() -> None:
    inputs = Case((1,), 1, 1, 1025, 0, conv=False, norm=False).make_inputs("cpu")
    with pytest.raises(ValueError, match=r"k_pages_P_G_R_C: C=1025 is not in 1\.\.1024"):
        attention_prologue(**inputs)
