"""What the adapters share: other libraries' arguments as weights, and a refusal of the rest."""

# Dimension key: E experts, D model width, F expert width, J = 2F gate and up rows.

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._dims import Dims
from ..moe_weights import MoEWeights
from ..precision import ACTIVATIONS
from ..quant import FORMATS, PackedExperts

PLAIN = {fmt.dtype: fmt for fmt in FORMATS.values() if not fmt.packed}


def plain_experts(
    w13: Tensor,
    w2: Tensor,
    bias13: Tensor | None,
    bias2: Tensor | None,
    *,
    names: tuple[str, str, str, str],
    order: str,
) -> MoEWeights:
    """Stacks [E, J, D] and [E, D, F] as they lie, biases [E, J] and [E, D] converted to float32.

    Keeps nothing and synchronises nothing, so that it may run in every step and under capture.
    names: the caller's, for errors. Raises TypeError or ValueError with one of them.
    """
    dims, device = Dims(), w13.device if isinstance(w13, Tensor) else None
    named = {f"{names[0]}_E_J_D": w13, f"{names[1]}_E_D_F": w2}
    for name, stack in named.items():
        dims.check(dtype=ACTIVATIONS, device=device, contiguous=True, **{name: stack})
    if w2.dtype != w13.dtype:
        raise TypeError(f"{names[1]}: expected {w13.dtype}, as {names[0]} has, got {w2.dtype}")
    if dims["J"] != 2 * dims["F"]:
        raise ValueError(
            f"{names[0]}: expected 2 F = {2 * dims['F']} rows of gate and up, got {dims['J']}"
        )
    for name, bias in ((f"{names[2]}_E_J", bias13), (f"{names[3]}_E_D", bias2)):
        if bias is not None:
            dims.check(dtype=ACTIVATIONS, device=device, contiguous=True, **{name: bias})
    fmt = PLAIN[w13.dtype]
    return MoEWeights(
        PackedExperts(fmt, w13, None, None, None, dims["J"], dims["D"]),
        PackedExperts(fmt, w2, None, None, None, dims["D"], dims["F"]),
        order,
        None if bias13 is None else bias13.float(),
        None if bias2 is None else bias2.float(),
    )


def refuse(**given: tuple[Any, Any]) -> None:
    """NotImplementedError for the first of name=(value, served) where they differ."""
    for name, (value, served) in given.items():
        if value is served or (served is not None and value == served):
            continue
        simple = value is None or isinstance(value, bool | int | float | str)
        shown = repr(value) if simple else f"a {type(value).__name__}"
        raise NotImplementedError(f"{name}: only {served!r} is served, got {shown}")
