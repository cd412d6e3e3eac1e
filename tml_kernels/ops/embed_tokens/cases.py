"""Inputs of embed_tokens for tests and benchmarks, and what each must move at least."""

# Dimension key: T tokens, D model width, V rows of the text table, B bands, Y = B * levels rows of
# the dMel table, A frames heard, P embedded tokens, N rows of steps, F frames of a step.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...testing import Cost, randn
from .kinds import TokenKind

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """How many tokens of each kind, in random order. Of V, A, P and N rows there are two more than
    tokens; those that no token names hold NaN, or a value that is out of range."""

    width: int
    text: int = 0
    heard: int = 0
    embedded: int = 0
    steps: int = 0
    nothing: int = 0
    num_frames: int = 2
    num_bands: int = 80
    num_levels: int = 16
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        counts = f"t{self.text}-h{self.heard}-e{self.embedded}-s{self.steps}-n{self.nothing}"
        return f"D{self.width}-{counts}-F{self.num_frames}-{str(self.dtype).removeprefix('torch.')}"

    def make_inputs(self, device: str) -> dict:
        def named_rows(count: int) -> Tensor:
            return torch.randperm(count + 2)[:count]

        rows = {
            TokenKind.TEXT: named_rows(self.text),
            TokenKind.LEVELS: named_rows(self.heard),
            TokenKind.EMBEDDED: named_rows(self.embedded),
            TokenKind.STEP: named_rows(self.steps),
            TokenKind.NOTHING: torch.full((self.nothing,), -1),
        }
        kind_T = torch.cat([torch.full((len(row),), int(kind)) for kind, row in rows.items()])
        order = torch.randperm(len(kind_T))
        said = torch.randint(self.text + 2, (self.steps,))
        token_N = torch.full((self.steps + 2,), -7)
        token_N[rows[TokenKind.STEP]] = said
        embed_V_D = _poison(
            randn(self.text + 2, self.width, dtype=self.dtype),
            torch.cat([rows[TokenKind.TEXT], said]),
        )
        x_P_D = randn(self.embedded + 2, self.width, dtype=self.dtype)
        levels = (self.heard + 2, self.num_bands)
        levels_N_F_B = self._levels(self.steps + 2, self.num_frames, self.num_bands)
        inputs = {
            "kind_T": kind_T[order].int(),
            "index_T": torch.cat(list(rows.values()))[order].int(),
            "embed_V_D": embed_V_D,
            "embed_norm_D": 1 + 0.1 * randn(self.width),
            "table_Y_D": randn(self.num_bands * self.num_levels, self.width, dtype=self.dtype),
            "table_norm_D": 1 + 0.1 * randn(self.width),
            "levels_A_B": _poison(self._levels(*levels), rows[TokenKind.LEVELS]),
            "x_P_D": _poison(x_P_D, rows[TokenKind.EMBEDDED]),
            "token_N": token_N,
            "levels_N_F_B": _poison(levels_N_F_B, rows[TokenKind.STEP]),
        }
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        return on_device | {"num_levels": self.num_levels}

    def _levels(self, *shape: int) -> Tensor:
        return torch.randint(self.num_levels, shape, dtype=torch.uint8)

    def cost(self) -> Cost:
        """Every table row that the tokens can touch is read once."""
        row, tokens = self.width * self.dtype.itemsize, self.text + self.heard + self.embedded
        frames = self.heard + self.steps * self.num_frames
        rows = min(frames * self.num_bands, self.num_bands * self.num_levels)
        tokens += self.steps + self.nothing
        read = self.text + self.steps + self.embedded + rows
        return Cost(
            bytes=(read + tokens) * row + frames * self.num_bands + 8 * tokens,
            flops=self.width * (frames * (self.num_bands + 5) + 4 * (self.text + self.steps)),
        )


def _poison(rows: Tensor, named: Tensor) -> Tensor:
    """Rows that are not named become NaN, or 255."""
    unnamed = torch.ones(len(rows), dtype=torch.bool)
    unnamed[named] = False
    rows[unnamed] = NAN if rows.is_floating_point() else 255
    return rows


# Bands and levels whose product is no power of two.
SMALL: dict[str, Any] = {"num_bands": 5, "num_levels": 3}
EDGE = [
    Case(128, **SMALL),  # no tokens
    Case(1, text=1, **SMALL),  # one token, one column: the norm is the sign
    Case(77, nothing=3, **SMALL),  # padding alone, odd width
    Case(77, text=3, heard=2, embedded=2, steps=2, nothing=2, **SMALL),  # all kinds, odd width
    Case(130, heard=4, **SMALL),  # one source, one step past a power of two
    Case(130, embedded=3, **SMALL),
    Case(32, steps=3, num_frames=1, **SMALL),
    Case(32, text=1, steps=3, num_frames=0, **SMALL),  # a step without sound is its token
    Case(64, steps=2, num_frames=5, **SMALL),
]
MODEL = [
    Case(128, text=6, heard=8, embedded=4, steps=2, nothing=1),  # tiny preset, two sessions
    Case(4096, text=1, heard=1, steps=1),  # inkling-small
    Case(6144, text=1, heard=1, embedded=1, steps=1, num_frames=1),  # the widest model
]
# One tick's input of S sessions (two words, four frames of sound, 32 patches, a step), and a step.
BENCH = [
    Case(4096, text=2 * s, heard=4 * s, embedded=32 * s, steps=s, dtype=torch.bfloat16)
    for s in (1, 8, 32)
] + [Case(4096, steps=s, dtype=torch.bfloat16) for s in (1, 8, 32)]
