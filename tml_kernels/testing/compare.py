"""Comparison with the float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import BY_DTYPE


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in float64; infinite when a value is not finite."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    if not torch.isfinite(actual).all():
        return float("inf")
    norm = expected.norm().item()
    error = (actual - expected).norm().item()
    return error / norm if norm > 0 else error


def assert_matches(
    actual: Tensor,
    expected: Tensor,
    *,
    dtype: torch.dtype | None = None,
    limit: float | None = None,
) -> None:
    """Fail unless the relative L2 error is within the limit of `dtype` (default: actual's own)."""
    limit = limit if limit is not None else BY_DTYPE[dtype or actual.dtype].rel_l2
    error = relative_l2(actual, expected)
    assert error <= limit, (
        f"relative L2 error {error:.3e} is over {limit:.1e} for shape {tuple(actual.shape)}"
    )


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    """Fail unless both hold the same bits (NaN equals the same NaN)."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} != {expected.dtype}"
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if not torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)):
        differing = (actual != expected).sum().item()
        raise AssertionError(f"{differing} of {actual.numel()} elements differ")
