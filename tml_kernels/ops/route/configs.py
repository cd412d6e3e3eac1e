"""How moe_route is cut: tiles of the gate by tokens, of a fixed depth."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..._configs import chooser
from ..._routing import GROUP_T

MAX_EXPERTS = 1024  # scores of GROUP_T tokens in the registers of one program


@dataclass(frozen=True)
class ScheduleConfig:
    """sum_tile: counts (groups x experts) that are added up at once; place_a: assignments that are
    put in their places at once. Both in the registers of one program."""

    sum_tile: int = 4096
    place_a: int = 1024
    num_warps: int = 4
    num_stages: int = 1


SCHEDULE = ScheduleConfig()


@dataclass(frozen=True)
class Problem:
    num_tokens: int
    num_experts: int


@dataclass(frozen=True)
class Config:
    """A program multiplies `block_a` rows of the gate by `block_t` tokens, over SPLIT_D columns.

    The last one of a tile of tokens to arrive scores that tile, GROUP_T tokens at a time.
    """

    block_a: int
    block_t: int
    num_stages: int
    # These decide the order of summation: the same for every number of tokens.
    block_d: int = 64
    num_warps: int = 4

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if self.block_a >= 64:
            return f"{self.block_a=}: from 64 rows on another matrix instruction sums otherwise"
        if self.block_t % GROUP_T:
            return f"{self.block_t=} is not a multiple of {GROUP_T=}"
        if p.num_tokens > self.block_t and self.block_a < 32:
            return f"{p.num_tokens=} is over {self.block_t=}: the gate would be read again"
        if self.num_warps != num_warps(p.num_experts):
            return f"{self.num_warps=} is not that of {p.num_experts=}"
        return None


def num_warps(num_experts: int) -> int:
    """As few as hold the scores of a group without spilling."""
    return 4 if num_experts <= 256 else 8


# Few tokens: as many programs as there are, and all their weights in flight at once. More: taller
# tiles, since each program reads its tokens again, but no more groups in a row for its last one
# than needed. Chosen by counts of programs and bytes at D = 4096 and A = 258, not by timing.
SHIPPED = (
    Config(block_a=16, block_t=8, num_stages=8),
    Config(block_a=16, block_t=16, num_stages=8),
    Config(block_a=32, block_t=16, num_stages=6),
    Config(block_a=32, block_t=32, num_stages=6),
)
MANY_TOKENS = 64


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock."""
    configs = [replace(config, num_warps=num_warps(p.num_experts)) for config in SHIPPED]
    if p.num_tokens > MANY_TOKENS:
        return configs[-1]
    return next(config for config in configs if config.why_not(p) is None)
