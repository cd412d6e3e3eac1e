from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tml_kernels.ops.attention_prologue import attention_prologue
from tml_kernels.ops.attention_prologue.cases import BENCH, EDGE, MODEL, Case
from tml_kernels.ops.attention_prologue.reference import attention_prologue_ref
from tml_kernels.testing import assert_bitwise, assert_matches, randn

POOLS = ("k_pages_P_G_R_C", "v_pages_P_G_R_C")
MUTATED = ("conv_state_N_2_3_GC", *POOLS)


def clone(inputs: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def pool_rows(pages_P_G_R_C: Tensor) -> Tensor:
    """The pool as rows [P * R, G, C], in the order kv_row counts them."""
    return pages_P_G_R_C.transpose(1, 2).flatten(0, 1)


def check(case: Case, device: str) -> None:
    inputs = case.make_inputs(device)
    before = clone(inputs)
    expected = attention_prologue_ref(
        **{k: v for k, v in inputs.items() if k not in (*POOLS, "kv_row_T")}
    )
    q = attention_prologue(**inputs)
    assert_matches(q, expected.q_T_H_C, dtype=case.dtype)
    assert (q[~expected.live_T] == 0).all()

    written = expected.live_T & (inputs["kv_row_T"] >= 0)
    kv_row = inputs["kv_row_T"][written]
    for name, value in zip(POOLS, (expected.k_T_G_C, expected.v_T_G_C), strict=True):
        rows, rows_before = pool_rows(inputs[name]), pool_rows(before[name])
        assert_matches(rows[kv_row], value[written], dtype=rows.dtype)
        untouched = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
        untouched[kv_row] = False
        assert_bitwise(rows[untouched], rows_before[untouched])

    state = before["conv_state_N_2_3_GC"].clone()
    active = inputs["slot_S"] >= 0
    state[inputs["slot_S"][active].long()] = expected.state_S_2_3_GC[active].to(state.dtype)
    assert_bitwise(inputs["conv_state_N_2_3_GC"], state)


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_gpu(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    check(Case((4, 1), 4, 2, 32, dtype=dtype), "cpu")
    check(Case((4, 1), 4, 2, 32, dtype=torch.float32, page_dtype=dtype), "cpu")


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


def test_any_split_of_an_append_is_bitwise_the_same() -> None:
    whole = Case((13,), 4, 2, 32).make_inputs("cpu")
    whole["qkvr_T_J"].nan_to_num_(0.0)
    for sizes in ((1,) * 13, (2, 11), (5, 1, 3, 4), (12, 0, 1)):
        first, pieces = clone(whole), clone(whole)
        q = attention_prologue(**first)
        start, parts = 0, []
        for size in sizes:
            piece = pieces | {
                name: pieces[name][start : start + size].clone()
                for name in ("qkvr_T_J", "kv_row_T")
            }
            piece["start_S1"] = torch.tensor([0, size], dtype=torch.int32)
            parts.append(attention_prologue(**piece))
            start += size
        assert_bitwise(torch.cat(parts), q)
        for name in MUTATED:
            assert_bitwise(pieces[name], first[name])


def test_session_does_not_depend_on_the_other_rows() -> None:
    inputs = Case((4, 1, 7, 2), 4, 2, 32, idle=(1,), padding=2).make_inputs("cpu")
    together, apart = clone(inputs), clone(inputs)
    q = attention_prologue(**together)
    start = inputs["start_S1"].tolist()
    for s in range(4):
        tokens = slice(start[s], start[s + 1])
        alone = apart | {name: apart[name][tokens].clone() for name in ("qkvr_T_J", "kv_row_T")}
        alone["start_S1"] = torch.tensor([0, start[s + 1] - start[s]], dtype=torch.int32)
        alone["slot_S"] = inputs["slot_S"][s : s + 1].clone()
        assert_bitwise(attention_prologue(**alone), q[tokens])
    for name in MUTATED:
        assert_bitwise(apart[name], together[name])


def test_nan_token_stays_in_its_session() -> None:
    inputs = Case((3, 4, 2), 2, 1, 32).make_inputs("cpu")
    clean = clone(inputs)
    expected = attention_prologue(**clean)
    inputs["qkvr_T_J"][4] = float("nan")
    q = attention_prologue(**inputs)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert q[4].isnan().all()
    assert_bitwise(q[others], expected[others])
    slots = inputs["slot_S"][[0, 2]].long()
    assert_bitwise(inputs["conv_state_N_2_3_GC"][slots], clean["conv_state_N_2_3_GC"][slots])
    kv_row = inputs["kv_row_T"][[0, 1, 7, 8]]
    for name in POOLS:
        assert_bitwise(pool_rows(inputs[name])[kv_row], pool_rows(clean[name])[kv_row])


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


def test_opcheck() -> None:
    inputs = Case((3, 2), 2, 1, 8, idle=(1,), poison=False).make_inputs("cpu")
    args = (*inputs.values(), 1e-6, torch.empty(5, 2, 8))
    torch.library.opcheck(torch.ops.tml_kernels.attention_prologue.default, args)


def test_cost_counts_every_row_once() -> None:
    cost = BENCH[0].cost()  # one token: q in and out, k and v in, pages, state both ways
    assert cost.bytes == 2 * (2 * 4096 + 2048 + 12 * 1024 + 2048) + 4 * (8192 + 256) + 8


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qkvr_T_J": torch.zeros(5, 39)}, ValueError, r"qkvr_T_J: .*32 \+ 2 B.*J=39"),
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
    for name in MUTATED:
        assert_bitwise(inputs[name], before[name])
