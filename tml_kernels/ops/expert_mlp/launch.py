"""Launches of expert_mlp's two kernels, and what compiles them ahead of time."""

# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ..._routing import Routing, Schedule, choose_blocking
from ...moe_weights import MoEWeights
from ...quant import PackedExperts
from .configs import BLOCK_M, STEP, Config, Problem, choose_config, kind_of, workspace_of
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
    num_shared, top_k = weights.num_shared, routing.expert_T_K.shape[1]
    hidden = max(weights.expert_width, shared.expert_width)
    layout = workspace_of(num_tokens, top_k + num_shared, width, hidden, x.dtype)
    h, part, counter = layout.carve(workspace, x.dtype)
    schedule = routing.schedule
    blocking = choose_blocking(num_tokens, top_k, routing.num_experts)
    block_n = schedule.blocking.size if schedule is not None else blocking.size
    blocks_per_shared = triton.cdiv(num_tokens, block_n)
    shared_blocks = num_shared * blocks_per_shared
    routed_blocks = num_tokens * top_k if schedule is None else schedule.max_blocks
    ids = (routing.expert_T_K, expert_map)
    tables = _tables(schedule)
    common = {
        "K": top_k,
        "Z": num_shared,
        "SCHEDULED": schedule is not None,
        "QUANTIZE_X": quantize_x,
    }
    config = _config(weights.w13, shared.w13, block_n, schedule is None)
    programs = shared_blocks * triton.cdiv(shared.expert_width, HALF_M)
    programs += routed_blocks * triton.cdiv(weights.expert_width, HALF_M)
    gate_up_kernel[(programs,)](
        x, routing.inv_rms_T, *_matrices(weights, "w13"), *ids, *tables, h, counter, out,
        num_tokens, width, routing.num_experts, weights.expert_width, shared.expert_width, hidden,
        shared_blocks, blocks_per_shared, layout.num_counters,
        **common, **_gate_up_constexprs(weights, activation), **_tile(config),
    )  # fmt: skip

    config = _config(weights.w2, shared.w2, block_n, schedule is None)
    programs = (shared_blocks + routed_blocks) * triton.cdiv(width, BLOCK_M)
    down_kernel[(programs,)](
        h, *_matrices(weights, "w2"), *ids, routing.weight_T_K, routing.shared_weight_T_Z, *tables,
        part, counter, out,
        num_tokens, width, routing.num_experts, weights.expert_width, shared.expert_width, hidden,
        shared_blocks, blocks_per_shared,
        **common, **_down_constexprs(weights), **_tile(config),
    )  # fmt: skip


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


def _config(routed: PackedExperts, shared: PackedExperts, block_n: int, alone: bool) -> Config:
    return choose_config(Problem(kind_of(routed), kind_of(shared), block_n, alone))


def _tile(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
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
        "EVEN_M": weights.expert_width % HALF_M == shared.expert_width % HALF_M == 0,
        "EVEN_W": _even(weights.w13) and _even(shared.w13),
    }


def _down_constexprs(weights: MoEWeights) -> dict[str, Any]:
    shared = weights.shared or weights
    return {
        "FORMAT": kind_of(weights.w2),
        "SHARED_FORMAT": kind_of(shared.w2),
        "ALIKE": _alike(weights, shared),
        "EVEN_M": weights.width % BLOCK_M == 0,
        "EVEN_W": _even(weights.w2) and _even(shared.w2),
    }
