"""How linear is cut, what its scratch holds, and which problems its kernel takes.

A row's columns are summed in `Problem.splits` parts, each in order, and the parts in order: that
follows from the weight's shape alone, and with it the bits. Where the weight is some of a matrix's
rows it follows from the shape of the whole matrix, so these rows give the bits they give in it. The
tile, and whether one program or one for each part adds them up, are free and follow from the number
of tokens too.
"""

# Dimension key: T tokens, D input width, F rows of the weight.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..._configs import chooser
from ..._triton import steps
from ...quant import PackedExperts

# Programs that fill the largest chip twice over (132 or 148 processors); less than this half of
# them leaves some of it idle.
FULL, HALF_FULL = 264, 128
MIN_SPLIT, MAX_SPLITS = 1024, 8  # columns of a part, at least; parts
MAX_ELEMENTS = 2**31 - 1  # of a packed matrix: offsets within it are 32-bit
# The counters have the first bytes of every scratch, whatever the call: partial results of one call
# never lie where another counts.
MAX_COUNTERS = 512

# Tokens of the widest block. Decoding takes registers; and a step of int4 has eight products with
# sums of their own, which for 64 tokens exceed sm_100's tensor memory of 512 columns.
WIDEST = {"plain": 128, "fp8": 64, "fp8_channel": 64, "int4": 32, "int4_f16": 32}
STEP = {format: steps.STEP[format] for format in WIDEST}  # of the formats that linear takes
WIDEST_CONV = 64  # with a convolution behind the product, whose taps take registers too


@dataclass(frozen=True)
class Problem:
    num_tokens: int  # T
    width: int  # D
    rows: int  # F
    format: str  # of the weight: "plain" for numbers, or a packed format's name
    parts: int = 1  # the weight is one of so many equal parts of a matrix's rows

    @property
    def split_d(self) -> int:
        """Columns of a part: a pure function of the whole matrix, never of T."""
        tiles = -(-self.rows * self.parts // (64 if self.format == "plain" else 128))
        splits = 1
        while (
            splits < MAX_SPLITS
            and 2 * splits * tiles <= FULL
            and 2 * splits * MIN_SPLIT <= self.width
        ):
            splits *= 2
        return max(1, -(-self.width // (256 * splits))) * 256

    @property
    def splits(self) -> int:
        return -(-self.width // self.split_d)

    @property
    def step(self) -> int:
        return STEP[self.format]


def problem_of(x_T_D: Tensor, weight_F_D: Tensor | PackedExperts, parts: int = 1) -> Problem:
    num_tokens, width = x_T_D.shape
    if isinstance(weight_F_D, Tensor):
        return Problem(num_tokens, width, weight_F_D.shape[0], "plain", parts)
    format = weight_F_D.format.name if weight_F_D.format.packed else "plain"
    return Problem(num_tokens, width, weight_F_D.num_rows, format, parts)


@dataclass(frozen=True)
class Config:
    """A program is `block_m` weight rows by `block_n` tokens. parallel: over one part of the
    columns, and the last program of a tile adds the parts up; else over all of them."""

    block_m: int
    block_n: int
    parallel: bool
    num_warps: int
    num_stages: int

    def tiles(self, p: Problem) -> int:
        return -(-p.rows // self.block_m)

    def blocks(self, p: Problem) -> int:
        return -(-p.num_tokens // self.block_n)

    def programs(self, p: Problem) -> int:
        return self.tiles(p) * self.blocks(p) * (p.splits if self.parallel else 1)

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser and the tests."""
        if self.block_n > WIDEST[p.format]:
            return f"{self.block_n=} is over {WIDEST[p.format]}, the widest block of {p.format}"
        if self.parallel and self.tiles(p) * self.blocks(p) > MAX_COUNTERS:
            return f"{self.tiles(p)} tiles of {self.blocks(p)} blocks are over {MAX_COUNTERS}"
        return None

    def scratch_bytes(self, p: Problem) -> int:
        """Counters, zero between calls, then a tile in float32 for every program."""
        if not self.parallel:
            return 0
        return 4 * (MAX_COUNTERS + self.programs(p) * self.block_m * self.block_n)


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock. Taken from the cubins' registers and
    shared memory, and from `bench tune`. The tile is always one of the matrix unit's wide
    instructions (64 rows and 4 warps, or multiples): narrower ones add up in another order."""
    block_n = next(n for n in (16, 32, 64, 128) if n >= min(p.num_tokens, WIDEST[p.format]))
    blocks = -(-p.num_tokens // block_n)
    lowest = 64 if p.format == "plain" else 128
    parallel = p.splits > 1 and -(-p.rows // lowest) * blocks < HALF_FULL
    programs = -(-p.rows // 128) * blocks * (p.splits if parallel else 1)
    block_m = 128 if lowest == 128 or programs > HALF_FULL else 64
    num_warps = 8 if block_n == 128 or (block_m == 128 and block_n == 64) else 4
    return Config(block_m, block_n, parallel, num_warps, _stages(p.format, block_m, block_n))


@chooser
def choose_conv_config(p: Problem) -> Config:
    """Of linear_conv: `choose_config`, but for its widest blocks; never with a larger scratch."""
    config = choose_config(p)
    if config.block_n <= WIDEST_CONV:
        return config
    return replace(choose_config(replace(p, num_tokens=WIDEST_CONV)), parallel=False)


def _stages(format: str, block_m: int, block_n: int) -> int:
    """At least 24 KB of weights in flight on a processor, and two programs in its shared memory
    while tokens are few."""
    if format != "plain":
        return 3 if block_n >= 64 else 4
    if block_n == 128:
        return 4
    return 6 if block_m == 64 else 4


def kernel_why_not(
    dtype: torch.dtype, weight_dtype: torch.dtype, format: str, width: int, rows: int
) -> str | None:
    """Why the kernel cannot multiply such rows with this weight; None when it can."""
    if dtype == torch.float32:
        return "float32 rows: the matrix unit takes 16-bit ones"
    if format == "plain":
        if weight_dtype != dtype:
            return f"a weight of {weight_dtype} with rows of {dtype}"
    elif dtype != torch.bfloat16:
        return f"{format} weights are multiplied in bfloat16, rows are {dtype}"
    elif rows * width > MAX_ELEMENTS:
        return f"a packed matrix of {rows} x {width} has over {MAX_ELEMENTS} elements"
    if width == 0:
        return "D=0: there is nothing to add up"
    return None


def scratch_bytes(p: Problem) -> int:
    """Bytes that `linear` needs on CUDA, where it takes the kernel."""
    return choose_config(p).scratch_bytes(p)
