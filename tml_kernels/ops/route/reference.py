"""The oracle of route, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A = E + Z,
# K experts chosen per token.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..._plain import row_blocked_matmul
from ..._pointwise import sigmoid


class Routing(NamedTuple):
    """Who works on each token, and with which weight.

    Two tokens, K = 2, one shared expert: expert_T_K = [[5, 0], [2, 5]], weight_T_K =
    [[3.1, 2.7], [4.0, 0.5]], shared_weight_T_1 = [[2.2], [3.5]]; each row of weights, shared ones
    included, sums to scale * global_scale (8 here).
    """

    expert_T_K: Tensor
    weight_T_K: Tensor
    shared_weight_T_Z: Tensor


def route_ref(
    x_T_D: Tensor,
    weight_A_D: Tensor,
    bias_E: Tensor,
    global_scale_1: Tensor,
    *,
    top_k: int,
    num_shared: int,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> Routing:
    """expert_T_K in int32, the weights in `dtype`.

    l = x W^T; chosen: the K largest of sigmoid(l[:E]) + bias, ties to the lowest id, by descending
    score; weights: softmax over log(sigmoid(l)) of the chosen and the shared ones, times
    scale * global_scale.
    """
    logit_T_A = row_blocked_matmul(x_T_D.to(dtype), weight_A_D.to(dtype))
    num_experts = bias_E.shape[0]
    score_T_E = sigmoid(logit_T_A[:, :num_experts]) + bias_E.to(dtype)
    # A stable sort keeps the lowest id first among equal scores; topk promises no order.
    order_T_E = torch.sort(score_T_E, dim=-1, descending=True, stable=True).indices
    expert_T_K = order_T_E[:, :top_k]
    picked_T_KZ = torch.cat([logit_T_A.gather(1, expert_T_K), logit_T_A[:, num_experts:]], dim=1)
    weight_T_KZ = torch.softmax(logsigmoid(picked_T_KZ), dim=-1)
    weight_T_KZ = weight_T_KZ * (scale * global_scale_1.to(dtype))
    assert weight_T_KZ.shape[1] == top_k + num_shared
    return Routing(expert_T_K.to(torch.int32), weight_T_KZ[:, :top_k], weight_T_KZ[:, top_k:])
