"""route: check, choose, launch."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, A = E + Z,
# K experts chosen per token.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .reference import Routing, route_ref


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    global_scale: Tensor,
    scale: float,
    expert: Tensor,
    expert_weight: Tensor,
    shared_weight: Tensor,
) -> None:
    result = route_ref(
        x,
        weight,
        bias,
        global_scale,
        top_k=expert.shape[1],
        num_shared=shared_weight.shape[1],
        scale=scale,
        dtype=torch.float32,
    )
    for target, value in zip((expert, expert_weight, shared_weight), result, strict=True):
        target.copy_(value)


_op = register_op(
    "route(Tensor x, Tensor weight, Tensor bias, Tensor global_scale, float scale, "
    "Tensor(a!) expert, Tensor(b!) expert_weight, Tensor(c!) shared_weight) -> ()",
    plain=_plain,
)


def route(
    x_T_D: Tensor,
    weight_A_D: Tensor,
    bias_E: Tensor,
    global_scale_1: Tensor,
    *,
    top_k: int,
    num_shared: int,
    scale: float,
    out: Routing | None = None,
) -> Routing:
    """Choose each token's experts and weigh them together with the shared experts.

    The K largest of sigmoid(x W^T) + bias over the routed experts (the first E of the weight's A
    rows), ties to the lowest id, in order of descending score. The bias chooses and does not
    weigh: weights are a softmax over log-sigmoids of the chosen and the `num_shared` last logits
    together, times scale * global_scale.

    x: [T, D], float32, bfloat16 or float16; weight: float32 or x's dtype; bias and global_scale:
    float32. Returns int32 [T, K], float32 [T, K] and float32 [T, Z], written into `out` when given.
    float32 throughout. Deterministic; row t depends on row t and the weights alone; a row with NaN
    gets valid ids and NaN weights. Raises TypeError or ValueError naming the argument.

    Source: `InklingTopkRouter` of transformers 5.17.
    """
    if num_shared < 0:
        raise ValueError(f"num_shared: expected at least 0, got {num_shared}")
    device = x_T_D.device if isinstance(x_T_D, Tensor) else None
    dims = Dims(Z=num_shared, K=top_k)
    dims.check(x_T_D=x_T_D, dtype=ACTIVATIONS)
    dims.check(weight_A_D=weight_A_D, dtype=(torch.float32, x_T_D.dtype), device=device)
    dims.check(bias_E=bias_E, global_scale_1=global_scale_1, dtype=torch.float32, device=device)
    if dims["A"] != dims["E"] + num_shared:
        raise ValueError(
            f"weight_A_D: expected A = E + num_shared = {dims['E']} + {num_shared} rows, "
            f"got {dims['A']}"
        )
    if not 0 < top_k <= dims["E"]:
        raise ValueError(f"top_k: expected 1..{dims['E']}, got {top_k}")
    if out is None:
        out = Routing(
            x_T_D.new_empty(dims["T"], top_k, dtype=torch.int32),
            x_T_D.new_empty(dims["T"], top_k, dtype=torch.float32),
            x_T_D.new_empty(dims["T"], num_shared, dtype=torch.float32),
        )
    else:
        dims.check(expert_T_K=out.expert_T_K, dtype=torch.int32, device=device)
        dims.check(weight_T_K=out.weight_T_K, dtype=torch.float32, device=device)
        dims.check(shared_weight_T_Z=out.shared_weight_T_Z, dtype=torch.float32, device=device)
    refuse_grad(x_T_D, weight_A_D, bias_E, global_scale_1)
    if dims["T"] > 0:
        _op(x_T_D, weight_A_D, bias_E, global_scale_1, scale, *out)
    return out
