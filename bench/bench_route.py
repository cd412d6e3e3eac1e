"""route: a gate too small to fill the chip, so launches and latency decide."""

# Dimension key: T tokens, D model width, E routed experts, A = E + shared experts.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.route import Routing, cases, route
from tml_kernels.ops.route.reference import route_ref
from tml_kernels.testing import assert_bitwise, assert_matches

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    result, expected = route(**inputs), route_ref(**inputs)
    assert_bitwise(result.expert_T_K, expected.expert_T_K)
    assert_matches(result.weight_T_K, expected.weight_T_K)
    assert_matches(result.shared_weight_T_Z, expected.shared_weight_T_Z)


def torch_route(
    x_T_D: Tensor,
    weight_A_D: Tensor,
    bias_E: Tensor,
    global_scale_1: Tensor,
    top_k: int,
    num_shared: int,
    scale: float,
) -> Routing:
    num_experts = bias_E.shape[0]
    logit_T_A = F.linear(x_T_D, weight_A_D).float()
    score_T_E = torch.sigmoid(logit_T_A[:, :num_experts]) + bias_E
    expert_T_K = torch.topk(score_T_E, top_k, dim=1).indices
    picked = torch.cat([logit_T_A.gather(1, expert_T_K), logit_T_A[:, num_experts:]], dim=1)
    weight = torch.softmax(F.logsigmoid(picked), dim=1) * (scale * global_scale_1)
    return Routing(expert_T_K.int(), weight[:, :top_k], weight[:, top_k:])


def gate_alone(x_T_D: Tensor, weight_A_D: Tensor, **_: Any) -> Tensor:
    """The matrix product without the routing: what a fused router competes with at least."""
    return F.linear(x_T_D, weight_A_D)


OP = OpBench(
    name="route",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={
        "ours": Variant(route),
        # bf16 logits choose other experts where scores nearly tie: not compared.
        "torch": Variant(torch_route, check=False),
        "F.linear alone": Variant(gate_alone, check=False),
    },
)
