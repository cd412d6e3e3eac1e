"""How rms_norm is cut: one program per row, the whole row in registers."""

from __future__ import annotations

from dataclasses import dataclass

from ..._configs import chooser

MAX_WIDTH = 16384  # one row in the registers of one program: 128 values a thread at 8 warps


@dataclass(frozen=True)
class Problem:
    width: int


@dataclass(frozen=True)
class Config:
    block_d: int
    num_warps: int

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if p.width > self.block_d:
            return f"{p.width=} does not fit one block of {self.block_d=}"
        return None


SHIPPED = (
    Config(block_d=128, num_warps=1),
    Config(block_d=256, num_warps=1),
    Config(block_d=512, num_warps=1),
    Config(block_d=1024, num_warps=2),
    Config(block_d=2048, num_warps=4),
    Config(block_d=4096, num_warps=8),
    Config(block_d=8192, num_warps=8),
    Config(block_d=16384, num_warps=16),
)


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock. The smallest block that holds a row."""
    for config in SHIPPED:
        if config.why_not(p) is None:
            return config
    raise ValueError(f"rms_norm: width {p.width} is over {MAX_WIDTH}, the widest row it takes")
