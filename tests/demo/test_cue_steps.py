"""Steps with a backward of their own: right, and bit by bit what autograd makes of plain torch."""

# Dimension key: N episodes, T tokens, W channels, K taps, G KV heads, H query heads, C head width,
# b queries of a block, S keys that one sees, X extent.

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tml_kernels.testing import assert_bitwise
from tml_runtime.demo.cue.steps import RmsNorm, ShiftRows, ShortConv, Spans

EPS = 1e-5
SPANS = [(0, 4), (2, 9), (0, 0), (8, 11)]
Step = Callable[..., Tensor]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    past, y = RmsNorm.apply(x, weight, EPS)
    return past + y.sin()


def normed_plainly(x: Tensor, weight: Tensor) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    return x + y.sin()


def normed_alone(x: Tensor, weight: Tensor) -> Tensor:
    """Of heads that take turns, as a projection leaves them."""
    return RmsNorm.apply(x.transpose(1, 2), weight, EPS)[1].transpose(1, 2)


def normed_alone_plainly(x: Tensor, weight: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight).transpose(1, 2)


def convolved_plainly(x_N_T_W: Tensor, weight_W_K: Tensor) -> Tensor:
    num_taps, num_tokens = weight_W_K.shape[1], x_N_T_W.shape[1]
    padded = F.pad(x_N_T_W, (0, 0, num_taps - 1, 0))
    return x_N_T_W + sum(
        padded[:, tap : tap + num_tokens] * weight_W_K[:, tap] for tap in range(num_taps)
    )


def in_spans(x_N_G_T_C: Tensor) -> Tensor:
    x = x_N_G_T_C[:, :, None].expand(-1, -1, 2, -1, -1)
    return torch.cat(Spans.apply(x, SPANS), dim=2)


def in_spans_plainly(x_N_G_T_C: Tensor) -> Tensor:
    x_N_H_T_C = x_N_G_T_C.repeat_interleave(2, dim=1)
    return torch.cat([x_N_H_T_C[:, :, first:end] for first, end in SPANS], dim=2)


def shifted(x: Tensor, *, num_keys: int) -> Tensor:
    return ShiftRows.apply(x, num_keys)


def shifted_plainly(x_N_H_b_X: Tensor, *, num_keys: int) -> Tensor:
    num_queries, extent = x_N_H_b_X.shape[2:]
    rows = []
    for n, row in enumerate(x_N_H_b_X.unbind(2)):
        left = num_queries - 1 - n
        rows.append(F.pad(row, (num_keys - extent, left))[..., left : left + num_keys])
    return torch.stack(rows, dim=2)


CASES: dict[str, tuple[Step, Step, list[tuple[int, ...]]]] = {
    "norm": (normed, normed_plainly, [(3, 37, 24), (24,)]),
    "norm of one": (normed, normed_plainly, [(1, 1, 1), (1,)]),
    "norm, heads": (normed_alone, normed_alone_plainly, [(2, 19, 3, 8), (8,)]),
    "conv": (ShortConv.apply, convolved_plainly, [(3, 21, 16), (16, 4)]),
    "conv of one": (ShortConv.apply, convolved_plainly, [(2, 1, 5), (5, 4)]),
    "conv of three": (ShortConv.apply, convolved_plainly, [(1, 3, 1), (1, 4)]),
    "spans": (in_spans, in_spans_plainly, [(2, 2, 11, 5)]),
    "shift": (partial(shifted, num_keys=9), partial(shifted_plainly, num_keys=9), [(2, 3, 5, 4)]),
    "shift, all": (
        partial(shifted, num_keys=6),
        partial(shifted_plainly, num_keys=6),
        [(1, 1, 6, 6)],
    ),
    "shift of one": (
        partial(shifted, num_keys=3),
        partial(shifted_plainly, num_keys=3),
        [(1, 2, 1, 3)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_bitwise_what_autograd_makes_of_it(case: str) -> None:
    step, plainly, shapes = CASES[case]
    rng = torch.Generator().manual_seed(7)
    values = [torch.randn(shape, generator=rng) for shape in shapes]
    out, grads = run(step, values)
    expected, expected_grads = run(plainly, values)
    assert_bitwise(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_bitwise(grad, expected_grad)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_differences(case: str) -> None:
    step, _, shapes = CASES[case]
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(step, values, check_undefined_grad=False)


def run(step: Step, values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [value.clone().requires_grad_() for value in values]
    out = step(*leaves)
    weights = torch.linspace(-1, 2, out.numel()).view(out.shape)  # of a loss
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), leaves))
