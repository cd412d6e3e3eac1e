"""How embed_tokens is cut: one program per token, the whole row in registers."""

from __future__ import annotations

from dataclasses import dataclass

from ..._configs import chooser

MAX_WIDTH = 8192  # a token in the registers of one program, twice for a step


@dataclass(frozen=True)
class Config:
    """unroll: table rows in flight per program; they are what hides the latency of the gather."""

    block_d: int
    num_warps: int
    unroll: int = 8

    def why_not(self, width: int) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if width > self.block_d:
            return f"{width=} does not fit one block of {self.block_d=}"
        return None


SHIPPED = (
    Config(block_d=128, num_warps=4),
    Config(block_d=512, num_warps=4),
    Config(block_d=1024, num_warps=4),
    Config(block_d=2048, num_warps=8),
    Config(block_d=4096, num_warps=16),
    Config(block_d=8192, num_warps=16, unroll=4),
)


@chooser
def choose_config(width: int) -> Config:
    """Pure: the width alone decides, so that a token's bits do not depend on its neighbours."""
    for config in SHIPPED:
        if config.why_not(width) is None:
            return config
    raise ValueError(f"embed_tokens: width {width} is over {MAX_WIDTH}, the widest token it makes")
