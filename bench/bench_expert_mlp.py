"""expert_mlp: the weights of every touched expert are streamed once.

All cases but the tick's hold w13 as [gate; up], the order of every peer: plain weights are then
theirs as they are, and no second copy of 13 GB is needed. The tick's are the model's: interleaved,
int4 beside fp8, with a late norm. The graph is 40 layers over four sets of weights.
"""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, F expert width,
# J = 2 F gate and up rows, K experts chosen per token, A = T * K assignments.

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tml_kernels.moe_weights import MoEWeights
from tml_kernels.ops.expert_mlp import cases, fused_moe, workspace_bytes
from tml_kernels.ops.expert_mlp.reference import fused_moe_ref
from tml_kernels.ops.route import Routing, moe_route
from tml_kernels.testing import assert_matches

from . import moe_peers
from .harness import OpBench, Variant, clone
from .moe_peers import Routed, swiglu
from .peers import find

SETS = 4  # layers with weights of their own
LAYERS = 40
MAX_GATHERED = 96  # assignments whose weights are gathered: 5 GB at the model's widths
# Rounding both products' activations to e4m3, 2.6 % of a value in the mean square, is most of it.
FP8_ACTIVATIONS = 8e-2


class TimedCase(cases.Case):
    """A case that shares its weights with those before it that differ in nothing of them: 256
    experts take seconds to draw and quantise."""

    def make_weights(self, device: str) -> MoEWeights:
        return _weights(replace(self, num_tokens=0, skew="uniform"), device)


@functools.lru_cache(maxsize=1)
def _weights(case: TimedCase, device: str) -> MoEWeights:
    # Packed experts lie in the storage that they were packed from: only a copy lets go of it.
    return clone(cases.Case.make_weights(case, device))


TIMED = [
    TimedCase(**vars(case if case.late_norm else replace(case, order="gate_up")))
    for case in cases.BENCH
]
QUICK = [
    case
    for case in TIMED
    if case.num_tokens in (1, 8, 64, 256) and case.skew == "uniform" and not case.num_shared
]
# The timed precisions, dtype and traits at widths that the oracle takes at once.
SMALL = [
    replace(case, width=512, expert_width=256, num_experts=8)
    for case in TIMED
    if case.num_tokens in (1, 8) and case.skew == "uniform"
]


def allocate(inputs: dict[str, Any]) -> dict[str, Any]:
    """Output, workspace and, on CUDA, the schedule, which the router makes, once and for all."""
    x, weights, routing = inputs["x"], inputs["weights"], inputs["routing"]
    num_tokens, top_k = routing.expert_T_K.shape
    size = workspace_bytes(weights, num_tokens, top_k, x.dtype)
    return inputs | {
        "routing": schedule(routing),
        "out": torch.empty_like(x),
        "workspace": torch.empty(size, dtype=torch.uint8, device=x.device),
    }


def schedule(routing: Routing, out: Routing | None = None) -> Routing:
    """Ready ids, in the order of the work."""
    scheduled = moe_route(
        expert_T_K=routing.expert_T_K,
        weight_T_K=routing.weight_T_K,
        shared_weight_T_Z=routing.shared_weight_T_Z,
        num_experts=routing.num_experts,
        out=out,
    )
    return replace(scheduled, inv_rms_T=routing.inv_rms_T)


def allocate_ids(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same, with the ids unscheduled and a routing to be written."""
    buffer = clone(schedule(inputs["routing"]))
    return allocate(inputs) | {"routing": inputs["routing"], "buffer": buffer}


def run_from_ids(routing: Routing, buffer: Routing | None = None, **inputs: Any) -> Tensor:
    return fused_moe(routing=schedule(routing, out=buffer), **inputs)


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    routing = inputs["routing"]
    expected = fused_moe_ref(
        inputs["x"],
        inputs["weights"],
        routing.expert_T_K,
        routing.weight_T_K,
        routing.shared_weight_T_Z,
        inv_rms_T=routing.inv_rms_T,
        activation=case.activation,
    )
    assert_matches(fused_moe(**allocate(inputs)), expected, dtype=case.dtype)


def on_plain(routed: Routed) -> Callable[..., Tensor]:
    """A variant of what multiplies by plain weights; shared experts, if any, by `torch.bmm`."""

    def run(x: Tensor, weights: MoEWeights, routing: Routing, activation: str) -> Tensor:
        w13_E_J_D, w2_E_D_F = moe_peers.plain(weights, activation)
        out_T_D = routed(x, w13_E_J_D, w2_E_D_F, routing.expert_T_K, routing.weight_T_K)
        return add_shared(out_T_D, x, weights.shared, routing.shared_weight_T_Z)

    return run


def add_shared(
    out_T_D: Tensor, x_T_D: Tensor, shared: MoEWeights | None, weight_T_Z: Tensor
) -> Tensor:
    if shared is None:
        return out_T_D
    w13_Z_J_D, w2_Z_D_F = moe_peers.plain(shared, "silu")
    x_Z_T_D = x_T_D.expand(w13_Z_J_D.shape[0], -1, -1)
    y_Z_T_D = torch.bmm(swiglu(torch.bmm(x_Z_T_D, w13_Z_J_D.mT)), w2_Z_D_F.mT)
    return out_T_D + (y_Z_T_D * weight_T_Z.T[..., None]).sum(0).to(out_T_D.dtype)


def limit_gathered(routed: Routed) -> Routed:
    def run(x: Tensor, w13: Tensor, w2: Tensor, expert_T_K: Tensor, weight_T_K: Tensor) -> Tensor:
        if expert_T_K.numel() > MAX_GATHERED:
            raise NotImplementedError(f"{expert_T_K.numel()} assignments, over {MAX_GATHERED}")
        return routed(x, w13, w2, expert_T_K, weight_T_K)

    return run


def gather_bmm(
    x_T_D: Tensor, w13_E_J_D: Tensor, w2_E_D_F: Tensor, expert_T_K: Tensor, weight_T_K: Tensor
) -> Tensor:
    """A copy of its weights for every assignment; valid ids only."""
    expert_A = expert_T_K.flatten()
    x_A_D = x_T_D.repeat_interleave(expert_T_K.shape[1], dim=0)
    h_A_F = swiglu(torch.bmm(w13_E_J_D[expert_A], x_A_D[..., None])[..., 0])
    y_A_D = torch.bmm(w2_E_D_F[expert_A], h_A_F[..., None])[..., 0]
    y_T_K_D = y_A_D.view(*expert_T_K.shape, -1) * weight_T_K[..., None]
    return y_T_K_D.sum(1).to(x_T_D.dtype)


def torch_grouped_mm() -> Routed:
    grouped_mm = find("torch.nn.functional", "grouped_mm")

    def routed(
        x_T_D: Tensor, w13_E_J_D: Tensor, w2_E_D_F: Tensor, expert_T_K: Tensor, weight_T_K: Tensor
    ) -> Tensor:
        """Assignments sorted by expert, one grouped product for each of the two weights."""
        num_experts, top_k = w13_E_J_D.shape[0], expert_T_K.shape[1]
        expert_A, order_A = expert_T_K.flatten().sort(stable=True)
        ids = torch.arange(num_experts, dtype=expert_A.dtype, device=expert_A.device)
        ends_E = torch.searchsorted(expert_A, ids, right=True).int()
        h_A_F = swiglu(grouped_mm(x_T_D[order_A // top_k], w13_E_J_D.mT, offs=ends_E))
        y_A_D = grouped_mm(h_A_F, w2_E_D_F.mT, offs=ends_E)
        weighted_A_D = y_A_D * weight_T_K.flatten()[order_A, None]
        out_T_D = torch.zeros_like(x_T_D, dtype=torch.float32)
        return out_T_D.index_add_(0, order_A // top_k, weighted_A_D).to(x_T_D.dtype)

    return routed


def transformers_batched_mm() -> Variant:
    return Variant(on_plain(limit_gathered(moe_peers.transformers_experts("batched_mm"))))


OP = OpBench(
    name="expert_mlp",
    edge=[*cases.EDGE, *cases.PACKED],
    model=[*cases.MODEL, *SMALL],
    bench=TIMED,
    check=check,
    variants={
        "ours": Variant(fused_moe, prepare=allocate),
        "ours from ids": Variant(run_from_ids, prepare=allocate_ids),
        "ours, fp8 activations": Variant(
            functools.partial(fused_moe, quantize_x=True), prepare=allocate, limit=FP8_ACTIVATIONS
        ),
        "gather + bmm": Variant(on_plain(limit_gathered(gather_bmm))),
    },
    peers={
        "torch grouped_mm": lambda: Variant(on_plain(torch_grouped_mm())),
        "transformers grouped_mm": lambda: Variant(
            on_plain(moe_peers.transformers_experts("grouped_mm"))
        ),
        "transformers batched_mm": transformers_batched_mm,
        "flag-gems": lambda: Variant(on_plain(moe_peers.flag_gems_experts())),
        "flag-gems, fp8 activations": lambda: replace(
            moe_peers.flag_gems_fp8(), limit=FP8_ACTIVATIONS
        ),
        "vllm": lambda: Variant(on_plain(moe_peers.vllm_experts())),
        "humming": moe_peers.humming_int4,
    },
    quick=QUICK,
    sets=SETS,
    graph_calls=LAYERS,
)
