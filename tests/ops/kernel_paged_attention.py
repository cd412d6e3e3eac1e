"""Runs the kernels of plan_pages and paged_attention on any device, and rearranges their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tml_kernels._page_plan import PagePlan
from tml_kernels.ops.paged_attention.configs import Config
from tml_kernels.ops.paged_attention.launch import launch_paged_attention
from tml_kernels.ops.plan_pages.kernel import launch_plan_pages

Inputs = dict[str, Any]


def launch(inputs: Inputs, config: Config | None = None, scratch: Tensor | None = None) -> Tensor:
    q = inputs["q_T_H_C"]
    out = torch.full_like(q, float("nan"))
    if q.shape[0]:
        k_pages = inputs["k_pages_P_G_R_C"]
        span = inputs.get("span") or k_pages.shape[2]
        names = ("scale", "window", "rel_T_H_B", "rel_table_B_X", "tau_floor")
        launch_paged_attention(
            q, k_pages, inputs["v_pages_P_G_R_C"], *inputs["plan"], inputs["start_S1"],
            inputs["length_S"], inputs.get("row_position_P_R"), span,
            *(inputs[name] for name in names), 0.1, inputs["softcap"],
            inputs.get("k_scale_P_G_R"), inputs.get("v_scale_P_G_R"), out, scratch, config,
        )  # fmt: skip
    return out


def launch_plan(page: Tensor, base: Tensor, rows: Tensor, slot: Tensor, *config: Any) -> PagePlan:
    out = PagePlan.empty(slot.shape[0], page.shape[1], page.device)
    launch_plan_pages(page, base, rows, slot, *out, *config)
    return out


def as_table(plan: PagePlan, columns: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of a plan with their columns in another order, (page, base, rows)."""
    columns = torch.randperm(plan.page_S_M.shape[1]) if columns is None else columns
    page, base, rows = (x[:, columns.to(x.device)].contiguous() for x in plan[:3])
    return page, base, rows


def with_pages(plan: PagePlan, s: int, extra: list[tuple[int, int, int]]) -> PagePlan:
    """The plan with more (page, base, rows) in row s, sorted."""
    count = plan.count_S.clone()
    lists = [torch.cat([x, x.new_full((x.shape[0], len(extra)), -1)], dim=1) for x in plan[:3]]
    entries = [tuple(int(x[s, m]) for x in lists) for m in range(int(count[s]))]
    for m, entry in enumerate(sorted([*entries, *extra], key=lambda entry: entry[1])):
        for x, value in zip(lists, entry, strict=True):
            x[s, m] = value
    count[s] += len(extra)
    return PagePlan(*lists, count)


def with_unseen_pages(inputs: Inputs) -> Inputs:
    """Of a call with one row: the page of NaN that every case has to spare also behind the newest
    key, and with a window before it."""
    spare, length = inputs["k_pages_P_G_R_C"].shape[0] - 1, int(inputs["length_S"])
    listed = inputs["plan"].page_S_M
    spare = next(page for page in range(spare + 1) if not (listed == page).any())
    extra = [(spare, length, 1), (spare, length + 40, 64), (spare, length + 104, 64)]
    if inputs["window"] is not None:
        extra.append((spare, 0, 64))
    if (row_position_P_R := inputs.get("row_position_P_R")) is not None:
        row_position_P_R[spare] = length + 3 * torch.arange(64, device=listed.device)
        extra = [(spare, length, 64)]
    return inputs | {"plan": with_pages(inputs["plan"], 0, extra)}


def row_alone(inputs: Inputs, s: int) -> tuple[Inputs, slice]:
    """The call with session row s only, and the tokens that it has in the whole call."""
    start = inputs["start_S1"].tolist()
    tokens = slice(start[s], start[s + 1])
    alone = inputs | {name: inputs[name][tokens].clone() for name in ("q_T_H_C", "rel_T_H_B")}
    alone["plan"] = PagePlan(*(x[s : s + 1].clone() for x in inputs["plan"]))
    alone["length_S"] = inputs["length_S"][s : s + 1].clone()
    alone["start_S1"] = (inputs["start_S1"][s : s + 2] - start[s]).contiguous()
    return alone, tokens


def pieces(inputs: Inputs, sizes: tuple[int, ...]) -> list[Inputs]:
    """The append of the only row in several calls."""
    device = inputs["q_T_H_C"].device
    first, length, parts = 0, int(inputs["length_S"]) - sum(sizes), []
    for size in sizes:
        tokens = slice(first, first + size)
        first, length = first + size, length + size
        piece = {
            name: None if inputs[name] is None else inputs[name][tokens]
            for name in ("q_T_H_C", "rel_T_H_B")
        }
        piece["start_S1"] = torch.tensor([0, size], dtype=torch.int32, device=device)
        piece["length_S"] = torch.tensor([length], device=device)
        parts.append(inputs | piece)
    return parts


def as_decoded(inputs: Inputs) -> Inputs:
    """The plan as it was when the call's length was reached: no page or row after it."""
    plan, end = PagePlan(*(x.clone() for x in inputs["plan"])), int(inputs["length_S"])
    position_P_R = inputs["row_position_P_R"].cpu()
    count = int(plan.count_S)
    for m in range(count):
        rows = int(plan.rows_S_M[0, m])
        position_R = position_P_R[int(plan.page_S_M[0, m]), :rows]
        plan.rows_S_M[0, m] = int((position_R < end).sum())
    kept = int((plan.rows_S_M[0, :count] > 0).sum())
    plan.count_S[0] = kept
    for x, unused in zip(plan[:3], (-1, -1, 0), strict=True):
        x[0, kept:] = unused
    return inputs | {"plan": plan}
