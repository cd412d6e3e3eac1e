"""fused_moe in two calls, for ranks that share the rows of every expert.

`expert_hidden` gives one rank's hidden columns, `expert_sum` one rank's model columns; each is then
gathered from all ranks. No product is cut along its sum, so the bits are those of `fused_moe`.
"""

# Dimension key: T tokens, D model width, K experts chosen per token, S slots of a token (chosen and
# shared), F expert width.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dims import Dims
from ..._registry import refuse_grad, register_op
from ..._routing import Routing, check_schedule
from ...moe_weights import MoEWeights
from ...precision import ACTIVATIONS as DTYPES
from .api import SCHEMA, Call, check_activation, check_types, flatten
from .configs import BLOCK_M, kernel_why_not
from .reference import expert_hidden_ref, expert_sum_ref


def _plain_hidden(*args: Any) -> None:
    call = Call(*args)
    call.out.copy_(
        expert_hidden_ref(
            call.x,
            call.weights(),
            call.expert,
            inv_rms_T=call.inv_rms,
            activation=call.activation,
            dtype=torch.float32,
        )
    )


def _plain_sum(*args: Any) -> None:
    call = Call(*args)
    call.out.copy_(
        expert_sum_ref(call.x.float(), call.weights(), call.expert, call.weight, call.shared_weight)
    )


def _kernel_hidden(*args: Any) -> None:
    from .launch import launch_gate_up

    call = Call(*args)
    weights = call.weights()
    # Without shared experts the kernel clears rows of no expert; here that is `expert_sum`'s part.
    nowhere = call.out if weights.num_shared else torch.empty_like(call.x)
    launch_gate_up(
        call.x, weights, call.routing(), None, call.activation, False, call.out,
        call.out.shape[2], call.expert, 0, nowhere,
    )  # fmt: skip


def _kernel_sum(*args: Any) -> None:
    from .launch import launch_down

    call = Call(*args)
    weights, (num_tokens, num_slots, hidden) = call.weights(), call.x.shape
    width = call.out.shape[1]
    if weights.num_shared == 0:
        call.out.zero_()
    part = call.x.new_empty(num_tokens * num_slots * width, dtype=torch.float32)
    counter = call.expert.new_zeros(num_tokens * -(-width // BLOCK_M))
    launch_down(call.x, hidden, weights, call.routing(), None, False, part, counter, call.out)


_hidden_op = register_op(f"expert_hidden{SCHEMA}", plain=_plain_hidden, kernel=_kernel_hidden)
_sum_op = register_op(f"expert_sum{SCHEMA}", plain=_plain_sum, kernel=_kernel_sum)


def expert_hidden(
    x: Tensor, weights: MoEWeights, routing: Routing, *, activation: str = "silu"
) -> Tensor:
    """[T, S, F / parts]: act(w13[e] x) of each token's slots, in this rank's hidden columns.

    x: [T, D], as `fused_moe` takes it with this routing; weights: whose w13 has one of `parts`
    equal parts of its hidden columns. The result has x's dtype on CUDA and float32 on a CPU, as
    between the launches of `fused_moe`. Slots of skipped ids hold anything. Raises TypeError or
    ValueError naming the argument.
    """
    check_types(weights, routing)
    check_activation(activation)
    dims = Dims(D=weights.width)
    dims.check(x_T_D=x, dtype=DTYPES)
    _check_weights(x, weights)
    _check_routing(routing, dims["T"], weights)
    slots = routing.expert_T_K.shape[1] + weights.num_shared
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    h = x.new_empty(dims["T"], slots, weights.w13.num_rows // 2, dtype=dtype)
    _call(_hidden_op, x, weights, routing, activation, h)
    return h


def expert_sum(
    h: Tensor, weights: MoEWeights, routing: Routing, *, dtype: torch.dtype | None = None
) -> Tensor:
    """[T, D / parts], in `dtype` (h's by default): what `fused_moe` gives in this rank's columns.

    h: [T, S, F], all columns of `expert_hidden`. weights: whose w2 has one of `parts` equal parts
    of its rows. Sums in float32, slots in their order, and rounds once. Raises TypeError or
    ValueError naming the argument.
    """
    check_types(weights, routing)
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    dims = Dims(F=weights.expert_width)
    dims.check(h_T_S_F=h, dtype=DTYPES)
    _check_weights(h, weights)
    _check_routing(routing, dims["T"], weights)
    if dims["S"] != routing.expert_T_K.shape[1] + weights.num_shared:
        raise ValueError(
            f"h_T_S_F: S={dims['S']}, but tokens have {routing.expert_T_K.shape[1]} experts and "
            f"{weights.num_shared} shared ones"
        )
    out = h.new_empty(dims["T"], weights.w2.num_rows, dtype=dtype or h.dtype)
    _call(_sum_op, h, weights, routing, "silu", out)
    return out


def _check_weights(x: Tensor, weights: MoEWeights) -> None:
    if weights.device != x.device:
        raise ValueError(f"weights: expected device {x.device}, got {weights.device}")
    shared = weights.shared
    if shared is not None and shared.expert_width != weights.expert_width:
        raise ValueError(
            f"weights: shared experts are {shared.expert_width} wide, the others "
            f"{weights.expert_width}; ranks share experts of one width"
        )
    if x.device.type == "cuda":
        for side in filter(None, (weights, shared)):
            for packed in (side.w13, side.w2):
                reason = kernel_why_not(x.dtype, packed)
                if reason is not None:
                    raise ValueError(f"weights: {reason}")


def _check_routing(routing: Routing, num_tokens: int, weights: MoEWeights) -> None:
    dims = Dims(T=num_tokens, Z=weights.num_shared)
    dims.check(expert_T_K=routing.expert_T_K, dtype=torch.int32, device=weights.device)
    dims.check(weight_T_K=routing.weight_T_K, dtype=torch.float32, device=weights.device)
    dims.check(
        shared_weight_T_Z=routing.shared_weight_T_Z, dtype=torch.float32, device=weights.device
    )
    if routing.inv_rms_T is not None:
        dims.check(inv_rms_T=routing.inv_rms_T, dtype=torch.float32, device=weights.device)
    sizes = (num_tokens, dims["K"], routing.num_experts)
    check_schedule("routing.schedule", routing.schedule, *sizes, weights.device)
    if routing.num_experts != weights.num_experts:
        raise ValueError(
            f"routing: made for num_experts={routing.num_experts}, but the weights hold "
            f"{weights.num_experts}"
        )


def _call(
    op: torch._ops.OpOverload,
    x: Tensor,
    weights: MoEWeights,
    routing: Routing,
    activation: str,
    out: Tensor,
) -> None:
    routed, names, sizes = flatten(weights)
    shared, shared_names, shared_sizes = flatten(weights.shared)
    refuse_grad(x, *routed, *shared, routing.weight_T_K)
    schedule = routing.schedule
    if out.numel() > 0:
        op(
            x, routed, names, sizes, shared, shared_names, shared_sizes,
            routing.expert_T_K, routing.weight_T_K, routing.shared_weight_T_Z, routing.inv_rms_T,
            None if schedule is None else schedule.buffer,
            0 if schedule is None else schedule.blocking.size,
            routing.num_experts, None, activation, False, out, None,
        )  # fmt: skip
