"""transformers' experts on `fused_moe`: experts_implementation="tml"."""

# Dimension key: T tokens, D model width, E experts, F expert width, J = 2F gate and up rows,
# R rows of one matrix, K experts chosen per token.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...moe import fused_moe, moe_route
from ...moe_weights import ORDERS, CheckpointScales, MoEWeights, prepare_moe_weights
from ...ops.expert_mlp.configs import ACTIVATIONS
from ...ops.expert_mlp.reference import activate, split_gate_up
from .._arguments import PLAIN
from .names import NAME

_KEPT = "_tml_prepared"  # attribute of a module
_INSTEAD = 'use experts_implementation="grouped_mm"'


@torch.compiler.disable  # looks at addresses and versions, which a trace does not have
def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of an experts module: [T, D].

    self: any module under transformers' `use_experts_implementation` with a gate, its weights in
    float32, bfloat16 or float16, or an `FP8Experts`. hidden_states: [T, D]. top_k_index: [T, K],
    int32 or int64; ids outside 0..E-1 are skipped. top_k_weights: [T, K], converted to float32.

    The first call looks at the weights and keeps them, prepared, on the module: plain [E, J, D] as
    they are; stored [E, K, N] (gpt-oss) or in fp8 as a copy in another layout, so that such experts
    take their memory twice. A moved, replaced or rewritten parameter is noticed at the next call;
    what was kept holds the old one's memory until then, so that weights offloaded between calls are
    not freed. A write through `.data`, or to a
    tensor made in inference mode, is not noticed. fp8 weights are multiplied as stored, by
    activations that are not rounded to fp8, unlike transformers' own.

    Accuracy and determinism are those of `fused_moe`. The first call synchronises; run it once
    before a capture. torch.compile breaks its graph here. Raises NotImplementedError for what is
    not served, RuntimeError in training.
    """
    _refuse_training(self, hidden_states, top_k_weights)
    prepared = _prepared(self)
    routing = moe_route(
        expert_T_K=top_k_index.contiguous(),
        weight_T_K=top_k_weights.float().contiguous(),
        # Not the module's own number, which expert parallelism may leave at that of all devices.
        num_experts=prepared.weights.num_experts,
    )
    return fused_moe(
        hidden_states.contiguous(), prepared.weights, routing, activation=prepared.activation
    )


def _refuse_training(module: Any, *inputs: Tensor) -> None:
    if torch.is_grad_enabled():
        tensors = (*inputs, *module.parameters(recurse=False))
        if any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                f'{type(module).__name__}: experts_implementation="{NAME}" is for inference and '
                f"has no backward: call under torch.no_grad(); to train, {_INSTEAD}"
            )


@dataclass(frozen=True)
class _Prepared:
    """What a module keeps. `sources` are its tensors at that time, held so that no other can take
    their addresses; `stamps` tell whether they still are the module's."""

    sources: tuple[Tensor, ...]
    stamps: tuple[Any, ...]
    weights: MoEWeights
    activation: str


def _prepared(module: Any) -> _Prepared:
    if not module.has_gate:
        raise NotImplementedError(
            f"{type(module).__name__}: has experts without a gate; {_INSTEAD}"
        )
    names = ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"]
    names += ["gate_up_proj_scale_inv", "down_proj_scale_inv"]
    if getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(
            f"{type(module).__name__}: normalises each expert's output; {_INSTEAD}"
        )
    sources = {name: getattr(module, name, None) for name in names}
    sources = {name: tensor for name, tensor in sources.items() if tensor is not None}
    stamps = tuple(_stamp(tensor) for tensor in sources.values())
    kept = module.__dict__.get(_KEPT)
    if kept is not None and kept.stamps == stamps:
        return kept
    # Gone before its successor is made: there may be no room for both.
    module.__dict__.pop(_KEPT, None)
    del kept
    order, activation = _gate_of(module)
    weights = _weights_of(module, order, sources)
    held = tuple(tensor.detach() for tensor in sources.values())
    made = module.__dict__[_KEPT] = _Prepared(held, stamps, weights, activation)
    return made


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return tensor.data_ptr(), version, *layout


def _weights_of(module: Any, order: str, sources: dict[str, Tensor]) -> MoEWeights:
    w13, w2 = sources["gate_up_proj"], sources["down_proj"]
    if w13.dtype in PLAIN:
        precision, scales = PLAIN[w13.dtype].name, None
    elif w13.dtype == torch.float8_e4m3fn:
        precision = _fp8_precision(module)
        scales = CheckpointScales(
            _fp8_scale(precision, w13, sources["gate_up_proj_scale_inv"]),
            _fp8_scale(precision, w2, sources["down_proj_scale_inv"]),
        )
    else:
        raise NotImplementedError(
            f"{type(module).__name__}.gate_up_proj: has dtype {w13.dtype}, expected "
            f"{', '.join(map(str, PLAIN))} or torch.float8_e4m3fn; {_INSTEAD}"
        )
    return prepare_moe_weights(
        w13,
        w2,
        layout=order + ("_kn" if getattr(module, "is_transposed", False) else ""),
        precision=precision,
        scales=scales,
        bias13=sources.get("gate_up_proj_bias"),
        bias2=sources.get("down_proj_bias"),
        inplace=False,
    )


def _fp8_precision(module: Any) -> str:
    block = module.block_size
    if block is None:
        return "fp8_channel"
    if tuple(block) != (128, 128):
        raise NotImplementedError(
            f"{type(module).__name__}.block_size: expected [128, 128] or None, got {block}; "
            f"{_INSTEAD}"
        )
    return "fp8"


def _fp8_scale(precision: str, weights_E_R_D: Tensor, scale: Tensor) -> Tensor:
    """float32, one for each block or row. Without blocks, transformers keeps one for each of gate
    and up, [E, 2, 1], and one for down, [E, 1, 1]."""
    scale = scale.detach().float()
    if precision == "fp8_channel":
        scale = scale.repeat_interleave(weights_E_R_D.shape[1] // scale.shape[1], dim=1)
    return scale.contiguous()


@torch.no_grad()
def _gate_of(module: Any) -> tuple[str, str]:
    """(order of the gate and up rows, activation): those that give what the module's own
    `_apply_gate` does, on values to 10^4 in float64. Asking it, not its name, takes every model's
    clamps and constants into account."""
    # [E, D, J] has as many numbers as [E, J, D], so J is what D leaves.
    down = module.down_proj
    width = 2 * down.shape[1 if getattr(module, "is_transposed", False) else 2]
    rows = -(-4096 // width)
    golden = (5.0**0.5 - 1.0) / 2.0
    spread = torch.arange(rows * width, dtype=torch.float64, device=down.device) * golden % 1.0
    y_T_J = (1e4 * (2.0 * spread - 1.0) ** 5).view(rows, width)
    own = module._apply_gate(y_T_J)
    for order in ORDERS:
        for activation in ACTIVATIONS:
            if torch.allclose(own, activate(*split_gate_up(y_T_J, order), activation), 1e-6, 1e-6):
                return order, activation
    act, gate = getattr(module, "act_fn", None), type(module)._apply_gate.__qualname__
    name = gate if act is None else f"{type(act).__name__} in {gate}"
    raise NotImplementedError(
        f"{type(module).__name__}: its activation, {name}, is none of {', '.join(ACTIVATIONS)}; "
        f"{_INSTEAD}"
    )
