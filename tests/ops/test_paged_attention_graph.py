"""plan_pages and paged_attention over one scratch, as a captured step calls them, while sessions
grow, change places and lose their oldest pages."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from kernel_paged_attention import Inputs, launch, launch_plan

from tml_kernels._page_plan import PagePlan
from tml_kernels.ops.paged_attention import paged_attention
from tml_kernels.ops.paged_attention.configs import MAX_COUNTERS, problem_of, scratch_buffers
from tml_kernels.ops.paged_attention.reference import paged_attention_ref
from tml_kernels.ops.plan_pages import plan_pages
from tml_kernels.testing import assert_bitwise, assert_matches, randn

ROWS, SLOTS, TOKENS, COLUMNS, PAGE_ROWS, SPAN = 4, 6, 12, 40, 16, 40
SPLIT = 32  # pages of 16 rows: full lists have two splits
FILLED = 1200  # steps after which all lists are full
NUM_PAGES = SLOTS * COLUMNS
RUNS = (5, 3)  # positions go to two classes in turns


class Sessions:
    """Page lists that change in place. Keys are whatever the pool holds: random, never NaN."""

    def __init__(self, device: str, dtype: torch.dtype, *, by_class: bool) -> None:
        self.random = random.Random(5)
        self.by_class = by_class
        self.free = list(range(NUM_PAGES))
        self.length = [10**9 + 100 * n for n in range(SLOTS)]
        self.table = [torch.full((SLOTS, COLUMNS), -1, dtype=d, device=device)
                      for d in (torch.int32, torch.int64, torch.int32)]  # fmt: skip
        self.open: list[dict[int, int]] = [{} for _ in range(SLOTS)]  # class -> column
        self.entries: list[dict[int, list[int]]] = [{} for _ in range(SLOTS)]  # page, base, rows
        self.position = torch.zeros(NUM_PAGES, PAGE_ROWS, dtype=torch.int64, device=device)
        self.slot = torch.full((ROWS,), -1, dtype=torch.int32, device=device)
        pool = (NUM_PAGES, 1, PAGE_ROWS, 32)
        self.inputs: Inputs = {
            "q_T_H_C": randn(TOKENS, 4, 32, device=device, dtype=dtype),
            "k_pages_P_G_R_C": randn(*pool, device=device, dtype=dtype),
            "v_pages_P_G_R_C": randn(*pool, device=device, dtype=dtype),
            "start_S1": torch.zeros(ROWS + 1, dtype=torch.int32, device=device),
            "length_S": torch.zeros(ROWS, dtype=torch.int64, device=device),
            "scale": 0.2,
            "window": None,
            "rel_T_H_B": randn(TOKENS, 4, 4, device=device, dtype=dtype),
            "rel_table_B_X": randn(4, 60, device=device),
            "tau_floor": 128000.0,
            "softcap": None,
        }
        if by_class:
            self.inputs |= {"row_position_P_R": self.position, "span": SPAN}

    def step(self) -> None:
        """Every live row gets 0 to 3 tokens; now and then all rows have other sessions."""
        slots = self.random.sample([*range(SLOTS), -1, -1], ROWS)
        start, length = [0], []
        for slot in slots:
            new = self.random.randint(0, TOKENS // ROWS)
            for _ in range(new if slot >= 0 else 0):
                self._append(slot)
            start.append(start[-1] + new)
            length.append(self.length[slot] if slot >= 0 else 0)
        self.slot.copy_(torch.tensor(slots, dtype=torch.int32))
        self.inputs["start_S1"].copy_(torch.tensor(start, dtype=torch.int32))
        self.inputs["length_S"].copy_(torch.tensor(length))

    def _append(self, slot: int) -> None:
        position, entries = self.length[slot], self.entries[slot]
        kind = int(position % sum(RUNS) >= RUNS[0]) if self.by_class else 0
        column = self.open[slot].get(kind, -1)
        full = column >= 0 and (
            entries[column][2] == PAGE_ROWS or position >= entries[column][1] + SPAN
        )
        if column < 0 or full:
            if len(entries) == COLUMNS:
                self._drop_oldest(slot)
            unused = [m for m in range(COLUMNS) if m not in entries]
            column = self.open[slot][kind] = self.random.choice(unused)
            page = self.free.pop(self.random.randrange(len(self.free)))
            entries[column] = [page, position, 0]
        page, _, row = entries[column]
        self.position[page, row] = position
        entries[column][2] += 1
        self.length[slot] += 1
        for tensor, value in zip(self.table, entries[column], strict=True):
            tensor[slot, column] = value

    def _drop_oldest(self, slot: int) -> None:
        entries, kept = self.entries[slot], self.open[slot].values()
        column = min(set(entries) - set(kept), key=lambda m: entries[m][1])
        self.free.append(entries.pop(column)[0])
        self.table[0][slot, column] = -1


def scratch_of(inputs: Inputs) -> torch.Tensor:
    plan_page = torch.empty(ROWS, COLUMNS)
    q, k_pages = inputs["q_T_H_C"], inputs["k_pages_P_G_R_C"]
    problem = problem_of(q, k_pages, plan_page, None, inputs["rel_T_H_B"])
    size = scratch_buffers(problem)[-1].end
    return torch.zeros(size, dtype=torch.uint8, device=q.device)


@pytest.mark.parametrize("by_class", [False, True])
def test_steps_over_one_scratch(by_class: bool) -> None:
    sessions = Sessions("cpu", torch.float32, by_class=by_class)
    inputs, scratch = sessions.inputs, scratch_of(sessions.inputs)
    for _ in range(FILLED):
        sessions.step()
    for _ in range(2):
        sessions.step()
        plan = launch_plan(*sessions.table, sessions.slot)
        out = launch(inputs | {"plan": plan}, scratch=scratch)
        assert (scratch[: 4 * MAX_COUNTERS] == 0).all()
        assert plan.count_S.max() > SPLIT
        assert_matches(out, paged_attention_ref(**inputs, plan=plan))


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("by_class", [False, True])
def test_gpu_a_graph_replayed_a_thousand_times_is_bitwise_eager(by_class: bool) -> None:
    sessions = Sessions("cuda", torch.bfloat16, by_class=by_class)
    inputs, scratch = sessions.inputs, scratch_of(sessions.inputs)
    plan, out = PagePlan.empty(ROWS, COLUMNS, "cuda"), torch.empty_like(inputs["q_T_H_C"])

    def run() -> None:
        plan_pages(*sessions.table, sessions.slot, out=plan)
        paged_attention(**inputs, plan=plan, out_T_H_C=out, scratch_B=scratch)

    for _ in range(FILLED):
        sessions.step()
    before = list(sessions.length)
    graph = captured(run)
    for _ in range(1000):
        sessions.step()
        graph.replay()
        eager_plan = plan_pages(*sessions.table, sessions.slot)
        assert_bitwise(out, paged_attention(**inputs, plan=eager_plan))
    assert plan.count_S.max() > SPLIT
    grown = [after - start for start, after in zip(before, sessions.length, strict=True)]
    assert min(grown) > SPLIT * PAGE_ROWS  # nearly every page has been replaced
    assert_matches(out, paged_attention_ref(**inputs, plan=plan))
