"""Launches of expert_mlp's two kernels, and what compiles them ahead of time."""

# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._device import arch_of
from ..._routing import Routing, Schedule, choose_blocking
from ..._scratch import is_aligned
from ..._triton.steps import STEP
from ...moe_weights import MoEWeights
from ...quant import PackedExperts
from .configs import BLOCK_M, Config, Problem, choose_config, kind_of, workspace_of
from .kernel import down_kernel, gate_up_kernel
from .specs import aot_specs as aot_specs

HALF_M = BLOCK_M // 2


def launch_expert_mlp(
    x: Tensor,
    weights: MoEWeights,
    routing: Routing,
    expert_map: Tensor | None,
    activation: str,
    quantize_x: bool,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """Both launches. x, out: [T, D], T at least 1; workspace: uint8, `workspace_of` bytes."""
    (num_tokens, width), shared = x.shape, weights.shared or weights
    slots = routing.expert_T_K.shape[1] + weights.num_shared
    hidden = max(weights.expert_width, shared.expert_width)
    layout = workspace_of(num_tokens, slots, width, hidden, x.dtype)
    h, part, counter = layout.carve(workspace, x.dtype)
    launch_gate_up(
        x, weights, routing, expert_map, activation, quantize_x, h, hidden,
        counter, layout.num_counters, out,
    )  # fmt: skip
    launch_down(h, hidden, weights, routing, expert_map, quantize_x, part, counter, out)


def launch_gate_up(
    x: Tensor,
    weights: MoEWeights,
    routing: Routing,
    expert_map: Tensor | None,
    activation: str,
    quantize_x: bool,
    h: Tensor,
    hidden: int,
    counter: Tensor,
    num_counters: int,
    out: Tensor,
) -> None:
    """x: [T, D]. Writes h [T * S, hidden], clears `num_counters` counters and, without shared
    experts, the rows of out [T, D] that have no expert."""
    (num_tokens, width), shared = x.shape, weights.shared or weights
    work = _Work.of(weights, routing, expert_map, num_tokens)
    config = _config(x, weights.w13, shared.w13, work.block_n, routing.schedule is None)
    rows, shared_rows = weights.w13.num_rows // 2, shared.w13.num_rows // 2
    programs = work.shared_blocks * triton.cdiv(shared_rows, HALF_M)
    programs += work.routed_blocks * triton.cdiv(rows, HALF_M)
    constexprs = _gate_up_constexprs(weights, activation)
    constexprs["EVEN_W"] &= is_aligned(x)
    gate_up_kernel[(programs,)](
        x, routing.inv_rms_T, *_matrices(weights, "w13"), routing.expert_T_K, expert_map,
        *_tables(routing.schedule), h, counter, out,
        num_tokens, width, routing.num_experts, work.num_local, rows, shared_rows, hidden,
        work.shared_blocks, work.blocks_per_shared, num_counters,
        **work.constexprs, QUANTIZE_X=quantize_x, **constexprs, **_tile(config),
    )  # fmt: skip


def launch_down(
    h: Tensor,
    hidden: int,
    weights: MoEWeights,
    routing: Routing,
    expert_map: Tensor | None,
    quantize_x: bool,
    part: Tensor,
    counter: Tensor,
    out: Tensor,
) -> None:
    """h: [T * S, hidden]; out: [T, D] of as many columns as w2 has rows; counters all zero."""
    (num_tokens, width), shared = out.shape, weights.shared or weights
    work = _Work.of(weights, routing, expert_map, num_tokens)
    config = _config(h, weights.w2, shared.w2, work.block_n, routing.schedule is None)
    programs = (work.shared_blocks + work.routed_blocks) * triton.cdiv(width, BLOCK_M)
    down_kernel[(programs,)](
        h, *_matrices(weights, "w2"), routing.expert_T_K, expert_map,
        routing.weight_T_K, routing.shared_weight_T_Z, *_tables(routing.schedule),
        part, counter, out,
        num_tokens, width, routing.num_experts, work.num_local,
        weights.expert_width, shared.expert_width, hidden,
        work.shared_blocks, work.blocks_per_shared,
        **work.constexprs, QUANTIZE_X=quantize_x, **_down_constexprs(weights), **_tile(config),
    )  # fmt: skip


class _Work(NamedTuple):
    """The blocks of a step, the same for both launches."""

    block_n: int
    blocks_per_shared: int
    shared_blocks: int
    routed_blocks: int
    num_local: int | None  # experts of the weights, where a map names them; None without a map
    constexprs: dict[str, Any]

    @classmethod
    def of(
        cls, weights: MoEWeights, routing: Routing, expert_map: Tensor | None, num_tokens: int
    ) -> _Work:
        top_k, schedule = routing.expert_T_K.shape[1], routing.schedule
        blocking = choose_blocking(num_tokens, top_k, routing.num_experts)
        block_n = schedule.blocking.size if schedule is not None else blocking.size
        per_shared = -(-num_tokens // block_n)
        routed = num_tokens * top_k if schedule is None else schedule.max_blocks
        flags = {"K": top_k, "Z": weights.num_shared, "SCHEDULED": schedule is not None}
        num_local = None if expert_map is None else weights.num_experts
        return cls(block_n, per_shared, weights.num_shared * per_shared, routed, num_local, flags)


def _matrices(weights: MoEWeights, name: str) -> list[Tensor | None]:
    """Pointers of the routed matrices and of the shared ones, which are the routed again (and not
    read) where there are none."""
    pointers: list[Tensor | None] = []
    for side in (weights, weights.shared or weights):
        experts: PackedExperts = getattr(side, name)
        bias = side.bias13_E_J if name == "w13" else side.bias2_E_D
        pointers += [experts.data, experts.scale, experts.zero, experts.outer_E, bias]
    return pointers


def _tables(schedule: Schedule | None) -> tuple[Tensor | None, ...]:
    if schedule is None:
        return (None,) * 4
    return (schedule.num_blocks_1, schedule.begin_B1, schedule.expert_B, schedule.order_A)


def _config(
    x: Tensor, routed: PackedExperts, shared: PackedExperts, block_n: int, alone: bool
) -> Config:
    cramped = x.dtype == torch.float32 and arch_of(x.device) < 90
    return choose_config(Problem(kind_of(routed), kind_of(shared), block_n, alone, cramped))


def _tile(config: Config) -> dict[str, int | None]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.maxnreg,
    }


def _even(experts: PackedExperts) -> bool:
    return experts.num_columns % STEP[kind_of(experts)] == 0


def _alike(routed: MoEWeights, shared: MoEWeights) -> bool:
    """One loop serves both: only the pointers differ."""

    def traits(side: MoEWeights) -> tuple:
        tensors = (side.w13.zero, side.w2.zero, side.bias13_E_J, side.bias2_E_D)
        formats = (side.w13.format, side.w2.format)
        return (*formats, side.order, side.expert_width, *(t is None for t in tensors))

    return traits(routed) == traits(shared)


def _gate_up_constexprs(weights: MoEWeights, activation: str) -> dict[str, Any]:
    shared = weights.shared or weights
    return {
        "ACTIVATION": activation,
        "FORMAT": kind_of(weights.w13),
        "ORDER": weights.order,
        "SHARED_FORMAT": kind_of(shared.w13),
        "ALIKE": _alike(weights, shared),
        "SHARED_ORDER": shared.order,
        "EVEN_M": weights.w13.num_rows % BLOCK_M == shared.w13.num_rows % BLOCK_M == 0,
        "EVEN_W": _even(weights.w13) and _even(shared.w13),
    }


def _down_constexprs(weights: MoEWeights) -> dict[str, Any]:
    shared = weights.shared or weights
    return {
        "FORMAT": kind_of(weights.w2),
        "SHARED_FORMAT": kind_of(shared.w2),
        "ALIKE": _alike(weights, shared),
        "EVEN_M": weights.w2.num_rows % BLOCK_M == 0,
        "EVEN_W": _even(weights.w2) and _even(shared.w2),
    }
