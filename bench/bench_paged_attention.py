"""paged_attention: every page is streamed once for all query heads that share it."""

# Dimension key: T tokens, S session rows, I queries of each, H query heads, G KV heads, C head
# width, P pages, R rows in a page, M page-list columns, L = M * R keys, B features, X extent.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.paged_attention import cases, paged_attention
from tml_kernels.ops.paged_attention.reference import paged_attention_ref
from tml_kernels.testing import assert_matches

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(paged_attention(**inputs), paged_attention_ref(**inputs), dtype=case.dtype)


def torch_attention(
    q_T_H_C: Tensor,
    k_pages_P_G_R_C: Tensor,
    v_pages_P_G_R_C: Tensor,
    page_table_S_M: Tensor,
    page_base_S_M: Tensor,
    start_S1: Tensor,
    length_S: Tensor,
    scale: float,
    window: int | None,
    rel_T_H_B: Tensor,
    rel_table_B_X: Tensor,
    tau_floor: float | None,
    softcap: float | None,
    k_scale_P_G_R: Tensor | None = None,
    v_scale_P_G_R: Tensor | None = None,
) -> Tensor:
    """Gather the pages, write bias and visibility into a mask, call torch's attention; for rows
    of one number of queries."""
    if softcap is not None:
        raise NotImplementedError(f"{softcap=}")
    num_sessions, extent = length_S.shape[0], rel_table_B_X.shape[1]
    q = q_T_H_C.unflatten(0, (num_sessions, -1)).transpose(1, 2)  # [S, H, I, C]
    rel = rel_T_H_B.unflatten(0, (num_sessions, -1)).transpose(1, 2)
    page_S_M = page_table_S_M.clamp(min=0)
    k, v = (
        _gather(pages, scale, page_S_M, q.dtype)
        for pages, scale in ((k_pages_P_G_R_C, k_scale_P_G_R), (v_pages_P_G_R_C, v_scale_P_G_R))
    )
    row_R = torch.arange(k_pages_P_G_R_C.shape[2], device=q.device)
    pk_S_L = (page_base_S_M[..., None] + row_R).flatten(1)
    used_S_L = (page_table_S_M >= 0).repeat_interleave(len(row_R), dim=1)
    pq_S_I = length_S[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    distance = pq_S_I[:, :, None] - pk_S_L[:, None]
    visible = (distance >= 0) & used_S_L[:, None]
    if window is not None:
        visible &= distance < window
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


OP = OpBench(
    name="paged_attention",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(paged_attention), "torch": Variant(torch_attention)},
)
