"""The oracle of expert_mlp, and its plain path: the same lines in float64 and in float32."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, F expert width,
# J = 2 F interleaved gate and up rows, K experts chosen per token, A = T * K assignments.

from __future__ import annotations

import torch
from torch import Tensor

from ..._plain import row_blocked_matmul
from ..._pointwise import swiglu


def _mlp(x_T_D: Tensor, w13_J_D: Tensor, w2_D_F: Tensor) -> Tensor:
    h_T_F = swiglu(row_blocked_matmul(x_T_D, w13_J_D.to(x_T_D.dtype)))
    return row_blocked_matmul(h_T_F, w2_D_F.to(x_T_D.dtype))


def expert_mlp_ref(
    x_T_D: Tensor,
    w13_E_J_D: Tensor,
    w2_E_D_F: Tensor,
    expert_T_K: Tensor,
    weight_T_K: Tensor,
    *,
    shared_w13_Z_J_D: Tensor | None = None,
    shared_w2_Z_D_F: Tensor | None = None,
    shared_weight_T_Z: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """out_T_D in `dtype`: sum over k of weight[t, k] * mlp(expert[t, k], x[t]), then the shared.

    mlp(e, x) = w2[e] (silu(g) * u), (g, u) = the even and odd rows of w13[e] x. Only experts with
    a token are read; ids outside 0..E-1 contribute nothing.
    """
    (num_tokens, top_k), num_experts = expert_T_K.shape, w13_E_J_D.shape[0]
    x_T_D = x_T_D.to(dtype)
    out_T_D = torch.zeros_like(x_T_D)

    expert_A = expert_T_K.reshape(-1).long()
    skipped_A = (expert_A < 0) | (expert_A >= num_experts)
    expert_A = expert_A.masked_fill(skipped_A, num_experts)
    *counts, num_skipped = torch.bincount(expert_A, minlength=num_experts + 1).tolist()
    order_A = torch.argsort(expert_A, stable=True)[: expert_A.shape[0] - num_skipped]
    x_A_D = x_T_D[order_A // top_k]
    y_A_D = x_T_D.new_zeros(num_tokens * top_k, x_T_D.shape[1])
    begin = 0
    for expert_idx, count in enumerate(counts):
        if count > 0:
            rows = slice(begin, begin + count)
            y_A_D[order_A[rows]] = _mlp(x_A_D[rows], w13_E_J_D[expert_idx], w2_E_D_F[expert_idx])
            begin += count

    # A skipped assignment adds an exact zero, even when its weight is NaN.
    weight_A = weight_T_K.to(dtype).reshape(-1).masked_fill(skipped_A, 0.0)
    y_T_K_D = (y_A_D * weight_A[:, None]).view(num_tokens, top_k, x_T_D.shape[1])
    for k in range(top_k):
        out_T_D += y_T_K_D[:, k]
    if shared_w13_Z_J_D is not None:
        assert shared_w2_Z_D_F is not None and shared_weight_T_Z is not None
        for z in range(shared_w13_Z_J_D.shape[0]):
            y_T_D = _mlp(x_T_D, shared_w13_Z_J_D[z], shared_w2_Z_D_F[z])
            out_T_D += y_T_D * shared_weight_T_Z[:, z : z + 1].to(dtype)
    return out_T_D
