"""What gives way when the machine cannot keep up: pictures first, then text, sound never."""

from __future__ import annotations

from enum import IntEnum

RECENT_TICKS = 25  # 5 s of 200 ms ticks
MANY_MISSES = 3


class Overload(IntEnum):
    """Each level does what the one before it does."""

    NONE = 0
    SHED_VIDEO = 1  # frames are not pushed
    HOLD_TEXT = 2  # text waits in the intake

    @staticmethod
    def after(misses: int) -> Overload:
        """The level for that many misses in the last RECENT_TICKS ticks of the runtime."""
        if misses >= MANY_MISSES:
            return Overload.HOLD_TEXT
        return Overload.SHED_VIDEO if misses > 0 else Overload.NONE
