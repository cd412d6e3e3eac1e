"""Triton kernel of sample: one launch, one read of the logits from memory.

A program takes a block of a row's columns: its largest logit, the best of its logits with noise,
its mass, and the maxima of its runs of columns. The last program of a row to arrive puts the blocks
together in order; where top-k, top-p or min-p narrow the draw it looks again at what it has to, in
L2. No program waits for another.

Logits order the columns as they are; the plain path orders them after the division, where float32
may have made two of them equal. Scores of one block are compared relative to its own maximum, then
those of the row as the plain path has them. So a draw differs from the oracle's only where the two
best scores, or p and the mass before a column, are within rounding: about 1e-6, relative.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# Triton's types know no launch options.

# Dimension key: S session rows, V vocabulary, J biases of a row, W words of 32 ids, B blocks,
# N runs of RUN columns; n and v of a tile.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._aot import AotSpec
from ..._triton.dependent import LAUNCH, wait_for_inputs
from .configs import MAX_RUNS, SHIPPED, Config, Problem, choose_config, scratch_sizes
from .narrow import narrow
from .tiles import NO_ID, gumbel_tile, load_tile, scale_logit


@triton.jit
def _is_last(counter_ptr, num_arrivals):
    """Whether all other programs arrived before. Then it sees all they stored, through loads that
    pass by the L1 cache, and the counter is zero again."""
    tl.debug_barrier()  # one thread arrives for all: their stores come first
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_arrivals - 1
    tl.debug_barrier()
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _draw_block(
    row, block_f_ptr, block_id_ptr, max_ptr, b, temperature, seed, counter, V, B,
    RUN: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Store what the row needs of block b."""
    run_n = b * TILE_N + tl.arange(0, TILE_N)
    x_n_v, v_n_v = load_tile(row, run_n, V, RUN)
    max_n = tl.max(x_n_v, axis=1)
    tl.store(max_ptr + run_n, max_n)
    x_max = tl.max(max_n, axis=0)
    largest = tl.min(tl.where(x_n_v == x_max, v_n_v, NO_ID))
    has_nan = tl.max((x_n_v != x_n_v).to(tl.int32)) > 0
    tl.store(block_f_ptr + b, tl.where(has_nan, float("nan"), x_max))
    tl.store(block_id_ptr + b, largest)
    if temperature > 0:
        mask_n_v = x_n_v > float("-inf")
        scaled_n_v = scale_logit(x_n_v, x_max, temperature)
        p_n_v = tl.where(mask_n_v, tl.exp(scaled_n_v), 0.0)
        noise_n_v = gumbel_tile(seed, counter, run_n, RUN)
        score_n_v = tl.where(mask_n_v, scaled_n_v + noise_n_v, float("-inf"))
        best = tl.min(tl.where(score_n_v == tl.max(score_n_v), v_n_v, NO_ID))
        is_best_n_v = v_n_v == best
        tl.store(block_f_ptr + B + b, tl.sum(p_n_v.to(tl.float64)).to(tl.float32))
        tl.store(block_f_ptr + 2 * B + b, tl.max(tl.where(is_best_n_v, x_n_v, float("-inf"))))
        tl.store(block_f_ptr + 3 * B + b, tl.max(tl.where(is_best_n_v, noise_n_v, float("-inf"))))
        tl.store(block_id_ptr + B + b, best)


@triton.jit(do_not_specialize=["fallback", "num_biases"])
def sample_kernel(
    logits_ptr,               # in   [S, V]
    temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, counter_ptr,  # in   [S]
    min_p_ptr,                # in   [S]     or None
    bias_id_ptr, bias_ptr,    # in   [S, J]  or None
    seen_ptr, penalty_ptr,    # in   [S, W], [S], or None
    arrived_ptr,              # work [S]        zeros before and after
    block_f_ptr,              # work [S, 4, B]  see `configs`
    block_id_ptr,             # work [S, 2, B]
    max_ptr, list_ptr,        # work [S, N]
    token_ptr, fault_ptr,     # out  [S]
    V, num_biases, fallback,
    RUN: tl.constexpr, TILE_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    B = tl.cdiv(V, RUN * TILE_N)
    N = B * TILE_N
    s = (tl.program_id(0) // B).to(tl.int64)
    b = tl.program_id(0) % B
    temperature = tl.load(temperature_ptr + s)
    logits_ptr += s * V
    biased, seen = (), ()
    if bias_id_ptr is not None:
        biased = (bias_id_ptr + s * num_biases, bias_ptr + s * num_biases, num_biases)
    if seen_ptr is not None:
        seen = (seen_ptr + s * tl.cdiv(V, 32), tl.load(penalty_ptr + s))
    row = (logits_ptr, biased, seen)
    block_f_ptr += s * 4 * B
    block_id_ptr += s * 2 * B
    max_ptr += s * N
    seed = tl.load(seed_ptr + s)
    counter = tl.load(counter_ptr + s)
    _draw_block(row, block_f_ptr, block_id_ptr, max_ptr, b, temperature, seed, counter,
                V, B, RUN, TILE_N)  # fmt: skip
    if _is_last(arrived_ptr + s, B):
        offs_b = tl.arange(0, BLOCK_B)
        mask_b = offs_b < B
        max_b = tl.load(block_f_ptr + offs_b, mask=mask_b, other=float("-inf"),
                        cache_modifier=".cg")  # fmt: skip
        largest_b = tl.load(block_id_ptr + offs_b, mask=mask_b, other=NO_ID, cache_modifier=".cg")
        has_nan = tl.max((max_b != max_b).to(tl.int32), axis=0) > 0
        x_max = tl.max(max_b, axis=0)
        fault = has_nan | (x_max == float("-inf"))
        token = tl.min(tl.where(max_b == x_max, largest_b, NO_ID), axis=0)
        min_p = 0.0
        if min_p_ptr is not None:
            min_p = tl.load(min_p_ptr + s)
        if (temperature > 0) & (fault == 0):
            token = _draw_row(
                row, block_f_ptr, block_id_ptr, max_ptr, list_ptr + s * N, max_b, x_max, token,
                tl.load(top_k_ptr + s), tl.load(top_p_ptr + s), min_p, temperature, seed, counter,
                V, N, B, RUN, TILE_N, BLOCK_N,
            )  # fmt: skip
        tl.store(token_ptr + s, tl.where(fault, fallback, token))
        tl.store(fault_ptr + s, fault.to(tl.uint8))


@triton.jit
def _draw_row(
    row, block_f_ptr, block_id_ptr, max_ptr, list_ptr, max_b, x_max, largest,
    top_k, top_p, min_p, temperature, seed, counter, V, N, B,
    RUN: tl.constexpr, TILE_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The token of a row, whose last block has been stored."""
    offs_b = tl.arange(0, max_b.shape[0])
    mask_b = offs_b < B
    mass_b = tl.load(block_f_ptr + B + offs_b, mask=mask_b, other=0.0, cache_modifier=".cg")
    x_b = tl.load(block_f_ptr + 2 * B + offs_b, mask=mask_b, other=float("-inf"),
                  cache_modifier=".cg")  # fmt: skip
    noise_b = tl.load(block_f_ptr + 3 * B + offs_b, mask=mask_b, other=0.0, cache_modifier=".cg")
    best_b = tl.load(block_id_ptr + B + offs_b, mask=mask_b, other=NO_ID, cache_modifier=".cg")
    is_drawn_b = x_b > float("-inf")
    score_b = tl.where(is_drawn_b, scale_logit(x_b, x_max, temperature) + noise_b, float("-inf"))
    token = tl.min(tl.where(score_b == tl.max(score_b, axis=0), best_b, NO_ID), axis=0)
    x = tl.max(tl.where(best_b == token, x_b, float("-inf")), axis=0)
    if ((top_k > 0) & (top_k < V)) | (top_p < 1.0) | (min_p > 0.0):
        share_b = tl.exp(scale_logit(max_b, x_max, temperature))
        mass_b = tl.where(is_drawn_b, mass_b * share_b, 0.0)
        token = narrow(
            x, token, tl.sum(mass_b.to(tl.float64), axis=0), largest, x_max,
            top_k, top_p, min_p, temperature, seed, counter,
            row, max_ptr, list_ptr, V, N, RUN, TILE_N, BLOCK_N,
        )  # fmt: skip
    return token


def launch_sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
    min_p: Tensor | None,
    bias_id: Tensor | None,
    bias: Tensor | None,
    seen: Tensor | None,
    penalty: Tensor | None,
    fallback: int,
    out: Tensor,
    fault: Tensor,
    scratch: Tensor | None,
    config: Config | None = None,
) -> None:
    """Arguments as of the op."""
    num_rows, vocabulary = logits.shape
    config = config or choose_config(Problem(vocabulary))
    sizes = scratch_sizes(num_rows, vocabulary, config)
    if scratch is None:
        scratch = torch.empty(sum(sizes), dtype=torch.int32, device=logits.device)
        scratch[: sizes[0]].zero_()
    arrived, block_f, block_id, run_max, listed = scratch[: sum(sizes)].split(sizes)
    sample_kernel[(num_rows * triton.cdiv(vocabulary, config.block_v),)](
        logits, temperature, top_k, top_p, seed, counter,
        min_p, bias_id, bias, seen, penalty,
        arrived, block_f.view(torch.float32), block_id, run_max.view(torch.float32), listed,
        out, fault.view(torch.uint8), vocabulary, 0 if bias is None else bias.shape[1], fallback,
        **_constexprs(vocabulary, config), num_warps=config.num_warps, **LAUNCH,
    )  # fmt: skip


def _constexprs(vocabulary: int, config: Config) -> dict[str, Any]:
    blocks = triton.cdiv(vocabulary, config.block_v)
    tile_n = config.block_v // config.run_v
    return {
        "RUN": config.run_v,
        "TILE_N": tile_n,
        "BLOCK_B": triton.next_power_of_2(blocks),
        "BLOCK_N": triton.next_power_of_2(blocks * tile_n),
    }


def aot_specs() -> list[AotSpec]:
    """Every shipped configuration at the largest vocabulary that it is chosen for, and the
    interaction model's."""
    shapes = [(SHIPPED[0], 201024), (SHIPPED[0], 320)]
    shapes += [(config, config.run_v * MAX_RUNS) for config in SHIPPED[1:]]
    plain = [_spec(config, vocabulary, {}) for config, vocabulary in shapes]
    return [*plain, _spec(SHIPPED[0], 201024, OPTIONS)]


OPTIONS = {
    "min_p_ptr": "*fp32", "bias_id_ptr": "*i32", "bias_ptr": "*fp32", "seen_ptr": "*i32",
    "penalty_ptr": "*fp32",
}  # fmt: skip


def _spec(config: Config, vocabulary: int, options: dict[str, str]) -> AotSpec:
    constexprs = _constexprs(vocabulary, config) | dict.fromkeys(OPTIONS.keys() - options.keys())
    types = {
        "logits_ptr": "*fp32", "temperature_ptr": "*fp32", "top_p_ptr": "*fp32",
        "top_k_ptr": "*i32", "seed_ptr": "*i64", "counter_ptr": "*i64",
        "arrived_ptr": "*i32", "block_f_ptr": "*fp32", "block_id_ptr": "*i32",
        "max_ptr": "*fp32", "list_ptr": "*i32", "token_ptr": "*i32", "fault_ptr": "*u8",
        "V": "i32", "num_biases": "i32", "fallback": "i32", **options,
    }  # fmt: skip
    return AotSpec(
        kernel=sample_kernel,
        config=config,
        signature=types,
        constexprs=constexprs,
        num_warps=config.num_warps,
        aligned=("logits_ptr", "V") if vocabulary % 16 == 0 else ("logits_ptr",),
        label=f"V{vocabulary}" + ("-options" if options else ""),
    )
