"""How short_conv is cut: one program per token, a row in one pass of registers or in blocks."""

from __future__ import annotations

from dataclasses import dataclass

from ..._configs import chooser

MAX_WIDTH = 16384


@dataclass(frozen=True)
class Problem:
    width: int


@dataclass(frozen=True)
class Config:
    """A row is `num_blocks` blocks of `block_d` columns.

    One block stays in registers between the sum of squares and the output. With more, each block is
    computed twice, which costs reads that the L1 cache answers.
    """

    block_d: int
    num_blocks: int
    num_warps: int

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if p.width > self.block_d * self.num_blocks:
            return f"{p.width=} does not fit {self.num_blocks=} of {self.block_d=}"
        return None


SHIPPED = (
    Config(block_d=128, num_blocks=1, num_warps=1),
    Config(block_d=512, num_blocks=1, num_warps=2),
    Config(block_d=1024, num_blocks=1, num_warps=4),
    Config(block_d=2048, num_blocks=1, num_warps=8),
    Config(block_d=4096, num_blocks=1, num_warps=16),
    Config(block_d=2048, num_blocks=3, num_warps=8),
    Config(block_d=2048, num_blocks=4, num_warps=8),
    Config(block_d=2048, num_blocks=8, num_warps=8),
)


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: the width alone decides, so that a token's bits do not depend on its neighbours."""
    for config in SHIPPED:
        if config.why_not(p) is None:
            return config
    raise ValueError(f"short_conv: width {p.width} is over {MAX_WIDTH}, the widest row it takes")
