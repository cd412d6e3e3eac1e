"""Inputs of move_pages for tests and benchmarks, and what each must move at least."""

# Dimension key: L layers, P pages of the source, N pages of the target, B elements of a page,
# I moves.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...testing import Cost

POOLS = ("source_L_P_B", "target_L_N_B")


@dataclass(frozen=True)
class Case:
    """padding: how many of the moves are padding. same: source and target are one tensor. pinned:
    "source" or "target" is pinned memory of the host when the other is on a GPU."""

    num_layers: int  # L
    source_pages: int  # P
    target_pages: int  # N
    num_moves: int  # I
    width: int  # B
    dtype: torch.dtype = torch.float32
    padding: int = 0
    same: bool = False
    pinned: str = ""

    def __str__(self) -> str:
        kind = "same" if self.same else f"{self.pinned or 'none'}-pinned"
        return (
            f"L{self.num_layers}-P{self.source_pages}-N{self.target_pages}-I{self.num_moves}-"
            f"B{self.width}-pad{self.padding}-{kind}-{str(self.dtype).removeprefix('torch.')}"
        )

    def make_inputs(self, device: str) -> dict[str, Tensor]:
        def pool(name: str, num_pages: int) -> Tensor:
            shape = (self.num_layers, num_pages, self.width)
            num_bytes = math.prod(shape) * self.dtype.itemsize
            made = torch.randint(256, (num_bytes,), dtype=torch.uint8)  # any bits, those of NaN too
            made = made.view(self.dtype).view(shape)
            if device == "cuda" and name.startswith(self.pinned or "none"):
                return made.pin_memory()
            return made.to(device)

        source = pool("source", self.source_pages)
        target = source if self.same else pool("target", self.target_pages)
        from_I = torch.randint(max(1, self.source_pages), (self.num_moves,))
        to_I = torch.randperm(max(self.target_pages, self.num_moves))[: self.num_moves]
        if self.same:
            pages = torch.randperm(self.source_pages)
            from_I = pages[self.num_moves :][from_I % (self.source_pages - self.num_moves)]
            to_I = pages[: self.num_moves]
        skipped = torch.randperm(self.num_moves)[: self.padding]
        from_I[skipped[::2]] = -1
        to_I[skipped[1::2]] = -1
        return {
            "source_L_P_B": source,
            "target_L_N_B": target,
            "from_I": from_I.to(device),
            "to_I": to_I.to(device),
        }

    def cost(self) -> Cost:
        page = self.num_layers * self.width * self.dtype.itemsize
        moves = self.num_moves - self.padding
        return Cost(bytes=2 * moves * page + 16 * self.num_moves, flops=0)


EDGE = [
    Case(2, 3, 3, 0, 8),  # no moves
    Case(0, 3, 3, 2, 8),  # no layers
    Case(2, 3, 3, 2, 0),  # empty pages
    Case(1, 1, 1, 1, 1, torch.uint8),  # one byte
    Case(3, 5, 4, 3, 7, torch.uint8, padding=2),  # pages of an odd number of bytes
    Case(2, 4, 6, 5, 5, torch.bfloat16, padding=2),  # two bytes at a time
    Case(2, 4, 6, 4, 3),  # four
    Case(2, 4, 6, 4, 3, torch.int64),  # eight
    Case(2, 4, 3, 3, 16, torch.float8_e4m3fn, padding=3),  # all padding
    Case(3, 9, 9, 4, 12, same=True, padding=1),
    Case(2, 3, 5, 4, 4112),  # one vector of 16 bytes past a tile
    Case(2, 3, 5, 4, 1027, torch.uint8),  # the same of one byte
]
MODEL = [
    Case(6, 16, 16, 5, 2 * 64 * 32, torch.bfloat16, same=True),  # tiny: fork copies the tails
    Case(6, 16, 8, 8, 2 * 64 * 32, torch.bfloat16, padding=1),  # and suspends
    Case(6, 16, 8, 8, 2 * 64, padding=1),  # with its scales
]
PAGE = 8 * 64 * 128  # elements of a page: 8 heads of 128, 64 rows
BENCH = [
    Case(66, 18, 2, 1, PAGE, torch.bfloat16),  # one page of every layer
    Case(66, 20, 16, 16, PAGE, torch.bfloat16),
    Case(66, 40, 32, 32, PAGE, torch.float8_e4m3fn),
    Case(66, 40, 32, 32, 8 * 64),  # scales
    Case(66, 20, 16, 16, PAGE, torch.bfloat16, pinned="target"),  # suspend
    Case(66, 16, 20, 16, PAGE, torch.bfloat16, pinned="source"),  # resume
]
