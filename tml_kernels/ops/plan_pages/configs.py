"""How plan_pages is cut: a program ranks `block_m` pages of one list against all of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..._configs import chooser


@dataclass(frozen=True)
class Problem:
    num_rows: int  # S
    num_columns: int  # M


@dataclass(frozen=True)
class Config:
    """block_j: pages that are compared with at a time."""

    block_m: int
    block_j: int
    num_warps: int = 4


# Lists of up to 256 pages are compared in one step; 16 pages of each program make 1,024 programs of
# 64 lists, which an H200 holds at once. Longer lists: every program reads all of its list, so
# fewer, each with more pages.
SHORT = Config(block_m=16, block_j=256)
LONG = Config(block_m=32, block_j=128)
SHORT_LIST = 512


@chooser
def choose_config(p: Problem) -> Config:
    """Pure: same problem, same config; no device, no clock."""
    return SHORT if p.num_columns <= SHORT_LIST else LONG
