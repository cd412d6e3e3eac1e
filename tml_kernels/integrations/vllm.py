"""vLLM's `fused_experts`, argument for argument, on `fused_moe`. Needs no vLLM."""

# Dimension key: T tokens, D model width, E experts here, G experts of all devices together,
# F expert width, K experts chosen per token.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dims import Dims
from ..moe import fused_moe, moe_route
from ..ops.expert_mlp.reference import OAI_ALPHA, OAI_LIMIT
from ..precision import ACTIVATIONS as DTYPES
from ._arguments import plain_experts, refuse

# vLLM's name: order of w1's rows, and ours. Its "swigluoai" reads gate and up from even and odd
# columns, as gpt-oss stores them.
ACTIVATIONS = {
    "silu": ("gate_up", "silu"),
    "gelu": ("gate_up", "gelu"),
    "gelu_tanh": ("gate_up", "gelu_tanh"),
    "swigluoai": ("interleaved", "swiglu_oai"),
    "swigluoai_uninterleave": ("gate_up", "swiglu_oai"),
}
_QUANTISED = ("quant_dtype", "w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale")


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    inplace: bool = False,
    activation: Any = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    quant_config: Any = None,
    allow_deep_gemm: bool = False,
) -> Tensor:
    """Each token through its chosen experts: [T, D], in hidden_states itself if `inplace`.

    hidden_states: [T, D], float32, bfloat16 or float16. w1: [E, 2F, D], F gates, then F ups, but
    for "swigluoai", which wants them interleaved; w2: [E, D, F], the same dtype. topk_weights:
    [T, K], float32 (others are converted). topk_ids: [T, K], int32 or int64; ids outside the
    experts, -1 above all, are skipped. activation: a name of `ACTIVATIONS`, or vLLM's enum.
    apply_router_weight_on_input: for K = 1, multiplies the token and not the result, rounded to its
    dtype. expert_map: [G] int32, row of w1 for each global id, -1 where it is elsewhere;
    global_num_experts is then G or -1. quant_config: vLLM's, or None; of it come the biases
    w1_bias [E, 2F] and w2_bias [E, D], and the constants without which there is no
    "swigluoai_uninterleave". allow_deep_gemm chooses a kernel of vLLM's, and none here.

    Accuracy and determinism are those of `fused_moe`. Safe to capture: nothing synchronises.
    Raises TypeError or ValueError naming the argument; NotImplementedError for what vLLM takes and
    this does not: quantised weights (use `prepare_moe_weights` and `fused_moe`), an activation
    without gate, other constants of "swigluoai", biases with apply_router_weight_on_input.

    Source: `fused_experts` in vLLM's model_executor/layers/fused_moe/fused_moe.py.
    """
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace: expected a bool, got {inplace!r}; give activation by its name")
    order, name = _activation(activation)
    if order == "gate_up" and name == "swiglu_oai":
        _check_constants(quant_config)
    bias1, bias2 = _biases(quant_config, name)
    weights = plain_experts(
        w1, w2, bias1, bias2, names=("w1", "w2", "quant_config.w1_bias", "quant_config.w2_bias"),
        order=order,
    )  # fmt: skip
    dims = Dims(D=weights.width)
    dims.check(hidden_states_T_D=hidden_states, dtype=DTYPES, device=w1.device)
    dims.check(topk_ids_T_K=topk_ids, dtype=(torch.int32, torch.int64), device=w1.device)
    dims.check(topk_weights_T_K=topk_weights, dtype=DTYPES, device=w1.device)
    num_experts = _num_experts(weights.num_experts, global_num_experts, expert_map)

    x, weight = hidden_states, topk_weights.float()
    if apply_router_weight_on_input:
        if dims["K"] != 1:
            raise ValueError(f"apply_router_weight_on_input: needs K = 1, got K={dims['K']}")
        refuse(**{"quant_config.w1_bias": (bias1, None), "quant_config.w2_bias": (bias2, None)})
        x, weight = (x.float() * weight).to(x.dtype), torch.ones_like(weight)
    routing = moe_route(expert_T_K=topk_ids, weight_T_K=weight, num_experts=num_experts)
    out = fused_moe(x, weights, routing, activation=name, expert_map=expert_map)
    return hidden_states.copy_(out) if inplace else out


def _activation(activation: Any) -> tuple[str, str]:
    name = getattr(activation, "value", activation)
    if name not in ACTIVATIONS:
        raise NotImplementedError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}"
        )
    return ACTIVATIONS[name]


def _check_constants(config: Any) -> None:
    """vLLM has no defaults for this activation's: models differ in them."""
    for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"):
        if getattr(config, name, None) is None:
            raise ValueError(f"quant_config.{name}: 'swigluoai_uninterleave' needs it, got None")


def _biases(config: Any, activation: str) -> tuple[Tensor | None, Tensor | None]:
    oai = activation == "swiglu_oai"
    served = dict.fromkeys(_QUANTISED) | {
        "gemm1_alpha": OAI_ALPHA if oai else 1.0,
        "gemm1_beta": 1.0 if oai else 0.0,
        "gemm1_clamp_limit": OAI_LIMIT if oai else None,
    }
    given = {name: getattr(config, name, None) for name in served}
    refuse(
        **{
            f"quant_config.{name}": (value, served[name])
            for name, value in given.items()
            if value is not None
        }
    )
    return getattr(config, "w1_bias", None), getattr(config, "w2_bias", None)


def _num_experts(here: int, everywhere: int, expert_map: Tensor | None) -> int:
    if expert_map is not None:
        Dims().check(expert_map_G=expert_map, dtype=torch.int32)
    expected = here if expert_map is None else expert_map.shape[0]
    if everywhere not in (-1, expected):
        rows = "w1" if expert_map is None else "expert_map"
        raise ValueError(f"global_num_experts: {rows} has {expected} experts, got {everywhere}")
    return expected
