"""TML_NVTX=1: ticks and their stages as NVTX ranges, for Nsight Systems."""

from __future__ import annotations

from typing import Any

import torch

from . import _env
from .errors import InputValueError

_AFTER = {"model": "publish"}  # `take` begins with the tick, `model` with its launch


class Ranges:
    """One range per tick and, within it, one per stage. For the tick thread alone."""

    def __init__(self, nvtx: Any) -> None:
        self._nvtx = nvtx
        self._in_stage = False

    def open(self, tick: int) -> None:
        self._nvtx.range_push(f"tick {tick}")
        self.begin("take")

    def begin(self, stage: str) -> None:
        self._end()
        self._nvtx.range_push(stage)
        self._in_stage = True

    def lap(self, stage: str) -> None:
        """`stage` is over."""
        self._end()
        if stage in _AFTER:
            self.begin(_AFTER[stage])

    def close(self) -> None:
        self._end()
        self._nvtx.range_pop()

    def _end(self) -> None:
        if self._in_stage:
            self._nvtx.range_pop()
        self._in_stage = False


def ranges() -> Ranges | None:
    """None unless TML_NVTX asks for ranges. Raises InputValueError where there is no CUDA."""
    if not _env.nvtx():
        return None
    if not torch.cuda.is_available():
        raise InputValueError(
            "TML_NVTX=1: NVTX ranges need CUDA, and torch sees no GPU here: unset TML_NVTX"
        )
    return Ranges(torch.cuda.nvtx)
