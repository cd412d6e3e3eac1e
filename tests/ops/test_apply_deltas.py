from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.harness import clone
from tml_kernels.ops.apply_deltas import api, apply_deltas
from tml_kernels.ops.apply_deltas.cases import BENCH, EDGE, MODEL, Case
from tml_kernels.ops.apply_deltas.reference import apply_deltas_ref
from tml_kernels.testing import assert_bitwise

TABLES = ("page_Q", "base_Q", "rows_Q", "row_position_W")


def check(inputs: dict[str, Tensor]) -> None:
    expected = apply_deltas_ref(**inputs)
    apply_deltas(**inputs)
    for name, table in zip(TABLES, expected, strict=True):
        assert_bitwise(inputs[name], table)


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    check(case.make_inputs("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH, ids=str)
def test_gpu(case: Case) -> None:
    check(case.make_inputs("cuda"))


def test_worked_example() -> None:
    page, base = torch.full((4,), -1, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    rows, row_position = torch.zeros(4, dtype=torch.int32), torch.full((6,), -1)
    apply_deltas(
        torch.tensor([[3, 17, 640, 64], [-1, 5, 5, 5]]),
        torch.tensor([4, -1]),
        torch.tensor([700, 9]),
        page_Q=page, base_Q=base, rows_Q=rows, row_position_W=row_position,
    )  # fmt: skip
    assert page.tolist() == [-1, -1, -1, 17]
    assert base.tolist() == [0, 0, 0, 640]
    assert rows.tolist() == [0, 0, 0, 64]
    assert row_position.tolist() == [-1, -1, -1, -1, 700, -1]


def test_an_entry_that_is_no_longer_used() -> None:
    """What the page table says of it: page -1."""
    inputs = Case(2, 1, 3, 3).make_inputs("cpu")
    inputs["delta_U_4"][0] = torch.tensor([2, -1, 0, 0])
    inputs["delta_U_4"][1, 0] = -1
    check(inputs)
    assert inputs["page_Q"][2] == -1


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_the_form_for_graphs_writes_the_same(case: Case) -> None:
    inputs = case.make_inputs("cpu")
    delta, row = inputs["delta_U_4"], inputs["row_Z"]
    expected = apply_deltas_ref(**inputs)
    pairs = [(delta[:, 0], delta[:, column]) for column in (1, 2, 3)]
    pairs.append((row, inputs["position_Z"]))
    for name, table, (index, value) in zip(TABLES, expected, pairs, strict=True):
        api.put_no_sync(inputs[name], index, value)
        assert_bitwise(inputs[name], table)


def beyond(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With keys and rows that are not there, on both sides."""
    inputs["delta_U_4"][:4, 0] = torch.tensor([-(2**63), 2**63 - 1, inputs["page_Q"].shape[0], -2])
    inputs["row_Z"][:3] = torch.tensor([-(2**63), 2**63 - 1, inputs["row_position_W"].shape[0]])
    return inputs


def test_the_form_for_graphs_skips_what_is_beyond() -> None:
    inputs = beyond(Case(9, 7, 20, 30).make_inputs("cpu"))
    expected = apply_deltas_ref(**inputs)
    api.put_no_sync(inputs["row_position_W"], inputs["row_Z"], inputs["position_Z"])
    assert_bitwise(inputs["row_position_W"], expected[3])


@pytest.mark.gpu
def test_gpu_skips_what_is_beyond() -> None:
    check(beyond(Case(9, 7, 20, 30).make_inputs("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["public", "plain"])
def test_gpu_captured_call_replays_with_other_entries(path: str) -> None:
    case = Case(300, 200, 1000, 2000, padding=40)
    inputs = case.make_inputs("cuda")

    def call() -> None:
        if path == "public":
            apply_deltas(**inputs)
        else:
            api._plain(*inputs.values())

    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    if path == "public":
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        for name, given in case.make_inputs("cuda").items():
            if name not in TABLES:
                inputs[name].copy_(given)
        expected = apply_deltas_ref(**inputs)
        graph.replay()
        for name, table in zip(TABLES, expected, strict=True):
            assert_bitwise(inputs[name], table)


def test_opcheck() -> None:
    inputs = Case(5, 4, 8, 9, padding=1).make_inputs("cpu")
    torch.library.opcheck(torch.ops.tml_kernels.apply_deltas.default, tuple(inputs.values()))


def test_cost_counts_no_padding_as_written() -> None:
    assert Case(10, 6, 20, 20, padding=2).cost().bytes == 320 + 96 + 8 * 16 + 4 * 8


DELTA = torch.tensor([[0, 1, 2, 3], [4, 1, 2, 3], [-1, 1, 2, 3]])


def delta(row: int, column: int, value: int) -> dict[str, Tensor]:
    changed = DELTA.clone()
    changed[row, column] = value
    return {"delta_U_4": changed}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"delta_U_4": DELTA[:, :3].contiguous()}, ValueError, "delta_U_4: 4=3"),
        ({"delta_U_4": DELTA.int()}, TypeError, "delta_U_4.*int32"),
        ({"delta_U_4": DELTA.repeat(1, 2)[:, :4]}, ValueError, "delta_U_4: must be contiguous"),
        ({"row_Z": torch.zeros(3, dtype=torch.int64)}, ValueError, "position_Z: Z=2, but Z=3"),
        ({"row_Z": torch.zeros(2, dtype=torch.int32)}, TypeError, "row_Z.*int32"),
        ({"position_Z": torch.zeros(2)}, TypeError, "position_Z.*float32"),
        ({"page_Q": torch.zeros(5, dtype=torch.int64)}, TypeError, "page_Q.*int64"),
        ({"rows_Q": torch.zeros(4, dtype=torch.int32)}, ValueError, "rows_Q: Q=4, but Q=5"),
        ({"base_Q": torch.zeros(5, dtype=torch.int32)}, TypeError, "base_Q.*int32"),
        ({"base_Q": torch.zeros(5, device="meta").long()}, ValueError, "base_Q: .*device cpu"),
        ({"row_position_W": torch.zeros(7).int()}, TypeError, "row_position_W.*int32"),
        (delta(1, 0, 5), ValueError, r"delta_U_4\[:, 0\]: .*below 5, got 5"),
        (delta(1, 0, 0), ValueError, r"delta_U_4\[:, 0\]: 0 is named twice"),
        (delta(0, 1, 2**31), ValueError, r"delta_U_4\[:, 1\]: .*got 2147483648"),
        (delta(0, 3, 2**31), ValueError, r"delta_U_4\[:, 3\]: .*got 2147483648"),
        ({"row_Z": torch.tensor([0, 7])}, ValueError, "row_Z: .*below 7, got 7"),
        ({"row_Z": torch.tensor([3, 3])}, ValueError, "row_Z: 3 is named twice"),
    ],
)
def test_bad_input_changes_nothing(change: dict, error: type, words: str) -> None:
    inputs = {
        "delta_U_4": DELTA,
        "row_Z": torch.tensor([6, -1]),
        "position_Z": torch.tensor([8, 9]),
        "page_Q": torch.full((5,), -1, dtype=torch.int32),
        "base_Q": torch.zeros(5, dtype=torch.int64),
        "rows_Q": torch.zeros(5, dtype=torch.int32),
        "row_position_W": torch.full((7,), -1),
    } | change
    before = clone(inputs)
    with pytest.raises(error, match=words):
        apply_deltas(**inputs)
    for name in TABLES:
        if not inputs[name].is_meta:
            assert_bitwise(inputs[name], before[name])
