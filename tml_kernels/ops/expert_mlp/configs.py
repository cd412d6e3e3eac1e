"""How expert_mlp is cut, what its workspace holds, and which problems its kernels take."""

# Dimension key: T tokens, D model width, F expert width, S slots of a token (chosen and shared).

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._configs import chooser
from ...quant import PackedExperts

# Widest tile of weight rows: the counters of a workspace are one for every token and tile of this
# many model columns, so all configurations share it.
BLOCK_M = 128
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")
FOUR_BIT = ("int4", "int4_f16", "mxfp4", "nvfp4")
MAX_ELEMENTS = 2**31 - 1  # of one expert's matrix: offsets within it are 32-bit


@dataclass(frozen=True)
class Problem:
    """One launch. block_n: tokens of a block; format: the routed experts'; both kernels alike.
    alone: a block for each assignment of few tokens, no schedule. cramped: tokens of float32 on a
    chip before sm_90, which has 163 KB of shared memory for a program and not 227."""

    format: str
    shared_format: str
    block_n: int
    alone: bool = False
    cramped: bool = False


@dataclass(frozen=True)
class Config:
    """A program is `block_m` weight rows by `block_n` tokens, which runs over all columns."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread may take; None: as many as the compiler likes

    def why_not(self, p: Problem) -> str | None:
        """The one statement of what is legal; used by the chooser, the tuner and the tests."""
        if self.block_n != p.block_n:
            return f"{self.block_n=}, but the schedule's blocks hold {p.block_n} tokens"
        if self.block_m != BLOCK_M:
            return f"{self.block_m=}, but the counters are for tiles of {BLOCK_M} rows"
        return None


# The depth of the pipeline. bf16 and fp8 need 24 KB of weights in flight on an SM. Steps of 4 bits
# are long: what counts is how many programs fit, and then that a step's weights come during the one
# before. int4 in 3 stages takes 57 of an SM's 228 KB, so that four programs fit to the byte.
_STAGES = {"plain": 4, "fp8": 4, "fp8_channel": 4, "int4": 3, "int4_f16": 2, "mxfp4": 3, "nvfp4": 7}
FOUR_PROGRAMS = 128  # registers of a thread: as many as let four programs of 4 warps fit


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock."""
    stages = min(_STAGES[p.format], _STAGES[p.shared_format])
    num_warps = 8 if p.block_n >= 64 else 4
    if p.block_n > 16 or p.format != p.shared_format:
        stages = max(stages, 3)
    if p.block_n > 16:
        stages = min(stages, 4)
    if p.block_n >= 64:
        stages = 3
    if p.alone and p.format in ("int4", "int4_f16"):
        # A program or two on an SM, and each waits for its own steps: more warps shorten those.
        num_warps, stages = 8, 3
    if p.cramped and (p.format in FOUR_BIT or p.shared_format in FOUR_BIT):
        stages = min(stages, 2 if p.block_n >= 64 else 4)
    four = p.format in ("int4", "int4_f16") and p.block_n == 16 and not p.alone
    return Config(BLOCK_M, p.block_n, num_warps, stages, FOUR_PROGRAMS if four else None)


def kind_of(experts: PackedExperts) -> str:
    """The kernels' name for a format: one for all that are read as they are."""
    return experts.format.name if experts.format.packed else "plain"


def kernel_why_not(dtype: torch.dtype, experts: PackedExperts) -> str | None:
    """Why the kernels cannot multiply such rows with these weights; None when they can."""
    rows, columns = experts.num_rows, experts.num_columns
    if rows * columns > MAX_ELEMENTS:
        return f"an expert's matrix of {rows} x {columns} has over {MAX_ELEMENTS} elements"
    if experts.format.packed and dtype == torch.float16:
        return f"{experts.format.name} weights are multiplied in bfloat16; x is float16"
    return None


def quantized_why_not(experts: PackedExperts, first_byte: int) -> str | None:
    """Why the kernels cannot multiply rounded rows, which begin there in their storage, with these
    weights; None when they can. Rows that no asynchronous copy takes come by plain stores, which
    are not fenced from the product (sm_90)."""
    if experts.num_columns % 16:
        return f"needs D and F that 16 divides, and one is {experts.num_columns}"
    if first_byte % 16:
        return f"needs x to begin at a multiple of 16 bytes, and it is at {first_byte}"
    return None


@dataclass(frozen=True)
class Workspace:
    """Byte offsets of what the two launches leave for each other, and its whole size."""

    h: int
    part: int
    counter: int
    num_counters: int
    size: int

    def carve(self, buffer: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(h, part, counter) as flat views of a uint8 buffer of at least `size` bytes."""
        return (
            buffer[self.h : self.part].view(dtype),
            buffer[self.part : self.counter].view(torch.float32),
            buffer[self.counter : self.size].view(torch.int32),
        )


def workspace_of(
    num_tokens: int, num_slots: int, width: int, hidden: int, dtype: torch.dtype
) -> Workspace:
    """h [T * S, F] in x's dtype, parts [T * S, D] in float32, counters [T * tiles] in int32.

    >>> workspace_of(1, 8, 4096, 2048, torch.bfloat16).size
    163968
    """
    rows = num_tokens * num_slots
    part = _aligned(rows * hidden * dtype.itemsize)
    counter = part + _aligned(rows * width * 4)
    num_counters = num_tokens * -(-width // BLOCK_M)
    return Workspace(0, part, counter, num_counters, counter + _aligned(num_counters * 4))


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
