"""How flow_head is cut, and the scratch that its launches hand on."""

# Dimension key: S session rows, N Euler steps, Q rows evaluated together: S, or 2 S when guided,
# W head width, U inner width of a block's MLP, L blocks.

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """A tile is block_f features x block_r rows, block_k columns at a time.

    One configuration per kernel, whatever the number of rows: a row's bits cannot depend on it.
    """

    block_f: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


PRODUCT = Config(block_f=32, block_r=16, block_k=64, num_warps=4, num_stages=3)
# Many rows at once, N * Q of them, read the weights of all blocks: a wider tile reads them less.
MODULATION = Config(block_f=64, block_r=32, block_k=32, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class Problem:
    num_rows: int
    width: int
    inner: int
    num_blocks: int
    num_steps: int
    guided: bool

    @property
    def evaluated(self) -> int:
        """Q."""
        return self.num_rows * (2 if self.guided else 1)

    def work_shapes(self) -> dict[str, tuple[int, ...]]:
        """What is handed on between launches, float32."""
        rows = (self.num_steps, self.evaluated)
        return {
            "cond_S_W": (self.num_rows, self.width),
            "time_in_N_W": (self.num_steps, self.width),
            "time_N_W": (self.num_steps, self.width),
            "mod_N_Q_L_3_W": (*rows, self.num_blocks, 3, self.width),
            "final_N_Q_2_W": (*rows, 2, self.width),
            "h_Q_W": (self.evaluated, self.width),
            "inner_Q_U": (self.evaluated, self.inner),
        }

    def work_size(self) -> int:
        """Values of scratch; each part begins at a multiple of ALIGN."""
        return sum(aligned_size(shape) for shape in self.work_shapes().values())


ALIGN = 32  # values: 128 bytes


def aligned_size(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // ALIGN) * ALIGN
