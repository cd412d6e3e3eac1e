"""Inputs of short_conv for tests and benchmarks, and what each must move at least."""

# Dimension key: T tokens, S session rows, N state slots, D model width.

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...testing import Cost, randn

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """counts: tokens of each session row; idle: the rows whose slot is -1; padding: tokens after
    the last session. What nobody may read, idle and padding rows and unnamed slots, holds NaN."""

    counts: tuple[int, ...]
    width: int
    idle: tuple[int, ...] = ()
    padding: int = 0
    residual: bool = True
    norm: bool = True
    late_norm: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        counts = "-".join(map(str, self.counts[:8])) or "none"
        kind = (
            "late"
            if self.late_norm
            else "norm"
            if self.norm
            else "add"
            if self.residual
            else "conv"
        )
        return (
            f"{counts}x{len(self.counts)}-i{len(self.idle)}-p{self.padding}-D{self.width}-{kind}-"
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def num_tokens(self) -> int:
        return sum(self.counts) + self.padding

    def slots(self) -> list[int]:
        """Row s has slot S - s, so that slot 0 is never named and rows and slots differ."""
        return [-1 if s in self.idle else len(self.counts) - s for s in range(len(self.counts))]

    def make_inputs(self, device: str) -> dict:
        start = torch.tensor([0, *self.counts]).cumsum(0)
        slots, live = self.slots(), torch.zeros(self.num_tokens, dtype=torch.bool)
        for s, slot in enumerate(slots):
            live[start[s] : start[s + 1]] = slot >= 0
        x = randn(self.num_tokens, self.width)
        residual = randn(self.num_tokens, self.width)
        state = torch.full((len(slots) + 2, 3, self.width), NAN)
        named = [slot for slot in slots if slot >= 0]
        state[named] = randn(len(named), 3, self.width)
        x[~live], residual[~live] = NAN, NAN

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=self.dtype)

        return {
            "x_T_D": rows(x),
            "weight_D_4": randn(self.width, 4, device=device, scale=0.5),
            "state_N_3_D": rows(state),
            "start_S1": start.to(device=device, dtype=torch.int32),
            "slot_S": torch.tensor(slots, device=device, dtype=torch.int32),
            "residual_T_D": rows(residual) if self.residual else None,
            "norm_weight_D": 1 + 0.1 * randn(self.width, device=device) if self.norm else None,
            "eps": 1e-6,
            "late_norm": self.late_norm,
        }

    def cost(self) -> Cost:
        row = self.width * self.dtype.itemsize
        rows_moved = 4 if self.residual else 2  # read x (and residual), write out (and residual)
        live = len(self.counts) - len(self.idle)
        weights = 4 * self.width * (5 if self.norm else 4)
        return Cost(
            bytes=self.num_tokens * row * rows_moved + live * 6 * row + weights,
            flops=(13 if self.norm else 9) * self.num_tokens * self.width,
        )


EDGE = [
    Case((), 128),  # no tokens, no sessions
    Case((), 128, padding=2),  # no sessions, only padding
    Case((0, 0), 128),  # sessions, no tokens
    Case((1,), 128),  # one token
    Case((2,), 1, residual=False, norm=False),  # one column
    Case((0, 1, 2, 3, 4, 0, 7), 77, padding=3),  # every way to mix state and inputs, odd width
    Case((3, 2, 5), 130, idle=(1,), norm=False),  # an idle row between live ones, no norm
    Case((4, 2), 96, idle=(0, 1), padding=1),  # nobody is live
    Case((1,) * 130, 32, idle=(5, 129)),  # more rows than one block of session ends
    Case((0, 1, 2, 5), 77, idle=(2,), padding=3, late_norm=True),  # its reader divides
    Case((2, 5), 1100, residual=False, norm=False),  # one step past a shipped block, conv alone
]
MODEL = [
    Case((4, 1, 9), 128),  # tiny preset
    Case((4, 1, 1, 6), 4096),  # inkling-small, prefill and decode rows in one call
    Case((1, 4), 6144),  # 975B: a row in three blocks
    Case((1, 4), 6144, late_norm=True),
    Case((3, 2), 16384, idle=(1,)),  # the widest
]
BENCH = [Case((1,) * n, 4096, dtype=torch.bfloat16) for n in (1, 8, 32, 64)] + [
    Case((16,) * n, 4096, dtype=torch.bfloat16) for n in (16, 64)
]
