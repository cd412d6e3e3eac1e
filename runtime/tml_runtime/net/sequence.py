"""What was sent, what came, and which samples of the media line are filled."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from ..errors import InputTypeError, InputValueError

MAX_COUNTER = 2**53 - 1  # what a number of JavaScript holds exactly
SEQ_WINDOW = 1024  # how far back a piece may come late or twice
MAX_SEQ_JUMP = 1 << 20  # all lost: more than an hour of 200 messages a second


def checked_counter(name: str, value: int) -> int:
    if type(value) is not int:
        raise InputTypeError(f"{name}={value!r}: expected an int")
    if not 0 <= value <= MAX_COUNTER:
        raise InputValueError(f"{name}={value} is not in 0..2**53-1: count up, without wrapping")
    return value


class Sequence:
    """Sequence numbers of one stream: which are new, and how many are lost."""

    def __init__(self) -> None:
        self.received = 0  # each number once
        self._first = self._newest = -1
        self._seen = 0  # bit i: newest - i came

    @property
    def lost(self) -> int:
        """Numbers between the least and the greatest that have not come."""
        return self._newest - self._first + 1 - self.received if self.received else 0

    def is_new(self, seq: int) -> bool:
        """Raises InputTypeError or InputValueError for a number that no stream comes to."""
        checked_counter("seq", seq)
        if not self.received:
            return True
        ahead = seq - self._newest
        if not -SEQ_WINDOW < ahead <= MAX_SEQ_JUMP:
            raise InputValueError(
                f"{seq=} is too far from {self._newest}, the newest: count up, without wrapping"
            )
        return ahead > 0 or not self._seen >> -ahead & 1

    def is_newest(self, seq: int) -> bool:
        return seq > self._newest

    def mark(self, seq: int) -> None:
        """It came. It is new."""
        if not self.received:
            self._first = self._newest = seq
        ahead = seq - self._newest
        if ahead > 0:
            self._seen = (self._seen << min(ahead, SEQ_WINDOW)) & ((1 << SEQ_WINDOW) - 1)
            self._newest = seq
        self._seen |= 1 << max(0, -ahead)
        self._first = min(self._first, seq)
        self.received += 1


class Spans:
    """Disjoint stretches of a line of samples, and the holes between those that are over."""

    def __init__(self) -> None:
        self.missing = 0  # samples of holes that are over
        self.holes = 0
        self.over = 0  # samples that are over, filled or not
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._cursor: int | None = None  # up to here all is over
        self._in_hole = False

    def add(self, start: int, stop: int) -> None:
        """Fill start..stop, at least one sample; filled ones may be filled again."""
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def begin(self, sample: int) -> None:
        """The line begins here, unless it has begun."""
        if self._cursor is None:
            self._cursor = sample

    def pass_to(self, sample: int) -> None:
        """What lies before `sample` is over: what is not filled now is missing."""
        if self._cursor is None or sample <= self._cursor:
            return
        self.over += sample - self._cursor
        while self._cursor < sample:
            start = min(self._starts[0], sample) if self._starts else sample
            if start > self._cursor:
                self.missing += start - self._cursor
                self.holes += not self._in_hole
                self._in_hole = True
            if start == sample:
                break
            self._in_hole = False
            self._cursor = max(self._cursor, min(self._stops[0], sample))
            if self._stops[0] <= sample:
                del self._starts[0], self._stops[0]
        self._cursor = sample
