"""route: a gate too small to fill the chip, so launches and latency decide."""

# Dimension key: T tokens, D model width, E routed experts, A = E + shared experts.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.route import Routing, cases, moe_route
from tml_kernels.ops.route.reference import RENORM_EPS, Rule, choice_ref, scores_ref

from .harness import OpBench, Variant
from .peers import find


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    cases.assert_routes(moe_route(**inputs), inputs)


def with_out(inputs: dict[str, Any]) -> dict[str, Any]:
    """As a captured step calls it: into a routing that is there, schedule included."""
    x_T_D, gate_A_D = inputs["x_T_D"], inputs["w_gate_A_D"]
    sinks = inputs["num_shared"] if inputs["scoring"] == "sink_sigmoid" else 0
    out = Routing.empty(
        x_T_D.shape[0], inputs["top_k"], inputs["num_shared"], gate_A_D.shape[0] - sinks,
        x_T_D.device, width=x_T_D.shape[1], late_norm="residual_T_D" in inputs,
    )  # fmt: skip
    return inputs | {"out": out}


def torch_route(
    x_T_D: Tensor,
    w_gate_A_D: Tensor,
    top_k: int,
    scoring: str,
    bias_E: Tensor,
    num_groups: int,
    top_groups: int,
    scale: float,
    global_scale_1: Tensor,
    **_: Any,
) -> tuple[Tensor, ...]:
    """As models write it, with logits in x's dtype; no schedule."""
    rule, num_experts = Rule(scoring, True, num_groups, top_groups), bias_E.shape[0]
    logit_T_A = F.linear(x_T_D, w_gate_A_D).float()
    score_T_E = scores_ref(logit_T_A[:, :num_experts], scoring)
    expert_T_K = torch.topk(choice_ref(score_T_E, bias_E, rule), top_k, dim=1).indices
    scale_1 = scale * global_scale_1
    if scoring != "sink_sigmoid":
        weight = score_T_E.gather(1, expert_T_K)
        weight = weight / (weight.sum(1, keepdim=True) + RENORM_EPS)
        return expert_T_K.int(), weight * scale_1
    picked = torch.cat([logit_T_A.gather(1, expert_T_K), logit_T_A[:, num_experts:]], dim=1)
    weight = torch.softmax(F.logsigmoid(picked), dim=1) * scale_1
    return expert_T_K.int(), weight[:, :top_k], weight[:, top_k:]


def gate_alone(x_T_D: Tensor, w_gate_A_D: Tensor, **_: Any) -> Tensor:
    """The matrix product without the routing: what a fused router competes with at least."""
    return F.linear(x_T_D, w_gate_A_D)


def grouped_logits(x_T_D: Tensor, w_gate_A_D: Tensor, scoring: str) -> Tensor:
    if scoring != "sigmoid":
        raise NotImplementedError(f"a grouped sigmoid alone, not {scoring}")
    return F.linear(x_T_D, w_gate_A_D).float()


def sglang_gate() -> Variant:
    """DeepSeek's rule, after the product."""
    function = find("sgl_kernel", "moe_fused_gate")

    def run(x_T_D: Tensor, w_gate_A_D: Tensor, scoring: str, **rest: Any) -> Any:
        logit_T_E = grouped_logits(x_T_D, w_gate_A_D, scoring)
        groups = (rest["num_groups"], rest["top_groups"], rest["top_k"])
        return function(logit_T_E, rest["bias_E"], *groups, 0, rest["scale"])

    return Variant(run, check=False)  # it takes no global scale


def vllm_gate() -> Variant:
    """DeepSeek's rule, after the product."""
    function = find("vllm.model_executor.layers.fused_moe", "grouped_topk")

    def run(x_T_D: Tensor, w_gate_A_D: Tensor, scoring: str, **rest: Any) -> Any:
        return function(
            hidden_states=x_T_D,
            gating_output=grouped_logits(x_T_D, w_gate_A_D, scoring),
            topk=rest["top_k"],
            renormalize=True,
            num_expert_group=rest["num_groups"],
            topk_group=rest["top_groups"],
            scoring_func=scoring,
            routed_scaling_factor=rest["scale"],
            e_score_correction_bias=rest["bias_E"],
        )

    return Variant(run, check=False)  # it takes no global scale


OP = OpBench(
    name="route",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={
        "ours": Variant(moe_route, with_out),
        # bf16 logits choose other experts where scores nearly tie: not compared.
        "torch": Variant(torch_route, check=False),
        "F.linear alone": Variant(gate_alone, check=False),
    },
    peers={"sglang": sglang_gate, "vllm": vllm_gate},
)
