"""Why a tick missed. One statement of the rule, for reports, traces and tests alike.

What a tick took falls into parts: how late it woke (`WOKE_LATE`), of that the time in which the
tick before still ran (`OVERRUN`), the stages `take` (`INPUT`), `model` (`MODEL`) and `publish`
(`PUBLISH`), and what no stage of these accounts for (`OTHER`). The usual time of a part is its
median over the newest ticks that were in time; without any, it is 0.

1. Garbage collections took half or more of what the tick took beyond the usual: `GARBAGE`.
2. Otherwise, the part that lies furthest above its usual time.
3. If that is the model's while the GPU's clocks were held down: `THROTTLED`.

A tick that never ran is an `OVERRUN` if it was due while the tick before still ran. If the thread
slept through it, collections that took half or more of what was slept through make it `GARBAGE`;
otherwise it is `WOKE_LATE`.

>>> ms = 1_000_000
>>> usual = np.array([0, 0, 1, 90, 5, 1]) * ms
>>> why_missed(np.array([0, 0, 1, 210, 5, 1]) * ms, usual, gc_ns=0, throttle=0).name
'MODEL'
>>> why_missed(np.array([0, 0, 1, 210, 5, 1]) * ms, usual, gc_ns=85 * ms, throttle=0).name
'GARBAGE'
"""

# Dimension key: N records, A parts (PARTS).

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from .gpu import SLOWDOWNS


class Reason(IntEnum):
    NONE = 0  # the tick was in time
    WOKE_LATE = 1
    OVERRUN = 2
    INPUT = 3
    MODEL = 4
    PUBLISH = 5
    GARBAGE = 6
    THROTTLED = 7
    OTHER = 8


PARTS = (
    Reason.WOKE_LATE,
    Reason.OVERRUN,
    Reason.INPUT,
    Reason.MODEL,
    Reason.PUBLISH,
    Reason.OTHER,
)
_STAGES = ("take", "model", "publish")


def parts_ns(records: np.ndarray, stages: Mapping[str, int]) -> np.ndarray:
    """int64 [N, A]: what each of PARTS took. `stages` gives the column of a stage's name."""
    late_N = records["woke_ns"] - records["scheduled_ns"]
    behind_N = records["before_done_ns"] - records["scheduled_ns"]
    behind_N = np.minimum(np.maximum(behind_N, 0), late_N)
    spent_N = np.maximum(records["busy_ns"], records["done_ns"] - records["woke_ns"])
    staged = [
        records["stage_ns"][:, stages[name]] if name in stages else np.zeros_like(late_N)
        for name in _STAGES
    ]
    return np.stack([late_N - behind_N, behind_N, *staged, spent_N - sum(staged)], axis=1)


def why_missed(part_A: np.ndarray, usual_A: np.ndarray, *, gc_ns: int, throttle: int) -> Reason:
    """The reason of a tick that was late; the rule is at the top of this module."""
    above_A = part_A - usual_A
    if gc_ns > 0 and 2 * gc_ns >= above_A.sum():
        return Reason.GARBAGE
    reason = PARTS[int(above_A.argmax())]
    if reason is Reason.MODEL and throttle & SLOWDOWNS:
        return Reason.THROTTLED
    return reason


def why_slept(slept_ns: int, gc_ns: int) -> Reason:
    """The reason of ticks that the thread slept through, in which collections took `gc_ns`."""
    if slept_ns == 0:
        return Reason.NONE
    return Reason.GARBAGE if 2 * gc_ns >= slept_ns else Reason.WOKE_LATE


def skipped_behind(skipped: int, *, scheduled_ns: int, before_done_ns: int, period_ns: int) -> int:
    """Of the `skipped` ticks before the one scheduled at `scheduled_ns`, those that were due while
    the tick before them, done at `before_done_ns`, still ran.

    Tick 2 is done at 1050 ms, so ticks 3 (due at 800) and 4 (1000) could not run; the thread then
    slept through tick 5 (1200), and tick 6 runs at 1400.

    >>> skipped_behind(3, scheduled_ns=1400, before_done_ns=1050, period_ns=200)
    2
    """
    slept = (scheduled_ns - before_done_ns) // period_ns  # whole periods in which nothing ran
    return min(skipped, max(0, skipped - slept))
