"""Which layers share pages in a TmlCache, and how many pages there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...kv_cache import CLASSES, CacheGroup, PageClass
from .layers import LayerShape


class Layout(NamedTuple):
    groups: list[CacheGroup]
    layers: list[list[int]]  # of each group
    budgets: dict[PageClass, int]


def plan_layout(
    shapes: Sequence[LayerShape],
    *,
    max_batch: int,
    window_tokens: int,
    num_sinks: int,
    max_append: int,
    history: int,
    page_rows: int,
) -> Layout:
    """A group for every window and head shape, with as many pages as a full batch ever takes.

    page_rows 64, window_tokens 200, history 0, num_sinks 4: budgets of one page of sinks and five
    of text, which hold 257 to 320 tokens after a forward, as the newest is filled; four would hold
    193. history: tokens more, so that as many can be cropped and the window still be whole. Raises
    ValueError for figures that do not fit.
    """
    for name, value, least in (
        ("max_batch", max_batch, 1),
        ("window_tokens", window_tokens, 1),
        ("num_sinks", num_sinks, 0),
        ("max_append", max_append, 1),
        ("history", history, 0),
        ("page_rows", page_rows, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if num_sinks and all(shape.window is not None for shape in shapes):
        raise ValueError(f"{num_sinks=}: all layers have sliding windows, which keep no sinks")

    def pages(tokens: int) -> int:
        return -(-tokens // page_rows)

    budgets = dict.fromkeys(CLASSES, 1)
    budgets[PageClass.TEXT] = pages(window_tokens - 1 + history) + 1
    budgets[PageClass.ANCHOR] = max(1, pages(num_sinks))
    members: dict[tuple[int | None, int, int], list[int]] = {}
    for layer, shape in enumerate(shapes):
        members.setdefault((shape.window, *shape.heads), []).append(layer)
    groups = []
    for (window, num_kv_heads, head_width), layers in members.items():
        if window is None:
            kept = pages(num_sinks) + budgets[PageClass.TEXT]
        else:
            kept = pages(window - 1 + history) + 1
        columns = kept + pages(max_append)
        groups.append(
            CacheGroup(
                num_layers=len(layers),
                num_kv_heads=num_kv_heads,
                head_width=head_width,
                pages=1 + max_batch * columns,
                columns=columns,
                window=window,
                history=0 if window is None else history,
                page_rows=page_rows,
                span=page_rows if window is None else None,  # positions in a page have no gaps
            )
        )
    return Layout(groups, list(members.values()), budgets)
