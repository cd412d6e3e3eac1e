from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The least an op must do: each input byte read once, each output byte written once."""

    bytes: int
    flops: int
