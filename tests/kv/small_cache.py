"""Caches small enough to fill and roll at once, and the way layers use one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tml_kernels.kv_cache import (
    CLASSES,
    CacheGroup,
    PageClass,
    RollingKVCache,
    Session,
    SlotTensor,
)

ROWS = 4
BUDGETS = dict(zip(CLASSES, (1, 2, 4, 4, 4), strict=True))
GROUPS = (
    CacheGroup(2, 2, 3, pages=60, columns=20, page_rows=ROWS, span=24),
    CacheGroup(1, 1, 5, pages=40, columns=12, page_rows=ROWS, window=6, history=8),
)


def make_cache(**changes: object) -> RollingKVCache:
    """Three sessions, two groups of layers, and a counter for each slot's other state."""
    options = {
        "max_sessions": 3,
        "page_dtype": torch.float32,
        "slot_tensors": {"counter": SlotTensor(torch.zeros(3, dtype=torch.int64))},
        **changes,
    }
    return RollingKVCache(GROUPS, **options)  # type: ignore[arg-type]


def append(
    cache: RollingKVCache, session: Session, runs: list[tuple[PageClass, int]]
) -> tuple[Tensor, np.ndarray]:
    """A transaction up to where the layers run: (rows [groups, T] on the device, positions)."""
    cache.reserve(session, runs)
    rows = np.full((len(cache.groups), sum(n for _, n in runs)), -1)
    first, column = cache.length(session), 0
    for page_class, tokens in runs:
        cache.append(session, page_class, tokens, rows, column)
        column += tokens
    positions = first + np.arange(column)
    return cache.apply(rows, positions).row_K_T, positions


def tick(cache: RollingKVCache, session: Session, runs: list[tuple[PageClass, int]]) -> None:
    """A whole tick; every key is its position."""
    row_K_T, positions = append(cache, session, runs)
    for group, row_T in zip(cache.groups, row_K_T, strict=True):
        page_T, place_T = row_T // ROWS, row_T % ROWS
        value_T = torch.from_numpy(positions).to(group.k_pages_L_P_G_R_C.dtype)
        group.k_pages_L_P_G_R_C[:, page_T, :, place_T] = value_T[:, None, None, None]
    cache.commit(session)
    cache.tick()


def keys(cache: RollingKVCache, session: Session, group: int) -> dict[int, list[float]]:
    """What the session's pages hold, by position: the first layer's first key of every row."""
    found = {}
    refs = zip(cache.pages(session, group), cache.positions(session, group), strict=True)
    for ref, positions in refs:
        page_R = cache.groups[group].k_pages_L_P_G_R_C[0, ref.page, 0, :, 0]
        found |= dict(zip(positions, page_R[: len(positions)].tolist(), strict=True))
    return found
