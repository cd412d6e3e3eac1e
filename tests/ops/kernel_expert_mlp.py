"""How tests of fused_moe call it, its kernels and its oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tml_kernels._routing import Routing, choose_blocking
from tml_kernels.ops.expert_mlp import workspace_bytes
from tml_kernels.ops.expert_mlp.launch import launch_expert_mlp
from tml_kernels.ops.expert_mlp.reference import fused_moe_ref
from tml_kernels.ops.route.reference import schedule_ref


def expected(inputs: dict[str, Any], **more: Any) -> Tensor:
    routing = inputs["routing"]
    return fused_moe_ref(
        inputs["x"], inputs["weights"], routing.expert_T_K, routing.weight_T_K,
        routing.shared_weight_T_Z, inv_rms_T=routing.inv_rms_T,
        activation=inputs["activation"], **more,
    )  # fmt: skip


def rows(inputs: dict[str, Any], index: Any) -> dict[str, Any]:
    """The same call for some of the tokens."""
    r = inputs["routing"]
    parts = (r.expert_T_K, r.weight_T_K, r.shared_weight_T_Z)
    inv_rms_T = None if r.inv_rms_T is None else r.inv_rms_T[index].contiguous()
    parts = (part[index].contiguous() for part in parts)
    routing = Routing(*parts, r.num_experts, inv_rms_T=inv_rms_T)
    return inputs | {"x": inputs["x"][index].contiguous(), "routing": routing}


def scheduled(inputs: dict[str, Any]) -> dict[str, Any]:
    """With the schedule that the router makes on CUDA, where there is one for so many tokens."""
    r = inputs["routing"]
    blocking = choose_blocking(*r.expert_T_K.shape, r.num_experts)
    if not blocking.scheduled:
        return inputs
    schedule = schedule_ref(r.expert_T_K, r.num_experts, blocking)
    return inputs | {"routing": replace(r, schedule=schedule)}


def launch(
    inputs: dict[str, Any], expert_map: Tensor | None = None, quantize_x: bool = False
) -> Tensor:
    x, weights, routing = inputs["x"], inputs["weights"], inputs["routing"]
    out = torch.full_like(x, float("nan"))
    size = workspace_bytes(weights, x.shape[0], routing.expert_T_K.shape[1], x.dtype)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=x.device)
    if x.shape[0] > 0:
        launch_expert_mlp(
            x, weights, routing, expert_map, inputs["activation"], quantize_x, out, workspace
        )
    return out
