"""Inputs of sample for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...testing import Cost, randn


@dataclass(frozen=True)
class Case:
    """Rows alternate between greedy and drawn, top-k and top-p on and off, when `mixed`; else all
    are drawn at temperature 1 from the whole vocabulary."""

    num_rows: int
    vocabulary: int
    mixed: bool = True
    num_hidden: int = 0  # columns at the end that are -inf

    def __str__(self) -> str:
        kind = "mixed" if self.mixed else "drawn"
        return f"S{self.num_rows}-V{self.vocabulary}-{kind}-hidden{self.num_hidden}"

    def make_inputs(self, device: str) -> dict:
        logits = randn(self.num_rows, self.vocabulary, device=device, scale=2.0)
        logits[:, self.vocabulary - self.num_hidden :] = float("-inf")
        s = torch.arange(self.num_rows, device=device)
        one = torch.ones(self.num_rows, device=device)
        return {
            "logits_S_V": logits,
            "temperature_S": 0.3 * (s % 4).float() if self.mixed else one,
            "top_k_S": ((s % 3) * 5 if self.mixed else 0 * s).to(torch.int32),
            "top_p_S": 1.0 - 0.25 * (s % 5 // 2).float() if self.mixed else one,
            "seed_S": 1000 + s // 2,
            "counter_S": 7 * s,
            "fallback": 0,
        }

    def cost(self) -> Cost:
        values = self.num_rows * self.vocabulary
        return Cost(bytes=4 * values + self.num_rows * 33, flops=4 * values)


EDGE = [
    Case(0, 16),  # no rows
    Case(1, 16),  # one row
    Case(3, 1),  # one token
    Case(40, 77),  # odd width, every mixture; top-k up to 10
    Case(12, 6),  # top-k larger than the vocabulary
    Case(8, 64, num_hidden=63),  # one token can be drawn
]
MODEL = [
    Case(8, 320, num_hidden=58),  # tiny
    Case(2, 201024, num_hidden=966),  # inkling-small
]
BENCH = [Case(s, 201024, mixed=False, num_hidden=966) for s in (1, 8, 32)]
