"""expert_mlp: the weights of every touched expert are streamed once."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, F expert width,
# J = 2 F interleaved gate and up rows, K experts chosen per token, A = T * K assignments.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.expert_mlp import cases, expert_mlp
from tml_kernels.ops.expert_mlp.reference import expert_mlp_ref
from tml_kernels.testing import assert_matches

from .harness import OpBench, Variant
from .peers import find

MAX_GATHERED = 96  # assignments whose weights are gathered: 5 GB at the model's widths


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    assert_matches(expert_mlp(**inputs), expert_mlp_ref(**inputs), dtype=case.dtype)


def swiglu(y: Tensor) -> Tensor:
    return F.silu(y[..., 0::2]) * y[..., 1::2]


def add_shared(
    out_T_D: Tensor,
    x_T_D: Tensor,
    shared_w13_Z_J_D: Tensor | None,
    shared_w2_Z_D_F: Tensor | None,
    shared_weight_T_Z: Tensor | None,
) -> Tensor:
    if shared_w13_Z_J_D is None or shared_w2_Z_D_F is None or shared_weight_T_Z is None:
        return out_T_D
    x_Z_T_D = x_T_D.expand(shared_w13_Z_J_D.shape[0], -1, -1)
    y_Z_T_D = torch.bmm(swiglu(torch.bmm(x_Z_T_D, shared_w13_Z_J_D.mT)), shared_w2_Z_D_F.mT)
    return out_T_D + (y_Z_T_D * shared_weight_T_Z.T[..., None]).sum(0).to(out_T_D.dtype)


def gather_bmm(
    x_T_D: Tensor,
    w13_E_J_D: Tensor,
    w2_E_D_F: Tensor,
    expert_T_K: Tensor,
    weight_T_K: Tensor,
    **shared: Any,
) -> Tensor:
    """A copy of its weights for every assignment; valid ids only."""
    expert_A = expert_T_K.flatten()
    if expert_A.numel() > MAX_GATHERED:
        raise NotImplementedError(f"{expert_A.numel()} assignments, over {MAX_GATHERED}")
    x_A_D = x_T_D.repeat_interleave(expert_T_K.shape[1], dim=0)
    h_A_F = swiglu(torch.bmm(w13_E_J_D[expert_A], x_A_D[..., None])[..., 0])
    y_A_D = torch.bmm(w2_E_D_F[expert_A], h_A_F[..., None])[..., 0]
    y_T_K_D = y_A_D.view(*expert_T_K.shape, -1) * weight_T_K[..., None]
    return add_shared(y_T_K_D.sum(1).to(x_T_D.dtype), x_T_D, **shared)


def torch_grouped_mm() -> Variant:
    grouped_mm = find("torch.nn.functional", "grouped_mm")

    def run(
        x_T_D: Tensor,
        w13_E_J_D: Tensor,
        w2_E_D_F: Tensor,
        expert_T_K: Tensor,
        weight_T_K: Tensor,
        **shared: Any,
    ) -> Tensor:
        """Assignments sorted by expert, one grouped product for each of the two weights."""
        num_experts, top_k = w13_E_J_D.shape[0], expert_T_K.shape[1]
        expert_A, order_A = expert_T_K.flatten().sort(stable=True)
        ids = torch.arange(num_experts, dtype=expert_A.dtype, device=expert_A.device)
        ends_E = torch.searchsorted(expert_A, ids, right=True).int()
        h_A_F = swiglu(grouped_mm(x_T_D[order_A // top_k], w13_E_J_D.mT, offs=ends_E))
        y_A_D = grouped_mm(h_A_F, w2_E_D_F.mT, offs=ends_E)
        weighted = y_A_D * weight_T_K.flatten()[order_A, None]
        out_T_D = torch.zeros_like(x_T_D, dtype=torch.float32)
        out_T_D.index_add_(0, order_A // top_k, weighted)
        return add_shared(out_T_D.to(x_T_D.dtype), x_T_D, **shared)

    return Variant(run)


OP = OpBench(
    name="expert_mlp",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(expert_mlp), "gather + bmm": Variant(gather_bmm)},
    peers={"torch grouped_mm": torch_grouped_mm},
)
