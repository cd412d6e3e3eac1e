"""Inputs of sample for tests and benchmarks, and what each must move at least."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...testing import Cost, randn


@dataclass(frozen=True)
class Case:
    """Rows alternate between greedy and drawn, top-k and top-p on and off, when `mixed`; else all
    are drawn at temperature 1 with `top_k` and `top_p`, by default from the whole vocabulary."""

    num_rows: int
    vocabulary: int
    mixed: bool = True
    num_hidden: int = 0  # columns at the end that are -inf
    top_k: int = 0
    top_p: float = 1.0
    scale: float = 2.0  # of the logits' normal distribution

    def __str__(self) -> str:
        kind = "mixed" if self.mixed else "drawn"
        narrowed = f"-k{self.top_k}" if self.top_k else ""
        narrowed += f"-p{self.top_p}" if self.top_p < 1.0 else ""
        return f"S{self.num_rows}-V{self.vocabulary}-{kind}{narrowed}-hidden{self.num_hidden}"

    def make_inputs(self, device: str) -> dict:
        logits = randn(self.num_rows, self.vocabulary, device=device, scale=self.scale)
        logits[:, self.vocabulary - self.num_hidden :] = float("-inf")
        s = torch.arange(self.num_rows, device=device)
        one = torch.ones(self.num_rows, device=device)
        return {
            "logits_S_V": logits,
            "temperature_S": 0.3 * (s % 4).float() if self.mixed else one,
            "top_k_S": ((s % 3) * 5 if self.mixed else 0 * s + self.top_k).to(torch.int32),
            "top_p_S": 1.0 - 0.25 * (s % 5 // 2).float() if self.mixed else self.top_p * one,
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
DRAWN = Case(1, 201024, mixed=False, num_hidden=966)
# Normal logits of scale 4 have 95 % of their mass in about 1 % of the columns.
PEAKED = replace(DRAWN, scale=4.0)
BENCH = [
    *(replace(DRAWN, num_rows=s) for s in (1, 8, 32, 64)),
    *(replace(PEAKED, num_rows=s, top_k=50) for s in (1, 32)),
    *(replace(PEAKED, num_rows=s, top_p=0.95) for s in (1, 32)),
    *(replace(PEAKED, num_rows=s, top_k=50, top_p=0.95) for s in (1, 32)),
    replace(DRAWN, num_rows=8, top_p=0.5),  # flat: some 2 % of the columns are kept
]
