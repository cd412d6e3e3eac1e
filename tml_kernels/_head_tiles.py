"""How ops that work on heads are cut: some heads of one token per program, all in registers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ._configs import chooser

MAX_HEAD_WIDTH = 1024


@dataclass(frozen=True)
class Problem:
    head_width: int


@dataclass(frozen=True)
class Config:
    """A tile is `block_h` heads of two halves of `block_b` columns."""

    block_h: int
    block_b: int
    num_warps: int

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if p.head_width > 2 * self.block_b:
            return f"{p.head_width=} does not fit two halves of {self.block_b=}"
        return None


# 1024 columns each: k and v of eight heads of 128 are one program, q of 32 heads four.
SHIPPED = (
    Config(block_h=32, block_b=16, num_warps=4),
    Config(block_h=16, block_b=32, num_warps=4),
    Config(block_h=8, block_b=64, num_warps=4),
    Config(block_h=4, block_b=128, num_warps=4),
    Config(block_h=2, block_b=256, num_warps=4),
    Config(block_h=1, block_b=512, num_warps=4),
)


@functools.partial(chooser, ops=("attention_prologue", "shift_keys"))
def choose_config(p: Problem) -> Config:
    """Pure: the head width alone decides, so that a token's bits do not depend on the others."""
    for config in SHIPPED:
        if config.why_not(p) is None:
            return config
    raise ValueError(f"head width {p.head_width} is over {MAX_HEAD_WIDTH}, the widest")
