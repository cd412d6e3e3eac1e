"""paged_attention: check, choose, launch."""

# Dimension key: T tokens, S session rows, H query heads, G KV heads, C head width, P pages,
# R rows in a page, M page-list columns, B relative-position features, X relative extent.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_count, check_finite, check_positive
from ..._page_plan import PagePlan, check_plan
from ..._ragged import check_below, check_start
from ..._registry import refuse_grad, register_op
from ..._scratch import check_scratch
from ...precision import ACTIVATIONS
from .configs import kernel_why_not, problem_of, scratch_bytes
from .reference import check_positions, paged_attention_ref


def _plain(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page: Tensor,
    base: Tensor,
    rows: Tensor,
    count: Tensor,
    start: Tensor,
    length: Tensor,
    row_position: Tensor | None,
    span: int,
    scale: float,
    window: int | None,
    rel: Tensor | None,
    rel_table: Tensor | None,
    tau_floor: float | None,
    tau_alpha: float,
    softcap: float | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    scratch: Tensor | None,
) -> None:
    check_start(start, q.shape[0])
    plan = PagePlan(page, base, rows, count)
    check_below(k_pages.shape[0], **{"plan.page_S_M": page})
    if row_position is not None:
        check_positions(plan, row_position, span)
    result = paged_attention_ref(
        q,
        k_pages,
        v_pages,
        plan,
        start,
        length,
        row_position_P_R=row_position,
        scale=scale,
        window=window,
        rel_T_H_B=rel,
        rel_table_B_X=rel_table,
        tau_floor=tau_floor,
        tau_alpha=tau_alpha,
        softcap=softcap,
        k_scale_P_G_R=k_scale,
        v_scale_P_G_R=v_scale,
        dtype=torch.float32,
    )
    out.copy_(result)


def _kernel(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page: Tensor,
    base: Tensor,
    rows: Tensor,
    count: Tensor,
    start: Tensor,
    length: Tensor,
    row_position: Tensor | None,
    span: int,
    scale: float,
    window: int | None,
    rel: Tensor | None,
    *rest: Any,
) -> None:
    from .launch import launch_paged_attention

    why = kernel_why_not(problem_of(q, k_pages, page, window, rel))
    run = _plain if why else launch_paged_attention
    run(
        q, k_pages, v_pages, page, base, rows, count, start, length, row_position, span,
        scale, window, rel, *rest,
    )  # fmt: skip


_op = register_op(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page, Tensor base, "
    "Tensor rows, Tensor count, Tensor start, Tensor length, Tensor? row_position, int span, "
    "float scale, int? window, Tensor? rel, "
    "Tensor? rel_table, float? tau_floor, float tau_alpha, float? softcap, Tensor? k_scale, "
    "Tensor? v_scale, Tensor(a!) out, Tensor(b!)? scratch) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def paged_attention(
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
    out_T_H_C: Tensor | None = None,
    scratch_B: Tensor | None = None,
) -> Tensor:
    """Causal attention of each session row's new tokens over the keys in its pages.

    Session row s owns tokens start[s]..start[s + 1], the last of its length[s] tokens, whose keys
    and values are in the pages already. Query i of n is at position length - n + i; row r of page
    plan.page[s, m], r < plan.rows[s, m], at plan.base[s, m] + r. A key is visible at a distance of
    0 and up (to window - 1). logit = tau * (scale * q.k + bias); bias = (rel . rel_table)[distance]
    and zero from X on; tau = 1 + tau_alpha * ln(max((position + 1) / tau_floor, 1)), or 1 without a
    floor; with a softcap, logit = softcap * tanh(logit / softcap). Query head h reads KV head
    h // (H / G).

    One row, R = 64, length 70, 2 tokens: plan.page [[3, 7, -1]], base [[0, 64, -1]], rows
    [[64, 6, 0]] hold positions 0..63 in page 3 and 64..69 in rows 0..5 of page 7; the queries are
    at 68 and 69.

    row_position, int64 [P, R]: row r of page p is at row_position[p, r] instead, so that pages may
    hold the tokens of one class, page 3 the positions 0..3, 8..11 and page 7 the positions 4..7.
    Positions ascend within a page, the first is the plan's base, and all are below base + span;
    not together with a window.

    The plan is that of `plan_pages`: sorted by base; on CUDA another order gives wrong results.
    Pages may be shared between rows. Pages and rows that no query sees may hold anything and do not
    change a bit of the result. A query that sees no key gives zeros, NaN or not: that is how a row
    is idle (length 0, or no pages). Tokens outside every row give zeros.

    q, out: [T, H, C], float32, bfloat16 or float16; the pages of one dtype, any of the three, or
    float8_e4m3fn with float32 scales k_scale and v_scale for every row and KV head, value = fp8 *
    scale; rel of q's dtype, any strides; rel_table float32 or q's dtype; start int32, length int64.
    Accumulates in float32, rounds once. Deterministic; a session row's bits do not depend on the
    other rows. Raises TypeError or ValueError naming the argument; on the plain path also for page
    ids, starts and row positions out of range.

    On CUDA the weights of values are rounded to q's dtype, and so are their sums; a table of
    float32 counts as two terms of it. Shapes and dtypes for which `configs.kernel_why_not` has a
    reason (float32 queries, float16 ones with fp8 pages) take the plain path there, in other bits:
    so does a call whose partial results would take over 2 GiB, which is about the tokens of all
    rows. With a window, bits of an append do not depend on how it is cut where the plan's bases are
    multiples of R.

    One launch. scratch: uint8, `configs.scratch_bytes(problem)` of them with
    `configs.problem_of(...)`, aligned to 256. It must be zeros before its first use; every call
    leaves it fit for the next one in stream order, of any problem. Allocated, and its counters
    cleared by a second launch, when it is None.

    Source: `InklingAttention`, `InklingRelativeLogits` and `eager_attention_forward` of
    transformers 5.17.
    """
    dims = Dims()
    dims.check(q_T_H_C=q_T_H_C, dtype=ACTIVATIONS)
    dtype, device = q_T_H_C.dtype, q_T_H_C.device
    page_dtypes = (*ACTIVATIONS, torch.float8_e4m3fn)
    dims.check(k_pages_P_G_R_C=k_pages_P_G_R_C, dtype=page_dtypes, device=device)
    dims.check(v_pages_P_G_R_C=v_pages_P_G_R_C, dtype=k_pages_P_G_R_C.dtype, device=device)
    check_plan(plan, dims, device, "plan")
    dims.check(start_S1=start_S1, dtype=torch.int32, device=device)
    dims.check(length_S=length_S, dtype=torch.int64, device=device)
    _check_row_position(dims, row_position_P_R, span, window, device)
    if (rel_T_H_B is None) != (rel_table_B_X is None):
        raise ValueError("rel_T_H_B, rel_table_B_X: expected both or neither, got one")
    if rel_T_H_B is not None and rel_table_B_X is not None:
        dims.check(rel_T_H_B=rel_T_H_B, dtype=dtype, device=device, contiguous=False)
        dims.check(rel_table_B_X=rel_table_B_X, dtype=(torch.float32, dtype), device=device)
    _check_scales(dims, k_pages_P_G_R_C, k_scale_P_G_R, v_scale_P_G_R)
    _check_options(dims, scale, window, tau_floor, tau_alpha, softcap)
    if out_T_H_C is None:
        out_T_H_C = torch.empty_like(q_T_H_C)
    else:
        dims.check(out_T_H_C=out_T_H_C, dtype=dtype, device=device)
    if scratch_B is not None:
        problem = problem_of(q_T_H_C, k_pages_P_G_R_C, plan.page_S_M, window, rel_T_H_B)
        check_scratch(scratch_B, scratch_bytes(problem), device, align=256)
    refuse_grad(q_T_H_C, k_pages_P_G_R_C, v_pages_P_G_R_C, rel_T_H_B, rel_table_B_X)
    if dims["T"] > 0:
        _op(
            q_T_H_C, k_pages_P_G_R_C, v_pages_P_G_R_C, *plan, start_S1, length_S,
            row_position_P_R, span or dims["R"], scale, window, rel_T_H_B, rel_table_B_X,
            tau_floor, tau_alpha, softcap, k_scale_P_G_R, v_scale_P_G_R, out_T_H_C, scratch_B,
        )  # fmt: skip
    return out_T_H_C


def _check_row_position(
    dims: Dims,
    row_position_P_R: Tensor | None,
    span: int | None,
    window: int | None,
    device: torch.device,
) -> None:
    if (row_position_P_R is None) != (span is None):
        raise ValueError(f"row_position_P_R, span: expected both or neither, got {span=}")
    if row_position_P_R is None or span is None:
        return
    dims.check(row_position_P_R=row_position_P_R, dtype=torch.int64, device=device)
    if window is not None:
        raise ValueError(f"row_position_P_R: not together with a window, got {window=}")
    check_count("span", span)


def _check_scales(
    dims: Dims, k_pages: Tensor, k_scale_P_G_R: Tensor | None, v_scale_P_G_R: Tensor | None
) -> None:
    is_fp8 = k_pages.dtype == torch.float8_e4m3fn
    for name, scale in (("k_scale_P_G_R", k_scale_P_G_R), ("v_scale_P_G_R", v_scale_P_G_R)):
        if (scale is not None) != is_fp8:
            wanted = "a tensor" if is_fp8 else "None"
            got = "None" if scale is None else "a tensor"
            raise ValueError(f"{name}: expected {wanted} for pages of {k_pages.dtype}, got {got}")
        if scale is not None:
            named = {name: scale}
            dims.check(dtype=torch.float32, device=k_pages.device, contiguous=True, **named)


def _check_options(
    dims: Dims,
    scale: float,
    window: int | None,
    tau_floor: float | None,
    tau_alpha: float,
    softcap: float | None,
) -> None:
    if dims["G"] == 0 or dims["H"] % dims["G"]:
        raise ValueError(f"q_T_H_C: expected H to be a multiple of G={dims['G']}, got {dims['H']}")
    if dims.get("X", 1) == 0:
        raise ValueError("rel_table_B_X: expected X of at least 1, got 0")
    if window is not None:
        check_count("window", window, why=", or None")
    check_finite("scale", scale)
    check_finite("tau_alpha", tau_alpha)
    for name, value in (("tau_floor", tau_floor), ("softcap", softcap)):
        if value is not None:
            check_positive(name, value, ", or None")
