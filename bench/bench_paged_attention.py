"""paged_attention: every page is streamed once for all query heads that share it."""

# Dimension key: T tokens, S session rows, I queries of each, H query heads, G KV heads, C head
# width, P pages, R rows in a page, M page-list columns, L = M * R keys, B features, X extent.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels._page_plan import PagePlan
from tml_kernels.ops.paged_attention import cases, paged_attention
from tml_kernels.ops.paged_attention.configs import problem_of, scratch_bytes
from tml_kernels.ops.paged_attention.reference import paged_attention_ref
from tml_kernels.testing import assert_matches

from . import attention_peers as peers
from .attention_peers import positions
from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(paged_attention(**inputs), paged_attention_ref(**inputs), dtype=case.dtype)


def allocate(inputs: dict[str, Any]) -> dict[str, Any]:
    """As a captured step calls it: output and scratch are there."""
    q, k_pages, plan = (inputs[name] for name in ("q_T_H_C", "k_pages_P_G_R_C", "plan"))
    problem = problem_of(q, k_pages, plan.page_S_M, inputs["window"], inputs["rel_T_H_B"])
    scratch = torch.zeros(scratch_bytes(problem), dtype=torch.uint8, device=q.device)
    return inputs | {"out_T_H_C": torch.empty_like(q), "scratch_B": scratch}


def torch_attention(
    q_T_H_C: Tensor,
    k_pages_P_G_R_C: Tensor,
    v_pages_P_G_R_C: Tensor,
    plan: PagePlan,
    length_S: Tensor,
    scale: float,
    window: int | None,
    rel_T_H_B: Tensor | None,
    rel_table_B_X: Tensor | None,
    tau_floor: float | None,
    softcap: float | None,
    start_S1: Tensor,
    row_position_P_R: Tensor | None = None,
    span: int | None = None,
    k_scale_P_G_R: Tensor | None = None,
    v_scale_P_G_R: Tensor | None = None,
) -> Tensor:
    """Gather the pages, write bias and visibility into a mask, call torch's attention; for rows
    of one number of queries."""
    if softcap is not None:
        raise NotImplementedError(f"{softcap=}")
    num_sessions = length_S.shape[0]
    q = q_T_H_C.unflatten(0, (num_sessions, -1)).transpose(1, 2)  # [S, H, I, C]
    page_S_M = plan.page_S_M.clamp(min=0)
    k, v = (
        _gather(pages, scale, page_S_M, q.dtype)
        for pages, scale in ((k_pages_P_G_R_C, k_scale_P_G_R), (v_pages_P_G_R_C, v_scale_P_G_R))
    )
    pk_S_L = positions({
        "plan": plan, "k_pages_P_G_R_C": k_pages_P_G_R_C, "row_position_P_R": row_position_P_R,
    })  # fmt: skip
    pq_S_I = length_S[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    distance = pq_S_I[:, :, None] - pk_S_L[:, None]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    bias = torch.zeros_like(distance, dtype=q.dtype)[:, None]
    if rel_T_H_B is not None and rel_table_B_X is not None:
        extent = rel_table_B_X.shape[1]
        rel = rel_T_H_B.unflatten(0, (num_sessions, -1)).transpose(1, 2)
        profile = rel @ rel_table_B_X.to(rel.dtype)
        index = distance.clamp(0, extent - 1)[:, None].expand(-1, q.shape[1], -1, -1)
        bias = profile.gather(3, index) * (distance < extent)[:, None]
    if tau_floor is not None:
        tau = 1 + 0.1 * ((pq_S_I + 1) / tau_floor).clamp(min=1).log()
        tau = tau[:, None, :, None].to(q.dtype)
        q, bias = q * tau, bias * tau
    mask = bias.masked_fill(~visible[:, None], float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _gather(
    pages_P_G_R_C: Tensor, scale_P_G_R: Tensor | None, page_S_M: Tensor, dtype: torch.dtype
) -> Tensor:
    """[S, G, L, C]"""
    x_S_M_G_R_C = pages_P_G_R_C[page_S_M].to(dtype)
    if scale_P_G_R is not None:
        x_S_M_G_R_C *= scale_P_G_R[page_S_M][..., None].to(dtype)
    return x_S_M_G_R_C.transpose(1, 2).flatten(2, 3)


BF16 = torch.bfloat16
QUICK = [
    *(case for case in cases.DECODE if case.page_dtype is None or case.extent is not None),
    cases.LOCAL[0],
    *(case for case in cases.APPEND if case.rows[0].length == 16 * cases.K),
    *cases.MORE,
]

OP = OpBench(
    name="paged_attention",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(paged_attention, allocate), "torch": Variant(torch_attention)},
    peers={
        "torch flex_attention": peers.flex_attention,
        "flashinfer decode": lambda: peers.flashinfer_decode(BF16),
        "flashinfer decode, fp8 of one scale": lambda: peers.flashinfer_decode(cases.FP8),
        "flashinfer append": lambda: peers.flashinfer_append(BF16),
        "flashinfer append, fp8 of one scale": lambda: peers.flashinfer_append(cases.FP8),
        "flashinfer holistic": lambda: peers.flashinfer_holistic(BF16),
        "flashinfer xqa": lambda: peers.flashinfer_xqa(BF16),
        "flashinfer xqa, fp8 of one scale": lambda: peers.flashinfer_xqa(cases.FP8),
        "xformers splitk": peers.xformers_splitk,
    },
    quick=QUICK,
)
