"""How moe_route is cut: tiles of the gate by tokens, of a fixed depth."""

from __future__ import annotations

from dataclasses import dataclass

from ..._configs import chooser
from ..._routing import GROUP_T

MAX_EXPERTS = 1024  # scores of GROUP_T tokens in the registers of one program


@dataclass(frozen=True)
class ScheduleConfig:
    """sum_groups: of which the counts are added up at once; place_a: assignments that are put in
    their places at once. Both in the registers of one program."""

    sum_groups: int = 8
    place_a: int = 512
    num_warps: int = 8
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
    block_d: int = 128  # of float32 gates half as many
    num_warps: int = 8  # one for each token of a group

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if self.block_a >= 64:
            return f"{self.block_a=}: from 64 rows on another matrix instruction sums otherwise"
        if self.block_t % GROUP_T:
            return f"{self.block_t=} is not a multiple of {GROUP_T=}"
        if p.num_tokens > self.block_t and self.block_a < 32:
            return f"{p.num_tokens=} is over {self.block_t=}: the gate would be read again"
        if self.num_warps != GROUP_T:
            return f"{self.num_warps=}: each of {GROUP_T=} tokens has one"
        return None


def max_registers(num_experts: int, gate_bytes: int) -> int:
    """Said to the compiler, since without a limit it saves registers: it then had 4 of the 16 loads
    of a token's parts in flight. 128 is two programs on a processor; float32 gates and more experts
    take more, or they would need local memory."""
    return 128 if num_experts <= 256 and gate_bytes <= 2 else 255


# Few tokens: as many programs as there are, and all their weights in flight at once. Up to
# MANY_TOKENS: one group a tile, since its last program takes groups one after the other; the gate
# comes from L2 once for each tile. More: taller tiles. Chosen by counts of programs, instructions
# and bytes at D = 4096 and A = 258, not by timing.
SHIPPED = (
    Config(block_a=16, block_t=8, num_stages=5),
    Config(block_a=32, block_t=8, num_stages=5),
    Config(block_a=32, block_t=32, num_stages=3),
)
MANY_TOKENS = 64


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock."""
    if p.num_tokens > MANY_TOKENS:
        return SHIPPED[-1]
    return next(config for config in SHIPPED if config.why_not(p) is None)
