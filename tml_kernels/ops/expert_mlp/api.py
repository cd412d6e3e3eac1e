"""expert_mlp: check, choose, launch."""

# Dimension key: T tokens, D model width, E routed experts, Z shared experts, F expert width,
# J = 2 F interleaved gate and up rows, K experts chosen per token.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._registry import refuse_grad, register_op
from ...precision import ACTIVATIONS
from .reference import expert_mlp_ref


def _plain(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    expert: Tensor,
    weight: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    shared_weight: Tensor | None,
    out: Tensor,
) -> None:
    result = expert_mlp_ref(
        x,
        w13,
        w2,
        expert,
        weight,
        shared_w13_Z_J_D=shared_w13,
        shared_w2_Z_D_F=shared_w2,
        shared_weight_T_Z=shared_weight,
        dtype=torch.float32,
    )
    out.copy_(result)


_op = register_op(
    "expert_mlp(Tensor x, Tensor w13, Tensor w2, Tensor expert, Tensor weight, "
    "Tensor? shared_w13, Tensor? shared_w2, Tensor? shared_weight, Tensor(a!) out) -> ()",
    plain=_plain,
)


def expert_mlp(
    x_T_D: Tensor,
    w13_E_J_D: Tensor,
    w2_E_D_F: Tensor,
    expert_T_K: Tensor,
    weight_T_K: Tensor,
    *,
    shared_w13_Z_J_D: Tensor | None = None,
    shared_w2_Z_D_F: Tensor | None = None,
    shared_weight_T_Z: Tensor | None = None,
    out_T_D: Tensor | None = None,
) -> Tensor:
    """Each token through its K experts and all shared ones, combined by weight.

    out[t] = sum over k = 0..K-1, in that order, of weight[t, k] * w2[e] (silu(g) * u) with
    e = expert[t, k] and (g, u) the even and odd rows of w13[e] x[t]; then the shared experts in
    order. Ids outside 0..E-1 are skipped, whatever their weight holds. An expert without tokens is
    not read. The three shared arguments come together or not at all.

    x, out: [T, D], float32, bfloat16 or float16, distinct; all four weight tensors of one dtype,
    float32 or x's; expert: int32; weight, shared_weight: float32. Accumulates in float32 and rounds
    once. Deterministic; row t depends on row t, its ids and weights alone, not on which other
    tokens share its experts. Raises TypeError or ValueError naming the argument.

    Source: `InklingExperts` and `InklingSharedExperts` of transformers 5.17, w13 interleaved.
    """
    dims = Dims()
    dims.check(x_T_D=x_T_D, dtype=ACTIVATIONS)
    device = x_T_D.device
    dims.check(w13_E_J_D=w13_E_J_D, dtype=(torch.float32, x_T_D.dtype), device=device)
    dims.check(w2_E_D_F=w2_E_D_F, dtype=w13_E_J_D.dtype, device=device)
    if dims["J"] != 2 * dims["F"]:
        raise ValueError(
            f"w13_E_J_D: expected J = 2 F = {2 * dims['F']} interleaved rows, got J={dims['J']}"
        )
    dims.check(expert_T_K=expert_T_K, dtype=torch.int32, device=device)
    if dims["K"] == 0:
        raise ValueError("expert_T_K: expected K of at least 1, got 0")
    dims.check(weight_T_K=weight_T_K, dtype=torch.float32, device=device)
    shared = {
        "shared_w13_Z_J_D": shared_w13_Z_J_D,
        "shared_w2_Z_D_F": shared_w2_Z_D_F,
        "shared_weight_T_Z": shared_weight_T_Z,
    }
    missing = [name for name, tensor in shared.items() if tensor is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"{missing[0]}: missing; the shared experts need all of {list(shared)}")
    if shared_w13_Z_J_D is not None and shared_w2_Z_D_F is not None:
        dims.check(shared_w13_Z_J_D=shared_w13_Z_J_D, dtype=w13_E_J_D.dtype, device=device)
        dims.check(shared_w2_Z_D_F=shared_w2_Z_D_F, dtype=w13_E_J_D.dtype, device=device)
    if shared_weight_T_Z is not None:
        dims.check(shared_weight_T_Z=shared_weight_T_Z, dtype=torch.float32, device=device)
    if out_T_D is None:
        out_T_D = torch.empty_like(x_T_D)
    else:
        dims.check(out_T_D=out_T_D, dtype=x_T_D.dtype, device=device)
    refuse_grad(x_T_D, w13_E_J_D, w2_E_D_F, weight_T_K, *shared.values())
    if dims["T"] > 0:
        _op(x_T_D, w13_E_J_D, w2_E_D_F, expert_T_K, weight_T_K, *shared.values(), out_T_D)
    return out_T_D
