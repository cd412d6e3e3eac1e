"""Other people's expert kernels, as bench_expert_mlp times them: weights [gate; up], valid ids.

Written against transformers 5.17 and 5.23, flag-gems 5.0.2, humming-kernels 0.1.10 and vllm 0.26.
A peer that is not installed, or that changed, is named with the reason and left out.
"""

# Dimension key: T tokens, D model width, E experts, F expert width, J = 2 F gate and up rows,
# R rows and C columns of a matrix, K experts chosen per token, A = T * K assignments, B blocks of
# N assignments.

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.moe_weights import MoEWeights
from tml_kernels.ops.route import Routing
from tml_kernels.quant import PackedExperts
from tml_kernels.quant.pack import unpack_scales, unpack_words

from .harness import Variant
from .peers import find

# (x_T_D, w13_E_J_D, w2_E_D_F, expert_T_K, weight_T_K) -> out_T_D
Routed = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Matmul = Callable[..., Tensor]


def swiglu(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain(weights: MoEWeights, activation: str) -> tuple[Tensor, Tensor]:
    """(w13_E_J_D, w2_E_D_F) as peers take them. NotImplementedError for anything else: on
    dequantised weights they would move other bytes and be timed twice."""
    names = {weights.w13.format.name, weights.w2.format.name}
    if weights.w13.format.packed or weights.w2.format.packed:
        raise NotImplementedError(f"takes plain weights, these are {', '.join(sorted(names))}")
    _check_traits(weights, activation)
    return weights.w13.data, weights.w2.data


def _check_traits(weights: MoEWeights, activation: str) -> None:
    traits = (weights.order, activation, weights.bias13_E_J is None and weights.bias2_E_D is None)
    if traits != ("gate_up", "silu", True):
        raise NotImplementedError(f"takes [gate; up] with silu and no bias, not {traits}")


def _check_format(weights: MoEWeights, activation: str, name: str) -> None:
    _check_traits(weights, activation)
    if {weights.w13.format.name, weights.w2.format.name} != {name} or weights.shared is not None:
        raise NotImplementedError(f"takes routed {name} weights alone")


@dataclass
class _Experts:
    """What a module of transformers has for its expert functions."""

    gate_up_proj: Tensor
    down_proj: Tensor
    num_experts: int
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    has_post_expert_norm: bool = False  # this and the next: 5.23 asks
    _is_expert_parallel: bool = False

    def _apply_gate(self, y: Tensor) -> Tensor:
        return swiglu(y)


def transformers_experts(name: str) -> Routed:
    forward = find("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS")[name]

    def routed(x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return forward(_Experts(w13, w2, w13.shape[0]), x, expert, weight)

    return routed


def flag_gems_experts() -> Routed:
    """vLLM's Triton kernels with flag-gems' configurations."""
    experts = find("flag_gems.fused", "outplace_fused_experts")

    def routed(x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return experts(x, w13, w2, weight, expert)

    return routed


def flag_gems_fp8() -> Variant:
    """The same in fp8 with scales of 128 x 128 weights; activations are rounded to fp8 too."""
    experts = find("flag_gems.fused", "outplace_fused_experts")

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        weights, routing = inputs["weights"], inputs["routing"]
        _check_format(weights, inputs["activation"], "fp8")
        return {
            "hidden_states": inputs["x"],
            "w1": _e4m3(weights.w13),
            "w2": _e4m3(weights.w2),
            "topk_weights": routing.weight_T_K,
            "topk_ids": routing.expert_T_K,
            "use_fp8_w8a8": True,
            "w1_scale": weights.w13.scale,
            "w2_scale": weights.w2.scale,
            "block_shape": [128, 128],
        }

    return Variant(experts, prepare)


def vllm_experts() -> Routed:
    experts = find("vllm.model_executor.layers.fused_moe", "fused_experts")

    def routed(x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return experts(x, w13, w2, weight, expert)

    return routed


def _codes(packed: PackedExperts, expert: int) -> Tensor:
    """uint8 [R, C]."""
    return unpack_words(packed.data[expert], packed.format, packed.num_columns)


def _e4m3(packed: PackedExperts) -> Tensor:
    shape = (packed.num_experts, packed.num_rows, packed.num_columns)
    out_E_R_C = torch.empty(shape, dtype=torch.float8_e4m3fn, device=packed.device)
    for expert in range(packed.num_experts):
        out_E_R_C[expert] = _codes(packed, expert).view(torch.float8_e4m3fn)
    return out_E_R_C


@dataclass(frozen=True)
class _Indexed:
    """Assignments by expert, each expert's filled up to whole blocks, as an indexed product of
    humming takes them."""

    sorted_ids: Tensor  # int32 [B * N], A where a place is empty
    expert_ids: Tensor  # int32 [B]
    num_tokens_padded: Tensor  # int32 [1], B * N


def align(expert_T_K: Tensor, block_size: int) -> _Indexed:
    """Blocks of `block_size` assignments. On the CPU: ids [[2, 0], [2, 1]] in blocks of 2 give
    sorted_ids [1, 4, 3, 4, 0, 2] of experts [0, 1, 2]."""
    expert_A = expert_T_K.flatten().cpu()
    blocks, experts = [], []
    for expert in expert_A.unique().tolist():
        ids = (expert_A == expert).nonzero()[:, 0].int()
        blocks.append(F.pad(ids, (0, -len(ids) % block_size), value=len(expert_A)))
        experts += [expert] * (len(blocks[-1]) // block_size)
    sorted_ids = torch.cat(blocks)
    device = expert_T_K.device
    return _Indexed(
        sorted_ids.to(device),
        torch.tensor(experts, dtype=torch.int32, device=device),
        torch.tensor([len(sorted_ids)], dtype=torch.int32, device=device),
    )


def humming_int4() -> Variant:
    """Two indexed products of humming's layers and its weighted sum; the blocks are made outside
    of the timed call, as our schedule is."""
    layer_type = find("humming.layer", "HummingLayer")
    method = find("humming.layer", "HummingMethod")
    pack_weight = find("humming.ops", "pack_weight")
    weighted_sum = find("humming.ops", "moe_fused_mul_sum")

    def make_layer(packed: PackedExperts) -> Any:
        with torch.device(packed.device):
            layer = layer_type(
                shape_n=packed.num_rows,
                shape_k=packed.num_columns,
                weight_config={"dtype": "int4", "group_size": 128},
                num_experts=packed.num_experts,
                torch_dtype=torch.bfloat16,
            )
        experts = range(packed.num_experts)
        weight = torch.stack([pack_weight(_codes(packed, e).int(), 4) for e in experts])
        scale = torch.stack([unpack_scales(packed, e).scale for e in experts])
        layer.load_from_tensors({"weight": weight, "weight_scale": scale})
        layer.transform()
        return layer

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        weights, routing = inputs["weights"], inputs["routing"]
        _check_format(weights, inputs["activation"], "int4")
        rows = routing.expert_T_K.numel()
        layers = [make_layer(weights.w13), make_layer(weights.w2)]
        tuning = [method.get_default_tuning_configs(m, gemm_type="indexed") for m in layers]
        fitting = [c for ranges in tuning for low, high, c in ranges if low < rows <= high]
        sizes = {config["block_shape"][0] for config in fitting}
        if len(sizes) != 1:
            raise NotImplementedError(f"both products take one block size, these take {sizes}")
        options = vars(align(routing.expert_T_K, sizes.pop())) | {"valid_shape_m": rows}
        options["compute_config"] = json.dumps({"use_f16_accum": False, "gemm_type": "indexed"})
        calls = [
            functools.partial(layer, tuning_config=json.dumps(ranges), **options)
            for layer, ranges in zip(layers, tuning, strict=True)
        ]
        return {"x": inputs["x"], "routing": routing, "gate_up": calls[0], "down": calls[1]}

    activate = torch.compile(swiglu, dynamic=False)

    def run(x: Tensor, routing: Routing, gate_up: Matmul, down: Matmul) -> Tensor:
        top_k = routing.expert_T_K.shape[1]
        y_A_D = down(activate(gate_up(x, top_k=top_k)), top_k=1)
        return weighted_sum(y_A_D.view(len(x), top_k, -1), routing.weight_T_K)

    return Variant(run, prepare)
