"""The passes of a tick over the layers: which tokens belong to whom, and where their keys go."""

# Dimension key: T tokens of a pass, S session rows, R runs of a row (its input blocks, then its
# output steps), O output steps, Z tokens of all passes of a tick: T, then S for every step but the
# first. K layer groups.

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tml_kernels._page_plan import PagePlan
from tml_kernels.kv_cache import PageClass
from tml_kernels.ops.plan_pages import plan_pages

from .buffers import Bucket, TickInputs
from .state import ModelState, Run

CLASS_OF = {"text": PageClass.TEXT, "video": PageClass.VIDEO, "audio": PageClass.AUDIO}


class Pass(NamedTuple):
    """One pass: tokens start[s]..start[s + 1] are the newest of the length[s] of row s."""

    start_S1: Tensor  # int32
    slot_S: Tensor  # int32, -1: idle
    length_S: Tensor  # int64, with this pass's tokens
    row_K_T: Tensor  # int64, row in the pool of each group where a token's keys go, -1: nowhere
    plans: tuple[PagePlan, ...]  # of each group, the same in all passes of a tick
    one_each: bool = False  # every row has exactly one token, so that token t is row t's


def plan_pass(state: ModelState, slots: Sequence[int], runs: Sequence[Sequence[Run]]) -> Pass:
    """The pass of each row's `runs`, appended and sent to the device; slot -1 is idle.

    Sessions must have reserved as much.
    """
    sizes = [sum(tokens for _, tokens in row) for row in runs]
    start = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    rows = np.full((len(state.groups), start[-1]), -1, np.int64)
    position_T, length_S = np.zeros(start[-1], np.int64), np.zeros(len(slots), np.int64)
    for s, slot in enumerate(slots):
        if slot >= 0:
            length_S[s] = append_runs(state, slot, runs[s], rows, position_T, int(start[s]))
    row_K_T, _ = state.cache.apply(rows, position_T)

    def to_device(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(state.device, dtype)

    slot_S = to_device(np.asarray(slots, np.int64), torch.int32)
    return Pass(
        to_device(start, torch.int32),
        slot_S,
        to_device(length_S, torch.int64),
        row_K_T,
        plan_all(state, slot_S),
        one_each=all(size == 1 for size in sizes),
    )


def append_runs(
    state: ModelState,
    slot: int,
    runs: Sequence[Run],
    rows: np.ndarray,
    position_Z: np.ndarray,
    column: int,
) -> int:
    """Append a slot's runs one behind another from `column` on; returns its length then."""
    session = state.session(slot)
    for page_class, tokens in runs:
        position = state.cache.append(session, page_class, tokens, rows, column)
        position_Z[column : column + tokens] = np.arange(position, position + tokens)
        column += tokens
    return state.length(slot)


@functools.cache
def classes_of(blocks: Sequence[str]) -> tuple[PageClass, ...]:
    """[R], of a row's runs: its input blocks in their order, then its output steps."""
    return (*(CLASS_OF[block] for block in blocks), PageClass.REPLY)


def fill_passes(state: ModelState, slots: Sequence[int], bucket: Bucket) -> None:
    """Append the tokens of a tick whose rows `TickInput.fill` has staged, and stage where all its
    passes' keys go; the changes of page lists too."""
    staged, layout = state.buffers.staged(bucket), state.buffers.layout(bucket)
    num_rows, later = len(slots), len(staged.length_O_S) - 1
    classes = (*classes_of(state.config.layout.blocks), *[PageClass.REPLY] * later)
    tokens_S_A, column_S_A = layout.tokens_S_A[:num_rows], layout.column_S_A[:num_rows]
    staged.row_K_Z[:] = -1
    state.append_all(slots, classes, tokens_S_A, column_S_A, staged.row_K_Z, layout.position_Z)
    layout.writer.set_lengths()
    state.cache.stage(
        staged.row_K_Z, layout.position_Z, staged.delta_U_4, staged.placed_X, staged.position_X
    )


def passes_of(
    state: ModelState, inputs: TickInputs[Tensor], slot_S: Tensor | None = None
) -> list[Pass]:
    """The passes that `fill_passes` wrote, once they and the page lists are on the device. slot:
    with more idle rows than there are."""
    num_rows, num_tokens = len(inputs.slot_S), len(inputs.kind_T)
    slot_S = inputs.slot_S if slot_S is None else slot_S
    plans = plan_all(state, slot_S)
    one_each_S1 = torch.arange(num_rows + 1, dtype=torch.int32, device=inputs.slot_S.device)
    starts = [inputs.start_S1, *[one_each_S1] * (len(inputs.length_O_S) - 1)]
    rows = [
        inputs.row_K_Z[:, :num_tokens],
        *inputs.row_K_Z[:, num_tokens:].split(num_rows, dim=1),
    ]
    return [
        Pass(start_S1, slot_S, length_S, row_K_T, plans, one_each=start_S1 is one_each_S1)
        for start_S1, length_S, row_K_T in zip(starts, inputs.length_O_S, rows, strict=False)
    ]


def pass_of_steps(inputs: TickInputs[Tensor], plans: tuple[PagePlan, ...], num_steps: int) -> Pass:
    """Output steps 1 to `num_steps` of every row in one pass, which `fill_passes` wrote as passes
    of their own."""
    (later, num_rows), num_tokens = inputs.length_O_S[1:].shape, len(inputs.kind_T)
    row_K_O_S = inputs.row_K_Z[:, num_tokens:].unflatten(1, (later, num_rows))
    first = torch.arange(num_rows + 1, dtype=torch.int32, device=inputs.slot_S.device)
    return Pass(
        num_steps * first,
        inputs.slot_S,
        inputs.length_O_S[num_steps],
        row_K_O_S[:, :num_steps].transpose(1, 2).flatten(1),
        plans,
        one_each=num_steps == 1,
    )


def plan_all(state: ModelState, slot_S: Tensor) -> tuple[PagePlan, ...]:
    return tuple(
        plan_pages(g.pages.page_N_M, g.pages.base_N_M, g.pages.rows_N_M, slot_S)
        for g in state.groups
    )
