from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_paged_attention import launch_plan
from torch import Tensor

from tml_kernels._page_plan import PagePlan
from tml_kernels.ops.plan_pages import plan_pages
from tml_kernels.ops.plan_pages.cases import BENCH, EDGE, MODEL, Case
from tml_kernels.ops.plan_pages.configs import LONG, SHORT, Config, Problem, choose_config
from tml_kernels.ops.plan_pages.reference import plan_pages_ref
from tml_kernels.testing import assert_bitwise


def assert_same(actual: PagePlan, expected: PagePlan) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_bitwise(a, e)


def by_definition(inputs: dict[str, Tensor]) -> PagePlan:
    page, base, rows, slot = (x.tolist() for x in inputs.values())
    lists, counts = [], []
    for n in slot:
        entries = zip(page[n], base[n], rows[n], strict=True) if n >= 0 else ()
        used = sorted((e for e in entries if e[0] >= 0 and e[2] > 0), key=lambda e: e[1])
        counts.append(len(used))
        lists.append(used + [(-1, -1, 0)] * (inputs["page_N_M"].shape[1] - len(used)))
    plan = PagePlan.empty(len(slot), inputs["page_N_M"].shape[1], "cpu")
    for field, tensor in enumerate(plan[:3]):
        for s, entries in enumerate(lists):
            tensor[s] = torch.tensor([entry[field] for entry in entries])
    plan.count_S[:] = torch.tensor(counts)
    return plan


@pytest.mark.parametrize("case", EDGE + MODEL, ids=str)
def test_public(case: Case) -> None:
    inputs = case.make_inputs("cpu")
    assert_same(plan_pages_ref(**inputs), by_definition(inputs))
    assert_same(plan_pages(**inputs), by_definition(inputs))


@pytest.mark.parametrize("config", [SHORT, LONG, Config(16, 64)], ids=str)
@pytest.mark.parametrize("case", EDGE, ids=str)
def test_kernel(case: Case, config: Config, device: str) -> None:
    inputs = case.make_inputs(device)
    if inputs["slot_S"].shape[0]:
        assert_same(launch_plan(*inputs.values(), config), plan_pages_ref(**inputs))


def test_a_slot_outside_the_table_is_idle_to_the_kernel(device: str) -> None:
    page, base, rows, _ = Case(2, 5, used=1.0).make_inputs(device).values()
    slot = torch.tensor([2, 1, -7], dtype=torch.int32, device=device)
    plan = launch_plan(page[:2], base[:2], rows[:2], slot)  # row 2 lies behind the table
    assert_same(plan, plan_pages_ref(page, base, rows, slot.where(slot == 1, -1)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", EDGE + MODEL + BENCH, ids=str)
def test_gpu(case: Case) -> None:
    inputs = case.make_inputs("cuda")
    assert_same(plan_pages(**inputs), plan_pages_ref(**inputs))


def test_example_of_the_docstring() -> None:
    plan = plan_pages(
        torch.tensor([[4, -1, -1], [7, -1, 3]], dtype=torch.int32),
        torch.tensor([[0, 0, 0], [64, 0, 0]]),
        torch.tensor([[9, 0, 0], [6, 0, 64]], dtype=torch.int32),
        torch.tensor([1, -1], dtype=torch.int32),
    )
    assert plan.page_S_M.tolist() == [[3, 7, -1], [-1, -1, -1]]
    assert plan.base_S_M.tolist() == [[0, 64, -1], [-1, -1, -1]]
    assert plan.rows_S_M.tolist() == [[64, 6, 0], [0, 0, 0]]
    assert plan.count_S.tolist() == [2, 0]


def test_choice() -> None:
    assert choose_config(Problem(64, 256)) is SHORT
    assert choose_config(Problem(1, 2048)) is LONG


def test_writes_into_out() -> None:
    inputs = EDGE[-1].make_inputs("cpu")
    out = PagePlan.empty(inputs["slot_S"].shape[0], inputs["page_N_M"].shape[1], "cpu")
    assert plan_pages(**inputs, out=out) is out
    assert_same(out, plan_pages(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"page_N_M": torch.zeros(2, 3).long()}, TypeError, "page_N_M.*int64"),
        ({"base_N_M": torch.zeros(2, 3).int()}, TypeError, "base_N_M.*int32"),
        ({"base_N_M": torch.zeros(2, 4).long()}, ValueError, "base_N_M: M=4, but M=3"),
        ({"rows_N_M": torch.zeros(3, 3).int()}, ValueError, "rows_N_M: N=3, but N=2"),
        ({"slot_S": torch.zeros(2).long()}, TypeError, "slot_S.*int64"),
        ({"slot_S": torch.tensor([0, 2]).int()}, ValueError, "slot_S.*below 2, got 2"),
        ({"out": (1, 2)}, TypeError, "out: expected a PagePlan, got tuple"),
        ({"out": PagePlan.empty(2, 4, "cpu")}, ValueError, "out.page_S_M: M=4, but M=3"),
        (
            {"out": PagePlan.empty(2, 3, "cpu")._replace(count_S=torch.zeros(2))},
            TypeError,
            "out.count_S.*float32",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type, words: str) -> None:
    out = PagePlan.empty(2, 3, "cpu")
    for tensor in out:
        tensor.fill_(7)
    inputs = {
        "page_N_M": torch.zeros(2, 3, dtype=torch.int32),
        "base_N_M": torch.zeros(2, 3, dtype=torch.int64),
        "rows_N_M": torch.ones(2, 3, dtype=torch.int32),
        "slot_S": torch.tensor([0, 1], dtype=torch.int32),
        "out": out,
    } | change
    with pytest.raises(error, match=words):
        plan_pages(**inputs)
    assert all((tensor == 7).all() for tensor in out)
