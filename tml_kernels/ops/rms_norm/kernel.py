"""Triton kernel of rms_norm: one program per row, one read and one write of it."""

# Dimension key: T tokens, D model width.

# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from .configs import SHIPPED, Config, Problem, choose_config


@triton.jit
def rms_norm_kernel(
    x_ptr,                    # in      [T, D]
    weight_ptr,               # in      [D]
    residual_ptr,             # in out  [T, D]  residual += x, when HAS_RESIDUAL
    out_ptr,                  # out     [T, D]
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
    tl.store(out_ptr + t * D + offs_d, h_d * scale * weight_d, mask=mask_d)


def launch_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, out: Tensor
) -> None:
    num_tokens, width = x.shape
    config = choose_config(Problem(width))
    rms_norm_kernel[(num_tokens,)](
        x, weight, x if residual is None else residual, out,
        width, eps,
        HAS_RESIDUAL=residual is not None, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip


def aot_specs() -> list[AotSpec]:
    """Every shipped configuration as the tick uses it: bf16 rows, fp32 weights, a residual."""

    def spec(config: Config) -> AotSpec:
        return AotSpec(
            kernel=rms_norm_kernel,
            config=config,
            signature={
                "x_ptr": "*bf16",
                "weight_ptr": "*fp32",
                "residual_ptr": "*bf16",
                "out_ptr": "*bf16",
                "D": "i32",
                "eps": "fp32",
            },
            constexprs={"HAS_RESIDUAL": True, "BLOCK_D": config.block_d},
            num_warps=config.num_warps,
        )

    return [spec(config) for config in SHIPPED]
