"""What a runtime allocates before anything else: its sessions' state, and the graphs over it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from .admission import Admission
from .errors import InputTypeError, InputValueError
from .graph import TickGraphs, graphs_for, page_count
from .model import InteractionModel, KvBudget
from .options import check_int

PAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Room(NamedTuple):
    state: Any  # a ModelState, or what another model has in its place
    graphs: TickGraphs | None
    admission: Admission


def make_room(
    model: InteractionModel,
    num_slots: int,
    num_spare: int,
    budget: KvBudget,
    global_pages: int | Literal["auto"] | None,
    page_dtype: torch.dtype | None = None,
    drafts: bool = False,
) -> Room:
    """num_spare: slots behind those of sessions, in which no tick runs. page_dtype: of keys and
    values, by default the model's. drafts: ticks draft. Raises InputValueError for pages of another
    kind, or that have no room for one session, and for a model that cannot draft."""
    if page_dtype is not None and page_dtype not in PAGE_DTYPES:
        raise InputValueError(f"page_dtype={page_dtype}: expected one of {PAGE_DTYPES} or None")
    if page_dtype == torch.float8_e4m3fn and model.dtype == torch.float16:
        raise InputValueError(
            f"page_dtype={page_dtype}: not of a float16 model, whose range is too small for the "
            "scales; take bfloat16"
        )
    if global_pages is not None and global_pages != "auto":
        check_int("global_pages", global_pages, at_least=2)
    if type(drafts) is not bool:
        raise InputTypeError(f"drafts={drafts!r}: expected a bool")
    drafting = {"drafts": True} if drafts else {}  # other models know no such option
    slots = num_slots + num_spare
    pages = page_count(model, slots, budget, global_pages, page_dtype, **drafting)
    by_pages = None
    if pages is not None:  # page 0 is nobody's
        each = sum(budget.pages().values())
        by_pages = (pages - 1) // each - num_spare
        if by_pages < 1:
            raise InputValueError(
                f"global_pages={pages}: page 0 is nobody's, and a session's budget takes {each}, "
                f"as do {num_spare} snapshots each: there is no room for a session"
            )
    state = model.new_state(
        slots, budget=budget, global_pages=pages, page_dtype=page_dtype, **drafting
    )
    graphs = graphs_for(model, state, num_slots)
    return Room(state, graphs, Admission(num_slots, by_pages=by_pages))
