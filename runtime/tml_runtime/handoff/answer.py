"""A request on its way, as the tick thread and the hand-off's thread share it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .request import DELEGATE, Request, Snapshot
from .transcript import Entry


@dataclass(eq=False)
class Answer:
    """Nothing here is locked: what changes has one writer, and `ended` is written last."""

    id: int
    epoch: int
    t_ns: int
    entries: list[Entry] = field(default_factory=list)
    trigger: str = DELEGATE
    snapshot: Snapshot | None = None

    # the hand-off's thread writes, the tick thread reads
    ids: deque[int] = field(default_factory=deque)  # the tick thread takes them out again
    notice: Sequence[int] = ()  # what to tell the model of its end
    ended: bool = False

    # the hand-off's thread alone
    request: Request | None = None
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    # the tick thread alone
    ready_window: int | None = None  # the first in which there was something to inject
    is_notice: bool = False  # of the tick thread's own: the hand-off's thread never saw it
