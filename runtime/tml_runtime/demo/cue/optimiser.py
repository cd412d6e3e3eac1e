"""Muon for the matrices of the layers, Adam for everything else, on tensors by name.

Source of Muon: K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

MUON_LR, MOMENTUM = 0.02, 0.95
ADAM_LR, BETAS, EPS = 3e-3, (0.9, 0.98), 1e-8
GAINS = ("q_norm_C", "k_norm_C")  # bound the scores: how sharp attention can be
GAIN_LR = 6.0  # times ADAM_LR
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 4  # bring singular values near enough to one
WARM_UP = 40  # steps
DECAY = 0.26  # the last part of all steps, in which the rate falls to zero


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of weights by its path, such as layers.0.attention.qkvr_J_D."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for spec in fields(value):
            yield from leaves(getattr(value, spec.name), _join(name, spec.name))
    elif isinstance(value, tuple):
        keys = getattr(value, "_fields", range(len(value)))
        for key, item in zip(keys, value, strict=True):
            yield from leaves(item, _join(name, str(key)))


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Of a layer: projections and experts, which Muon moves."""
    small = ("conv", "rel_table", "gate_A_D", "norm")
    return name.startswith("layers.") and tensor.ndim > 1 and not any(s in name for s in small)


@dataclass
class Optimiser:
    """state: by name of a weight and of what is kept of it; `weights` are moved in place."""

    weights: Mapping[str, Tensor]
    state: dict[str, Tensor]

    @classmethod
    def new(cls, weights: Mapping[str, Tensor]) -> Optimiser:
        state = {}
        for name, tensor in weights.items():
            state[f"{name}.mean"] = torch.zeros_like(tensor)
            if not is_matrix(name, tensor):
                state[f"{name}.square"] = torch.zeros_like(tensor)
        return cls(weights, state)

    @torch.no_grad()
    def step(self, step: int, num_steps: int, names: Iterable[str] | None = None) -> None:
        """step counts from 0. Takes the gradients of all weights, or of those named, that have one,
        and clears them."""
        rate = schedule(step, num_steps)
        for name in self.weights if names is None else names:
            tensor = self.weights[name]
            if tensor.grad is None:
                continue
            mean, square = self.state[f"{name}.mean"], self.state.get(f"{name}.square")
            if square is None:
                mean.lerp_(tensor.grad, 1 - MOMENTUM)
                move = orthogonal(tensor.grad.lerp(mean, MOMENTUM))
                scale = max(1.0, tensor.shape[-2] / tensor.shape[-1]) ** 0.5
                tensor.add_(move, alpha=-MUON_LR * rate * scale)
            else:
                mean.lerp_(tensor.grad, 1 - BETAS[0])
                square.lerp_(tensor.grad.square(), 1 - BETAS[1])
                bias = math.sqrt(1 - BETAS[1] ** (step + 1)) / (1 - BETAS[0] ** (step + 1))
                lr = ADAM_LR * (GAIN_LR if name.endswith(GAINS) else 1.0)
                tensor.addcdiv_(mean, square.sqrt().add_(EPS), value=-lr * rate * bias)
            tensor.grad = None


def halves(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights in two parts that take about as long to move."""
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    works = [0, 0]
    for work, name in sorted(((_work(*item), item[0]) for item in weights.items()), reverse=True):
        less = works.index(min(works))
        parts[less][name] = weights[name]
        works[less] += work
    return parts


def _work(name: str, tensor: Tensor) -> int:
    """Of a step, in numbers that are multiplied."""
    return tensor.numel() * (min(tensor.shape[-2:]) if is_matrix(name, tensor) else 8)


def schedule(step: int, num_steps: int) -> float:
    """1 at most: up at the beginning, down to zero at the end."""
    down = (num_steps - step) / max(1.0, DECAY * num_steps)
    return min(1.0, (step + 1) / WARM_UP, down)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix, or stack of matrices, with singular values of about one."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).reshape(-1, *sorted(matrix.shape[-2:]))
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
