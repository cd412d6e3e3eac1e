"""What is needed to compile one kernel ahead of time, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotSpec:
    """One Triton kernel in one shipped configuration.

    signature: argument name -> Triton type ("*bf16", "i32", "fp32", ...) for what is not constexpr.
    constexprs: argument name -> value. aligned: the arguments whose pointer or value is a multiple
    of 16, as torch's allocations and the model's widths are; None means all pointers and "D".
    """

    kernel: Any
    config: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] | None = None
    label: str = field(default="")
