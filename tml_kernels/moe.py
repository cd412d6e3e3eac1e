"""The mixture-of-experts block: router and experts, and what they cost."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A gate rows,
# K experts chosen per token.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._numbers import check_count, check_positive
from ._routing import Routing as Routing
from ._routing import choose_blocking
from .moe_weights import MoEWeights as MoEWeights
from .moe_weights import prepare_moe_weights as prepare_moe_weights
from .ops.expert_mlp import fused_moe as fused_moe
from .ops.expert_mlp import workspace_bytes as workspace_bytes
from .ops.expert_mlp.configs import BLOCK_M, Problem, choose_config, kind_of
from .ops.route import configs as route_configs
from .ops.route import moe_route as moe_route
from .quant import PackedExperts


def moe_layer(
    x: Tensor,
    w_gate: Tensor,
    weights: MoEWeights,
    *,
    activation: str = "silu",
    quantize_x: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    routing: Routing | None = None,
    **route: Any,
) -> Tensor:
    """`moe_route`, then `fused_moe`: [T, D] to [T, D] in three launches on CUDA.

    x: [T, D], float32, bfloat16 or float16; w_gate: [A, D], float32 or x's dtype. route: keywords
    of `moe_route` (top_k, scoring, residual_T_D, ...); the number of shared experts is that of the
    weights. routing: a buffer of `Routing.empty` (its
    `late_norm` says whether there is a residual), overwritten; with it, `out` and `workspace`
    nothing is allocated, and without it its counters are cleared first. Row t depends on row t
    alone, bit for bit. Raises TypeError or ValueError naming the argument.
    """
    routing = moe_route(x, w_gate, num_shared=weights.num_shared, out=routing, **route)
    return fused_moe(
        x,
        weights,
        routing,
        activation=activation,
        quantize_x=quantize_x,
        out=out,
        workspace=workspace,
    )


def warmup(
    w_gate: Tensor,
    weights: MoEWeights,
    *,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu",
    quantize_x: bool = False,
    residual_T_D: Tensor | None = None,
    **route: Any,
) -> list[int]:
    """Run the block once for every kernel that 1..max_tokens tokens can choose.

    Afterwards no number of tokens up to max_tokens compiles anything, so that the block may be
    captured in a CUDA graph. route: keywords of `moe_route`, of which residual_T_D has max_tokens
    rows. Returns the numbers of tokens run. On the CPU nothing is compiled, and the block runs all
    the same.
    """
    check_count("max_tokens", max_tokens)
    top_k = check_count("top_k", route.get("top_k"))
    tokens, seen = [], set()
    for num_tokens in range(1, max_tokens + 1):
        kernels = (
            choose_blocking(num_tokens, top_k, weights.num_experts),
            route_configs.choose_config(route_configs.Problem(num_tokens, weights.num_experts)),
        )
        if kernels not in seen:
            seen.add(kernels)
            tokens.append(num_tokens)
    for num_tokens in tokens:
        x = torch.zeros(num_tokens, weights.width, dtype=dtype, device=weights.device)
        residual = None if residual_T_D is None else residual_T_D[:num_tokens]
        moe_layer(
            x,
            w_gate,
            weights,
            activation=activation,
            quantize_x=quantize_x,
            residual_T_D=residual,
            **route,
        )
    return tokens


@dataclass(frozen=True)
class Explanation:
    """What `fused_moe` does for a number of tokens, and what it must cost.

    num_blocks: the most blocks that can have work. weight_bytes: of the experts that uniform
    routing touches in the mean, each read once, and of the shared ones. predicted_us: all bytes
    over the bandwidth; None when none was given.
    """

    mode: str  # "token-centric" or "grouped"
    block_n: int
    num_blocks: int
    launches: tuple[str, ...]
    touched_experts: float
    weight_bytes: int
    activation_bytes: int
    predicted_us: float | None

    def __str__(self) -> str:
        time = "" if self.predicted_us is None else f"\nat least {self.predicted_us:.1f} us"
        return (
            f"{self.mode}: at most {self.num_blocks} blocks of up to {self.block_n} tokens, "
            f"{self.touched_experts:.1f} experts in the mean\n"
            + "\n".join(self.launches)
            + f"\n{self.weight_bytes / 1e6:.1f} MB of weights, "
            + f"{self.activation_bytes / 1e6:.2f} MB of activations{time}"
        )


def explain(
    weights: MoEWeights,
    *,
    num_tokens: int,
    top_k: int,
    dtype: torch.dtype = torch.bfloat16,
    bandwidth: float | None = None,
) -> Explanation:
    """The kernels and tiles `fused_moe` takes on CUDA, and the bytes it must move.

    bandwidth: bytes per second of the device, as measured on it; it makes `predicted_us`. The bytes
    assume ids drawn uniformly. Pure: no device is asked. Raises ValueError naming the argument.

    >>> print(explain(weights, num_tokens=8, top_k=6, bandwidth=4.4e12))  # doctest: +SKIP
    """
    check_count("num_tokens", num_tokens)
    check_count("top_k", top_k, 1, weights.num_experts)
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)
    blocking = choose_blocking(num_tokens, top_k, weights.num_experts)
    shared = weights.shared or weights
    blocks = blocking.max_blocks(num_tokens, top_k, weights.num_experts)
    shared_blocks = weights.num_shared * -(-num_tokens // blocking.size)
    launches = []
    for name, routed, other in (
        ("gate-up", weights.w13, shared.w13),
        ("down", weights.w2, shared.w2),
    ):
        kinds = kind_of(routed), kind_of(other)
        config = choose_config(Problem(*kinds, blocking.size, alone=not blocking.scheduled))
        programs = blocks * -(-routed.num_rows // BLOCK_M)
        programs += shared_blocks * -(-other.num_rows // BLOCK_M)
        launches.append(
            f"{name}: {routed.format.name} weights, tile {config.block_m} x {config.block_n}, "
            f"{config.num_warps} warps, {config.num_stages} stages, "
            f"{programs} programs"
        )
    touched = weights.num_experts * (1.0 - (1.0 - top_k / weights.num_experts) ** num_tokens)
    weight_bytes = round(touched * (_bytes_of(weights.w13) + _bytes_of(weights.w2)))
    if weights.shared is not None:
        weight_bytes += weights.shared.w13.nbytes + weights.shared.w2.nbytes
    slots = top_k + weights.num_shared
    hidden = top_k * weights.expert_width + weights.num_shared * shared.expert_width
    moved = 2 * num_tokens * weights.width * dtype.itemsize
    moved += 2 * num_tokens * (hidden * dtype.itemsize + 4 * slots * weights.width)
    time = None if bandwidth is None else (weight_bytes + moved) / bandwidth * 1e6
    return Explanation(
        "grouped" if blocking.scheduled else "token-centric",
        blocking.size,
        blocks + shared_blocks,
        tuple(launches),
        touched,
        weight_bytes,
        moved,
        time,
    )


def _bytes_of(experts: PackedExperts) -> float:
    """Of one expert."""
    return experts.nbytes / experts.num_experts
