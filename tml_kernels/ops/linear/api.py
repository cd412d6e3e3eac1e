"""linear: check, choose, launch."""

# Dimension key: T tokens, D input width, F rows of the weight, or output width, B bytes.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_count, check_finite
from ..._registry import refuse_grad, refuse_same, register_op
from ..._scratch import check_scratch, is_aligned
from ...precision import ACTIVATIONS
from ...quant import FORMATS, PackedExperts
from .configs import STEP, kernel_why_not, problem_of, scratch_bytes
from .reference import linear_ref


def _plain(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    format: str,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    activation: str | None,
    num_valid: int | None,
    out: Tensor,
    scratch: Tensor | None,
    parts: int = 1,
) -> None:
    result = linear_ref(
        x,
        given_weight(x, weight, weight_scale, weight_zero, format),
        bias_F=bias,
        residual_T_F=residual,
        scale=scale,
        activation=activation,
        num_valid=num_valid,
        dtype=torch.float32,
    )
    out.copy_(result)


def launch_or(
    plain: Callable[..., None],
    launch: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    format: str,
    *rest: Any,
) -> None:
    """What an op does on a GPU: `launch`, or `plain` where there is no kernel for the weight."""
    why = kernel_why_not(x.dtype, weight.dtype, format, x.shape[1], weight.shape[-2])
    run = plain if why or not is_aligned(weight) else launch
    run(x, weight, weight_scale, weight_zero, format, *rest)


def _kernel(x: Tensor, weight: Tensor, *rest: Any) -> None:
    from .launch import launch_linear

    launch_or(_plain, launch_linear, x, weight, *rest)


_op = register_op(
    "linear(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? weight_zero, str format, "
    "Tensor? bias, Tensor? residual, float scale, str? activation, int? num_valid, "
    "Tensor(a!) out, Tensor(b!)? scratch, int parts=1) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def linear(
    x_T_D: Tensor,
    weight_F_D: Tensor | PackedExperts,
    *,
    bias_F: Tensor | None = None,
    residual_T_F: Tensor | None = None,
    scale: float = 1.0,
    activation: str | None = None,
    num_valid: int | None = None,
    out_dtype: torch.dtype | None = None,
    out_T_F: Tensor | None = None,
    scratch_B: Tensor | None = None,
    parts: int = 1,
) -> Tensor:
    """act(scale * x W^T + bias) + residual, for few rows against a large weight.

    activation "swiglu": the weight's rows interleave gate and up (g0, u0, g1, u1, ...), the output
    and the residual are F / 2 wide and hold silu(gate) * up (+ residual). `num_valid`: the columns
    from there on are -inf (the padding rows of an unembedding), whatever the weight holds.

    x: [T, D], float32, bfloat16 or float16; weight, bias: float32 or x's dtype; weight also one
    matrix packed as fp8, fp8_channel, int4 or int4_f16 (`quant.pack_matrix`); residual and out:
    any of the three; out has `out_dtype`, x's dtype by default. CUDA tensors for which
    `configs.kernel_why_not` gives a reason (float32 rows) take the plain path there, and a weight
    that does not begin at a multiple of 16 bytes. One launch.
    scratch: uint8, `configs.scratch_bytes(problem)` of them or more, aligned to 16; its first
    4 * configs.MAX_COUNTERS bytes are zero before the first call and again after every call, of
    whatever shape. Allocates only where out or scratch is None.

    parts: the weight is one of so many equal parts of a matrix's rows, and gives the bits of those
    rows in the whole matrix (on a CPU, as far as its BLAS keeps columns apart).

    Accumulates in float32 and rounds once. Deterministic; row t depends on row t and the weights
    alone: the same bits for every T and position. `out_T_F` may be `residual_T_F`, not `x_T_D`.
    Raises TypeError or ValueError naming the argument.

    Source of swiglu: Shazeer, "GLU Variants Improve Transformer", 2020, equation 5.
    """
    weight, weight_scale, weight_zero, format = flatten(weight_F_D)
    dims = check_products(x_T_D, weight_F_D)
    if bias_F is not None:
        dims.check(bias_F=bias_F, dtype=(torch.float32, x_T_D.dtype), device=x_T_D.device)
    out_dims = Dims(T=dims["T"], F=_output_width(dims["F"], activation, num_valid))
    if residual_T_F is not None:
        out_dims.check(residual_T_F=residual_T_F, dtype=ACTIVATIONS, device=x_T_D.device)
    if out_dtype is not None and out_dtype not in ACTIVATIONS:
        raise TypeError(f"out_dtype: expected float32, bfloat16 or float16, got {out_dtype}")
    if out_T_F is None:
        out_T_F = x_T_D.new_empty(dims["T"], out_dims["F"], dtype=out_dtype or x_T_D.dtype)
    else:
        wanted = ACTIVATIONS if out_dtype is None else out_dtype
        out_dims.check(out_T_F=out_T_F, dtype=wanted, device=x_T_D.device)
        refuse_same(out_T_F=out_T_F, x_T_D=x_T_D)
    check_finite("scale", scale)
    check_count("parts", parts)
    refuse_grad(x_T_D, weight, bias_F, residual_T_F)
    if out_T_F.numel() > 0:
        if scratch_B is not None:
            needed = scratch_bytes(problem_of(x_T_D, weight_F_D, parts))
            check_scratch(scratch_B, needed, x_T_D.device, align=16)
        _op(
            x_T_D, weight, weight_scale, weight_zero, format, bias_F, residual_T_F, scale,
            activation, num_valid, out_T_F, scratch_B, parts,
        )  # fmt: skip
    return out_T_F


def check_products(x_T_D: Tensor, weight_F_D: Tensor | PackedExperts) -> Dims:
    """The sizes of x and the weight, T, D and F."""
    dims = Dims()
    dims.check(x_T_D=x_T_D, dtype=ACTIVATIONS)
    if not isinstance(weight_F_D, PackedExperts) or not weight_F_D.format.packed:
        weight_F_D = flatten(weight_F_D)[0]
        dims.check(weight_F_D=weight_F_D, dtype=(torch.float32, x_T_D.dtype), device=x_T_D.device)
        return dims
    if weight_F_D.num_columns != dims["D"]:
        raise ValueError(
            f"weight_F_D: D={weight_F_D.num_columns}, but D={dims['D']} was bound earlier"
        )
    if weight_F_D.device != x_T_D.device:
        raise ValueError(f"weight_F_D: expected device {x_T_D.device}, got {weight_F_D.device}")
    return Dims(**dims, F=weight_F_D.num_rows)


def flatten(
    weight: Tensor | PackedExperts,
) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    """Data, scale, zero and format of a weight, as the op's schema takes them."""
    if not isinstance(weight, PackedExperts):
        return weight, None, None, "plain"
    if weight.num_experts != 1:
        raise ValueError(f"weight_F_D: expected one matrix, got E={weight.num_experts} experts")
    if not weight.format.packed:
        return weight.data[0], None, None, "plain"
    if weight.format.name not in STEP:
        packed = ", ".join(name for name in STEP if name != "plain")
        raise ValueError(f"weight_F_D: expected one of {packed}, got {weight.format.name}")
    return weight.data, weight.scale, weight.zero, weight.format.name


def given_weight(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    format: str,
) -> Tensor | PackedExperts:
    """The inverse of `flatten`, for rows x."""
    if format == "plain":
        return weight
    sizes = (weight.shape[-2], x.shape[1])
    return PackedExperts(FORMATS[format], weight, weight_scale, weight_zero, None, *sizes)


def _output_width(num_rows: int, activation: str | None, num_valid: int | None) -> int:
    if activation not in (None, "swiglu"):
        raise ValueError(f"activation: expected None or 'swiglu', got {activation!r}")
    if activation == "swiglu":
        if num_rows % 2:
            raise ValueError(f"weight_F_D: swiglu needs an even number of rows, got F={num_rows}")
        if num_valid is not None:
            raise ValueError(f"num_valid: not with activation='swiglu', got {num_valid}")
        return num_rows // 2
    if num_valid is not None:
        check_count("num_valid", num_valid, 1, num_rows)
    return num_rows
