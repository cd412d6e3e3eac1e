"""Keys and values of the sessions in pages of 64 rows, a fixed ring of pages for every slot.

The token at position p lies on ring page (p // 64) % M, row p % 64: nothing moves, the oldest page
is written over. Which position a row holds follows from the slot's length alone, so a slot of
length zero reaches none of its old rows.

Worked example, M = 3 and length 200: positions 128..191 lie on ring page 2, 192..199 on ring page
0, and ring page 1 still holds 64..127. The page list of the slot has the bases [192, 64, 128].
"""

# Dimension key: L layers of a group, N slots, S session rows of a call, M pages of a slot's ring,
# P = N * M pages, G KV heads, R rows in a page, C head width, T tokens, W = G * C.

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tml_kernels import PagePlan, plan_pages

from .config import HeadSpec

PAGE_ROWS = 64
CONV_TAPS = 3  # tokens before the current one that a convolution of four taps sees


class PageList(NamedTuple):
    """Where the keys of one call lie, in the terms of `paged_attention`."""

    plan: PagePlan
    pool_row_T: Tensor  # int64, where each token is written, -1: nowhere


@dataclass(frozen=True)
class KvGroup:
    """Pages, and convolution taps of K and V, of the layers with one window and head shape."""

    window: int
    ring: int  # M
    k_pages_L_P_G_R_C: Tensor
    v_pages_L_P_G_R_C: Tensor
    conv_L_N_2_3_W: Tensor

    @classmethod
    def zeros(
        cls,
        heads: HeadSpec,
        *,
        num_layers: int,
        num_slots: int,
        window: int,
        max_append: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> KvGroup:
        """Room for `window` tokens of every slot while up to `max_append` more are written."""
        ring = ring_pages(window, max_append)
        pages = (num_layers, num_slots * ring, heads.num_kv_heads, PAGE_ROWS, heads.head_width)
        taps = (num_layers, num_slots, 2, CONV_TAPS, heads.kv_width)
        return cls(
            window=window,
            ring=ring,
            k_pages_L_P_G_R_C=torch.zeros(pages, device=device, dtype=dtype),
            v_pages_L_P_G_R_C=torch.zeros(pages, device=device, dtype=dtype),
            conv_L_N_2_3_W=torch.zeros(taps, device=device, dtype=dtype),
        )

    def page_list(
        self, slot_S: Tensor, length_S: Tensor, slot_T: Tensor, position_T: Tensor
    ) -> PageList:
        """The pages once row s holds `length_S` tokens; all int64. Slot -1 reaches nothing."""
        ring_M = torch.arange(self.ring, device=slot_S.device)
        newest_S_1 = (length_S - 1).div(PAGE_ROWS, rounding_mode="floor")[:, None]
        number_S_M = newest_S_1 - (newest_S_1 - ring_M) % self.ring  # negative: not written yet
        used_S_M = (number_S_M >= 0) & (slot_S >= 0)[:, None]
        page_S_M = torch.where(used_S_M, slot_S[:, None] * self.ring + ring_M, -1)
        page_T = slot_T * self.ring + position_T // PAGE_ROWS % self.ring
        pool_row_T = torch.where(slot_T >= 0, page_T * PAGE_ROWS + position_T % PAGE_ROWS, -1)
        rows_S_M = torch.full_like(page_S_M, PAGE_ROWS, dtype=torch.int32)
        row_S = torch.arange(slot_S.shape[0], dtype=torch.int32, device=slot_S.device)
        plan = plan_pages(page_S_M.int(), number_S_M * PAGE_ROWS, rows_S_M, row_S)
        return PageList(plan, pool_row_T)


def ring_pages(window: int, max_append: int) -> int:
    """Pages that hold every key the queries of one append can see, wherever its page begins.

    The first of `max_append` queries still sees window - 1 tokens before itself.
    """
    span = window + max_append - 1
    return (span + PAGE_ROWS - 2) // PAGE_ROWS + 1
