"""What ranks of one model exchange, from its sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..model import ModelConfig


@dataclass(frozen=True)
class Traffic:
    """Of one rank: bytes it receives from the others, and collectives it takes part in."""

    received: int
    collectives: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.received + other.received, self.collectives + other.collectives)


def pass_traffic(
    config: ModelConfig, num_ranks: int, num_tokens: int, dtype: torch.dtype
) -> Traffic:
    """Of one pass of `num_tokens` tokens over the layers: four gathers each."""
    gathers = [columns for layer in config.layers for columns in _layer_columns(config, layer)]
    return _gathered(num_ranks, num_tokens * dtype.itemsize, gathers)


def tick_traffic(
    config: ModelConfig,
    num_ranks: int,
    *,
    num_sessions: int,
    prefill_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Traffic:
    """Of a tick. prefill_tokens: of all sessions together, the first output step among them.

    The other output steps are passes of a token for every session, and each of them all gathers
    float32 logits. What rank 0 sends before a tick, some 13 kB for a session and its pictures, is
    not in it, nor what experts give in float32 on a CPU.
    """
    num_steps = config.layout.num_steps
    total = pass_traffic(config, num_ranks, prefill_tokens, dtype)
    for _ in range(num_steps - 1):
        total += pass_traffic(config, num_ranks, num_sessions, dtype)
    for _ in range(num_steps):
        total += _gathered(num_ranks, num_sessions * 4, [config.vocab.size])
    return total


def _layer_columns(config: ModelConfig, layer: int) -> list[int]:
    """Columns of a token that are gathered: attended heads, their mix, hidden values, their mix."""
    heads, experts = config.heads(layer), config.experts
    hidden = (experts.top_k + experts.num_shared) * experts.width
    if config.is_dense(layer):
        hidden = config.dense_width
    return [heads.num_heads * heads.head_width, config.width, hidden, config.width]


def _gathered(num_ranks: int, column_bytes: int, gathers: list[int]) -> Traffic:
    received = sum(column_bytes * columns // num_ranks * (num_ranks - 1) for columns in gathers)
    return Traffic(received, len(gathers))
