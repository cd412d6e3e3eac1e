"""move_pages: bandwidth decides, of the memory or, with pinned pages, of the bus."""

# Dimension key: L layers, P pages of the source, N pages of the target, B elements of a page,
# I moves.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tml_kernels.ops.move_pages import cases, move_pages
from tml_kernels.ops.move_pages.reference import move_pages_ref
from tml_kernels.testing import assert_bitwise

from .harness import OpBench, Variant


def check(case: cases.Case, device: str) -> None:
    inputs = case.make_inputs(device)
    expected = move_pages_ref(**inputs)
    move_pages(**inputs)
    assert_bitwise(inputs["target_L_N_B"], expected)


def pinned(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies of pinned tensors are not pinned."""
    on_gpu = inputs["from_I"].is_cuda
    return {
        name: tensor.pin_memory() if on_gpu and not tensor.is_cuda else tensor
        for name, tensor in inputs.items()
    }


def run(source_L_P_B: Tensor, target_L_N_B: Tensor, from_I: Tensor, to_I: Tensor) -> Tensor:
    move_pages(source_L_P_B, target_L_N_B, from_I, to_I)
    return _bytes(target_L_N_B)


def torch_move(source_L_P_B: Tensor, target_L_N_B: Tensor, from_I: Tensor, to_I: Tensor) -> Tensor:
    """Gather and scatter, through a copy where one side is the host's. No padding is timed."""
    source, target = _bytes(source_L_P_B), _bytes(target_L_N_B)
    pages_L_I_B = source[:, from_I.to(source.device)]
    target[:, to_I.to(target.device)] = pages_L_I_B.to(target.device)
    return target


def _bytes(pool: Tensor) -> Tensor:
    return pool.view(torch.uint8)


OP = OpBench(
    name="move_pages",
    edge=cases.EDGE,
    model=cases.MODEL,
    bench=cases.BENCH,
    check=check,
    variants={"ours": Variant(run, pinned), "torch": Variant(torch_move, pinned)},
)
