"""Other people's attention, as bench_paged_attention times it: without a relative bias, but for
FlexAttention. What a peer wants made of the inputs, page layouts and schedules, is made untimed.

Written against flashinfer-python 0.7.2, xformers 0.0.35 and torch 2.9's FlexAttention. A peer that
is not installed, or that changed, is named with the reason and left out.
"""

# Dimension key: T tokens, S session rows, I queries of each, H query heads, G KV heads, C head
# width, P pages, R rows in a page, M page-list columns, L = M * R keys, X extent.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .harness import SAME_FUNCTION, Variant
from .peers import find

WORKSPACE = 256 << 20
# Pages rounded to fp8 a second time, with one scale in place of one for each row: each value is off
# by 2.6 % in the mean square, in keys and in values.
ONE_SCALE = 8e-2
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Paged:
    """A case in the terms of peers: pages of a row are consecutive positions, the last one partly
    used, and queries are the last tokens."""

    q: Tensor  # [T, H, C]
    pages: tuple[Tensor, Tensor]  # [P, G, R, C] twice
    scales: tuple[float, float]  # of fp8 pages, else 1
    num_queries: list[int]
    kv_len: list[int]
    page_S_M: Tensor  # int32
    window: int | None
    scale: float

    @classmethod
    def of(cls, inputs: Inputs, page_dtype: torch.dtype) -> Paged:
        """NotImplementedError for what peers do not compute."""
        for name in ("rel_T_H_B", "row_position_P_R", "tau_floor", "softcap"):
            if inputs.get(name) is not None:
                raise NotImplementedError(f"no {name}")
        pages = (inputs["k_pages_P_G_R_C"], inputs["v_pages_P_G_R_C"])
        if pages[0].dtype != page_dtype:
            raise NotImplementedError(f"pages of {page_dtype}, these are {pages[0].dtype}")
        plan, scales = inputs["plan"], (1.0, 1.0)
        if page_dtype == torch.float8_e4m3fn:
            given = (inputs["k_scale_P_G_R"], inputs["v_scale_P_G_R"])
            made = [_one_scale(x, s) for x, s in zip(pages, given, strict=True)]
            pages, scales = (made[0][0], made[1][0]), (made[0][1], made[1][1])
        return cls(
            q=inputs["q_T_H_C"],
            pages=pages,
            scales=scales,
            num_queries=inputs["start_S1"].diff().tolist(),
            kv_len=(inputs["length_S"] - plan.base_S_M[:, 0]).tolist(),
            page_S_M=plan.page_S_M,
            window=inputs["window"],
            scale=inputs["scale"],
        )

    @property
    def page_rows(self) -> int:
        return self.pages[0].shape[2]

    @property
    def heads(self) -> tuple[int, int]:
        return self.q.shape[1], self.pages[0].shape[1]

    def int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)

    def starts(self, counts: list[int]) -> Tensor:
        return self.int32([sum(counts[:s]) for s in range(len(counts) + 1)])

    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """(start of each row's pages, page ids, rows of each row's last page)."""
        counts = [-(-length // self.page_rows) for length in self.kv_len]
        indices = torch.cat([self.page_S_M[s, :n] for s, n in enumerate(counts)])
        used = zip(self.kv_len, counts, strict=True)
        last = [length - (n - 1) * self.page_rows for length, n in used]
        return self.starts(counts), indices, self.int32(last)


def _one_scale(pages_P_G_R_C: Tensor, scale_P_G_R: Tensor) -> tuple[Tensor, float]:
    x_P_G_R_C = pages_P_G_R_C.float() * scale_P_G_R[..., None]
    scale = float(x_P_G_R_C.abs().max()) / 448
    return (x_P_G_R_C / scale).to(torch.float8_e4m3fn), scale


def _limit(page_dtype: torch.dtype) -> float:
    return ONE_SCALE if page_dtype == torch.float8_e4m3fn else SAME_FUNCTION


def _decode_only(p: Paged) -> None:
    if set(p.num_queries) != {1}:
        raise NotImplementedError(f"one query of each session, not {max(p.num_queries)}")


def flashinfer_decode(page_dtype: torch.dtype) -> Variant:
    wrapper_type = find("flashinfer", "BatchDecodeWithPagedKVCacheWrapper")

    def prepare(inputs: Inputs) -> Inputs:
        p = Paged.of(inputs, page_dtype)
        _decode_only(p)
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=p.q.device)
        wrapper = wrapper_type(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(
            *p.lists(),
            *p.heads,
            p.q.shape[2],
            p.page_rows,
            window_left=-1 if p.window is None else p.window - 1,
            sm_scale=p.scale,
            q_data_type=p.q.dtype,
            kv_data_type=page_dtype,
        )
        return {"wrapper": wrapper, "p": p}

    return Variant(_run_flashinfer, prepare, limit=_limit(page_dtype))


def _run_flashinfer(wrapper: Any, p: Paged) -> Tensor:
    return wrapper.run(p.q, p.pages, k_scale=p.scales[0], v_scale=p.scales[1])


def flashinfer_append(page_dtype: torch.dtype) -> Variant:
    wrapper_type = find("flashinfer", "BatchPrefillWithPagedKVCacheWrapper")

    def prepare(inputs: Inputs) -> Inputs:
        p = Paged.of(inputs, page_dtype)
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=p.q.device)
        wrapper = wrapper_type(workspace, "HND")
        wrapper.plan(
            p.starts(p.num_queries),
            *p.lists(),
            *p.heads,
            p.q.shape[2],
            p.page_rows,
            causal=True,
            window_left=-1 if p.window is None else p.window - 1,
            sm_scale=p.scale,
            q_data_type=p.q.dtype,
            kv_data_type=page_dtype,
        )
        return {"wrapper": wrapper, "p": p}

    return Variant(_run_flashinfer, prepare, limit=_limit(page_dtype))


def flashinfer_holistic(page_dtype: torch.dtype) -> Variant:
    """One persistent kernel for rows of all kinds."""
    wrapper_type = find("flashinfer", "BatchAttention")

    def prepare(inputs: Inputs) -> Inputs:
        p = Paged.of(inputs, page_dtype)
        if p.window is not None:
            raise NotImplementedError("no window")
        wrapper = wrapper_type("HND")
        begin, indices, _ = p.lists()
        width = p.q.shape[2]
        wrapper.plan(
            p.starts(p.num_queries),
            begin,
            indices,
            p.int32(p.kv_len),
            *p.heads,
            width,
            width,
            p.page_rows,
            causal=True,
            sm_scale=p.scale,
            q_data_type=p.q.dtype,
            kv_data_type=page_dtype,
        )
        k_scale, v_scale = (torch.tensor([x], device=p.q.device) for x in p.scales)
        scales = {} if p.scales == (1.0, 1.0) else {"k_scale": k_scale, "v_scale": v_scale}
        return {"wrapper": wrapper, "p": p, "scales": scales}

    def run(wrapper: Any, p: Paged, scales: Inputs) -> Tensor:
        return wrapper.run(p.q, p.pages, **scales)[0]

    return Variant(run, prepare, limit=_limit(page_dtype))


def flashinfer_xqa(page_dtype: torch.dtype) -> Variant:
    decode = find("flashinfer.decode", "xqa_batch_decode_with_kv_cache")

    def prepare(inputs: Inputs) -> Inputs:
        p = Paged.of(inputs, page_dtype)
        _decode_only(p)
        return {
            "query": p.q,
            "kv_cache": p.pages,
            "workspace_buffer": torch.zeros(WORKSPACE, dtype=torch.uint8, device=p.q.device),
            "block_tables": p.page_S_M.clamp(min=0),
            "seq_lens": p.int32(p.kv_len).view(torch.uint32),
            "max_seq_len": max(p.kv_len),
            "bmm1_scale": p.scale * p.scales[0],
            "bmm2_scale": p.scales[1],
            "window_left": -1 if p.window is None else p.window - 1,
            "kv_layout": "HND",
        }

    return Variant(decode, prepare, limit=_limit(page_dtype))


def xformers_splitk() -> Variant:
    """Triton kernels of split keys; pages are copied with their rows outermost, untimed."""
    attention = find("xformers.ops.fmha", "memory_efficient_attention_forward")
    op = find("xformers.ops.fmha.triton_splitk", "FwOp")
    padded = find("xformers.ops.fmha.attn_bias", "BlockDiagonalCausalWithOffsetPaddedKeysMask")
    paged = find("xformers.ops.fmha.attn_bias", "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask")

    def prepare(inputs: Inputs) -> Inputs:
        p = Paged.of(inputs, inputs["q_T_H_C"].dtype)
        if p.window is not None:
            raise NotImplementedError("no window")
        (num_heads, num_kv_heads), size = p.heads, p.page_rows
        group = num_heads // num_kv_heads
        block_tables = p.page_S_M.clamp(min=0)
        bias = padded.from_seqlens(
            q_seqlen=p.num_queries,
            kv_padding=block_tables.shape[1] * size,
            kv_seqlen=p.kv_len,
            device=p.q.device,
        ).make_paged(block_tables=block_tables, page_size=size, paged_type=paged)
        k, v = (
            x.transpose(1, 2).flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, group, -1)
            for x in p.pages
        )
        q = p.q.unflatten(1, (num_kv_heads, group))[None]
        return {"query": q, "key": k, "value": v, "attn_bias": bias, "scale": p.scale, "op": op}

    def run(**given: Any) -> Tensor:
        return attention(**given)[0].flatten(1, 2)

    return Variant(run, prepare)


def flex_attention() -> Variant:
    """With bias and tau, over keys gathered untimed; for rows of one number of queries."""
    attend = find("torch.nn.attention.flex_attention", "flex_attention")

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pk_S_L: Tensor,
        pq_S_I: Tensor,
        tau_S_I: Tensor,
        rel: Tensor,
        table: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        profile_S_H_I_X, extent = rel @ table, table.shape[1]

        def score_mod(score: Tensor, s: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            distance = pq_S_I[s, i] - pk_S_L[s, j]
            near = (distance >= 0) & (distance < extent)
            bias = profile_S_H_I_X[s, h, i, distance.clamp(0, extent - 1)].float()
            score = (score + torch.where(near, bias, 0.0)) * tau_S_I[s, i]
            visible = (distance >= 0) & (distance < window)
            return torch.where(visible, score, float("-inf"))

        out = attend(q, k, v, score_mod=score_mod, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return Variant(torch.compile(run, dynamic=False), _gathered)


FAR = 1 << 40  # as a position: no query sees it


def _gathered(inputs: Inputs) -> Inputs:
    """Keys in one tensor for each row, and their positions."""
    if inputs["softcap"] is not None or inputs.get("k_scale_P_G_R") is not None:
        raise NotImplementedError("no softcap, no pages of fp8")
    num_queries = set(inputs["start_S1"].diff().tolist())
    if len(num_queries) > 1:
        raise NotImplementedError(f"rows of one number of queries, not {num_queries}")
    q, plan, length_S = inputs["q_T_H_C"], inputs["plan"], inputs["length_S"]
    num_rows = length_S.shape[0]
    rel, table = inputs["rel_T_H_B"], inputs["rel_table_B_X"]
    if rel is None:
        rel, table = q.new_zeros(*q.shape[:2], 1), q.new_zeros(1, 1)
    position_S_L = positions(inputs)
    q, rel = (x.unflatten(0, (num_rows, -1)).transpose(1, 2) for x in (q, rel))
    pq_S_I = length_S[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    tau_S_I = torch.ones_like(pq_S_I, dtype=torch.float32)
    if inputs["tau_floor"] is not None:
        tau_S_I += 0.1 * ((pq_S_I + 1) / inputs["tau_floor"]).clamp(min=1).log()
    page_S_M = plan.page_S_M.clamp(min=0)
    k, v = (
        inputs[name][page_S_M].transpose(1, 2).flatten(2, 3)
        for name in ("k_pages_P_G_R_C", "v_pages_P_G_R_C")
    )
    return {
        "q": q.contiguous(), "k": k, "v": v, "pk_S_L": position_S_L, "pq_S_I": pq_S_I,
        "tau_S_I": tau_S_I, "rel": rel.contiguous(), "table": table.to(q.dtype),
        "scale": inputs["scale"], "window": inputs["window"] or FAR,
    }  # fmt: skip


def positions(inputs: Inputs) -> Tensor:
    """[S, L] of the rows of the planned pages, FAR where a row is not in use."""
    plan, row_position_P_R = inputs["plan"], inputs.get("row_position_P_R")
    row_R = torch.arange(inputs["k_pages_P_G_R_C"].shape[2], device=plan.base_S_M.device)
    if row_position_P_R is None:
        position_S_M_R = plan.base_S_M[..., None] + row_R
    else:
        position_S_M_R = row_position_P_R[plan.page_S_M.clamp(min=0)]
    return position_S_M_R.masked_fill(row_R >= plan.rows_S_M[..., None], FAR).flatten(1)
