"""Triton kernel of sample: one launch, one read of the logits from memory.

A program takes a block of a row's columns and leaves three numbers for each run of them: its
largest logit, a bound of its best draw (`tiles.may_win`), and its mass where top-p asks for it. The
last program of a row to arrive draws in full where the bounds allow the best draw to be, as a rule
in one run; where top-k, top-p or min-p narrow the draw it looks again at what it has to, in L2. No
program waits for another.

Logits order the columns as they are; the plain path orders them after the division, where float32
may have made two of them equal. So a draw differs from the oracle's only where the two best scores,
or p and the mass before a column, are within rounding: about 1e-6, relative.
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
from ..._triton.arrival import is_last
from .configs import MAX_RUNS, SHIPPED, Config, Problem, choose_config, scratch_sizes
from .narrow import best_draw, list_where, narrow
from .tiles import NO_ID, first_column, load_tile, may_win, scale_logit, slope_of, uniform_tile


@triton.jit
def _look_at_block(
    row, max_ptr, race_ptr, mass_ptr, b, temperature, top_p, seed, counter, V,
    RUN: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Store what the row needs of the runs of block b. A run is within a warp: nobody waits."""
    run_n = b * TILE_N + tl.arange(0, TILE_N)
    x_n_v, _v_n_v = load_tile(row, run_n, V, RUN)
    max_n = tl.max(x_n_v, axis=1)
    tl.store(max_ptr + run_n, max_n)
    if temperature > 0:
        u_n_v = uniform_tile(seed, counter, run_n, RUN)
        race_n_v = u_n_v * tl.exp2((max_n[:, None] - x_n_v) * slope_of(temperature))
        is_empty_n = max_n == float("-inf")
        tl.store(race_ptr + run_n, tl.where(is_empty_n, float("inf"), tl.min(race_n_v, axis=1)))
        if top_p < 1.0:
            p_n_v = tl.exp(scale_logit(x_n_v, max_n[:, None], temperature))
            tl.store(mass_ptr + run_n, tl.where(is_empty_n, 0.0, tl.sum(p_n_v, axis=1)))


@triton.jit(do_not_specialize=["fallback", "num_biases"])
def sample_kernel(
    logits_ptr,               # in   [S, V]
    temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, counter_ptr,  # in   [S]
    min_p_ptr,                # in   [S]     or None
    bias_id_ptr, bias_ptr,    # in   [S, J]  or None
    seen_ptr, penalty_ptr,    # in   [S, W], [S], or None
    arrived_ptr,              # work [S]        zeros before and after
    run_ptr,                  # work [S, 3, N]  largest logits, races and masses
    list_ptr,                 # work [S, N]
    token_ptr, fault_ptr,     # out  [S]
    V, num_biases, fallback,
    RUN: tl.constexpr, TILE_N: tl.constexpr, LOOK_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    B = tl.cdiv(V, RUN * TILE_N)
    N = B * TILE_N
    s = (tl.program_id(0) // B).to(tl.int64)
    b = tl.program_id(0) % B
    logits_ptr += s * V
    biased, seen = (), ()
    if bias_id_ptr is not None:
        biased = (bias_id_ptr + s * num_biases, bias_ptr + s * num_biases, num_biases)
    if seen_ptr is not None:
        seen = (seen_ptr + s * tl.cdiv(V, 32), tl.load(penalty_ptr + s))
    row = (logits_ptr, biased, seen)
    max_ptr = run_ptr + s * 3 * N
    race_ptr, mass_ptr = max_ptr + N, max_ptr + 2 * N
    temperature = tl.load(temperature_ptr + s)
    top_p = tl.load(top_p_ptr + s)
    seed = tl.load(seed_ptr + s)
    counter = tl.load(counter_ptr + s)
    _look_at_block(row, max_ptr, race_ptr, mass_ptr, b, temperature, top_p, seed, counter, V,
                   RUN, TILE_N)  # fmt: skip
    if is_last(arrived_ptr + s, B):
        offs_n = tl.arange(0, BLOCK_N)
        max_n = tl.load(max_ptr + offs_n, mask=offs_n < N, other=float("-inf"),
                        cache_modifier=".cg")  # fmt: skip
        x_max = tl.max(max_n, axis=0)
        fault = (x_max == float("-inf")) | (x_max == float("inf"))
        token = fallback
        if fault == 0:
            token = first_column(row, tl.min(tl.where(max_n == x_max, offs_n, N), axis=0), x_max,
                                 V, RUN)  # fmt: skip
            if temperature > 0:
                min_p = 0.0
                if min_p_ptr is not None:
                    min_p = tl.minimum(tl.load(min_p_ptr + s), 1.0)
                token = _draw_row(
                    row, max_ptr, race_ptr, mass_ptr, list_ptr + s * N, max_n, x_max, token,
                    tl.load(top_k_ptr + s), top_p, min_p, temperature, seed, counter,
                    V, N, RUN, LOOK_N, BLOCK_N,
                )  # fmt: skip
        tl.store(token_ptr + s, token)
        tl.store(fault_ptr + s, fault.to(tl.uint8))


@triton.jit
def _draw_row(
    row, max_ptr, race_ptr, mass_ptr, list_ptr, max_n, x_max, largest,
    top_k, top_p, min_p, temperature, seed, counter, V, N,
    RUN: tl.constexpr, LOOK_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The token of a row, all of whose blocks have been looked at."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    race_n = tl.load(race_ptr + offs_n, mask=mask_n, other=float("inf"), cache_modifier=".cg")
    listed_n = may_win(race_n, max_n, x_max, temperature)
    num_listed = list_where(list_ptr, listed_n, BLOCK_N)
    x, token = best_draw(list_ptr, num_listed, row, float("-inf"), NO_ID,
                         x_max, temperature, seed, counter, V, RUN, LOOK_N)  # fmt: skip
    if ((top_k > 0) & (top_k < V)) | (top_p < 1.0) | (min_p > 0.0):
        mass = tl.full([], 0.0, tl.float64)
        if top_p < 1.0:
            mass_n = tl.load(mass_ptr + offs_n, mask=mask_n, other=0.0, cache_modifier=".cg")
            mass_n *= tl.exp(scale_logit(max_n, x_max, temperature))
            mass = tl.sum(mass_n.to(tl.float64), axis=0)
        token = narrow(
            x, token, mass, largest, x_max, top_k, top_p, min_p, temperature, seed, counter,
            row, max_ptr, list_ptr, V, N, RUN, LOOK_N, BLOCK_N,
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
    arrived, runs, listed = scratch[: sum(sizes)].split(sizes)
    sample_kernel[(num_rows * triton.cdiv(vocabulary, config.block_v),)](
        logits, temperature, top_k, top_p, seed, counter,
        min_p, bias_id, bias, seen, penalty,
        arrived, runs.view(torch.float32), listed,
        out, fault.view(torch.uint8), vocabulary, 0 if bias is None else bias.shape[1], fallback,
        **_constexprs(vocabulary, config), num_warps=config.num_warps,
        maxnreg=config.registers(edited=bias_id is not None or seen is not None),
    )  # fmt: skip


def _constexprs(vocabulary: int, config: Config) -> dict[str, Any]:
    blocks = triton.cdiv(vocabulary, config.block_v)
    tile_n = config.block_v // config.run_v
    return {
        "RUN": config.run_v,
        "TILE_N": tile_n,
        "LOOK_N": config.look_v // config.run_v,
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
        "arrived_ptr": "*i32", "run_ptr": "*fp32", "list_ptr": "*i32",
        "token_ptr": "*i32", "fault_ptr": "*u8",
        "V": "i32", "num_biases": "i32", "fallback": "i32", **options,
    }  # fmt: skip
    return AotSpec(
        kernel=sample_kernel,
        config=config,
        signature=types,
        constexprs=constexprs,
        num_warps=config.num_warps,
        maxnreg=config.registers(edited=bool(options)),
        aligned=("logits_ptr", "V") if vocabulary % 16 == 0 else ("logits_ptr",),
        label=f"V{vocabulary}" + ("-options" if options else ""),
    )
