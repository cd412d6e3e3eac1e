"""rms_norm: check, choose, launch."""

# Dimension key: T tokens, D model width.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_eps
from ..._pages import quantize_ref
from ..._registry import refuse_grad, refuse_same, register_op
from ...precision import ACTIVATIONS
from .configs import MAX_WIDTH
from .reference import rms_norm_ref


def _plain(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    out: Tensor,
    out_scale: Tensor | None,
) -> None:
    result, total = rms_norm_ref(x, weight, eps=eps, residual_T_D=residual, dtype=torch.float32)
    if residual is not None:
        residual.copy_(total)
    if out_scale is not None:
        result, scale_T_1 = quantize_ref(result[:, None])
        result = result[:, 0]
        out_scale.copy_(scale_T_1[:, 0])
    out.copy_(result)


def _kernel(*args) -> None:
    from .kernel import launch_rms_norm

    launch_rms_norm(*args)


_op = register_op(
    "rms_norm(Tensor x, Tensor weight, Tensor(a!)? residual, float eps, Tensor(b!) out, "
    "Tensor(c!)? out_scale) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def rms_norm(
    x_T_D: Tensor,
    weight_D: Tensor,
    *,
    eps: float = 1e-6,
    residual_T_D: Tensor | None = None,
    out_T_D: Tensor | None = None,
    out_scale_T: Tensor | None = None,
) -> Tensor:
    """RMS normalisation of every row, after an optional residual addition.

    With `residual_T_D`, it is updated in place (residual += x, rounded once to its dtype) and the
    norm is that of the unrounded sum. Accumulates in float32 and rounds once. Deterministic, row t
    depends on row t alone. `out_T_D` may be `x_T_D`, not `residual_T_D`. Allocates only when
    `out_T_D` is None.

    x, residual, out: [T, D] of one dtype, float32, bfloat16 or float16, D <= 16384; weight: [D],
    float32 or x's dtype. With out_scale, float32 [T], the result is float8_e4m3fn, value = out *
    scale, and scale becomes amax / 448 of the row, 1 where that is zero. Raises TypeError or
    ValueError naming the argument.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4, with eps.
    """
    dims = Dims()
    dims.check(x_T_D=x_T_D, dtype=ACTIVATIONS)
    check_eps(eps)
    dims.check(weight_D=weight_D, dtype=(torch.float32, x_T_D.dtype), device=x_T_D.device)
    if dims["D"] == 0 or dims["D"] > MAX_WIDTH:
        raise ValueError(f"x_T_D: D={dims['D']} is not in 1..{MAX_WIDTH}")
    if residual_T_D is not None:
        dims.check(residual_T_D=residual_T_D, dtype=x_T_D.dtype, device=x_T_D.device)
    out_dtype = x_T_D.dtype
    if out_scale_T is not None:
        dims.check(out_scale_T=out_scale_T, dtype=torch.float32, device=x_T_D.device)
        out_dtype = torch.float8_e4m3fn
    if out_T_D is None:
        out_T_D = x_T_D.new_empty(x_T_D.shape, dtype=out_dtype)
    else:
        dims.check(out_T_D=out_T_D, dtype=out_dtype, device=x_T_D.device)
    if residual_T_D is not None:
        refuse_same(out_T_D=out_T_D, residual_T_D=residual_T_D)
    refuse_grad(x_T_D, weight_D, residual_T_D)
    if dims["T"] > 0:
        _op(x_T_D, weight_D, residual_T_D, eps, out_T_D, out_scale_T)
    return out_T_D
