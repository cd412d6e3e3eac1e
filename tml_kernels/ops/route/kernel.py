"""Triton kernels of moe_route: one launch from tokens to a schedule.

1. A program multiplies some gate rows by a tile of tokens over one split of D, and stores partial
   logits. The cuts of D are fixed, so that a token's sum has one order in every batch. Where tokens
   come without the division of their norm, further programs sum the squares of that split.
2. The last program of a tile to arrive adds the splits up in order, scores the tile in groups of
   GROUP_T tokens, one a warp, chooses and weighs, and counts each group's experts.
3. The last of those builds the schedule; the only one does so without asking.

No program waits for another. The counters that tell the last are zero before and after.
"""

# pyright: reportCallIssue=false
# Triton's types know no launch options.

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A gate rows, K experts
# chosen per token, G groups of J experts each, both padded to powers of two, I = G * J.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from ..._routing import GROUP_T, SPLIT_D, round_up, scratch_sizes
from ..._triton.arrival import is_last
from .configs import SCHEDULE, SHIPPED, Config, Problem, choose_config, max_registers
from .group import route_group
from .reference import Rule
from .scheduling import build_schedule, count_group
from .scoring import expert_tile, store_partial, store_squares

# Neither their values nor their alignment make another kernel: bits do not depend on where a
# tensor lies or on how many tokens there are.
SIZES = ["T", "MAX_BLOCKS", "BLOCK_SIZE"]
UNALIGNED = [
    "logits_ptr", "bias_ptr", "logit_bias_ptr", "global_scale_ptr", "expert_ptr", "weight_ptr",
    "shared_weight_ptr", "inv_rms_ptr", "schedule_ptr",
]  # fmt: skip


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
    counter_ptr, count_ptr, before_ptr, first_ptr, place_ptr,  # scratch_sizes
    partial_ptr, squares_ptr,
    T, D, MAX_BLOCKS, BLOCK_SIZE, scale, eps,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, A: tl.constexpr, PITCH: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_D: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, SUM_G: tl.constexpr, PLACE_A: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(T, BLOCK_T)
    # What a last program needs that is there already comes before it knows that it is one.
    bias_t_i = None
    if bias_ptr is not None:
        BLOCK_I: tl.constexpr = BLOCK_G * BLOCK_J
        experts, mask = expert_tile(GROUP_T, E, NUM_GROUPS, BLOCK_I, BLOCK_J)
        bias_tile = tl.load(bias_ptr + experts, mask=mask, other=0.0)
        bias_t_i = tl.reshape(bias_tile, (GROUP_T, BLOCK_I))
    if global_scale_ptr is not None:
        scale = scale * tl.load(global_scale_ptr)
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
                residual_ptr, squares_ptr, tile * GROUPS + part - ROW_TILES, split, T, D,
                SPLITS, SPLIT_D, GROUP_T,
            )  # fmt: skip
        logits_ptr = partial_ptr
        last = is_last(counter_ptr + 1 + tile, (ROW_TILES + GROUPS) * SPLITS)
    else:
        tile = tl.program_id(0)
        last = True
    if last:
        for first in range(0, min(BLOCK_T, T - tile * BLOCK_T), GROUP_T):
            group = (tile * BLOCK_T + first) // GROUP_T
            route_group(
                logits_ptr, squares_ptr, logit_bias_ptr, bias_t_i,
                expert_ptr, weight_ptr, shared_weight_ptr, inv_rms_ptr,
                None if schedule_ptr is None else place_ptr, count_ptr, group, T, D, scale, eps,
                SCORING, RENORMALIZE, NUM_GROUPS, TOP_GROUPS, E, K, Z, PITCH, SPLITS,
                GROUP_T, BLOCK_G, BLOCK_J, BLOCK_N, BLOCK_S,
            )  # fmt: skip
        if schedule_ptr is not None:
            all_done = num_tiles == 1
            if all_done:
                tl.debug_barrier()  # what was just stored is read by other threads
            else:
                all_done = is_last(counter_ptr, num_tiles)
            if all_done:
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
    gate_bytes = 0 if gate is None else gate.element_size()
    if config is None:
        config = choose_config(Problem(num_tokens, rule.num_experts(num_logits, num_shared)))
    constexprs = _route_constexprs(rule, num_logits, top_k, num_shared, width, config, gate_bytes)
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
        maxnreg=max_registers(constexprs["E"], gate_bytes),
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
    *parts, _, _ = _split(scratch, num_tokens, top_k, 0, num_experts, 0)
    schedule_kernel[(triton.cdiv(num_tokens, GROUP_T),)](
        expert, schedule, *parts, num_tokens, max_blocks, block_size,
        BLOCK_K=_pad(top_k), **_schedule_constexprs(top_k, num_experts),
        num_warps=SCHEDULE.num_warps,
    )  # fmt: skip


def _split(
    scratch: Tensor, num_tokens: int, top_k: int, num_logits: int, num_experts: int, width: int
) -> list[Tensor]:
    """The parts of the scratch in the order of `scratch_sizes`, the last two in float32."""
    sizes = scratch_sizes(num_tokens, top_k, num_logits, num_experts, width)
    *parts, partial, squares = scratch[: sum(sizes)].split(sizes)
    return [*parts, partial.view(torch.float32), squares.view(torch.float32)]


def _pad(size: int) -> int:
    return int(triton.next_power_of_2(max(size, 1)))


def _schedule_constexprs(top_k: int, num_experts: int) -> dict[str, Any]:
    return {
        "K": top_k,
        "E": num_experts,
        "GROUP_T": GROUP_T,
        "BLOCK_E": _pad(num_experts),
        "SUM_G": SCHEDULE.sum_groups,
        "PLACE_A": SCHEDULE.place_a,
    }


def _route_constexprs(
    rule: Rule,
    num_logits: int,
    top_k: int,
    num_shared: int,
    width: int,
    config: Config,
    gate_bytes: int,
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
        "PITCH": round_up(num_logits) if gate_bytes else num_logits,
        "SPLITS": triton.cdiv(width, SPLIT_D) if gate_bytes else 1,
        "SPLIT_D": SPLIT_D,
        "BLOCK_A": config.block_a,
        "BLOCK_T": config.block_t if gate_bytes else GROUP_T,
        "BLOCK_D": config.block_d // max(gate_bytes // 2, 1),
        "BLOCK_G": _pad(rule.num_groups),
        "BLOCK_J": _pad(num_experts // rule.num_groups),
        # At least a warp's lanes, so that a token stays in its warp.
        "BLOCK_N": max(32, _pad(top_k + num_shared)),
        "BLOCK_S": max(32, _pad(-(-width // SPLIT_D))),
    }


INPUTS = (
    "x_ptr", "gate_ptr", "logits_ptr", "bias_ptr", "logit_bias_ptr", "global_scale_ptr",
    "residual_ptr", "inv_rms_ptr",
)  # fmt: skip
TYPES = {
    **dict.fromkeys(("expert_ptr", "schedule_ptr", "counter_ptr", "count_ptr"), "*i32"),
    **dict.fromkeys(("before_ptr", "first_ptr", "place_ptr"), "*i32"),
    **dict.fromkeys(("weight_ptr", "shared_weight_ptr", "partial_ptr", "squares_ptr"), "*fp32"),
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
        _route_spec("grouped", SHIPPED[1], deepseek, bf16 | {"bias_ptr": "*fp32"}),
        _route_spec("wide", SHIPPED[1], wide, bf16),
        _route_spec("wide-fp32", SHIPPED[2], wide, fp32),
    ]


def _route_spec(label: str, config: Config, case: tuple, inputs: dict[str, str]) -> AotSpec:
    rule, num_logits, top_k, num_shared, width = case
    gate_bytes = {"*fp32": 4, "*bf16": 2}.get(inputs.get("gate_ptr", ""), 0)
    constexprs = _route_constexprs(
        rule,
        num_logits,
        top_k,
        num_shared,
        width,
        config,
        gate_bytes,
    ) | {name: None for name in INPUTS if name not in inputs}
    label = f"{label}-E{constexprs['E']}-K{top_k}-{config.block_a}x{config.block_t}"
    maxnreg = max_registers(rule.num_experts(num_logits, num_shared), gate_bytes)
    return _spec(route_kernel, config, constexprs, label, inputs, maxnreg)


def _schedule_spec(top_k: int, num_experts: int) -> AotSpec:
    constexprs = _schedule_constexprs(top_k, num_experts) | {"BLOCK_K": _pad(top_k)}
    return _spec(schedule_kernel, SCHEDULE, constexprs, f"E{num_experts}-K{top_k}", {})


def _spec(
    kernel: Any,
    config: Any,
    constexprs: dict,
    label: str,
    types: dict,
    maxnreg: int | None = None,
) -> AotSpec:
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
        maxnreg=maxnreg,
    )
