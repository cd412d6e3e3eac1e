"""How long a client's audio waits before it is heard, so that the late pieces still come in time.

After WebRTC's NetEq: the wait covers 95 % of the transit times seen lately, rises at once, and
falls slowly and in silence. Only arithmetic on the times it is given: no clock, no thread.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

import numpy as np

from .drift import DriftTracker

_MS = 1_000_000
_S = 1_000_000_000

MIN_DELAY_NS, START_DELAY_NS, MAX_DELAY_NS = 20 * _MS, 80 * _MS, 200 * _MS
QUANTILE = 0.95
FORGET = 0.983  # weight of the past, per piece: a burst counts half after 40 of them
LOWER = 0.01  # of the time in silence: 10 ms/s

BEST_NS = 10 * _S  # the best transit time is sought this far back
START_NS = 1 * _S  # in which a stream may yet turn out to be quicker than its first pieces

# Farther than this from the best, a piece is not just late: a clock was set, or a computer slept.
STEP_NS = 500 * _MS
STEP_TOLERANCE_NS = 60 * _MS  # between the pieces that confirm it
STEP_PIECES = 5  # of a step that no network can make
STEP_WAIT_NS = 300 * _MS  # of one that might be a network's pause: what it held comes faster
STEP_GIVE_UP_NS = 3 * _S  # without one piece that fits, anything is better than what was known

_BUCKET_NS = 5 * _MS
_NUM_BUCKETS = 110


class Arrival(Enum):
    """What a piece's times say."""

    FITS = "fits"
    SUSPECT = "suspect"  # nothing is learnt from it
    STEP = "step"  # the sender's clock was set, as the suspects before showed: all is new


class DelayEstimator:
    """One sender's delay. Times are integers in ns; a sender's clock starts where it likes.

    Give `update` every piece once, in the order of arrival, with the sender's time of its first
    sample; `due_ns` is then when a sample is to be heard, on our clock. `delay_ns` is how long that
    is after the quickest piece would have come, between MIN_DELAY_NS and MAX_DELAY_NS.

    Worked example: pieces of 20 ms take 30 ms, now and then 70. The first sample of one, captured
    at our time 0, is due at 50 + delay; once more than one piece in twenty takes 70, the delay is
    45: 40, and what is left of a bucket of 5.
    """

    def __init__(self) -> None:
        self.clock_steps = 0
        self._origin_ns: int | None = None  # transit time of the first piece; others are relative
        self._first_ns = self._last_ns = 0  # arrivals
        self._drift = DriftTracker()
        self._suspects: tuple[float, int, int, int] | None = None

    @property
    def started(self) -> bool:
        return self._origin_ns is not None

    @property
    def delay_ns(self) -> int:
        return round(self._due_ns - self._best_ns) if self.started else START_DELAY_NS

    @property
    def drift(self) -> float:
        """What the sender's clock loses against ours, per unit of time: 1e-4 is 100 ppm slow."""
        return self._drift.slope

    def due_ns(self, sent_ns: int) -> int:
        """When what was captured at `sent_ns`, on the sender's clock, is to be heard, on ours."""
        assert self._origin_ns is not None
        return sent_ns + self._origin_ns + round(self._due_ns + self._drifted_ns)

    def update(
        self, sent_ns: int, arrived_ns: int, *, silent_ns: int = 0, backwards: bool = False
    ) -> Arrival:
        """silent_ns: length of the piece if it is silence, else 0. backwards: the piece was sent
        after another, and yet its time lies before that one's."""
        if self._origin_ns is None:
            self._start(sent_ns, arrived_ns)
        transit_ns = self._relative_ns(sent_ns, arrived_ns)
        if self._is_suspect(transit_ns, arrived_ns) or backwards:
            if not self._is_confirmed(transit_ns, arrived_ns, backwards):
                return Arrival.SUSPECT
            self.clock_steps += 1
            self._drift.forget()
            self._start(sent_ns, arrived_ns)
            return Arrival.STEP
        self._suspects = None
        self._follow_drift(transit_ns, arrived_ns)
        self._find_best(transit_ns, arrived_ns)
        self._adapt(transit_ns, arrived_ns, silent_ns)
        return Arrival.FITS

    def _start(self, sent_ns: int, arrived_ns: int) -> None:
        self._origin_ns = arrived_ns - sent_ns
        self._first_ns = self._last_ns = arrived_ns
        self._drifted_ns = 0.0  # what the drift has added to transit times
        self._best: deque[tuple[int, float]] = deque([(arrived_ns, 0.0)])  # both rise
        self._best_ns = 0.0
        self._due_ns = float(START_DELAY_NS)  # transit time within which a piece is in time
        self._weight = np.zeros(_NUM_BUCKETS)
        self._low_ns = 0.0  # lower edge of the first bucket
        self._count = 0
        self._suspects = None

    def _relative_ns(self, sent_ns: int, arrived_ns: int) -> float:
        assert self._origin_ns is not None
        return (arrived_ns - sent_ns - self._origin_ns) - self._drifted_ns

    def _is_suspect(self, transit_ns: float, arrived_ns: int) -> bool:
        if transit_ns < self._best_ns - STEP_NS:
            return arrived_ns - self._first_ns > START_NS
        return transit_ns > self._best_ns + STEP_NS

    def _is_confirmed(self, transit_ns: float, arrived_ns: int, backwards: bool) -> bool:
        """No network makes a piece come too early, or late before an older one: a few that agree
        will do. One that comes late is waited for: after a pause of the network they come ever less
        late."""
        if self._suspects is None:
            self._suspects = (transit_ns, arrived_ns, arrived_ns, 1)
            return False
        first_transit_ns, agree_since_ns, since_ns, count = self._suspects
        if abs(transit_ns - first_transit_ns) <= STEP_TOLERANCE_NS:
            count += 1
        else:
            first_transit_ns, agree_since_ns, count = transit_ns, arrived_ns, 1
        self._suspects = (first_transit_ns, agree_since_ns, since_ns, count)
        impossible = backwards or transit_ns < self._best_ns
        waited = arrived_ns - agree_since_ns >= STEP_WAIT_NS
        gave_up = arrived_ns - since_ns >= STEP_GIVE_UP_NS
        return gave_up or (count >= STEP_PIECES and (impossible or waited))

    def _follow_drift(self, transit_ns: float, arrived_ns: int) -> None:
        self._drift.add(float(arrived_ns - self._first_ns), transit_ns + self._drifted_ns)
        if arrived_ns > self._last_ns:
            self._drifted_ns += self._drift.slope * (arrived_ns - self._last_ns)
            self._last_ns = arrived_ns

    def _find_best(self, transit_ns: float, arrived_ns: int) -> None:
        best = self._best
        while best and best[-1][1] >= transit_ns:
            best.pop()
        best.append((arrived_ns, transit_ns))
        while best[0][0] < arrived_ns - BEST_NS:
            best.popleft()
        self._best_ns = best[0][1]

    def _adapt(self, transit_ns: float, arrived_ns: int, silent_ns: int) -> None:
        self._count_transit(transit_ns)
        least_ns, most_ns = self._best_ns + MIN_DELAY_NS, self._best_ns + MAX_DELAY_NS
        wanted_ns = min(most_ns, max(least_ns, self._quantile_ns()))
        if arrived_ns - self._first_ns < START_NS:
            self._due_ns = max(wanted_ns, self._best_ns + START_DELAY_NS)
        else:
            self._due_ns = max(wanted_ns, min(most_ns, self._due_ns - LOWER * silent_ns))

    def _count_transit(self, transit_ns: float) -> None:
        """Buckets begin at the best transit time or just below it; the last takes all beyond."""
        shift = int((self._best_ns - self._low_ns) // _BUCKET_NS)
        if shift != 0:
            self._low_ns += shift * _BUCKET_NS
            self._weight = _shifted(self._weight, shift)
        bucket = min(_NUM_BUCKETS - 1, int((transit_ns - self._low_ns) // _BUCKET_NS))
        forget = min(FORGET, self._count / (self._count + 1))  # the first ones count alike
        self._count += 1
        self._weight *= forget
        self._weight[bucket] += 1.0 - forget

    def _quantile_ns(self) -> float:
        """Upper edge of the bucket."""
        bucket = int(np.searchsorted(np.cumsum(self._weight), QUANTILE - 1e-9))
        return self._low_ns + (bucket + 1) * _BUCKET_NS


def _shifted(weight: np.ndarray, shift: int) -> np.ndarray:
    """The same weights where the first bucket begins `shift` buckets later; ends take the rest."""
    size = len(weight)
    moved = np.zeros_like(weight)
    np.add.at(moved, np.clip(np.arange(size) - shift, 0, size - 1), weight)
    return moved
