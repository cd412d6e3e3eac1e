"""Launch of paged_attention's kernel, and what compiles it ahead of time."""

# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..._aot import AotSpec
from ..._device import ARCHS, arch_of
from .configs import (
    LARGE,
    MAX_PROGRAMS,
    SMALL,
    Config,
    Problem,
    choose_config,
    problem_of,
    scratch_buffers,
    shape_why_not,
)
from .kernel import attention_kernel


def launch_paged_attention(
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
    config: Config | None = None,
) -> None:
    """Arguments as of the op; ValueError for shapes that the kernels do not take."""
    p = problem_of(q, k_pages, page, window, rel)
    reason = shape_why_not(p)
    if reason is not None:
        raise ValueError(f"paged_attention: {reason}")
    if config is None:
        table_dtype = None if rel_table is None else rel_table.dtype
        config = choose_config(p).fitted(p, table_dtype, arch_of(q.device))
    buffers = scratch_buffers(p)
    if scratch is None:
        scratch = torch.empty(buffers[-1].end, dtype=torch.uint8, device=q.device)
        scratch[: 4 * config.max_tiles(p) * p.num_kv_heads].zero_()
    counter, part_ml, part_acc = (b.of(scratch) for b in buffers)
    programs = min(MAX_PROGRAMS, config.max_tiles(p) * p.num_kv_heads * p.max_splits)
    attention_kernel[(programs,)](
        q, k_pages, v_pages, k_scale, v_scale, page, base, rows, count, row_position,
        start, length,
        rel, *((0, 0, 0) if rel is None else rel.stride()), rel_table,
        counter, part_ml, part_acc, out,
        p.num_tokens, p.num_rows, p.num_columns, p.max_splits, span, p.num_features,
        scale, tau_floor or 1.0, tau_alpha, softcap or 1.0,
        **_constexprs(p, config, 0 if rel_table is None else rel_table.shape[1]),
        TAU=tau_floor is not None, SOFTCAP=softcap is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _constexprs(p: Problem, config: Config, extent: int) -> dict[str, Any]:
    return {
        "G": p.num_kv_heads,
        "GROUP": p.group,
        "C": p.head_width,
        "R": p.page_rows,
        "X": extent,
        "WINDOW": p.window,
        "SPLIT_PAGES": p.split_pages,
        "TILE": config.tile_tokens(p),
        "BLOCK_N": triton.next_power_of_2(p.num_rows + 1),
        "BLOCK_Q": config.block_q,
        "BLOCK_R": p.block_r,
        "BLOCK_C": p.block_c,
        "BLOCK_B": p.block_b,
        "BLOCK_K": p.block_b * config.dot_tokens(p),
    }


# Whose values change from tick to tick, and the types of the pointers that are not q's.
TYPES = {
    "page_ptr": "*i32",
    "base_ptr": "*i64",
    "rows_ptr": "*i32",
    "count_ptr": "*i32",
    "position_ptr": "*i64",
    "start_ptr": "*i32",
    "length_ptr": "*i64",
    "counter_ptr": "*i32",
    "part_ml_ptr": "*fp32",
    "part_acc_ptr": "*fp32",
    "k_scale_ptr": "*fp32",
    "v_scale_ptr": "*fp32",
    "table_ptr": "*fp32",
    "scale": "fp32",
    "tau_floor": "fp32",
    "tau_alpha": "fp32",
    "softcap": "fp32",
}
FP8 = torch.float8_e4m3fn


def _problem(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "num_tokens": 32,
        "num_rows": 32,
        "num_columns": 256,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_width": 128,
        "page_rows": 64,
        "window": None,
        "num_features": 16,
        "dtype": torch.bfloat16,
        "page_dtype": torch.bfloat16,
    }
    return Problem(**given | changes)


def aot_specs() -> list[AotSpec]:
    """Global and local layers of the public model, global ones with positions of the rows, and a
    layer without bias and window, of head widths 64, 128 and 256, with pages of bf16 and fp8; and
    wide heads with a bias, in as many stages as fit each chip."""
    plain = {"num_features": 0}
    shapes: list[tuple[str, dict[str, Any], int]] = [
        ("global", {}, 1024),
        ("global-positions", {}, 1024),
        ("local", {"window": 512}, 512),
        ("plain", plain, 0),
        ("plain-positions", plain, 0),
        ("plain-C64", plain | {"head_width": 64}, 0),
        ("plain-C256", plain | {"head_width": 256}, 0),
    ]
    specs = []
    for name, changes, extent in shapes:
        for page_dtype in (torch.bfloat16, FP8):
            p = _problem(page_dtype=page_dtype, **changes)
            configs = (choose_config(p), SMALL, *((LARGE,) if page_dtype == p.dtype else ()))
            specs += [_attention_spec(name, p, config, extent) for config in configs]
    for features in (16, 64):
        p = _problem(head_width=256, num_features=features)
        for config in (SMALL, LARGE):
            for arch in ARCHS:
                fitted = config.fitted(p, torch.float32, arch)
                spec = _attention_spec(f"global-C256-B{features}", p, fitted, 1024)
                specs.append(replace(spec, min_arch=arch, below_arch=90 if arch < 90 else None))
    return specs


def _attention_spec(name: str, p: Problem, config: Config, extent: int) -> AotSpec:
    is_fp8 = p.page_dtype == FP8
    constexprs = _constexprs(p, config, extent) | {"TAU": "global" in name, "SOFTCAP": False}
    absent = () if is_fp8 else ("k_scale_ptr", "v_scale_ptr")
    if extent == 0:
        absent += ("rel_ptr", "table_ptr")
    if "positions" not in name:
        absent += ("position_ptr",)
    constexprs |= dict.fromkeys(absent)
    page = "*fp8e4nv" if is_fp8 else "*bf16"
    types = {"q_ptr": "*bf16", "rel_ptr": "*bf16", "out_ptr": "*bf16", "k_ptr": page, "v_ptr": page}
    return AotSpec(
        **_signature(attention_kernel, constexprs, TYPES | types),
        config=config,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        label=",".join(
            (name, "fp8" if is_fp8 else "bf16", "alone" if config.alone else str(config.block_q))
        ),
        mma="HMMA",
        min_arch=90 if is_fp8 else 80,
    )


def _signature(kernel: Any, constexprs: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    names = [name for name in kernel.arg_names if name not in constexprs]
    signature = {name: types.get(name, "i32") for name in names}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "aligned": tuple(name for name, kind in signature.items() if kind[0] == "*"),
    }
