"""What is needed to compile one kernel ahead of time, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Most instructions a thread may spend on one 4-bit weight: an H200 issues 132 SMs * 128 lanes *
# 1.98 GHz = 33 T lane-instructions a second, and its memory brings 8.3 T weights of 4.25 bits.
MAX_LOOP = 4.0


@dataclass(frozen=True)
class AotSpec:
    """One Triton kernel in one shipped configuration.

    signature: argument name -> Triton type ("*bf16", "i32", "fp32", ...) for what is not constexpr.
    constexprs: argument name -> value. aligned: the arguments whose pointer or value is a multiple
    of 16, as torch's allocations and the model's widths are; None means all pointers and "D".

    mma: the matrix instructions that sm_90 code must have, "HGMMA" or "QGMMA"; None asks nothing.
    weights_per_step: for each loop with matrix instructions, in program order, the weights that a
    program takes in one iteration; empty if they are not counted. max_loop: the most instructions
    per weight that any of these loops may have on sm_90. min_arch: the oldest chip that has what
    the kernel needs; below_arch: the first one that takes another configuration; None: all newer
    ones take it. maxnreg: registers a thread may take, where a launch says so.
    """

    kernel: Any
    config: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] | None = None
    label: str = field(default="")
    mma: str | None = None
    weights_per_step: tuple[int, ...] = ()
    max_loop: float | None = None
    min_arch: int = 80
    below_arch: int | None = None
    maxnreg: int | None = None
