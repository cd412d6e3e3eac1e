"""A layer's experts made of a few: for models with random weights, which only have to be as large
and as much work as real ones."""

# Dimension key: E experts, R rows of a matrix, K columns.

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tml_kernels.moe import MoEWeights
from tml_kernels.quant import PackedExperts

BLOCK = 128  # rows that may share a scale


def repeat_experts(few: MoEWeights, num_experts: int) -> MoEWeights:
    """As many experts as wanted: expert e is number e % n of the n there are, with its rows moved
    on by e // n blocks of 128, all in memory of their own. Matrices of another height are repeated
    as they are. Shared experts and order stay; biases are not for random models."""
    assert few.bias13_E_J is None and few.bias2_E_D is None
    return replace(few, w13=_repeat(few.w13, num_experts), w2=_repeat(few.w2, num_experts))


def _repeat(few: PackedExperts, num_experts: int) -> PackedExperts:
    step = BLOCK if few.num_rows % BLOCK == 0 else 0

    def moved(x: Tensor, axis: int, rows_per_entry: int = 1) -> Tensor:
        made = x.new_empty(num_experts, *x.shape[1:])
        for expert in range(num_experts):
            turn, number = divmod(expert, len(x))
            made[expert] = x[number].roll(turn * step // rows_per_entry, axis)
        return made

    def each(x: Tensor) -> Tensor:
        return x[torch.arange(num_experts, device=x.device) % len(x)]

    fmt, scale, zero = few.format, few.scale, few.zero
    if scale is not None and fmt.name == "fp8":
        scale = moved(scale, 0, BLOCK)  # of blocks of rows
    elif scale is not None:
        scale = moved(scale, 0 if fmt.name == "fp8_channel" else 1)
    return replace(
        few,
        data=moved(few.data, 1 if fmt.packed else 0),
        scale=scale,
        zero=None if zero is None else moved(zero, 1),
        outer_E=None if few.outer_E is None else each(few.outer_E),
        error_E=None if few.error_E is None else each(few.error_E),
    )
