"""The passes of a tick over the layers: which tokens belong to whom, and where their keys go."""

# Dimension key: T tokens of a pass, S session rows, K layer groups.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tml_kernels._page_plan import PagePlan
from tml_kernels.kv_cache import PageClass
from tml_kernels.ops.plan_pages import plan_pages

from .state import ModelState, Run


class Pass(NamedTuple):
    """One pass: tokens start[s]..start[s + 1] are the newest of the length[s] of row s."""

    start_S1: Tensor  # int32
    slot_S: Tensor  # int32, -1: idle
    length_S: Tensor  # int64, with this pass's tokens
    row_K_T: Tensor  # int64, row in the pool of each group where a token's keys go, -1: nowhere
    plans: tuple[PagePlan, ...]  # of each group, the same in all passes of a tick


def plan_passes(
    state: ModelState,
    slots: Sequence[int],
    runs: Sequence[Sequence[Run]],
    *,
    num_tokens: int | None = None,
    num_steps: int = 1,
) -> list[Pass]:
    """The pass of each row's `runs`, then num_steps - 1 passes of one reply token for each row.

    Everything is appended here and the page lists are sent to the device once, so the passes only
    run the layers. Sessions must have reserved as much. Slot -1 is idle: its tokens go nowhere, and
    neither do those from the last row's end up to `num_tokens`.
    """
    sizes = [sum(tokens for _, tokens in row) for row in runs]
    start = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    first_step = start[-1] if num_tokens is None else num_tokens
    total = first_step + (num_steps - 1) * len(slots)
    rows = np.full((len(state.groups), total), -1, np.int64)
    position_T = np.zeros(total, np.int64)
    length_S = np.zeros(len(slots), np.int64)
    for s, slot in enumerate(slots):
        if slot < 0:
            continue
        session = state.session(slot)
        column = start[s]
        for page_class, tokens in runs[s]:
            position = state.cache.append(session, page_class, tokens, rows, int(column))
            position_T[column : column + tokens] = position + np.arange(tokens)
            column += tokens
        length_S[s] = state.length(slot)
        for step in range(num_steps - 1):
            column = first_step + step * len(slots) + s
            position_T[column] = state.cache.append(session, PageClass.REPLY, 1, rows, int(column))
    row_K_T, _ = state.cache.apply(rows, position_T)

    def to_device(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(state.device, dtype)

    slot_S = to_device(np.asarray(slots, np.int64), torch.int32)
    plans = tuple(
        plan_pages(g.pages.page_N_M, g.pages.base_N_M, g.pages.rows_N_M, slot_S)
        for g in state.groups
    )
    passes = [
        Pass(
            to_device(start, torch.int32),
            slot_S,
            to_device(length_S, torch.int64),
            row_K_T[:, :first_step],
            plans,
        )
    ]
    one_each_S1 = torch.arange(len(slots) + 1, dtype=torch.int32, device=state.device)
    for row_K_S in row_K_T[:, first_step:].split(max(1, len(slots)), dim=1):
        length = passes[-1].length_S + (slot_S >= 0)
        passes.append(Pass(one_each_S1, slot_S, length, row_K_S, plans))
    return passes[:num_steps]
