"""Triton kernel of rms_norm: one program per row, one read and one write of it."""

# Dimension key: T tokens, D model width.

# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from ..._triton.e4m3 import to_scaled_e4m3
from .configs import SHIPPED, Config, Problem, choose_config


@triton.jit
def rms_norm_kernel(
    x_ptr,                    # in      [T, D]
    weight_ptr,               # in      [D]
    residual_ptr,             # in out  [T, D]  residual += x, when HAS_RESIDUAL
    out_ptr,                  # out     [T, D]  bytes of e4m3 where there is a scale
    out_scale_ptr,            # out     [T]  or None
    D, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D

    h_d = tl.load(x_ptr + t * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_d = tl.load(residual_ptr + t * D + offs_d, mask=mask_d, other=0.0)
        h_d += residual_d.to(tl.float32)
        tl.store(residual_ptr + t * D + offs_d, h_d, mask=mask_d)
    weight_d = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)

    scale = 1.0 / tl.sqrt(tl.sum(h_d * h_d, axis=0) / D + eps)
    y_d = h_d * scale * weight_d
    if out_scale_ptr is not None:
        y_d, out_scale_1 = to_scaled_e4m3(y_d)
        tl.store(out_scale_ptr + t + tl.arange(0, 1), out_scale_1)
    tl.store(out_ptr + t * D + offs_d, y_d, mask=mask_d)


def launch_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    out: Tensor,
    out_scale: Tensor | None = None,
) -> None:
    num_tokens, width = x.shape
    config = choose_config(Problem(width))
    if out_scale is not None:
        out = out.view(torch.uint8)
    rms_norm_kernel[(num_tokens,)](
        x, weight, x if residual is None else residual, out, out_scale,
        width, eps,
        HAS_RESIDUAL=residual is not None, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip


def aot_specs() -> list[AotSpec]:
    """Every shipped configuration as the tick uses it: bf16 rows, fp32 weights, a residual; the
    model's width also with fp8 output."""

    def spec(config: Config, fp8: bool = False) -> AotSpec:
        signature = {
            "x_ptr": "*bf16",
            "weight_ptr": "*fp32",
            "residual_ptr": "*bf16",
            "out_ptr": "*u8" if fp8 else "*bf16",
            "D": "i32",
            "eps": "fp32",
        }
        absent = {} if fp8 else {"out_scale_ptr": None}
        return AotSpec(
            kernel=rms_norm_kernel,
            config=config,
            signature=signature | ({"out_scale_ptr": "*fp32"} if fp8 else {}),
            constexprs={"HAS_RESIDUAL": True, "BLOCK_D": config.block_d} | absent,
            num_warps=config.num_warps,
            label="fp8" if fp8 else "",
        )

    wide = choose_config(Problem(4096))
    return [*(spec(config) for config in SHIPPED), spec(wide, fp8=True)]
