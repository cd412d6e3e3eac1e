"""Where a sender's samples lie in media time.

A sender counts its samples; each count belongs to one sample of the session's line, for ever. The
line bends where a delay grows or shrinks, and only behind everything that was placed before, so
pieces may come in any order and no sample is heard twice or before an older one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

MAX_BENDS = 256  # the newest; pieces from before the oldest of them are too late anyway


class Timeline:
    """Worked example: `bend(0, 1000)`, `extend(320, 1323)`: three samples were put in before or
    within count 0..319, so count 320 lies at 1323, and a piece 300..339 that comes now lies at
    1300..1319 and 1323..1342."""

    def __init__(self) -> None:
        self._stamps: list[int] = []
        self._samples: list[int] = []
        self.next_stamp = 0  # after the newest piece
        self.next_sample = 0

    def restart(self, stamp: int, sample: int) -> None:
        """The sender's count was set: what is not placed by now has no place."""
        self._stamps, self._samples = [stamp], [sample]
        self.next_stamp, self.next_sample = stamp, sample

    def bend(self, stamp: int, sample: int) -> None:
        """From `stamp` on, not before `next_stamp`, the line goes on at `sample`."""
        assert stamp >= self.next_stamp and sample >= self.next_sample
        if self._samples[-1] + stamp - self._stamps[-1] == sample:
            return
        if self._stamps[-1] == stamp:
            self._samples[-1] = sample
            return
        self._stamps.append(stamp)
        self._samples.append(sample)
        if len(self._stamps) > MAX_BENDS:
            del self._stamps[0], self._samples[0]

    def extend(self, next_stamp: int, next_sample: int) -> None:
        """Everything up to these is placed; the next piece follows it."""
        self.next_stamp, self.next_sample = next_stamp, next_sample
        self.bend(next_stamp, next_sample)

    def places(self, stamp: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first count, end, sample) for those of stamp..stop that have a place, at most to
        `next_stamp`; in their order."""
        stop = min(stop, self.next_stamp)
        at = max(stamp, self._stamps[0])
        while at < stop:
            i = bisect_right(self._stamps, at) - 1
            last = i + 1 == len(self._stamps)
            end = stop if last else min(stop, self._stamps[i + 1])
            sample = self._samples[i] + at - self._stamps[i]
            limit = self.next_sample if last else self._samples[i + 1]
            if sample < limit:
                yield at, min(end, at + limit - sample), sample
            at = end
