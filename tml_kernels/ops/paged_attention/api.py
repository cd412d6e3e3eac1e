"""paged_attention: check, choose, launch."""

# Dimension key: T tokens, S session rows, H query heads, G KV heads, C head width, P pages,
# R rows in a page, M page-list columns, B relative-position features, X relative extent.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._dims import Dims
from ..._ragged import check_below, check_start
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .configs import kernel_why_not, problem_of, scratch_bytes
from .reference import paged_attention_ref


def _plain(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    page_base: Tensor,
    start: Tensor,
    length: Tensor,
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
    check_below(k_pages.shape[0], page_table_S_M=page_table)
    result = paged_attention_ref(
        q,
        k_pages,
        v_pages,
        page_table,
        page_base,
        start,
        length,
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
    page_table: Tensor,
    page_base: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    window: int | None,
    rel: Tensor | None,
    *rest: Any,
) -> None:
    from .launch import launch_paged_attention

    why = kernel_why_not(problem_of(q, k_pages, page_table, window, rel))
    run = _plain if why else launch_paged_attention
    run(q, k_pages, v_pages, page_table, page_base, start, length, scale, window, rel, *rest)


_op = register_op(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, "
    "Tensor page_base, Tensor start, Tensor length, float scale, int? window, Tensor? rel, "
    "Tensor? rel_table, float? tau_floor, float tau_alpha, float? softcap, Tensor? k_scale, "
    "Tensor? v_scale, Tensor(a!) out, Tensor(b!)? scratch) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def paged_attention(
    q_T_H_C: Tensor,
    k_pages_P_G_R_C: Tensor,
    v_pages_P_G_R_C: Tensor,
    page_table_S_M: Tensor,
    page_base_S_M: Tensor,
    start_S1: Tensor,
    length_S: Tensor,
    *,
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
    page_table[s, m] at page_base[s, m] + r. A key is visible at a distance of 0 and up (to
    window - 1). logit = tau * (scale * q.k + bias), bias = (rel . rel_table)[distance], zero from
    X on; tau = 1 + tau_alpha * ln(max((position + 1) / tau_floor, 1)), or 1 without a floor; with
    a softcap, logit = softcap * tanh(logit / softcap). Query head h reads KV head h // (H / G).

    One row, R = 64, length 70, 2 tokens: page_table [[7, -1, 3]] with page_base [[64, 0, 0]] holds
    positions 64..69 in rows 0..5 of page 7 and 0..63 in page 3; the queries are at 68 and 69.

    The page list has no order (-1 is unused) and the result does not depend on it, bitwise; pages
    may be shared between rows; rows of a page that no query sees may hold anything. A query that
    sees no key gives zeros, NaN or not: that is how a row is idle (length 0, or no pages). Tokens
    outside every row give zeros.

    q, out: [T, H, C], float32, bfloat16 or float16; the pages of one dtype, any of the three, or
    float8_e4m3fn with float32 scales k_scale and v_scale for every row and KV head, value = fp8 *
    scale; rel of q's dtype, any strides; rel_table float32 or q's dtype; page_table, start int32;
    page_base, length int64. Accumulates in float32, rounds once. Deterministic; a session row's
    bits do not depend on the other rows. Raises TypeError or ValueError naming the argument; on the
    plain path also for page ids and starts out of range.

    On CUDA the weights of values are rounded to q's dtype, and so are their sums; a table of
    float32 counts as two terms of it. Shapes and dtypes for which `configs.kernel_why_not` has a
    reason take the plain path there. scratch: uint8, `configs.scratch_bytes(problem)` of them with
    `configs.problem_of(...)`, with any content, aligned to 256; allocated when it is None.

    Source: `InklingAttention`, `InklingRelativeLogits` and `eager_attention_forward` of
    transformers 5.17.
    """
    dims = Dims()
    dims.check(q_T_H_C=q_T_H_C, dtype=ACTIVATIONS)
    dtype, device = q_T_H_C.dtype, q_T_H_C.device
    page_dtypes = (*ACTIVATIONS, torch.float8_e4m3fn)
    dims.check(k_pages_P_G_R_C=k_pages_P_G_R_C, dtype=page_dtypes, device=device)
    dims.check(v_pages_P_G_R_C=v_pages_P_G_R_C, dtype=k_pages_P_G_R_C.dtype, device=device)
    dims.check(page_table_S_M=page_table_S_M, start_S1=start_S1, dtype=torch.int32, device=device)
    dims.check(page_base_S_M=page_base_S_M, length_S=length_S, dtype=torch.int64, device=device)
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
        problem = problem_of(q_T_H_C, k_pages_P_G_R_C, page_table_S_M, window, rel_T_H_B)
        _check_scratch(scratch_B, scratch_bytes(problem), device)
    refuse_grad(q_T_H_C, k_pages_P_G_R_C, v_pages_P_G_R_C, rel_T_H_B, rel_table_B_X)
    if dims["T"] > 0:
        _op(
            q_T_H_C, k_pages_P_G_R_C, v_pages_P_G_R_C, page_table_S_M, page_base_S_M,
            start_S1, length_S, scale, window, rel_T_H_B, rel_table_B_X,
            tau_floor, tau_alpha, softcap, k_scale_P_G_R, v_scale_P_G_R, out_T_H_C, scratch_B,
        )  # fmt: skip
    return out_T_H_C


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


def _check_scratch(scratch: Tensor, needed: int, device: torch.device) -> None:
    Dims().check(scratch_B=scratch, dtype=torch.uint8, device=device)
    if scratch.numel() < needed:
        raise ValueError(f"scratch_B: {needed} bytes are needed, got B={scratch.numel()}")
    if scratch.storage_offset() % 256:
        raise ValueError(
            f"scratch_B: starts {scratch.storage_offset()} bytes into its storage, "
            "which is not a multiple of 256"
        )


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
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, or None, got {window}")
    for name, value in (("scale", scale), ("tau_alpha", tau_alpha)):
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    for name, value in (("tau_floor", tau_floor), ("softcap", softcap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive number, or None, got {value}")
