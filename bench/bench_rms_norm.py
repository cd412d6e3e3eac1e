"""rms_norm with its residual: bandwidth decides, each row is read and written once."""

# Dimension key: T tokens, D model width.

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tml_kernels import rms_norm
from tml_kernels.ops.rms_norm import cases
from tml_kernels.ops.rms_norm.reference import rms_norm_ref
from tml_kernels.testing import assert_matches

from .harness import OpBench, Variant
from .peers import find


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    expected, expected_sum = rms_norm_ref(**inputs)
    assert_matches(rms_norm(**inputs), expected, dtype=case.dtype)
    if case.residual:
        assert_matches(inputs["residual_T_D"], expected_sum, dtype=case.dtype)


def with_weight_in_x_dtype(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"weight_D": inputs["weight_D"].to(inputs["x_T_D"].dtype)}


def torch_rms_norm(x_T_D: Tensor, weight_D: Tensor, residual_T_D: Tensor | None) -> Tensor:
    """As models write it: add in x's dtype, then torch's own norm."""
    h_T_D = x_T_D if residual_T_D is None else residual_T_D.add_(x_T_D)
    return F.rms_norm(h_T_D, (h_T_D.shape[-1],), weight_D, 1e-6)


def flashinfer_rms_norm() -> Variant:
    fused = find("flashinfer.norm", "fused_add_rmsnorm")

    def run(x_T_D: Tensor, weight_D: Tensor, residual_T_D: Tensor) -> Tensor:
        fused(x_T_D, residual_T_D, weight_D, 1e-6)  # both in place
        return x_T_D

    return Variant(run, with_weight_in_x_dtype)


def liger_rms_norm() -> Variant:
    function = find("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")

    def run(x_T_D: Tensor, weight_D: Tensor, residual_T_D: Tensor) -> Tensor:
        return function.apply(x_T_D, residual_T_D, weight_D, 1e-6, 0.0, "llama", False)[0]

    return Variant(run, with_weight_in_x_dtype)


OP = OpBench(
    name="rms_norm",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(rms_norm), "torch": Variant(torch_rms_norm, with_weight_in_x_dtype)},
    peers={"flashinfer": flashinfer_rms_norm, "liger": liger_rms_norm},
)
