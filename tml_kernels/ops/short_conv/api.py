"""short_conv: check, choose, launch."""

# Dimension key: T tokens, S session rows, N state slots, D model width.

from __future__ import annotations

import torch
from torch import Tensor

from ..._dims import Dims
from ..._numbers import check_eps, check_flag
from ..._ragged import check_slots, check_start
from ..._registry import refuse_grad, refuse_same, register_op
from ...precision import ACTIVATIONS
from .configs import MAX_WIDTH
from .reference import short_conv_ref


def _plain(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    start: Tensor,
    slot: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    late_norm: bool,
    out: Tensor,
) -> None:
    if x.device.type == "cpu":  # elsewhere reading the values would synchronise
        check_start(start, x.shape[0])
        check_slots(slot, state.shape[0])
    result = short_conv_ref(
        x,
        weight,
        state,
        start,
        slot,
        residual_T_D=residual,
        norm_weight_D=norm_weight,
        eps=eps,
        late_norm=late_norm,
        dtype=torch.float32,
    )
    out.copy_(result.out_T_D)
    state.copy_(result.state_N_3_D)
    if residual is not None and result.residual_T_D is not None:
        changed_T_D = result.residual_T_D.to(residual.dtype)
        residual.copy_(torch.where(result.live_T[:, None], changed_T_D, residual))


def _kernel(*args) -> None:
    from .kernel import launch_short_conv

    launch_short_conv(*args)


_op = register_op(
    "short_conv(Tensor x, Tensor weight, Tensor(a!) state, Tensor start, Tensor slot, "
    "Tensor(b!)? residual, Tensor? norm_weight, float eps, bool late_norm, "
    "Tensor(c!) out) -> ()",
    plain=_plain,
    kernel=_kernel,
)


def short_conv(
    x_T_D: Tensor,
    weight_D_4: Tensor,
    state_N_3_D: Tensor,
    start_S1: Tensor,
    slot_S: Tensor,
    *,
    residual_T_D: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    late_norm: bool = False,
    out_T_D: Tensor | None = None,
) -> Tensor:
    """y = x + conv(x) per session, with the residual addition and RMSNorm that follow it.

    conv is depthwise and causal with four taps; weight[d, 3] multiplies the current token, and the
    three tokens before a session's first one are its state, oldest first, which is updated in
    place to the session's last three inputs. With `residual_T_D`, residual += y in place, rounded
    once; with `norm_weight_D` as well, the result is the RMSNorm of that sum before rounding,
    otherwise it is y. With `late_norm` it is sum * norm_weight alone: what multiplies it divides by
    the root mean square afterwards, as `moe_route` does. Tokens of idle sessions (slot -1) and
    padding (at or beyond start[S]) give zeros whatever they hold, and leave state and residual
    alone.

    Accumulates in float32 and rounds once. Deterministic; a token depends on its session's inputs
    alone, and a session's tokens have the same bits however they are split over calls. One launch.
    Allocates only when `out_T_D` is None.

    x, residual, out: [T, D], state: [N, 3, D], of one dtype, float32, bfloat16 or float16,
    D <= 16384, none of them overlapping another; weight: [D, 4] float32; norm_weight: [D], float32
    or x's dtype; start: int32 [S + 1], prefix sums; slot: int32 [S], each at most once. Raises
    TypeError or ValueError naming the argument. The values of start and slot are checked on the
    CPU only, where that needs no synchronisation; a GPU takes a slot outside 0..N-1 as idle.

    Source: `InklingShortConvolution` of transformers 5.17.
    """
    dims = Dims()
    dims.check(x_T_D=x_T_D, dtype=ACTIVATIONS)
    check_eps(eps)
    check_flag("late_norm", late_norm)
    device = x_T_D.device
    dims.check(weight_D_4=weight_D_4, dtype=torch.float32, device=device)
    dims.check(state_N_3_D=state_N_3_D, dtype=x_T_D.dtype, device=device)
    dims.check(start_S1=start_S1, slot_S=slot_S, dtype=torch.int32, device=device)
    if not 0 < dims["D"] <= MAX_WIDTH:
        raise ValueError(f"x_T_D: D={dims['D']} is not in 1..{MAX_WIDTH}")
    if residual_T_D is not None:
        dims.check(residual_T_D=residual_T_D, dtype=x_T_D.dtype, device=device)
    if norm_weight_D is not None:
        dims.check(norm_weight_D=norm_weight_D, dtype=(torch.float32, x_T_D.dtype), device=device)
        if residual_T_D is None:
            raise ValueError("norm_weight_D: normalises the residual sum, but residual_T_D is None")
    elif late_norm:
        raise ValueError("late_norm: of no norm, norm_weight_D is None")
    if out_T_D is None:
        out_T_D = x_T_D.new_empty(x_T_D.shape)
    else:
        dims.check(out_T_D=out_T_D, dtype=x_T_D.dtype, device=device)
        refuse_same(out_T_D=out_T_D, x_T_D=x_T_D)
    if residual_T_D is not None:
        refuse_same(residual_T_D=residual_T_D, x_T_D=x_T_D)
        refuse_same(residual_T_D=residual_T_D, out_T_D=out_T_D)
    refuse_grad(x_T_D, weight_D_4, state_N_3_D, residual_T_D, norm_weight_D)
    if dims["T"] > 0:
        _op(
            x_T_D, weight_D_4, state_N_3_D, start_S1, slot_S,
            residual_T_D, norm_weight_D, eps, late_norm, out_T_D,
        )  # fmt: skip
    return out_T_D
