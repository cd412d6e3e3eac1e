"""The oracle of paged_attention, and its plain path: dense attention of one session row at a time,
in float64 and in float32."""

# Dimension key: T tokens, S session rows, I tokens of one session row, H query heads, G KV heads,
# Q = (H / G) * I queries of one KV head, C head width, P pages, R rows in a page, M page-list
# columns, L visible keys, B relative-position features, X relative extent.

from __future__ import annotations

import torch
from torch import Tensor

from ..._page_plan import PagePlan
from ..._plain import row_blocked_matmul


def paged_attention_ref(
    q_T_H_C: Tensor,
    k_pages_P_G_R_C: Tensor,
    v_pages_P_G_R_C: Tensor,
    plan: PagePlan,
    start_S1: Tensor,
    length_S: Tensor,
    *,
    row_position_P_R: Tensor | None = None,
    span: int | None = None,
    scale: float,
    window: int | None = None,
    rel_T_H_B: Tensor | None = None,
    rel_table_B_X: Tensor | None = None,
    tau_floor: float | None = None,
    tau_alpha: float = 0.1,
    softcap: float | None = None,
    k_scale_P_G_R: Tensor | None = None,
    v_scale_P_G_R: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """out_T_H_C in `dtype`: softmax(logit) v over the visible keys; zero where there is none.

    logit = tau (scale q.k + bias), softcap * tanh(logit / softcap) with a cap. Query i of the n of
    a session row is at position pq = length - n + i, the key in row r < rows[m] of page[m] at
    pk = base[m] + r, or at row_position[page[m], r]; visible: 0 <= pq - pk (< window).
    bias = (rel . rel_table)[pq - pk], zero from X on; tau = 1 + alpha ln(max((pq + 1) / floor, 1)).
    span makes no difference here.
    """
    out_T_H_C = torch.zeros(q_T_H_C.shape, dtype=dtype, device=q_T_H_C.device)
    start, length, count = (x.tolist() for x in (start_S1, length_S, plan.count_S))
    for s, end in enumerate(length):
        rows = slice(start[s], start[s + 1])
        first = end - (rows.stop - rows.start)
        if first == end:
            continue
        oldest = first - window + 1 if window is not None else None
        page_L, row_L, pk_L = _visible_rows(
            plan.page_S_M[s, : count[s]],
            plan.base_S_M[s, : count[s]],
            plan.rows_S_M[s, : count[s]],
            row_position_P_R,
            k_pages_P_G_R_C.shape[2],
            oldest,
            end,
        )
        if pk_L.shape[0] == 0:
            continue
        pq_I = torch.arange(first, end, device=pk_L.device)
        distance_I_L = pq_I[:, None] - pk_L
        hidden_I_L = distance_I_L < 0
        if window is not None:
            hidden_I_L |= distance_I_L >= window
        tau_I = None if tau_floor is None else _tau(pq_I, tau_floor, tau_alpha, dtype)
        bias_H_I_L = None
        if rel_T_H_B is not None and rel_table_B_X is not None:
            rel_I_H_B = rel_T_H_B[rows].to(dtype)
            bias_H_I_L = _bias(rel_I_H_B, rel_table_B_X.to(dtype), distance_I_L)
        out_T_H_C[rows] = _attend(
            q_T_H_C[rows].to(dtype) * scale,
            _gather(k_pages_P_G_R_C, k_scale_P_G_R, page_L, row_L, dtype),
            _gather(v_pages_P_G_R_C, v_scale_P_G_R, page_L, row_L, dtype),
            hidden_I_L,
            bias_H_I_L,
            tau_I,
            softcap,
        )
    return out_T_H_C


def check_positions(plan: PagePlan, row_position_P_R: Tensor, span: int) -> None:
    """ValueError unless the rows in use ascend from their page's base to below base + span."""
    used_S_M = plan.page_S_M >= 0
    position_L_R = row_position_P_R[plan.page_S_M[used_S_M].long()]
    base_L, rows_L = plan.base_S_M[used_S_M], plan.rows_S_M[used_S_M]
    used_L_R = torch.arange(position_L_R.shape[1], device=rows_L.device) < rows_L[:, None]
    bad_L_R = (position_L_R < base_L[:, None]) | (position_L_R >= base_L[:, None] + span)
    bad_L_R[:, 1:] |= position_L_R[:, 1:] <= position_L_R[:, :-1]
    bad_L_R[:, :1] |= position_L_R[:, :1] != base_L[:, None]
    bad_L_R &= used_L_R
    if bad_L_R.any():
        m, r = bad_L_R.nonzero()[0].tolist()
        raise ValueError(
            f"row_position_P_R: {int(position_L_R[m, r])} in row {r} of page "
            f"{int(plan.page_S_M[used_S_M][m])} does not ascend from base {int(base_L[m])} to "
            f"below {int(base_L[m]) + span}"
        )


def _visible_rows(
    page_M: Tensor,
    base_M: Tensor,
    rows_M: Tensor,
    row_position_P_R: Tensor | None,
    page_rows: int,
    oldest: int | None,
    end: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(page_L, row_L, pk_L) of the keys that some query sees, by ascending position.

    Sorted, the sums below run in one order however the keys lie in pages; and a row that nobody
    sees is never read, so whatever it holds (NaN of a fresh page) does not matter.
    """
    row_R = torch.arange(page_rows, device=page_M.device)
    if row_position_P_R is None:
        pk_M_R = base_M[:, None] + row_R
    else:
        pk_M_R = row_position_P_R[page_M.long()]
    seen_M_R = (pk_M_R < end) & (row_R < rows_M[:, None])
    if oldest is not None:
        seen_M_R &= pk_M_R >= oldest
    column_L, row_L = seen_M_R.nonzero(as_tuple=True)
    pk_L, order_L = pk_M_R[column_L, row_L].sort(stable=True)
    return page_M.long()[column_L[order_L]], row_L[order_L], pk_L


def _gather(
    pages_P_G_R_C: Tensor,
    scale_P_G_R: Tensor | None,
    page_L: Tensor,
    row_L: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """x_L_G_C of the visible keys or values; those of fp8 times their scales."""
    x_L_G_C = pages_P_G_R_C[page_L, :, row_L].to(dtype)
    if scale_P_G_R is not None:
        x_L_G_C *= scale_P_G_R[page_L, :, row_L].to(dtype)[:, :, None]
    return x_L_G_C


def _tau(pq_I: Tensor, floor: float, alpha: float, dtype: torch.dtype) -> Tensor:
    # In float64: float32 does not hold positions over 2^24.
    return (1.0 + alpha * torch.log(((pq_I.double() + 1.0) / floor).clamp(min=1.0))).to(dtype)


def _bias(rel_I_H_B: Tensor, rel_table_B_X: Tensor, distance_I_L: Tensor) -> Tensor:
    """bias_H_I_L: each query's mix of the table's profiles, read at the distance."""
    # Blocked, because a product's bits may depend on how many rows it has, and on their place.
    num_queries, num_heads, _ = rel_I_H_B.shape
    profile_HI_X = row_blocked_matmul(rel_I_H_B.transpose(0, 1).flatten(0, 1), rel_table_B_X.T)
    profile_H_I_X = profile_HI_X.view(num_heads, num_queries, -1)
    extent = rel_table_B_X.shape[1]
    index_I_L = distance_I_L.clamp(0, extent - 1)
    bias_H_I_L = profile_H_I_X.gather(2, index_I_L.expand(profile_H_I_X.shape[0], -1, -1))
    return bias_H_I_L.masked_fill_(distance_I_L >= extent, 0.0)


def _attend(
    q_I_H_C: Tensor,
    k_L_G_C: Tensor,
    v_L_G_C: Tensor,
    hidden_I_L: Tensor,
    bias_H_I_L: Tensor | None,
    tau_I: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """out_I_H_C; query head h reads KV head h // (H / G). `q` holds the scale already."""
    num_queries, num_heads, width = q_I_H_C.shape
    num_kv_heads = k_L_G_C.shape[1]
    q_G_Q_C = q_I_H_C.transpose(0, 1).reshape(num_kv_heads, -1, width)
    logit_H_I_L = (q_G_Q_C @ k_L_G_C.permute(1, 2, 0)).view(num_heads, num_queries, -1)
    if bias_H_I_L is not None:
        logit_H_I_L += bias_H_I_L
    if tau_I is not None:
        logit_H_I_L *= tau_I[:, None]
    if softcap is not None:
        logit_H_I_L = softcap * torch.tanh(logit_H_I_L / softcap)
    p_H_I_L = torch.softmax(logit_H_I_L.masked_fill_(hidden_I_L, float("-inf")), dim=-1)
    # A query that sees nothing has a softmax of NaN and gives zeros.
    p_H_I_L.masked_fill_(hidden_I_L.all(-1, keepdim=True), 0.0)
    out_G_Q_C = p_H_I_L.view(num_kv_heads, -1, p_H_I_L.shape[-1]) @ v_L_G_C.transpose(0, 1)
    return out_G_Q_C.view(num_heads, num_queries, width).transpose(0, 1)
