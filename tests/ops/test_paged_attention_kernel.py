"""The kernels of paged_attention: in the interpreter in float32, on a GPU in 16-bit dtypes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tml_kernels.ops.paged_attention import paged_attention
from tml_kernels.ops.paged_attention.cases import BENCH, EDGE, FAR, MODEL, Case, Row
from tml_kernels.ops.paged_attention.configs import (
    LARGE,
    SMALL,
    WHOLE,
    Config,
    Problem,
    choose_config,
    kernel_why_not,
    problem_of,
    scratch_buffers,
    scratch_bytes,
)
from tml_kernels.ops.paged_attention.launch import launch_paged_attention
from tml_kernels.ops.paged_attention.reference import paged_attention_ref
from tml_kernels.testing import assert_bitwise, assert_matches

FP8 = torch.float8_e4m3fn
CONFIGS = [SMALL, LARGE, WHOLE]
LONG = Case((Row(9, 1300), Row(1, 600), Row(0, 5), Row(3, 3)), extent=700, tau_floor=9.0, padding=2)


def launch(
    inputs: dict[str, Any], config: Config | None = None, scratch: Tensor | None = None
) -> Tensor:
    q = inputs["q_T_H_C"]
    out = torch.full_like(q, float("nan"))
    if q.shape[0]:
        names = ("k_pages_P_G_R_C", "v_pages_P_G_R_C", "page_table_S_M", "page_base_S_M")
        names += ("start_S1", "length_S", "scale", "window", "rel_T_H_B", "rel_table_B_X")
        shared = [inputs[name] for name in names]
        options = (inputs["tau_floor"], 0.1, inputs["softcap"])
        scales = (inputs.get("k_scale_P_G_R"), inputs.get("v_scale_P_G_R"))
        run: Any = launch_paged_attention
        run(q, *shared, *options, *scales, out, scratch, config)
    return out


def on(case: Case, device: str) -> Case:
    """On a GPU the kernels' products take 16-bit operands."""
    return replace(case, dtype=torch.bfloat16) if device == "cuda" else case


def permuted(inputs: dict[str, Any]) -> dict[str, Any]:
    columns = torch.randperm(inputs["page_table_S_M"].shape[1])
    names = ("page_table_S_M", "page_base_S_M")
    return inputs | {name: inputs[name][:, columns].contiguous() for name in names}


def pieces(inputs: dict[str, Any], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """The append of the only row in several calls."""
    done, parts = int(inputs["length_S"]) - sum(sizes), []
    first = 0
    for size in sizes:
        tokens = slice(first, first + size)
        piece = inputs | {name: inputs[name][tokens] for name in ("q_T_H_C", "rel_T_H_B")}
        first, done = first + size, done + size
        piece["start_S1"] = torch.tensor([0, size], dtype=torch.int32, device=tokens_device(inputs))
        piece["length_S"] = torch.tensor([done], device=tokens_device(inputs))
        parts.append(piece)
    return parts


def tokens_device(inputs: dict[str, Any]) -> torch.device:
    return inputs["q_T_H_C"].device


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("case", [*EDGE, *MODEL, LONG], ids=str)
def test_gpu_dtypes(case: Case, config: Config, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).make_inputs("cuda")
    assert_matches(launch(inputs, config), paged_attention_ref(**inputs), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", BENCH, ids=str)
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
    for _ in range(3):
        assert_bitwise(launch(permuted(inputs), config), expected)


def test_long_page_lists_are_sorted(device: str) -> None:
    """More pages than a program of the plan compares at a time, some of them idle."""
    case = on(Case((Row(2, 700), Row(1, 100)), 2, 1, 16, page_rows=4), device)
    inputs = case.make_inputs(device)
    assert inputs["page_table_S_M"].shape[1] > 128
    expected = launch(inputs)
    assert_matches(expected, paged_attention_ref(**inputs), dtype=case.dtype)
    assert_bitwise(launch(permuted(inputs)), expected)


def test_whole_tiles_have_the_bits_of_split_ones(device: str) -> None:
    inputs = on(LONG, device).make_inputs(device)
    assert_bitwise(launch(inputs, WHOLE), launch(inputs, LARGE))


@pytest.mark.parametrize("config", [SMALL, WHOLE], ids=str)
def test_row_does_not_depend_on_the_other_rows(config: Config, device: str) -> None:
    inputs = on(LONG, device).make_inputs(device)
    together, start = launch(inputs, config), inputs["start_S1"].tolist()
    for s in range(len(LONG.rows)):
        tokens = slice(start[s], start[s + 1])
        alone = inputs | {name: inputs[name][tokens].clone() for name in ("q_T_H_C", "rel_T_H_B")}
        for name in ("page_table_S_M", "page_base_S_M", "length_S"):
            alone[name] = inputs[name][s : s + 1].clone()
        alone["start_S1"] = (inputs["start_S1"][s : s + 2] - start[s]).contiguous()
        assert_bitwise(launch(alone, config), together[tokens])


APPEND = Case((Row(21, 1100),), extent=500, tau_floor=10.0)
SIZES = [(1,) * 21, (4, 17), (20, 1), (2, 9, 10)]


@pytest.mark.parametrize("window", [None, 530])
def test_an_append_in_pieces_is_the_same_attention(window: int | None, device: str) -> None:
    """Only near, in the interpreter: numpy's products have other bits for other numbers of rows."""
    case = on(replace(APPEND, window=window), device)
    inputs = case.make_inputs(device)
    whole = launch(inputs, LARGE)
    for sizes in SIZES:
        parts = torch.cat([launch(piece, SMALL) for piece in pieces(inputs, sizes)])
        assert_matches(parts, whole, dtype=case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", [None, FP8])
@pytest.mark.parametrize("window", [None, 530])
def test_gpu_append_in_pieces_is_bitwise_the_same(
    window: int | None, page_dtype: torch.dtype | None
) -> None:
    case = replace(APPEND, window=window, dtype=torch.bfloat16, page_dtype=page_dtype)
    inputs = case.make_inputs("cuda")
    whole = launch(inputs, WHOLE)
    for config in (SMALL, LARGE):
        for sizes in SIZES:
            parts = [launch(piece, config) for piece in pieces(inputs, sizes)]
            assert_bitwise(torch.cat(parts), whole)


@pytest.mark.parametrize("window", [None, 64])
def test_positions_near_a_billion_are_exact(window: int | None, device: str) -> None:
    """The same context moved by whole splits gives the same bits: nothing but tau reads them."""
    moved = FAR // 512 * 512
    near = on(Case((Row(4, 700),), window=window, extent=50), device).make_inputs(device)
    far = near | {
        "page_base_S_M": near["page_base_S_M"] + moved,
        "length_S": near["length_S"] + moved,
    }
    assert_bitwise(launch(far), launch(near))


def test_first_pages_stay_when_a_billion_positions_are_gone(device: str) -> None:
    """Sinks at the beginning and a hole up to the newest pages."""
    case = on(Case((Row(3, FAR, 700),), extent=128, tau_floor=128000.0), device)
    inputs = case.make_inputs(device)
    oldest = inputs["page_base_S_M"].masked_fill(inputs["page_table_S_M"] < 0, 1 << 60).argmin()
    inputs["page_base_S_M"][0, oldest] = 0
    names = ("k_pages_P_G_R_C", "v_pages_P_G_R_C")
    inputs |= {name: inputs[name].nan_to_num(0.5) for name in names}
    assert_matches(launch(inputs), paged_attention_ref(**inputs), dtype=case.dtype)


def test_pages_may_start_anywhere_and_leave_holes(device: str) -> None:
    case = on(Case((Row(2, 300),), window=200, extent=90), device)
    inputs = case.make_inputs(device)
    used = inputs["page_table_S_M"] >= 0
    shift = torch.where(inputs["page_base_S_M"] < 200, 37, 17)
    inputs["page_base_S_M"] = torch.where(
        used, inputs["page_base_S_M"] - shift, inputs["page_base_S_M"]
    )
    names = ("k_pages_P_G_R_C", "v_pages_P_G_R_C")
    inputs |= {name: inputs[name].nan_to_num(0.5) for name in names}
    assert_matches(launch(inputs), paged_attention_ref(**inputs), dtype=case.dtype)


def test_query_that_sees_nothing_gives_zeros(device: str) -> None:
    inputs = on(Case((Row(2, 40), Row(3, 50), Row(1, 9)), extent=16), device).make_inputs(device)
    expected = launch(inputs)
    inputs["q_T_H_C"][:2] = float("nan")
    inputs["length_S"][0] = 0
    inputs["q_T_H_C"][5] = float("nan")
    inputs["page_table_S_M"][2] = -1
    out = launch(inputs)
    assert (out[:2] == 0).all()
    assert (out[5] == 0).all()
    assert_bitwise(out[2:5], expected[2:5])


def test_nan_key_stays_in_its_row(device: str) -> None:
    inputs = on(Case((Row(2, 40), Row(3, 50)), extent=16), device).make_inputs(device)
    expected = launch(inputs)
    inputs["k_pages_P_G_R_C"][inputs["page_table_S_M"][0].max(), :, 5] = float("nan")
    out = launch(inputs)
    assert out[:2].isnan().all()
    assert_bitwise(out[2:], expected[2:])


def test_table_of_the_queries_dtype(device: str) -> None:
    case = on(Case((Row(4, 90),), extent=32), device)
    inputs = case.make_inputs(device)
    inputs["rel_table_B_X"] = inputs["rel_table_B_X"].to(case.dtype)
    assert_matches(launch(inputs), paged_attention_ref(**inputs), dtype=case.dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_scratch_of_exactly_its_size_with_any_content(config: Config, device: str) -> None:
    inputs = on(LONG, device).make_inputs(device)
    names = ("q_T_H_C", "k_pages_P_G_R_C", "page_table_S_M", "window", "rel_T_H_B")
    problem = problem_of(*(inputs[name] for name in names))
    needed, guard = scratch_buffers(problem, config)[-1].end, 4096
    scratch = torch.full((needed + guard,), 0xA5, dtype=torch.uint8, device=device)
    first = launch(inputs, config, scratch[:needed])
    assert_bitwise(launch(inputs, config, scratch[:needed]), first)
    assert_matches(first, paged_attention_ref(**inputs), dtype=inputs["q_T_H_C"].dtype)
    assert (scratch[needed:] == 0xA5).all()


def make_problem(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "num_tokens": 1, "num_rows": 1, "num_columns": 256, "num_heads": 32, "num_kv_heads": 8,
        "head_width": 128, "page_rows": 64, "window": None, "num_features": 16,
        "dtype": torch.bfloat16, "page_dtype": torch.bfloat16,
    }  # fmt: skip
    return Problem(**given | changes)


def test_choice() -> None:
    assert choose_config(make_problem()) is SMALL
    assert choose_config(make_problem(num_tokens=500)) is SMALL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32, "page_dtype": torch.float32}, "16-bit"),
        ({"page_dtype": torch.float16}, "float16"),
        ({"head_width": 320}, "C=320"),
        ({"page_rows": 128}, "R=128"),
        ({"num_kv_heads": 1}, "G=1"),
        ({"num_features": 65}, "B=65"),
        ({"window": 1 << 21}, "window=2097152"),
        ({"num_tokens": 4096}, "T=4096, M=256: partial results"),
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
