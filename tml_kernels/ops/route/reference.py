"""The oracle of moe_route, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A gate rows (E + Z
# with scoring "sink_sigmoid", else E), K experts chosen per token, G groups of experts, B blocks.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..._plain import row_blocked_matmul
from ..._pointwise import sigmoid
from ..._routing import Blocking, Routing, Schedule

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus", "sink_sigmoid")

# Source: DeepSeek-V3's `MoEGate` (inference/modeling_deepseek.py): no division by zero where every
# chosen score underflows.
RENORM_EPS = 1e-20


@dataclass(frozen=True)
class Rule:
    """How logits become a routing: everything but tensors."""

    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    def num_experts(self, num_logits: int, num_shared: int) -> int:
        """Routed experts among the gate's rows."""
        return num_logits - num_shared if self.scoring == "sink_sigmoid" else num_logits


def logits_ref(
    x_T_D: Tensor, w_gate_A_D: Tensor | None, logit_bias_A: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x W^T + bias; x is the logits themselves where there is no gate."""
    logit_T_A = x_T_D.to(dtype)
    if w_gate_A_D is not None:
        logit_T_A = row_blocked_matmul(logit_T_A, w_gate_A_D.to(dtype))
    return logit_T_A if logit_bias_A is None else logit_T_A + logit_bias_A.to(dtype)


def scores_ref(logit_T_E: Tensor, scoring: str) -> Tensor:
    """Each expert's score, in the logits' dtype."""
    if scoring == "softmax":
        return torch.softmax(logit_T_E, dim=-1)
    if scoring == "sqrtsoftplus":
        # Not torch's softplus: the bits of that depend on where in memory a value stands.
        return torch.sqrt(logit_T_E.clamp(min=0) + torch.log1p(torch.exp(-logit_T_E.abs())))
    return sigmoid(logit_T_E)


def choice_ref(score_T_E: Tensor, bias_E: Tensor | None, rule: Rule) -> Tensor:
    """What experts are chosen by: score + bias, and -inf outside the best groups."""
    choice_T_E = score_T_E if bias_E is None else score_T_E + bias_E.to(score_T_E.dtype)
    if rule.num_groups == 1:
        return choice_T_E
    choice_T_G_J = choice_T_E.unflatten(1, (rule.num_groups, -1))
    num_best = 1 if bias_E is None else min(2, choice_T_G_J.shape[2])
    group_T_G = choice_T_G_J.topk(num_best, dim=2).values.sum(2)
    order_T_G = torch.sort(group_T_G, dim=1, descending=True, stable=True).indices
    out_T_G = torch.ones_like(group_T_G, dtype=torch.bool)
    out_T_G.scatter_(1, order_T_G[:, : rule.top_groups], False)
    return choice_T_G_J.masked_fill(out_T_G[:, :, None], float("-inf")).flatten(1)


def moe_route_ref(
    x_T_D: Tensor,
    w_gate_A_D: Tensor | None = None,
    *,
    top_k: int,
    num_shared: int = 0,
    bias_E: Tensor | None = None,
    logit_bias_A: Tensor | None = None,
    global_scale_1: Tensor | None = None,
    residual_T_D: Tensor | None = None,
    eps: float = 1e-6,
    rule: Rule,
    dtype: torch.dtype = torch.float64,
) -> Routing:
    """Weights in `dtype`, ids in int32, no schedule. Without a gate, x is the logits [T, A]. With
    a residual, x[t] / sqrt(mean(residual[t]^2) + eps) is routed.

    Chosen: the K largest of `choice_ref`, ties to the lowest id, by descending value. Weights: the
    scores of the chosen, divided by their sum when renormalised; with "sink_sigmoid" a softmax over
    log(sigmoid(l)) of the chosen and of the Z last logits. All times scale * global_scale.
    """
    inv_rms_T = None
    if residual_T_D is not None:
        inv_rms_T = torch.rsqrt(residual_T_D.to(dtype).square().mean(-1) + eps)
        x_T_D = x_T_D.to(dtype) * inv_rms_T[:, None]
    logit_T_A = logits_ref(x_T_D, w_gate_A_D, logit_bias_A, dtype)
    num_experts = rule.num_experts(logit_T_A.shape[1], num_shared)
    logit_T_E = logit_T_A[:, :num_experts]
    score_T_E = scores_ref(logit_T_E, rule.scoring)
    choice_T_E = choice_ref(score_T_E, bias_E, rule)
    # A stable sort keeps the lowest id first among equal scores; topk promises no order.
    order_T_E = torch.sort(choice_T_E, dim=-1, descending=True, stable=True).indices
    expert_T_K = order_T_E[:, :top_k]
    scale = rule.scale if global_scale_1 is None else rule.scale * global_scale_1.to(dtype)
    if rule.scoring == "sink_sigmoid":
        picked_T_KZ = torch.cat([logit_T_A.gather(1, expert_T_K), logit_T_A[:, num_experts:]], 1)
        weight_T_KZ = torch.softmax(logsigmoid(picked_T_KZ), dim=-1) * scale
        weight_T_K, shared_T_Z = weight_T_KZ[:, :top_k], weight_T_KZ[:, top_k:]
    else:
        weight_T_K = score_T_E.gather(1, expert_T_K)
        if rule.renormalize:
            weight_T_K = weight_T_K / (weight_T_K.sum(1, keepdim=True) + RENORM_EPS)
        elif rule.scoring != "softmax":  # a score of its own would hide the NaN of another expert
            weight_T_K.masked_fill_(logit_T_A.isnan().any(1, keepdim=True), float("nan"))
        weight_T_K = weight_T_K * scale
        shared_T_Z = weight_T_K.new_ones(weight_T_K.shape[0], num_shared)
    expert_T_K = expert_T_K.to(torch.int32)
    return Routing(expert_T_K, weight_T_K, shared_T_Z, num_experts, inv_rms_T=inv_rms_T)


def schedule_ref(expert_T_K: Tensor, num_experts: int, blocking: Blocking) -> Schedule:
    """The schedule of these ids on their device; -1 where `Schedule` leaves it undefined."""
    num_tokens, top_k = expert_T_K.shape
    max_blocks = blocking.max_blocks(num_tokens, top_k, num_experts)
    size = 2 + 2 * max_blocks + num_tokens * top_k
    buffer = torch.full((size,), -1, dtype=torch.int32, device=expert_T_K.device)
    schedule = Schedule(buffer, blocking, max_blocks)
    expert_A = expert_T_K.flatten().long()
    valid_A = (expert_A >= 0) & (expert_A < num_experts)
    expert_A = torch.where(valid_A, expert_A, num_experts)
    order_A = torch.sort(expert_A, stable=True).indices[: int(valid_A.sum())]
    schedule.order_A[: len(order_A)] = order_A.int()

    count_E = torch.bincount(expert_A, minlength=num_experts + 1)[:num_experts]
    first_E = count_E.cumsum(0) - count_E
    blocks_E = -(-count_E // blocking.size)
    expert_B = torch.repeat_interleave(blocks_E)
    num_blocks = len(expert_B)
    within_B = torch.arange(num_blocks, device=buffer.device)
    within_B = within_B - (blocks_E.cumsum(0) - blocks_E)[expert_B]
    schedule.num_blocks_1.fill_(num_blocks)
    schedule.expert_B[:num_blocks] = expert_B.int()
    schedule.begin_B1[:num_blocks] = (first_E[expert_B] + within_B * blocking.size).int()
    schedule.begin_B1[num_blocks] = len(order_A)
    return schedule
