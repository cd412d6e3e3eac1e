"""plan_pages: launch and latency decide; torch sorts with several launches."""

from __future__ import annotations

from typing import Any

import torch

from tml_kernels._page_plan import PagePlan
from tml_kernels.ops.plan_pages import cases, plan_pages
from tml_kernels.ops.plan_pages.reference import plan_pages_ref

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs: dict[str, Any] = case.make_inputs(device)
    for ours, expected in zip(plan_pages(**inputs), plan_pages_ref(**inputs), strict=True):
        assert torch.equal(ours, expected), f"{(ours != expected).sum()} values differ"


def with_out(inputs: dict[str, Any]) -> dict[str, Any]:
    """As a captured step calls it."""
    page_N_M = inputs["page_N_M"]
    out = PagePlan.empty(inputs["slot_S"].shape[0], page_N_M.shape[1], page_N_M.device)
    return inputs | {"out": out}


OP = OpBench(
    name="plan_pages",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(plan_pages, with_out), "torch": Variant(plan_pages_ref)},
)
