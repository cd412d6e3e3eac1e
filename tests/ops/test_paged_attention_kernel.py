"""The kernels of paged_attention: in the interpreter in float32, on a GPU in 16-bit dtypes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_paged_attention import (
    as_decoded,
    as_table,
    launch,
    launch_plan,
    pieces,
    row_alone,
    with_unseen_pages,
)

from tml_kernels._device import ARCHS, max_shared
from tml_kernels._pages import FP8
from tml_kernels.ops.paged_attention import paged_attention
from tml_kernels.ops.paged_attention.cases import BENCH, EDGE, FAR, MODEL, Case, Row
from tml_kernels.ops.paged_attention.configs import (
    ALONE,
    ALONE_WIDE,
    LARGE,
    SMALL,
    Config,
    Problem,
    choose_config,
    kernel_why_not,
    problem_of,
    scratch_buffers,
    scratch_bytes,
)
from tml_kernels.ops.paged_attention.reference import paged_attention_ref
from tml_kernels.testing import assert_bitwise, assert_matches

CONFIGS = [ALONE, SMALL, LARGE]
LONG = Case(
    (Row(9, 1300), Row(1, 600), Row(0, 5), Row(3, 3)), 2, 1, extent=700, tau_floor=9.0, padding=2
)


def on(case: Case, device: str) -> Case:
    """On a GPU the kernels' products take 16-bit operands."""
    return replace(case, dtype=torch.bfloat16) if device == "cuda" else case


def replanned(inputs: dict[str, Any]) -> dict[str, Any]:
    """Through plan_pages, from lists in random order."""
    slot = torch.arange(inputs["length_S"].shape[0], dtype=torch.int32)
    table = as_table(inputs["plan"])
    return inputs | {"plan": launch_plan(*table, slot.to(table[0].device))}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("case", [*EDGE, *MODEL[:2], LONG], ids=str)
def test_kernel(case: Case, config: Config, device: str) -> None:
    case = on(case, device)
    inputs = case.make_inputs(device)
    assert_matches(launch(inputs, config), paged_attention_ref(**inputs), dtype=case.dtype)


@pytest.mark.parametrize("case", MODEL[2:], ids=str)
def test_kernel_of_the_public_model(case: Case, device: str) -> None:
    case = on(case, device)
    inputs = case.make_inputs(device)
    assert_matches(launch(inputs), paged_attention_ref(**inputs), dtype=case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        replace(case, dtype=dtype)
        for case in (*EDGE, *MODEL, LONG)
        for dtype in (torch.bfloat16, torch.float16)
        if case.page_dtype is None or dtype == torch.bfloat16  # see `shape_why_not`
    ],
    ids=str,
)
def test_gpu_dtypes(case: Case, config: Config) -> None:
    inputs = case.make_inputs("cuda")
    assert_matches(launch(inputs, config), paged_attention_ref(**inputs), dtype=case.dtype)


# The oracle holds float64 logits of every pair of a row: up to 8 GB of them.
FULL_SIZE = [case for case in BENCH if case.cost().flops <= 4 * case.head_width << 30]


@pytest.mark.gpu
@pytest.mark.parametrize("case", FULL_SIZE, ids=str)
def test_gpu_full_size(case: Case) -> None:
    inputs = case.make_inputs("cuda")
    assert_matches(paged_attention(**inputs), paged_attention_ref(**inputs), dtype=case.dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("window", [None, 600])
def test_order_of_the_page_list_is_bitwise_neutral(
    window: int | None, config: Config, device: str
) -> None:
    case = on(replace(LONG, window=window), device)
    inputs = case.make_inputs(device)
    expected = launch(inputs, config)
    assert_bitwise(launch(replanned(inputs), config), expected)


def test_long_page_lists(device: str) -> None:
    case = on(Case((Row(2, 700), Row(1, 100)), 2, 1, 16, page_rows=4), device)
    inputs = case.make_inputs(device)
    assert inputs["plan"].page_S_M.shape[1] > 128
    expected = launch(inputs)
    assert_matches(expected, paged_attention_ref(**inputs), dtype=case.dtype)
    assert_bitwise(launch(replanned(inputs)), expected)


@pytest.mark.parametrize(
    "case",
    [
        Case((Row(5, 511),), window=100, extent=64),
        Case((Row(5, 511),), extent=64),  # the unseen pages begin a split of their own
        Case((Row(5, 511),), extent=64, runs=(4, 4)),
        Case((Row(5, 511),), runs=(4, 4)),
    ],
    ids=str,
)
def test_pages_that_nobody_sees_are_bitwise_neutral(case: Case, device: str) -> None:
    """A ring that still lists pages before the window, and pages reserved ahead."""
    inputs = on(case, device).make_inputs(device)
    expected = launch(inputs)
    assert_bitwise(launch(with_unseen_pages(inputs)), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_row_does_not_depend_on_the_other_rows(config: Config, device: str) -> None:
    inputs = on(LONG, device).make_inputs(device)
    together = launch(inputs, config)
    for s in range(len(LONG.rows)):
        alone, tokens = row_alone(inputs, s)
        assert_bitwise(launch(alone, config), together[tokens])


SIZES = [(1,) * 21, (4, 17), (20, 1), (2, 9, 10)]
APPENDS = [
    Case((Row(21, 1100),), 2, 1, extent=500, tau_floor=10.0),
    Case((Row(21, 1100),), 2, 1, extent=500, window=530),
    Case((Row(21, 1100),), 2, 1),
    Case((Row(21, 1100),), 2, 1, extent=500, tau_floor=10.0, runs=(9, 4)),
    Case((Row(21, 1100),), 2, 1, runs=(9, 4)),
]


@pytest.mark.parametrize("case", APPENDS, ids=str)
def test_an_append_in_pieces_is_the_same_attention(case: Case, device: str) -> None:
    """Only near, in the interpreter: numpy's products have other bits for other numbers of rows."""
    case = on(case, device)
    inputs = case.make_inputs(device)
    whole = launch(inputs, LARGE)
    for sizes in SIZES[3:]:
        parts = torch.cat([launch(piece, SMALL) for piece in pieces(inputs, sizes)])
        assert_matches(parts, whole, dtype=case.dtype)


@pytest.mark.parametrize("case", [c for c in APPENDS if c.runs], ids=str)
def test_a_token_decoded_has_the_bits_it_has_with_later_tokens_in_its_pages(
    case: Case, device: str
) -> None:
    inputs = on(case, device).make_inputs(device)
    for piece in pieces(inputs, (1,) * 21)[::7]:
        assert_bitwise(launch(as_decoded(piece)), launch(piece))


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", [None, FP8])
@pytest.mark.parametrize("case", APPENDS, ids=str)
def test_gpu_append_in_pieces_is_bitwise_the_same(
    case: Case, page_dtype: torch.dtype | None
) -> None:
    case = replace(case, dtype=torch.bfloat16, page_dtype=page_dtype)
    inputs = case.make_inputs("cuda")
    whole = launch(inputs, LARGE)
    for config in CONFIGS:
        for sizes in SIZES:
            parts = [launch(piece, config) for piece in pieces(inputs, sizes)]
            assert_bitwise(torch.cat(parts), whole)


@pytest.mark.parametrize("window", [None, 64])
def test_positions_near_a_billion_are_exact(window: int | None, device: str) -> None:
    """The same context moved by whole splits gives the same bits: nothing but tau reads them."""
    moved = FAR // 512 * 512
    near = on(Case((Row(4, 700),), window=window, extent=50), device).make_inputs(device)
    plan = near["plan"]._replace(base_S_M=near["plan"].base_S_M + moved)
    far = near | {"plan": plan, "length_S": near["length_S"] + moved}
    assert_bitwise(launch(far), launch(near))


@pytest.mark.parametrize("begin", [496, 489, 505])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_pages_of_a_window_may_begin_anywhere(config: Config, begin: int, device: str) -> None:
    """A page that begins before the first split and reaches over its edge."""
    case = on(Case((Row(1, 48),), window=20, page_rows=16), device)
    inputs = case.make_inputs(device)
    plan = inputs["plan"]._replace(base_S_M=inputs["plan"].base_S_M + begin)
    inputs |= {"plan": plan, "length_S": inputs["length_S"] + begin}
    assert_matches(launch(inputs, config), paged_attention_ref(**inputs), dtype=case.dtype)


def test_positions_of_rows_near_a_billion_are_exact(device: str) -> None:
    case = on(Case((Row(4, 700),), extent=50, runs=(4, 4)), device)
    near = case.make_inputs(device)
    plan = near["plan"]._replace(base_S_M=near["plan"].base_S_M + FAR)
    position = near["row_position_P_R"] + FAR
    far = near | {"plan": plan, "length_S": near["length_S"] + FAR, "row_position_P_R": position}
    assert_bitwise(launch(far), launch(near))


def test_first_pages_stay_when_a_billion_positions_are_gone(device: str) -> None:
    """Sinks at the beginning and a hole up to the newest pages."""
    case = on(Case((Row(3, FAR, 700),), extent=128, tau_floor=128000.0), device)
    inputs = case.make_inputs(device)
    inputs["plan"].base_S_M[0, 0] = 0
    names = ("k_pages_P_G_R_C", "v_pages_P_G_R_C")
    inputs |= {name: inputs[name].nan_to_num(0.5) for name in names}
    assert_matches(launch(inputs), paged_attention_ref(**inputs), dtype=case.dtype)


def test_query_that_sees_nothing_gives_zeros(device: str) -> None:
    inputs = on(Case((Row(2, 40), Row(3, 50), Row(1, 9)), extent=16), device).make_inputs(device)
    expected = launch(inputs)
    inputs["q_T_H_C"][:2] = float("nan")
    inputs["length_S"][0] = 0
    inputs["q_T_H_C"][5] = float("nan")
    inputs["plan"].count_S[2] = 0
    out = launch(inputs)
    assert (out[:2] == 0).all()
    assert (out[5] == 0).all()
    assert_bitwise(out[2:5], expected[2:5])


def test_nan_key_stays_in_its_row(device: str) -> None:
    inputs = on(Case((Row(2, 40), Row(3, 50)), extent=16), device).make_inputs(device)
    expected = launch(inputs)
    inputs["k_pages_P_G_R_C"][inputs["plan"].page_S_M[0, 0], :, 5] = float("nan")
    out = launch(inputs)
    assert out[:2].isnan().all()
    assert_bitwise(out[2:], expected[2:])


def test_table_of_the_queries_dtype(device: str) -> None:
    case = on(Case((Row(4, 90),), extent=32), device)
    inputs = case.make_inputs(device)
    inputs["rel_table_B_X"] = inputs["rel_table_B_X"].to(case.dtype)
    assert_matches(launch(inputs), paged_attention_ref(**inputs), dtype=case.dtype)


def problem_of_inputs(inputs: dict[str, Any]) -> Problem:
    q, k_pages, plan = (inputs[name] for name in ("q_T_H_C", "k_pages_P_G_R_C", "plan"))
    return problem_of(q, k_pages, plan.page_S_M, inputs["window"], inputs["rel_T_H_B"])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_scratch_of_exactly_its_size_serves_one_call_after_another(
    config: Config, device: str
) -> None:
    """Of other shapes too: nothing but zeros is left where tiles are counted."""
    inputs = on(LONG, device).make_inputs(device)
    other = on(Case((Row(2, 600),), 4, 4, extent=9), device).make_inputs(device)
    counters, *partial = scratch_buffers(problem_of_inputs(inputs))
    needed, guard = partial[-1].end, 4096
    scratch = torch.full((needed + guard,), 0xA5, dtype=torch.uint8, device=device)
    scratch[: counters.end] = 0
    first = launch(inputs, config, scratch[:needed])
    assert_matches(first, paged_attention_ref(**inputs), dtype=inputs["q_T_H_C"].dtype)
    for _ in range(2):
        assert (scratch[: counters.end] == 0).all()
        assert_bitwise(launch(inputs, config, scratch[:needed]), first)
        assert scratch_buffers(problem_of_inputs(other))[-1].end <= needed
        launch(other, config, scratch[:needed])
    assert (scratch[needed:] == 0xA5).all()


def make_problem(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "num_tokens": 1, "num_rows": 1, "num_columns": 256, "num_heads": 32, "num_kv_heads": 8,
        "head_width": 128, "page_rows": 64, "window": None, "num_features": 16,
        "dtype": torch.bfloat16, "page_dtype": torch.bfloat16,
    }  # fmt: skip
    return Problem(**given | changes)


def test_choice() -> None:
    assert choose_config(make_problem(num_tokens=32, num_rows=32)) is ALONE
    assert choose_config(make_problem(num_tokens=1, num_rows=1, page_dtype=FP8)) is ALONE
    assert choose_config(make_problem(num_tokens=1, num_rows=1, head_width=256)) is ALONE_WIDE
    assert choose_config(make_problem(num_tokens=33, num_rows=32)) is SMALL
    assert choose_config(make_problem(num_tokens=500)) is LARGE
    assert choose_config(make_problem(num_tokens=500, page_dtype=FP8)) is SMALL
    # a tile of 16 tokens would hold as many parts of the bias table as no shared memory does
    crowded = {"num_heads": 8, "num_kv_heads": 8, "num_features": 32}
    assert choose_config(make_problem(num_tokens=500, **crowded)) is ALONE
    assert choose_config(make_problem(num_tokens=500, head_width=256, **crowded)) is ALONE_WIDE
    assert choose_config(make_problem(num_tokens=500, **crowded | {"num_features": 0})) is LARGE


@pytest.mark.parametrize(
    ("config", "changes", "found"),
    [
        (SMALL, {}, 109568),  # "global-positions" of bench/kernel_table.json, and "global-C256-B*"
        (LARGE, {}, 87552),
        (SMALL, {"head_width": 256}, 176136),
        (replace(SMALL, num_stages=3), {"head_width": 256}, 94212),
        (replace(SMALL, num_stages=3), {"head_width": 256, "num_features": 64}, 149508),
        (SMALL, {"head_width": 256, "num_features": 64}, 280584),  # as no row may be
        (LARGE, {"head_width": 256, "num_features": 64}, 249860),
    ],
)
def test_shared_memory_is_what_cubins_have(
    config: Config, changes: dict[str, Any], found: int
) -> None:
    """But for positions of rows, which are always counted."""
    assert 0 <= config.shared_bytes(make_problem(**changes), torch.float32) - found + 16 <= 3088


def test_a_bias_fits_the_shared_memory_of_each_chip() -> None:
    for width, features, heads in itertools.product((64, 128, 256), (8, 16, 32, 64), (1, 2, 4, 8)):
        p = make_problem(
            num_tokens=500, head_width=width, num_features=features, num_kv_heads=32 // heads
        )
        for config, arch in itertools.product((SMALL, LARGE), ARCHS):
            if config is choose_config(p) or (config is SMALL and choose_config(p) is LARGE):
                fitted = config.fitted(p, torch.float32, arch)
                assert fitted.shared_bytes(p, torch.float32) <= max_shared(arch), (p, fitted)
                assert fitted == replace(config, num_stages=fitted.num_stages)
    wide = make_problem(num_tokens=500, head_width=256)
    assert SMALL.fitted(wide, torch.float32, 80) == replace(SMALL, num_stages=3)
    assert SMALL.fitted(wide, torch.float32, 90) is SMALL
    assert SMALL.fitted(replace(wide, num_features=0), None, 80) is SMALL
    assert LARGE.fitted(wide, torch.float32, 80) is LARGE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32, "page_dtype": torch.float32}, "16-bit"),
        ({"page_dtype": torch.float16}, "float16"),
        ({"dtype": torch.float16, "page_dtype": FP8}, "float16, which has no range"),
        ({"head_width": 320}, "C=320"),
        ({"page_rows": 128}, "R=128"),
        ({"num_kv_heads": 1}, "G=1"),
        ({"num_features": 65}, "B=65"),
        ({"window": 1 << 21}, "window=2097152"),
        ({"num_tokens": 4096}, "T=4096, M=256: partial results"),
        (
            {"num_tokens": 90000, "num_columns": 1, "num_kv_heads": 32},
            "T=90000, G=32: over 65536 tiles",
        ),
    ],
)
def test_why_not(changes: dict, words: str) -> None:
    problem = make_problem(**changes)
    assert words in (kernel_why_not(problem) or "")
    assert scratch_bytes(problem) == 0
    assert kernel_why_not(make_problem()) is None
    assert scratch_bytes(make_problem()) > 0


def test_launch_refuses_what_the_kernels_do_not_take() -> None:
    inputs = Case((Row(1, 10),), 2, 1, 320).make_inputs("cpu")
    with pytest.raises(ValueError, match="paged_attention: C=320"):
        launch(inputs)
    inputs = Case((Row(1, 10),), dtype=torch.float16, page_dtype=FP8).make_inputs("cpu")
    with pytest.raises(ValueError, match=r"paged_attention: .*float16, which has no range"):
        launch(inputs)
