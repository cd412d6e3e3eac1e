"""linear for few rows: the weight is streamed once."""

# Dimension key: T tokens, D input width, F rows of the weight, or output width.

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.ops.linear import cases, linear
from tml_kernels.ops.linear.configs import problem_of, scratch_bytes
from tml_kernels.ops.linear.reference import linear_ref
from tml_kernels.quant import PackedExperts, dequantize
from tml_kernels.testing import assert_matches

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    out = linear(**inputs, out_dtype=case.out_dtype)
    expected = linear_ref(**inputs)
    valid = case.num_valid if case.num_valid is not None else out.shape[1]
    assert_matches(out[:, :valid], expected[:, :valid])
    assert (out[:, valid:] == float("-inf")).all(), f"columns from {valid} on are not -inf"


def allocate(inputs: dict[str, Any]) -> dict[str, Any]:
    """As a captured step calls it: scratch is there."""
    x = inputs["x_T_D"]
    size = scratch_bytes(problem_of(x, inputs["weight_F_D"]))
    return inputs | {"scratch_B": torch.zeros(size, dtype=torch.uint8, device=x.device)}


def ours(num_valid: int | None, **inputs: Any) -> Tensor:
    """Logits, the only ones with padding columns, are stored in float32."""
    out_dtype = None if num_valid is None else torch.float32
    return linear(**inputs, num_valid=num_valid, out_dtype=out_dtype)


def unpacked(inputs: dict[str, Any]) -> dict[str, Any]:
    """A packed weight in x's dtype: what torch would read instead."""
    weight = inputs["weight_F_D"]
    if isinstance(weight, PackedExperts):
        weight = dequantize(weight, 0).to(inputs["x_T_D"].dtype)
    return inputs | {"weight_F_D": weight}


def torch_linear(
    x_T_D: Tensor,
    weight_F_D: Tensor,
    bias_F: Tensor | None,
    residual_T_F: Tensor | None,
    scale: float,
    activation: str | None,
    num_valid: int | None,
) -> Tensor:
    y = F.linear(x_T_D if scale == 1.0 else scale * x_T_D, weight_F_D, bias_F)
    if activation == "swiglu":
        y = F.silu(y[:, 0::2]) * y[:, 1::2]
    if residual_T_F is not None:
        y = y + residual_T_F
    if num_valid is not None:
        y = y.float()
        y[:, num_valid:] = float("-inf")
    return y


OP = OpBench(
    name="linear",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={
        "ours": Variant(ours, allocate),
        "torch": Variant(
            torch_linear, unpacked, cost=lambda case: replace(case, precision=None).cost()
        ),
    },
)
