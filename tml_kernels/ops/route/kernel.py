"""Triton kernels of moe_route: one launch from tokens to a schedule.

1. A program multiplies some gate rows by a tile of tokens over one split of D, and stores partial
   logits. The cuts of D are fixed, so that a token's sum has one order in every batch. Where tokens
   come without the division of their norm, further programs sum the squares of that split.
2. The last program of a tile to arrive adds the splits up in order, scores the tile in groups of
   GROUP_T tokens, chooses and weighs, and counts each group's experts.
3. The last of those builds the schedule.

No program waits for another. The counters that tell the last are zero before and after.
"""

# pyright: reportCallIssue=false
# Triton's types know no launch options.

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A gate rows, K experts
# chosen per token, G groups of J experts each, both padded to powers of two, I = G * J.

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from ..._routing import GROUP_T, SPLIT_D, round_up, scratch_sizes
from .configs import SCHEDULE, SHIPPED, Config, Problem, choose_config, num_warps
from .reference import RENORM_EPS, Rule
from .scheduling import build_schedule, count_group, is_last
from .scoring import (
    choose,
    keep_best_groups,
    load_inv_rms,
    load_logits,
    score,
    sink_weights,
    store_partial,
    store_squares,
)

EPS = tl.constexpr(RENORM_EPS)

# Neither their values nor their alignment make another kernel: bits do not depend on where a
# tensor lies or on how many tokens there are.
SIZES = ["T", "MAX_BLOCKS", "BLOCK_SIZE"]
UNALIGNED = [
    "logits_ptr", "bias_ptr", "logit_bias_ptr", "global_scale_ptr", "expert_ptr", "weight_ptr",
    "shared_weight_ptr", "inv_rms_ptr", "schedule_ptr",
]  # fmt: skip


@triton.jit
def route_group(
    logits_ptr, bias_ptr, logit_bias_ptr, global_scale_ptr,
    expert_ptr, weight_ptr, shared_weight_ptr, inv_rms_ptr,
    group, T, D, scale, eps,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, A: tl.constexpr, PITCH: tl.constexpr,
    SPLITS: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Route GROUP_T tokens; returns their ids, -1 beyond T and K."""
    J: tl.constexpr = E // NUM_GROUPS
    t = group.to(tl.int64) * GROUP_T + tl.arange(0, GROUP_T)
    mask_t = t < T
    offs_i = tl.arange(0, BLOCK_G * BLOCK_J)
    expert_i = offs_i // BLOCK_J * J + offs_i % BLOCK_J
    mask_i = (offs_i % BLOCK_J < J) & (offs_i // BLOCK_J < NUM_GROUPS)
    offs_k, offs_z = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Z)
    mask_k, mask_z = offs_k < K, offs_z < Z

    inv_rms_t = None
    if inv_rms_ptr is not None:
        inv_rms_t = load_inv_rms(logits_ptr, t, mask_t, T, D, eps, A, PITCH, SPLITS)
        tl.store(inv_rms_ptr + t, inv_rms_t, mask=mask_t)
    logit_t_i = load_logits(
        logits_ptr, logit_bias_ptr, inv_rms_t, t, mask_t, expert_i, mask_i, T, PITCH, SPLITS
    )
    score_t_i = score(logit_t_i, mask_i, SCORING)
    choice_t_i = score_t_i
    if bias_ptr is not None:
        choice_t_i += tl.load(bias_ptr + expert_i, mask=mask_i, other=0.0)[None, :]
    if NUM_GROUPS > 1:
        choice_t_i = tl.where(mask_i[None, :], choice_t_i, float("-inf"))
        PAIRS: tl.constexpr = (bias_ptr is not None) and (J > 1)
        choice_t_i = keep_best_groups(choice_t_i, TOP_GROUPS, PAIRS, BLOCK_G, BLOCK_J)

    if global_scale_ptr is not None:
        scale = scale * tl.load(global_scale_ptr)
    nan_t = tl.max((logit_t_i != logit_t_i).to(tl.int32), axis=1)
    if SCORING == "sink_sigmoid":
        shared_t_z = load_logits(
            logits_ptr, logit_bias_ptr, inv_rms_t, t, mask_t, E + offs_z, mask_z, T, PITCH, SPLITS
        )
        expert_t_k, value_t_k = choose(choice_t_i, logit_t_i, expert_i, mask_i, K, BLOCK_K)
        weight_t_k, shared_t_z = sink_weights(value_t_k, mask_k, shared_t_z, mask_z)
        shared_t_z = tl.where(nan_t[:, None] > 0, float("nan"), shared_t_z * scale)
    else:
        expert_t_k, weight_t_k = choose(choice_t_i, score_t_i, expert_i, mask_i, K, BLOCK_K)
        if RENORMALIZE:
            weight_t_k = weight_t_k / (tl.sum(weight_t_k, axis=1) + EPS)[:, None]
        shared_t_z = tl.full([GROUP_T, BLOCK_Z], 1.0, tl.float32)
    weight_t_k = tl.where(nan_t[:, None] > 0, float("nan"), weight_t_k * scale)

    mask_t_k = mask_t[:, None] & mask_k[None, :]
    offs_t_k = t[:, None] * K + offs_k[None, :]
    tl.store(expert_ptr + offs_t_k, expert_t_k, mask=mask_t_k)
    tl.store(weight_ptr + offs_t_k, weight_t_k, mask=mask_t_k)
    shared_ptr_t_z = shared_weight_ptr + t[:, None] * Z + offs_z[None, :]
    tl.store(shared_ptr_t_z, shared_t_z, mask=mask_t[:, None] & mask_z[None, :])
    return tl.where(mask_t_k, expert_t_k, -1)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def route_kernel(
    x_ptr, gate_ptr,          # in   [T, D], [A, D], or None
    logits_ptr,               # in   [T, A], where there is no gate
    bias_ptr, logit_bias_ptr, # in   [E], [A], or None
    global_scale_ptr,         # in   [1], or None
    residual_ptr,             # in   [T, D], or None: x is normed
    expert_ptr, weight_ptr,   # out  [T, K]
    shared_weight_ptr,        # out  [T, Z]
    inv_rms_ptr,              # out  [T], where there is a residual
    schedule_ptr,             # out  see Schedule, or None
    counter_ptr, count_ptr, before_ptr, first_ptr, place_ptr, partial_ptr,  # scratch_sizes
    T, D, MAX_BLOCKS, BLOCK_SIZE, scale, eps,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, A: tl.constexpr, PITCH: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_D: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    BLOCK_E: tl.constexpr, SUM_G: tl.constexpr, PLACE_A: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(T, BLOCK_T)
    if gate_ptr is not None:
        ROW_TILES: tl.constexpr = (A + BLOCK_A - 1) // BLOCK_A
        GROUPS: tl.constexpr = 0 if residual_ptr is None else BLOCK_T // GROUP_T
        tile = tl.program_id(0) // ((ROW_TILES + GROUPS) * SPLITS)
        split = tl.program_id(0) // (ROW_TILES + GROUPS) % SPLITS
        part = tl.program_id(0) % (ROW_TILES + GROUPS)
        if part < ROW_TILES:
            store_partial(
                x_ptr, gate_ptr, partial_ptr, tile, part, split, T, D,
                A, PITCH, SPLIT_D, BLOCK_A, BLOCK_T, BLOCK_D,
            )  # fmt: skip
        elif residual_ptr is not None:
            store_squares(
                residual_ptr, partial_ptr, tile * GROUPS + part - ROW_TILES, split, T, D,
                A, PITCH, SPLIT_D, GROUP_T,
            )  # fmt: skip
        logits_ptr = partial_ptr
        last = is_last(counter_ptr + 1 + tile, (ROW_TILES + GROUPS) * SPLITS)
    else:
        tile = tl.program_id(0)
        last = True
    if last:
        for first in range(0, min(BLOCK_T, T - tile * BLOCK_T), GROUP_T):
            group = (tile * BLOCK_T + first) // GROUP_T
            expert_t_k = route_group(
                logits_ptr, bias_ptr, logit_bias_ptr, global_scale_ptr,
                expert_ptr, weight_ptr, shared_weight_ptr, inv_rms_ptr, group, T, D, scale, eps,
                SCORING, RENORMALIZE, NUM_GROUPS, TOP_GROUPS, E, K, Z, A, PITCH, SPLITS,
                GROUP_T, BLOCK_G, BLOCK_J, BLOCK_K, BLOCK_Z,
            )  # fmt: skip
            if schedule_ptr is not None:
                count_group(expert_t_k, place_ptr, count_ptr, group, T, K, E, GROUP_T, BLOCK_E)
        if schedule_ptr is not None:  # noqa: SIM102 - Triton compiles both sides of an `and`
            if is_last(counter_ptr, num_tiles):
                build_schedule(
                    expert_ptr, place_ptr, count_ptr, before_ptr, first_ptr, schedule_ptr,
                    T, MAX_BLOCKS, BLOCK_SIZE, K, E, GROUP_T, BLOCK_E, SUM_G, PLACE_A,
                )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def schedule_kernel(
    expert_ptr,               # in   [T, K]
    schedule_ptr,             # out  see Schedule
    counter_ptr, count_ptr, before_ptr, first_ptr, place_ptr,  # scratch_sizes
    T, MAX_BLOCKS, BLOCK_SIZE,
    K: tl.constexpr, E: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, SUM_G: tl.constexpr, PLACE_A: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    t = group.to(tl.int64) * GROUP_T + tl.arange(0, GROUP_T)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t_k = (t < T)[:, None] & (offs_k < K)[None, :]
    expert_t_k = tl.load(expert_ptr + t[:, None] * K + offs_k[None, :], mask=mask_t_k, other=-1)
    count_group(expert_t_k, place_ptr, count_ptr, group, T, K, E, GROUP_T, BLOCK_E)
    if is_last(counter_ptr, tl.cdiv(T, GROUP_T)):
        build_schedule(
            expert_ptr, place_ptr, count_ptr, before_ptr, first_ptr, schedule_ptr,
            T, MAX_BLOCKS, BLOCK_SIZE, K, E, GROUP_T, BLOCK_E, SUM_G, PLACE_A,
        )  # fmt: skip


def launch_route(
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    logit_bias: Tensor | None,
    global_scale: Tensor | None,
    residual: Tensor | None,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
    eps: float,
    block_size: int,
    max_blocks: int,
    expert: Tensor,
    weight: Tensor,
    shared_weight: Tensor,
    inv_rms: Tensor | None,
    schedule: Tensor | None,
    scratch: Tensor | None,
    config: Config | None = None,
) -> None:
    """Arguments as of the op; the scratch is needed."""
    assert scratch is not None
    (num_tokens, top_k), num_shared = expert.shape, shared_weight.shape[1]
    num_logits, width = (x.shape[1], 0) if gate is None else gate.shape
    rule = Rule(scoring, renormalize, num_groups, top_groups, scale)
    if config is None:
        config = choose_config(Problem(num_tokens, rule.num_experts(num_logits, num_shared)))
    constexprs = _route_constexprs(
        rule, num_logits, top_k, num_shared, width, config, gate is not None, residual is not None
    )
    parts = _split(scratch, num_tokens, top_k, num_logits, constexprs["E"], width)
    grid = triton.cdiv(num_tokens, constexprs["BLOCK_T"])
    if gate is not None:
        groups = 0 if residual is None else config.block_t // GROUP_T
        grid *= (triton.cdiv(num_logits, config.block_a) + groups) * constexprs["SPLITS"]
    route_kernel[(grid,)](
        None if gate is None else x, gate, x if gate is None else None,
        bias, logit_bias, global_scale, residual, expert, weight, shared_weight, inv_rms, schedule,
        *parts, num_tokens, width, max_blocks, block_size, scale, eps,
        **constexprs, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def launch_route_schedule(
    expert: Tensor,
    num_experts: int,
    block_size: int,
    max_blocks: int,
    schedule: Tensor,
    scratch: Tensor | None,
) -> None:
    """Arguments as of the op; the scratch is needed."""
    assert scratch is not None
    num_tokens, top_k = expert.shape
    *parts, _ = _split(scratch, num_tokens, top_k, 0, num_experts, 0)
    schedule_kernel[(triton.cdiv(num_tokens, GROUP_T),)](
        expert, schedule, *parts, num_tokens, max_blocks, block_size,
        BLOCK_K=_pad(top_k), **_schedule_constexprs(top_k, num_experts),
        num_warps=SCHEDULE.num_warps,
    )  # fmt: skip


def _split(
    scratch: Tensor, num_tokens: int, top_k: int, num_logits: int, num_experts: int, width: int
) -> list[Tensor]:
    """The parts of the scratch in the order of `scratch_sizes`, the last in float32."""
    sizes = scratch_sizes(num_tokens, top_k, num_logits, num_experts, width)
    *parts, partial = scratch[: sum(sizes)].split(sizes)
    return [*parts, partial.view(torch.float32)]


def _pad(size: int) -> int:
    return int(triton.next_power_of_2(max(size, 1)))


def _schedule_constexprs(top_k: int, num_experts: int) -> dict[str, Any]:
    block_e = _pad(num_experts)
    return {
        "K": top_k,
        "E": num_experts,
        "GROUP_T": GROUP_T,
        "BLOCK_E": block_e,
        "SUM_G": max(1, SCHEDULE.sum_tile // block_e),
        "PLACE_A": SCHEDULE.place_a,
    }


def _route_constexprs(
    rule: Rule,
    num_logits: int,
    top_k: int,
    num_shared: int,
    width: int,
    config: Config,
    has_gate: bool,
    late_norm: bool = False,
) -> dict[str, Any]:
    num_experts = rule.num_experts(num_logits, num_shared)
    return _schedule_constexprs(top_k, num_experts) | {
        "SCORING": rule.scoring,
        "RENORMALIZE": rule.renormalize,
        "NUM_GROUPS": rule.num_groups,
        "TOP_GROUPS": rule.top_groups,
        "Z": num_shared,
        "A": num_logits,
        # Ready logits are read as one split, by tiles of one group of tokens.
        "PITCH": round_up(num_logits + late_norm) if has_gate else num_logits,
        "SPLITS": triton.cdiv(width, SPLIT_D) if has_gate else 1,
        "SPLIT_D": SPLIT_D,
        "BLOCK_A": config.block_a,
        "BLOCK_T": config.block_t if has_gate else GROUP_T,
        "BLOCK_D": config.block_d,
        "BLOCK_G": _pad(rule.num_groups),
        "BLOCK_J": _pad(num_experts // rule.num_groups),
        "BLOCK_K": _pad(top_k),
        "BLOCK_Z": _pad(num_shared),
    }


INPUTS = (
    "x_ptr", "gate_ptr", "logits_ptr", "bias_ptr", "logit_bias_ptr", "global_scale_ptr",
    "residual_ptr", "inv_rms_ptr",
)  # fmt: skip
TYPES = {
    **dict.fromkeys(("expert_ptr", "schedule_ptr", "counter_ptr", "count_ptr"), "*i32"),
    **dict.fromkeys(("before_ptr", "first_ptr", "place_ptr"), "*i32"),
    **dict.fromkeys(("weight_ptr", "shared_weight_ptr", "partial_ptr"), "*fp32"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
}


def aot_specs() -> list[AotSpec]:
    """Every shipped configuration on the interaction model's gate, and its parts on others'."""
    inkling = (Rule("sink_sigmoid", scale=8.0), 258, 6, 2, 4096)
    deepseek = (Rule("sigmoid", True, 8, 4, 2.5), 256, 8, 0, 7168)
    wide = (Rule("softmax"), 512, 10, 0, 4096)
    bf16, fp32 = {"x_ptr": "*bf16", "gate_ptr": "*bf16"}, {"x_ptr": "*fp32", "gate_ptr": "*fp32"}
    chosen = {"bias_ptr": "*fp32", "global_scale_ptr": "*fp32"}
    late = {"residual_ptr": "*bf16", "inv_rms_ptr": "*fp32"} | bf16 | chosen
    return [
        _schedule_spec(6, 256),
        _route_spec("logits", SHIPPED[0], deepseek, {"logits_ptr": "*fp32", "bias_ptr": "*fp32"}),
        *(_route_spec("late-norm", config, inkling, late) for config in SHIPPED),
        *(_route_spec("bf16", config, inkling, bf16 | chosen) for config in SHIPPED),
        *(_route_spec("fp32", config, inkling, fp32 | chosen) for config in SHIPPED),
        _route_spec("grouped", SHIPPED[2], deepseek, bf16 | {"bias_ptr": "*fp32"}),
        _route_spec("wide", SHIPPED[2], wide, bf16),
        _route_spec("wide-fp32", SHIPPED[3], wide, fp32),
    ]


def _route_spec(label: str, config: Config, case: tuple, inputs: dict[str, str]) -> AotSpec:
    rule, num_logits, top_k, num_shared, width = case
    config = replace(config, num_warps=num_warps(rule.num_experts(num_logits, num_shared)))
    constexprs = _route_constexprs(
        rule,
        num_logits,
        top_k,
        num_shared,
        width,
        config,
        "gate_ptr" in inputs,
        "residual_ptr" in inputs,
    ) | {name: None for name in INPUTS if name not in inputs}
    label = f"{label}-E{constexprs['E']}-K{top_k}-{config.block_a}x{config.block_t}"
    return _spec(route_kernel, config, constexprs, label, inputs)


def _schedule_spec(top_k: int, num_experts: int) -> AotSpec:
    constexprs = _schedule_constexprs(top_k, num_experts) | {"BLOCK_K": _pad(top_k)}
    return _spec(schedule_kernel, SCHEDULE, constexprs, f"E{num_experts}-K{top_k}", {})


def _spec(kernel: Any, config: Any, constexprs: dict, label: str, types: dict) -> AotSpec:
    signature = {
        name: types.get(name) or TYPES.get(name, "i32")
        for name in kernel.arg_names
        if name not in constexprs
    }
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or name == "D"]
    return AotSpec(
        kernel=kernel,
        config=config,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name in aligned if name not in UNALIGNED),
        label=label,
    )
