"""What a rolling cache holds on the device: pages of every layer group, and the tables to them."""

# Dimension key: L layers of a group, N session slots, M page-list columns, P pages, G KV heads,
# R rows in a page, C head width, Q entries of all page lists, W rows of all pools whose rows have
# positions of their own, K groups, T tokens, Z = T of each group whose rows have such positions,
# U changes of page lists.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._core import LayerGroup
from ..ops.apply_deltas import apply_deltas
from ..precision import ACTIVATIONS

SPAN = 2048  # positions
PAGE_DTYPES = (*ACTIVATIONS, torch.float8_e4m3fn)


@dataclass(frozen=True)
class CacheGroup:
    """The layers with one window and head shape; one page id serves all of them.

    pages: of all sessions, the zero page 0 among them. columns: the most pages of one session, what
    a tick appends included. With a `window`, pages are filled in order whatever the class and leave
    when the window has passed them, but `history` positions later, so that a rewind can go back
    that far. Without one, every class of tokens fills pages of its own, each of which holds
    positions base..base + span - 1.
    """

    num_layers: int
    num_kv_heads: int
    head_width: int
    pages: int
    columns: int
    window: int | None = None
    history: int = 0
    page_rows: int = 64
    span: int | None = None  # without a window, SPAN unless given

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.window is None and self.span is None:
            object.__setattr__(self, "span", SPAN)
        self.layer_group()

    def layer_group(self) -> LayerGroup:
        """What the page table needs to know. Raises ValueError for figures that do not fit."""
        span = {} if self.span is None else {"span": self.span}
        return LayerGroup(
            pages=self.pages,
            columns=self.columns,
            page_rows=self.page_rows,
            window=self.window,
            history=self.history,
            **span,
        )

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Of one page in all layers."""
        scale = 4 if dtype == torch.float8_e4m3fn else 0
        row = self.num_kv_heads * (self.head_width * dtype.itemsize + scale)
        return 2 * self.num_layers * self.page_rows * row


@dataclass(frozen=True)
class GroupPages:
    """One group's pages and page lists, in the terms of `attention_prologue`, `plan_pages` and
    `paged_attention`. Scales are None unless pages are fp8, row positions with a window."""

    spec: CacheGroup
    k_pages_L_P_G_R_C: Tensor
    v_pages_L_P_G_R_C: Tensor
    k_scale_L_P_G_R: Tensor | None
    v_scale_L_P_G_R: Tensor | None
    page_N_M: Tensor
    base_N_M: Tensor
    rows_N_M: Tensor
    row_position_P_R: Tensor | None

    def contents(self) -> dict[str, Tensor]:
        """All that a page holds, by name, each as [layers, pages, elements]."""
        named = {
            "k": self.k_pages_L_P_G_R_C,
            "v": self.v_pages_L_P_G_R_C,
            "k_scale": self.k_scale_L_P_G_R,
            "v_scale": self.v_scale_L_P_G_R,
            "row_position": None
            if self.row_position_P_R is None
            else self.row_position_P_R.unsqueeze(0),
        }
        return {name: x.flatten(2) for name, x in named.items() if x is not None}


class Pools:
    """Allocated once. The page lists of all groups lie in one flat table, so that one launch keeps
    them up to date, and so do the positions of rows."""

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        *,
        max_sessions: int,
        page_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if page_dtype not in PAGE_DTYPES:
            wanted = ", ".join(str(dtype) for dtype in PAGE_DTYPES)
            raise TypeError(f"page_dtype: expected one of {wanted}, got {page_dtype}")
        num_keys = sum(spec.columns * max_sessions for spec in groups)
        num_rows = sum(spec.pages * spec.page_rows for spec in groups if spec.window is None)
        self.page_Q = torch.full((num_keys,), -1, dtype=torch.int32, device=device)
        self.base_Q = torch.zeros(num_keys, dtype=torch.int64, device=device)
        self.rows_Q = torch.zeros(num_keys, dtype=torch.int32, device=device)
        self.row_position_W = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.groups: list[GroupPages] = []
        key = row = 0
        for spec in groups:
            lists = slice(key, key + max_sessions * spec.columns)
            rows = slice(row, row + spec.pages * spec.page_rows)
            table = (max_sessions, spec.columns)
            has_positions = spec.window is None
            self.groups.append(
                GroupPages(
                    spec,
                    *_page_tensors(spec, page_dtype, device),
                    self.page_Q[lists].view(table),
                    self.base_Q[lists].view(table),
                    self.rows_Q[lists].view(table),
                    self.row_position_W[rows].view(-1, spec.page_rows) if has_positions else None,
                )
            )
            key = lists.stop
            row = rows.stop if has_positions else row

    def write(self, delta_U_4: Tensor, row_Z: Tensor, position_Z: Tensor) -> None:
        """Changes of page lists, and positions of rows: one launch."""
        apply_deltas(
            delta_U_4,
            row_Z,
            position_Z,
            page_Q=self.page_Q,
            base_Q=self.base_Q,
            rows_Q=self.rows_Q,
            row_position_W=self.row_position_W,
        )


def _page_tensors(
    spec: CacheGroup, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    shape = (spec.num_layers, spec.pages, spec.num_kv_heads, spec.page_rows, spec.head_width)
    k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.float8_e4m3fn:
        return k, v, None, None
    k_scale, v_scale = (torch.ones(shape[:-1], device=device) for _ in range(2))
    return k, v, k_scale, v_scale
