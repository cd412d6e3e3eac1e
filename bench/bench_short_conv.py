"""short_conv with its residual and norm: one launch, each row read and written once."""

# Dimension key: T tokens, S session rows, L tokens of each session, N state slots, D model width.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.short_conv import cases, short_conv
from tml_kernels.ops.short_conv.reference import short_conv_ref
from tml_kernels.testing import assert_bitwise, assert_matches

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    expected = short_conv_ref(**inputs)
    out, live = short_conv(**inputs), expected.live_T
    assert_matches(out[live], expected.out_T_D[live], dtype=case.dtype)
    assert_bitwise(out[~live], torch.zeros_like(out[~live]))
    assert_bitwise(inputs["state_N_3_D"], expected.state_N_3_D)
    if expected.residual_T_D is not None:
        residual = inputs["residual_T_D"]
        assert_matches(residual[live], expected.residual_T_D[live], dtype=case.dtype)


def with_weights_in_x_dtype(inputs: dict[str, Any]) -> dict[str, Any]:
    names = ("weight_D_4", "norm_weight_D")
    return inputs | {name: inputs[name].to(inputs["x_T_D"].dtype) for name in names}


def torch_short_conv(
    x_T_D: Tensor,
    weight_D_4: Tensor,
    state_N_3_D: Tensor,
    start_S1: Tensor,
    slot_S: Tensor,
    residual_T_D: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    late_norm: bool,
) -> Tensor:
    """As models write it, for sessions of one length: cut the window, convolve, add, norm."""
    assert not late_norm
    num_sessions, width = slot_S.shape[0], x_T_D.shape[1]
    x_S_L_D = x_T_D.view(num_sessions, -1, width)
    window = torch.cat([state_N_3_D[slot_S], x_S_L_D], dim=1)
    state_N_3_D[slot_S] = window[:, -3:]
    mixed = F.conv1d(window.transpose(1, 2), weight_D_4[:, None], groups=width).transpose(1, 2)
    residual_T_D.add_((x_S_L_D + mixed).reshape(x_T_D.shape))
    return F.rms_norm(residual_T_D, (width,), norm_weight_D, eps)


OP = OpBench(
    name="short_conv",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={
        "ours": Variant(short_conv),
        "torch": Variant(torch_short_conv, with_weights_in_x_dtype),
    },
)
