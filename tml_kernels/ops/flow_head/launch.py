"""The launches of flow_head in their order, and what is compiled ahead of time."""

# pyright: reportCallIssue=false, reportArgumentType=false
# Triton's types know no launch options and no plain values for constexprs.

# Dimension key: S session rows, N Euler steps, Q rows evaluated together: S, or 2 S when guided,
# W head width, L blocks, B output values (mel bins); of a product: R rows, F features, K columns.

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..._aot import AotSpec
from .configs import MODULATION, PRODUCT, Config, Problem, aligned_size
from .kernel import (
    modulation_kernel,
    noise_kernel,
    norm_product_kernel,
    product_kernel,
    velocity_kernel,
)
from .reference import FlowWeights, time_wave


@functools.lru_cache(maxsize=16)
def _wave(num_steps: int, width: int, device: torch.device) -> Tensor:
    """wave_N_W, float32. Copied to the device the first time: warm up before capturing a graph."""
    return time_wave(num_steps, width, torch.device("cpu")).float().to(device)


def _grid(num_rows: int, num_features: int, config: Config) -> tuple:
    blocks = triton.cdiv(num_rows, config.block_r) * triton.cdiv(num_features, config.block_f)
    return (blocks,)


def _options(config: Config) -> dict[str, Any]:
    return _blocks(config) | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _blocks(config: Config) -> dict[str, Any]:
    return {"BLOCK_F": config.block_f, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k}


def _product(
    x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, *, silu: bool = False,
    gate: Tensor | None = None,
) -> None:  # fmt: skip
    """y = x W^T + bias, row r from x of r % len(x); with a gate y += gate * that."""
    num_rows, num_features = y.shape
    product_kernel[_grid(num_rows, num_features, PRODUCT)](
        x, weight, bias, y if gate is None else gate, 0 if gate is None else gate.stride(0), y,
        num_rows, len(x), num_features, x.shape[1],
        SILU=silu, GATED=gate is not None, **_options(PRODUCT),
    )  # fmt: skip


def _modulate(
    time: Tensor, cond: Tensor, null: Tensor, weight: Tensor, bias: Tensor, y: Tensor
) -> None:
    """y_N_Q_F of all steps; weight and bias may have their features in several axes."""
    (num_steps, num_evaluated), width = y.shape[:2], time.shape[1]
    num_rows, num_features = num_steps * num_evaluated, bias.numel()
    modulation_kernel[_grid(num_rows, num_features, MODULATION)](
        time, cond, null, weight, bias, y,
        num_rows, len(cond), num_evaluated, num_features, width, **_options(MODULATION),
    )  # fmt: skip


def launch_flow_head(
    cond: Tensor,
    weights: list[Tensor],
    seed: Tensor,
    counter: Tensor,
    num_steps: int,
    guidance: float,
    work: Tensor,
    out: Tensor,
) -> None:
    """Arguments as of the op; x lives in `out`."""
    w = FlowWeights(*weights)
    (num_rows, num_bins), width = out.shape, len(w.null_W)
    num_blocks, inner = w.up_bias_L_U.shape
    problem = Problem(num_rows, width, inner, num_blocks, num_steps, guidance != 1.0)
    part = _divide(work, problem)
    noise_kernel[(num_rows,)](
        seed, counter, out, num_bins, BLOCK_I=triton.next_power_of_2(triton.cdiv(num_bins, 4))
    )
    _product(cond, w.cond_W_D, w.cond_bias_W, part["cond_S_W"])
    wave, time_in, time = _wave(num_steps, width, out.device), part["time_in_N_W"], part["time_N_W"]
    _product(wave, w.time_in_W_W, w.time_in_bias_W, time_in, silu=True)
    _product(time_in, w.time_out_W_W, w.time_out_bias_W, time)
    condition = (time, part["cond_S_W"], w.null_W)
    mod, final = part["mod_N_Q_L_3_W"], part["final_N_Q_2_W"]
    _modulate(*condition, w.mod_L_3_W_W, w.mod_bias_L_3_W, mod)
    _modulate(*condition, w.final_mod_2_W_W, w.final_mod_bias_2_W, final)

    h, y = part["h_Q_W"], part["inner_Q_U"]
    for n in range(num_steps):
        _product(out, w.input_W_B, w.input_bias_W, h)
        for i in range(num_blocks):
            norm_product_kernel[_grid(len(h), inner, PRODUCT)](
                h, mod[n, :, i], mod.stride(1), w.up_L_U_W[i], w.up_bias_L_U[i], y,
                len(h), inner, width, **_options(PRODUCT),
            )  # fmt: skip
            gate = mod[n, :, i, 2]
            _product(y, w.down_L_W_U[i], w.down_bias_L_W[i], h, gate=gate)
        velocity_kernel[_grid(num_rows, num_bins, PRODUCT)](
            h, final[n], final.stride(1), w.output_B_W, w.output_bias_B, out,
            num_rows, num_bins, width, guidance, float(num_steps),
            GUIDED=problem.guided, **_options(PRODUCT),
        )  # fmt: skip


def _divide(work: Tensor, problem: Problem) -> dict[str, Tensor]:
    parts, offset = {}, 0
    for name, shape in problem.work_shapes().items():
        parts[name] = work[offset : offset + math.prod(shape)].view(shape)
        offset += aligned_size(shape)
    return parts


ROW = {"h_ptr": "*fp32", "mod_ptr": "*fp32", "stride_mod_r": "i32"}
LINEAR = {"weight_ptr": "*bf16", "bias_ptr": "*bf16"}
SIZES = {"F": "i32", "K": "i32"}


def aot_specs() -> list[AotSpec]:
    """As the tick uses them: bf16 weights, everything else float32."""

    def spec(kernel, signature: dict[str, str], config: Config = PRODUCT, label="", **flags):
        pointers = [name for name, kind in signature.items() if kind.startswith("*")]
        sizes = [name for name in ("F", "K", "stride_mod_r", "stride_gate_r") if name in signature]
        return AotSpec(
            kernel=kernel,
            config=config,
            signature=signature,
            constexprs=_blocks(config) | flags,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            aligned=(*pointers, *sizes),
            label=label,
        )

    product = {
        "x_ptr": "*fp32", **LINEAR, "gate_ptr": "*fp32", "stride_gate_r": "i32",
        "y_ptr": "*fp32", "R": "i32", "X": "i32", **SIZES,
    }  # fmt: skip
    modulation = {
        "time_ptr": "*fp32", "cond_ptr": "*fp32", "null_ptr": "*bf16", **LINEAR,
        "y_ptr": "*fp32", "R": "i32", "S": "i32", "Q": "i32", **SIZES,
    }  # fmt: skip
    velocity = ROW | LINEAR | {"x_ptr": "*fp32", "S": "i32"} | SIZES
    velocity |= {"guidance": "fp32", "num_steps": "fp32"}
    noise = {"seed_ptr": "*i64", "counter_ptr": "*i64", "x_ptr": "*fp32", "B": "i32"}
    return [
        AotSpec(noise_kernel, PRODUCT, noise, {"BLOCK_I": 32}, label="B80"),
        spec(modulation_kernel, modulation, MODULATION),
        spec(norm_product_kernel, ROW | LINEAR | {"y_ptr": "*fp32", "R": "i32"} | SIZES),
        spec(product_kernel, product | {"x_ptr": "*bf16"}, label="cond", SILU=False, GATED=False),
        spec(product_kernel, product, label="plain", SILU=False, GATED=False),
        spec(product_kernel, product, label="silu", SILU=True, GATED=False),
        spec(product_kernel, product, label="gated", SILU=False, GATED=True),
        spec(velocity_kernel, velocity, label="one", GUIDED=False),
        spec(velocity_kernel, velocity, label="guided", GUIDED=True),
    ]
