"""Triton kernels of patch_embed: four launches for three folds.

1. `stem_kernel`: pixels to the rows of the second fold, normalised and activated.
2. `product_kernel`, once for every further fold and once for the frames: rows times weights, and
   each row's squares summed by slots of features; it normalises and activates the rows that another
   product wrote while it loads them.
3. `final_norm_kernel`.

Rows lie so that a fold is a plain reshape: the rows that the next fold joins follow each other.
Every sum has one order, whatever the number of tokens: K in the steps of the tensor core, squares
pairwise within a slot and pairwise over the slots.
"""

# pyright: reportCallIssue=false
# Triton's types know no launch options.

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..._aot import AotSpec
from .configs import (
    BLOCK_K,
    NORM,
    PRODUCTS,
    STEM,
    ProductConfig,
    choose_product,
    scratch_buffers,
    stem_why_not,
)
from .products import final_norm_kernel, product_kernel
from .reference import PATCH_40, PatchSpec, spec_of
from .stem import stem_kernel

# Argument -> its type in the tick; what is not here is a 32-bit size.
TYPES = {
    **dict.fromkeys(("weight_1_ptr", "weight_2_ptr", "weight_ptr", "x_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("norm_1_ptr", "norm_2_ptr", "norm_ptr"), "*fp32"),
    **dict.fromkeys(("x_ssq_ptr", "y_ssq_ptr", "ssq_ptr", "y_ptr"), "*fp32"),
    "frames_ptr": "*u8",
    "extent_ptr": "*i32",
    "eps": "fp32",
}


def launch_patch_embed(
    frames: Tensor,
    extent: Tensor | None,
    linears: list[Tensor],
    norms: list[Tensor],
    final_norm: Tensor,
    folds: list[int],
    extra_column: bool,
    mean: list[float],
    std: list[float],
    eps: float,
    out: Tensor,
    scratch: Tensor | None,
) -> None:
    """Arguments as of the op; ValueError for a tower that the stem does not take."""
    spec = spec_of(frames, linears, folds, extra_column, mean, std)
    reason = stem_why_not(spec)
    if reason is not None:
        raise ValueError(f"patch_embed: {reason}")
    num_tokens, width = out.shape
    buffers = scratch_buffers(spec, num_tokens, width, linears[0].dtype)
    if scratch is None:
        scratch = torch.empty(buffers[-1].end, dtype=torch.uint8, device=out.device)
    x, *pairs = (b.of(scratch) for b in buffers)
    _launch_stem(frames, extent, linears, norms, spec, eps, x)
    ssq = None
    for i, y, y_ssq in zip(range(2, len(linears)), pairs[::2], pairs[1::2], strict=True):
        _launch_product(x, ssq, norms[i - 1], linears[i], eps, y, y_ssq)
        x, ssq = y, y_ssq
    grid = (num_tokens, triton.cdiv(width, NORM.block_d))
    final_norm_kernel[grid](
        x, ssq, final_norm, out, eps, D=width, BLOCK_D=NORM.block_d,
        num_warps=NORM.num_warps, num_stages=NORM.num_stages,
    )  # fmt: skip


def _launch_stem(
    frames: Tensor,
    extent: Tensor | None,
    linears: list[Tensor],
    norms: list[Tensor],
    spec: PatchSpec,
    eps: float,
    out: Tensor,
) -> None:
    height, width = frames.shape[2:4]
    num_rows = out.shape[0]
    stem_kernel[(triton.cdiv(num_rows, STEM.block_r),)](
        frames, linears[0], norms[0], linears[1], norms[1], extent, out,
        num_rows, height, width, *spec.grid(height, width), eps,
        **_stem_constexprs(spec), num_warps=STEM.num_warps, num_stages=STEM.num_stages,
    )  # fmt: skip


def _stem_constexprs(spec: PatchSpec) -> dict[str, Any]:
    return {
        "L": spec.frames,
        "FOLDS": spec.folds,
        "C1": spec.widths[0],
        "C2": spec.widths[1],
        "MEAN": spec.mean,
        "STD": spec.std,
        "RAGGED": spec.extra_column,
        "BLOCK_R": STEM.block_r,
    }


def _launch_product(
    x: Tensor,
    x_ssq: Tensor | None,
    norm: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    y_ssq: Tensor,
) -> None:
    """y = x W^T, with as many rows of x joined as W is deep; without x_ssq x is activated."""
    (num_rows, features), depth = y.shape, weight.shape[1]
    config = choose_product(num_rows)
    activate = x_ssq is not None
    width = x.shape[1] if activate else depth
    grid = triton.cdiv(features, config.block_f) * triton.cdiv(num_rows, config.block_r)
    product_kernel[(grid,)](
        x, x_ssq if activate else y_ssq, norm, weight, y, y_ssq, num_rows, eps,
        **_product_constexprs(config, features, depth // width, width, activate),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _product_constexprs(
    config: ProductConfig, features: int, joined: int, width: int, activate: bool
) -> dict[str, Any]:
    return {
        "F": features,
        "G": joined,
        "C": width,
        "ACTIVATE": activate,
        "BLOCK_F": config.block_f,
        "BLOCK_R": config.block_r,
        "BLOCK_K": BLOCK_K,
    }


def aot_specs() -> list[AotSpec]:
    """The public model's tower in the tick's types: bf16 rows and weights, fp32 norms."""
    shapes = PATCH_40.linear_shapes(4096)
    specs = [
        _stem_spec(PATCH_40, "whole"),
        _stem_spec(replace(PATCH_40, extra_column=True), "ragged"),
        _stem_spec(PATCH_40, "cut"),
    ]
    for _, config in PRODUCTS:
        for i, frames in ((2, 1), (3, PATCH_40.frames)):
            features, depth = shapes[i]
            specs.append(_product_spec(config, features, frames, depth // frames))
    specs.append(_spec(final_norm_kernel, NORM, {"D": 4096, "BLOCK_D": NORM.block_d}, "norm"))
    return specs


def _stem_spec(spec: PatchSpec, label: str) -> AotSpec:
    constexprs = _stem_constexprs(spec)
    if label != "cut":
        constexprs["extent_ptr"] = None
    return _spec(stem_kernel, STEM, constexprs, label)


def _product_spec(config: ProductConfig, features: int, joined: int, width: int) -> AotSpec:
    activate = joined > 1
    constexprs = _product_constexprs(config, features, joined, width, activate)
    label = f"{width}x{joined}->{features},block_f={config.block_f},block_r={config.block_r}"
    types = {"y_ptr": "*fp32" if activate else "*bf16"}
    return _spec(product_kernel, config, constexprs, label, types)


def _spec(
    kernel: Any, config: Any, constexprs: dict, label: str, types: dict[str, str] | None = None
) -> AotSpec:
    signature = {
        name: (types or {}).get(name) or TYPES.get(name, "i32")
        for name in kernel.arg_names
        if name not in constexprs
    }
    return AotSpec(
        kernel=kernel,
        config=config,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(n for n, t in signature.items() if t[0] == "*" and t != "*u8"),
        label=label,
    )
