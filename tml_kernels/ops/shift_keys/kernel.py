"""Triton kernel of shift_keys: one launch for all keys of all layers."""

# Dimension key: L layers, I keys, G KV heads, C head width, B = C / 2 rotary frequencies, P pages,
# R rows in a page. A tile [h, b, 2] is some heads of one key: column b of each of their two halves.

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's types know no launch options.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from ..._head_tiles import SHIPPED, Config, Problem, choose_config
from ..._triton.heads import load_heads, rotate, write_page


@triton.jit(do_not_specialize=["P"])
def shift_keys_kernel(
    source_ptr,                  # in   [L, I, G, C]
    row_ptr, shift_ptr,          # in   [I]
    phase_ptr,                   # in   [B]
    k_pages_ptr,                 # out  [L, P, G, R, C], bytes when IS_FP8
    k_scale_ptr,                 # out  [L, P, G, R], when IS_FP8
    P,
    G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, IS_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    tl.static_assert(C <= 2 * BLOCK_B, "a head is wider than a block")
    tl.static_assert(C % 2 == 0, "rotary heads have an even width")
    i, layer, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    key_ptr = source_ptr + (layer * tl.num_programs(0) + i) * (G * C)
    first_row = layer * P * (G * R)

    x_h_b_2 = load_heads(key_ptr, block, G, C, BLOCK_H, BLOCK_B)
    x_h_b_2 = rotate(x_h_b_2, phase_ptr, tl.load(shift_ptr + i), C, BLOCK_B)
    write_page(
        x_h_b_2, row_ptr, k_pages_ptr + first_row * C, k_scale_ptr + first_row, i, block, P,
        G, C, R, IS_FP8, BLOCK_H, BLOCK_B,
    )  # fmt: skip


def launch_shift_keys(
    source: Tensor,
    row: Tensor,
    shift: Tensor,
    rope_phase: Tensor,
    k_pages: Tensor,
    k_scale: Tensor | None,
) -> None:
    num_layers, num_pages, num_kv_heads, page_rows, head_width = k_pages.shape
    config = choose_config(Problem(head_width))
    shift_keys_kernel[(row.shape[0], num_layers, triton.cdiv(num_kv_heads, config.block_h))](
        source, row, shift, rope_phase,
        k_pages if k_scale is None else k_pages.view(torch.uint8),
        source if k_scale is None else k_scale,
        num_pages,
        G=num_kv_heads, C=head_width, R=page_rows, IS_FP8=k_scale is not None,
        BLOCK_H=config.block_h, BLOCK_B=config.block_b,
        num_warps=config.num_warps,
    )  # fmt: skip


def aot_specs() -> list[AotSpec]:
    """Every shipped width with bf16 pages, and heads of 128 with fp8 pages."""
    fp8 = _spec(choose_config(Problem(128)), "C128-fp8", True)
    return [*(_spec(config, f"C{2 * config.block_b}", False) for config in SHIPPED), fp8]


def _spec(config: Config, label: str, is_fp8: bool) -> AotSpec:
    signature = {
        "source_ptr": "*bf16",
        **dict.fromkeys(("row_ptr", "shift_ptr", "phase_ptr"), "*i64"),
        "k_pages_ptr": "*u8" if is_fp8 else "*bf16",
        "k_scale_ptr": "*fp32" if is_fp8 else "*bf16",
        "P": "i32",
    }
    sizes = {"G": 8, "C": 2 * config.block_b, "R": 64, "IS_FP8": is_fp8}
    return AotSpec(
        kernel=shift_keys_kernel,
        config=config,
        signature=signature,
        constexprs=sizes | {"BLOCK_H": config.block_h, "BLOCK_B": config.block_b},
        num_warps=config.num_warps,
        label=label,
    )
