"""How much input to leave out when ticks run late: video first, then text, never audio."""

from __future__ import annotations

from .mailbox import SHED_TEXT

RECENT = 5  # ticks
CALM = 10


class Overload:
    """What `Inbox.take` sheds. One step more for a miss that is not the only one of the last RECENT
    ticks, one step less after CALM ticks in a row without one. A tick that follows skipped ones
    counts as a miss."""

    def __init__(self) -> None:
        self.shed = 0
        self._recent = 0  # a bit for each tick, the newest lowest
        self._calm = 0

    def observe(self, missed: bool) -> None:
        self._recent = (self._recent << 1 | missed) & ((1 << RECENT) - 1)
        self._calm = 0 if missed else self._calm + 1
        if missed and self._recent.bit_count() > 1:
            self.shed = min(self.shed + 1, SHED_TEXT)
        elif self._calm >= CALM:
            self.shed, self._calm = max(self.shed - 1, 0), 0
