"""Steps of the model with a backward of their own.

Autograd makes many passes through memory of each, and of a slice a zeroed copy of the whole. These
make fewer, and the same bits: sums are added up in the order in which it does.
"""

# Dimension key: N episodes, T tokens, W channels, K taps, G KV heads, H query heads, C head width,
# b queries of a block, S keys that one sees, X extent.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class RmsNorm(Function):
    """(x, weight, eps): x / sqrt(mean(x^2) + eps) * weight over the last axis, after x itself, for
    what goes past the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.set_materialize_grads(False)
        return x, (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        work = grad * (x * scale)  # laid out as grad: the order in which it is added up
        weight_grad = work.sum_to_size(weight.shape)
        torch.mul(grad, weight, out=work)
        x_grad = work * scale
        if past is not None:
            x_grad += past
        scale_grad = work.mul_(x).sum(-1, keepdim=True)
        square_grad = scale_grad * (-0.5 * scale.pow(3)) / x.shape[-1]
        x_grad += torch.mul(x, 2 * square_grad, out=work)
        return x_grad, weight_grad, None


class ShortConv(Function):
    """(x [N, T, W], weight [W, K]): x + a depthwise causal convolution, whose last tap is the
    current token's."""

    @staticmethod
    def forward(ctx: Any, x_N_T_W: Tensor, weight_W_K: Tensor) -> Tensor:
        ctx.save_for_backward(x_N_T_W, weight_W_K)
        out, work = torch.zeros_like(x_N_T_W), torch.empty_like(x_N_T_W)
        for weight_W, then, now in _taps(x_N_T_W, weight_W_K):
            out[:, now] += torch.mul(x_N_T_W[:, then], weight_W, out=work[:, now])
        return out.add_(x_N_T_W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N_T_W: Tensor) -> tuple[Tensor, Tensor]:
        x_N_T_W, weight_W_K = ctx.saved_tensors
        x_grad, work = torch.zeros_like(x_N_T_W), torch.zeros_like(x_N_T_W)
        weight_grads = []
        for weight_W, then, now in reversed(_taps(x_N_T_W, weight_W_K)):
            x_grad[:, then] += torch.mul(grad_N_T_W[:, now], weight_W, out=work[:, now])
            torch.mul(grad_N_T_W[:, now], x_N_T_W[:, then], out=work[:, now])
            work[:, : now.start] = 0
            weight_grads.append(work.sum((0, 1)))
        return x_grad.add_(grad_N_T_W), torch.stack(weight_grads[::-1], dim=1)


def _taps(x_N_T_W: Tensor, weight_W_K: Tensor) -> list[tuple[Tensor, slice, slice]]:
    """(weight [W], the tokens that it weighs, those for which it does) of each tap."""
    num_tokens, num_taps = x_N_T_W.shape[1], weight_W_K.shape[1]
    back = [min(num_taps - 1 - tap, num_tokens) for tap in range(num_taps)]
    return [
        (weight_W, slice(0, num_tokens - n), slice(n, num_tokens))
        for weight_W, n in zip(weight_W_K.t().contiguous(), back, strict=True)
    ]


class Spans(Function):
    """(x [N, G, H / G, T, C], spans): x[..., first:end, :] as [N, H, S, C] for each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.spans = x.shape, spans
        return tuple(x[..., first:end, :].flatten(1, 2) for first, end in spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_grad = grads[0].new_zeros(ctx.shape)
        heads_grad = x_grad.flatten(1, 2)
        for (first, end), grad in zip(reversed(ctx.spans), reversed(grads), strict=True):
            heads_grad[..., first:end, :] += grad
        return x_grad, None


class ShiftRows(Function):
    """(x [N, H, b, X], S): [N, H, b, S] with the last row of x at the end of the last row, and each
    other a place further to the left than the one below it; 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x_N_H_b_X: Tensor, num_keys: int) -> Tensor:
        num_queries, ctx.extent = x_N_H_b_X.shape[2:]
        return _shifted(F.pad(x_N_H_b_X, (num_keys - ctx.extent, num_queries - 1)), num_keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N_H_b_S: Tensor) -> tuple[Tensor, None]:
        num_queries, num_keys = grad_N_H_b_S.shape[2:]
        padded = grad_N_H_b_S.new_zeros(*grad_N_H_b_S.shape[:3], num_keys + num_queries - 1)
        _shifted(padded, num_keys).copy_(grad_N_H_b_S)
        return padded[..., num_keys - ctx.extent : num_keys], None


def _shifted(padded: Tensor, num_keys: int) -> Tensor:
    """A view whose rows of `num_keys` begin one further to the left each, the last at 0."""
    *strides, row, one = padded.stride()
    return padded.as_strided(
        (*padded.shape[:3], num_keys), (*strides, row - 1, one), padded.shape[2] - 1
    )
