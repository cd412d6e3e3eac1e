"""linear_conv: linear, and the short convolution behind it, of an output step."""

# Dimension key: T tokens, N state slots, D input width, F rows of the weight, B bytes.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._ragged import check_slots
from ..._registry import refuse_grad, refuse_same, register_op
from ..._scratch import check_scratch
from ...quant import PackedExperts
from .api import check_products, flatten, given_weight, launch_or
from .configs import problem_of, scratch_bytes
from .reference import linear_conv_ref


def _plain(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    format: str,
    conv_weight: Tensor,
    state: Tensor,
    slot: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    scratch: Tensor | None,
) -> None:
    if x.device.type == "cpu":  # elsewhere reading the values would synchronise
        check_slots(slot, state.shape[0])
    result = linear_conv_ref(
        x,
        given_weight(x, weight, weight_scale, weight_zero, format),
        conv_weight,
        state,
        slot,
        residual,
        norm_weight,
        dtype=torch.float32,
    )
    out.copy_(result.out_T_F)
    state.copy_(result.state_N_3_F)
    residual.copy_(result.residual_T_F)


def _kernel(x: Tensor, weight: Tensor, *rest: Any) -> None:
    from .launch import launch_linear_conv

    launch_or(_plain, launch_linear_conv, x, weight, *rest)


_op = register_op(
    "linear_conv(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? weight_zero, str format, "
    "Tensor conv_weight, Tensor(a!) state, Tensor slot, Tensor(b!) residual, Tensor norm_weight, "
    "Tensor(c!) out, Tensor(d!)? scratch) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def linear_conv(
    x_T_D: Tensor,
    weight_F_D: Tensor | PackedExperts,
    conv_weight_F_4: Tensor,
    state_N_3_F: Tensor,
    slot_T: Tensor,
    residual_T_F: Tensor,
    norm_weight_F: Tensor,
    *,
    out_T_F: Tensor | None = None,
    scratch_B: Tensor | None = None,
) -> Tensor:
    """`linear`, then `short_conv` with `late_norm`, where every token is its session's only one.

    y = x W^T; residual += y + conv(y) in place; the result is that sum times the norm's weight,
    and whatever multiplies it divides by the root mean square of the residual. Token t belongs to
    the session with the state row slot[t]; of an idle one, slot -1, the result is zero, and state
    and residual stay as they are. The same bits as the two ops give, in one launch: y is rounded to
    x's dtype between them.

    x: [T, D], float32, bfloat16 or float16; weight: float32, x's dtype or packed, as of `linear`;
    state: [N, 3, F], residual, out: [T, F], of x's dtype, none of them overlapping another;
    conv_weight: [F, 4] float32; norm_weight: [F], float32 or x's dtype; slot: int32 [T], each at
    most once. scratch: as of `linear`. CUDA tensors for which `configs.kernel_why_not` gives a
    reason take the plain path. Allocates only where out or scratch is None. Raises TypeError or
    ValueError naming the argument. The values of slot are checked on the CPU only; a GPU takes one
    outside 0..N-1 as idle.
    """
    weight, weight_scale, weight_zero, format = flatten(weight_F_D)
    dims = check_products(x_T_D, weight_F_D)
    dtype, device = x_T_D.dtype, x_T_D.device
    dims.check(conv_weight_F_4=conv_weight_F_4, dtype=torch.float32, device=device)
    dims.check(state_N_3_F=state_N_3_F, residual_T_F=residual_T_F, dtype=dtype, device=device)
    dims.check(slot_T=slot_T, dtype=torch.int32, device=device)
    dims.check(norm_weight_F=norm_weight_F, dtype=(torch.float32, dtype), device=device)
    if out_T_F is None:
        out_T_F = residual_T_F.new_empty(residual_T_F.shape)
    else:
        dims.check(out_T_F=out_T_F, dtype=dtype, device=device)
    refuse_same(residual_T_F=residual_T_F, x_T_D=x_T_D)
    refuse_same(out_T_F=out_T_F, x_T_D=x_T_D)
    refuse_same(out_T_F=out_T_F, residual_T_F=residual_T_F)
    refuse_grad(x_T_D, weight, conv_weight_F_4, state_N_3_F, residual_T_F, norm_weight_F)
    if out_T_F.numel() > 0:
        if scratch_B is not None:
            needed = scratch_bytes(problem_of(x_T_D, weight_F_D))
            check_scratch(scratch_B, needed, device, align=16)
        _op(
            x_T_D, weight, weight_scale, weight_zero, format, conv_weight_F_4, state_N_3_F, slot_T,
            residual_T_F, norm_weight_F, out_T_F, scratch_B,
        )  # fmt: skip
    return out_T_F
