"""The launches of flow_head in their order, and what is compiled ahead of time."""

# pyright: reportCallIssue=false, reportArgumentType=false
# Triton's types know no launch options and no plain values for constexprs.

# Dimension key: S session rows, N Euler steps, Q rows evaluated together: S, or 2 S when guided,
# W head width, L blocks, B output values (mel bins); of a product: R rows, F features, K columns.

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..._aot import AotSpec
from .configs import (
    MODULATION,
    NORM_PRODUCT,
    PRODUCT,
    VELOCITY,
    Config,
    Problem,
    aligned_size,
    problem_of,
)
from .kernel import (
    condition_kernel,
    noise_kernel,
    norm_product_kernel,
    product_kernel,
    velocity_kernel,
)
from .reference import FlowWeights, time_wave


@functools.cache
def _wave(num_steps: int, width: int, device: torch.device) -> Tensor:
    """wave_N_W, float32. Copied to the device the first time: warm up before capturing a graph,
    which then holds no more than its pointer, so none is ever dropped."""
    return time_wave(num_steps, width, torch.device("cpu")).float().to(device)


def _constexprs(config: Config, num_columns: int) -> dict[str, Any]:
    return {
        "SPLITS": config.splits(num_columns),
        "SPLIT_K": config.split_k,
        "BLOCK_F": config.block_f,
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block_k,
    }


def _stat_constexprs(width: int) -> dict[str, Any]:
    """Of who reads the statistics that `PRODUCT` leaves of rows of `width` values."""
    tiles = PRODUCT.tiles(1, width)
    return {"STAT_F": PRODUCT.block_f, "BLOCK_T": triton.next_power_of_2(tiles)}


def _options(config: Config, num_columns: int, weight: Tensor) -> dict[str, Any]:
    config = config.for_weight(weight.dtype, num_columns)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return _constexprs(config, num_columns) | options


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
    problem = problem_of(len(out), w, num_steps, guidance)
    run = _Launcher(w, problem, _divide(work, problem))
    num_bins = problem.num_bins
    arrived = run.exchange[0]
    noise_kernel[(len(out),)](
        seed, counter, out, arrived, num_bins, len(arrived),
        BLOCK_I=triton.next_power_of_2(triton.cdiv(num_bins, 4)),
    )  # fmt: skip
    run.modulate(cond, _wave(num_steps, problem.width, out.device))
    for n in range(num_steps):
        run.step(n, guidance, out)


@dataclass(frozen=True)
class _Launcher:
    w: FlowWeights
    problem: Problem
    part: dict[str, Tensor]

    @property
    def exchange(self) -> tuple[Tensor, Tensor]:
        """Counters of arrivals, and room for the parts of tiles; of one launch after another."""
        return self.part["counter_A"].view(torch.int32), self.part["part"]

    @property
    def inner(self) -> Tensor:
        """Of a block's MLP: float32, or the three parts that bfloat16 weights meet."""
        p, buffer = self.problem, self.part["inner_3_Q_U"].view(-1)
        if self.w.down_L_W_U.dtype == torch.bfloat16:
            return buffer.view(torch.bfloat16)[: 3 * p.evaluated * p.inner].view(3, -1, p.inner)
        return buffer[: p.evaluated * p.inner].view(-1, p.inner)

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, config: Config = PRODUCT, *,
        silu: bool = False, gate: Tensor | None = None, stat: Tensor | None = None,
    ) -> None:  # fmt: skip
        """y = x W^T + bias, with a gate y += gate * that. x: [X, K], of which rows from X on take
        the first ones; or [3, X, K], its parts."""
        num_rows, num_features, (num_x, num_columns) = len(y), bias.numel(), x.shape[-2:]
        config = config.for_weight(weight.dtype, num_columns)
        product_kernel[(config.programs(num_rows, num_features, num_columns),)](
            x, weight, bias, gate, 0 if gate is None else gate.stride(0), *self.exchange, y, stat,
            num_rows, num_x, num_features, num_columns,
            SILU=silu, X_PARTS=3 if x.ndim == 3 else 1, **_options(config, num_columns, weight),
        )  # fmt: skip

    def modulate(self, cond: Tensor, wave: Tensor) -> None:
        """mod and final of all steps, from the time of each and the condition of each row."""
        w, p, part = self.w, self.problem, self.part
        self.product(wave, w.time_in_W_W, w.time_in_bias_W, part["time_in_N_W"], silu=True)
        self.product(part["time_in_N_W"], w.time_out_W_W, w.time_out_bias_W, part["time_N_W"])
        sizes = (p.num_rows, p.width, p.model_width)
        condition_kernel[(PRODUCT.programs(*sizes),)](
            cond, w.cond_W_D, w.cond_bias_W, part["time_N_W"], w.null_W, *self.exchange,
            part["act_N_Q_W"], p.num_rows, p.evaluated, p.num_steps, p.width, p.model_width,
            GUIDED=p.guided, **_options(PRODUCT, p.model_width, w.cond_W_D),
        )  # fmt: skip
        act, mod, final = (
            part[name].flatten(0, 1) for name in ("act_N_Q_W", "mod_N_Q_L_3_W", "final_N_Q_2_W")
        )
        self.product(act, w.mod_L_3_W_W, w.mod_bias_L_3_W, mod, MODULATION)
        self.product(act, w.final_mod_2_W_W, w.final_mod_bias_2_W, final)

    def step(self, n: int, guidance: float, x: Tensor) -> None:
        """x += v / N of step n."""
        w, p, part = self.w, self.problem, self.part
        h, stat, y = part["h_Q_W"], part["stat_Q_2_T"], self.inner
        mod, final = part["mod_N_Q_L_3_W"][n], part["final_N_Q_2_W"][n]
        self.product(x, w.input_W_B, w.input_bias_W, h, stat=stat)
        for i in range(p.num_blocks):
            norm_product_kernel[(NORM_PRODUCT.programs(len(h), p.inner, p.width),)](
                h, stat, mod[:, i], mod.stride(0), w.up_L_U_W[i], w.up_bias_L_U[i], *self.exchange,
                y, p.evaluated, p.inner, p.width,
                **_stat_constexprs(p.width), **_options(NORM_PRODUCT, p.width, w.up_L_U_W),
            )  # fmt: skip
            gate = mod[:, i, 2]
            self.product(y, w.down_L_W_U[i], w.down_bias_L_W[i], h, gate=gate, stat=stat)
        velocity_kernel[(VELOCITY.programs(p.num_rows, p.num_bins, p.width),)](
            h, stat, final, final.stride(0), w.output_B_W, w.output_bias_B, *self.exchange, x,
            p.num_rows, p.num_bins, p.width, guidance, float(p.num_steps), BRANCHES=p.branches,
            **_stat_constexprs(p.width), **_options(VELOCITY, p.width, w.output_B_W),
        )  # fmt: skip


def _divide(work: Tensor, problem: Problem) -> dict[str, Tensor]:
    parts, offset = {}, 0
    for name, shape in problem.work_shapes().items():
        parts[name] = work[offset : offset + math.prod(shape)].view(shape)
        offset += aligned_size(shape)
    return parts


ROW = {"h_ptr": "*fp32", "stat_ptr": "*fp32", "mod_ptr": "*fp32", "stride_mod_r": "i32"}
LINEAR = {"weight_ptr": "*bf16", "bias_ptr": "*bf16"}
EXCHANGE = {"counter_ptr": "*i32", "part_ptr": "*fp32"}
SIZES = {"F": "i32", "K": "i32"}
WEIGHTS = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


def aot_specs() -> list[AotSpec]:
    """As the tick uses them: bf16 weights, everything else float32; and float32 weights."""

    def spec(kernel, signature: dict[str, str], config: Config, columns: int, label="", **flags):
        pointers = [name for name, kind in signature.items() if kind.startswith("*")]
        config = config.for_weight(WEIGHTS[signature["weight_ptr"]], columns)
        sizes = [name for name in ("F", "K", "stride_mod_r", "stride_gate_r") if name in signature]
        sizes = sizes if columns % 16 == 0 else []
        return AotSpec(
            kernel=kernel,
            config=config,
            signature=signature,
            constexprs=_constexprs(config, columns) | flags,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            aligned=(*pointers, *sizes),
            label=label,
        )

    width, inner, stats = 1024, 4096, _stat_constexprs(1024)
    plain = {"x_ptr": "*fp32", **LINEAR, "stride_gate_r": "i32", **EXCHANGE, "y_ptr": "*fp32"}
    plain |= {"R": "i32", "X": "i32", **SIZES}
    condition = {"x_ptr": "*bf16", **LINEAR, "time_ptr": "*fp32", "null_ptr": "*bf16", **EXCHANGE}
    condition |= {"act_ptr": "*fp32", "S": "i32", "Q": "i32", "N": "i32", **SIZES}
    norm = ROW | LINEAR | EXCHANGE | {"y_ptr": "*bf16", "R": "i32"} | SIZES
    velocity = ROW | LINEAR | EXCHANGE | {"x_ptr": "*fp32", "S": "i32"} | SIZES
    velocity |= {"guidance": "fp32", "num_steps": "fp32"}
    noise = {"seed_ptr": "*i64", "counter_ptr": "*i64", "x_ptr": "*fp32", "arrived_ptr": "*i32"}
    noise |= {"B": "i32", "A": "i32"}
    wide = {"weight_ptr": "*fp32", "bias_ptr": "*fp32"}
    silu, one = {"SILU": True, "X_PARTS": 1}, {"SILU": False, "X_PARTS": 1}
    alone: dict[str, Any] = {"gate_ptr": None, "stat_ptr": None}
    first = plain | {"stat_ptr": "*fp32"}
    gated = first | {"gate_ptr": "*fp32"}
    parts, three = gated | {"x_ptr": "*bf16"}, {"SILU": False, "X_PARTS": 3}
    norm_wide = norm | wide | {"y_ptr": "*fp32"}
    return [
        AotSpec(noise_kernel, PRODUCT, noise, {"BLOCK_I": 32}, label="B80"),
        spec(condition_kernel, condition, PRODUCT, 4096, "one", GUIDED=False),
        spec(condition_kernel, condition, PRODUCT, 4096, "guided", GUIDED=True),
        spec(norm_product_kernel, norm_wide, NORM_PRODUCT, width, "float32", **stats),
        spec(norm_product_kernel, norm, NORM_PRODUCT, width, "up", **stats),
        spec(product_kernel, plain, PRODUCT, width, "time-in", **silu, **alone),
        spec(product_kernel, plain, PRODUCT, width, "time-out", **one, **alone),
        spec(product_kernel, first, PRODUCT, 80, "input", **one, gate_ptr=None),
        spec(product_kernel, plain, MODULATION, width, "modulation", **one, **alone),
        spec(product_kernel, plain, MODULATION, 1000, "modulation,odd", **one, **alone),
        spec(product_kernel, plain | wide, MODULATION, width, "modulation,float32", **one, **alone),
        spec(product_kernel, gated | wide, PRODUCT, inner, "down,float32", **one),
        spec(product_kernel, parts, PRODUCT, inner, "down", **three),
        spec(velocity_kernel, velocity, VELOCITY, width, "one", BRANCHES=1, **stats),
        spec(velocity_kernel, velocity, VELOCITY, width, "guided", BRANCHES=2, **stats),
    ]
