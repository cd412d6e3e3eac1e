"""How fast a sender's clock runs against ours, from the quickest packets of the last minute.

The least transit time in five seconds hardly depends on the jitter, so a line through these minima
has the slope of the two clocks. Its slope is the median over all pairs of points (Theil and Sen).
"""

from __future__ import annotations

from collections import deque
from itertools import combinations
from statistics import median

BUCKET_NS = 5_000_000_000
BUCKETS = 13  # a minute and a bucket
MIN_POINTS = 4
MAX_SLOPE = 1e-3  # 1000 ppm; crystals are within 100, some sound cards within 300


class DriftTracker:
    """`slope` is what a transit time grows by per unit of our time; 0 for the first 20 seconds.

    A minimum farther from the line than a clock can run in a bucket is another route, or a minute
    in which no packet was quick: the points before it are moved there, and the slope stays.
    """

    def __init__(self) -> None:
        self.slope = 0.0
        self._points: deque[tuple[float, float]] = deque(maxlen=BUCKETS)  # time, transit
        self._bucket = -1
        self._least = (0.0, 0.0)

    def add(self, at_ns: float, transit_ns: float) -> None:
        """A packet that arrived `at_ns` after the first one. Times that go back are taken too."""
        bucket = int(at_ns // BUCKET_NS)
        if bucket > self._bucket:
            if self._bucket >= 0:
                self._close_bucket()
            self._bucket, self._least = bucket, (at_ns, transit_ns)
        elif transit_ns < self._least[1]:
            self._least = (at_ns, transit_ns)

    def forget(self) -> None:
        """The clock was set: what was seen before says nothing of what comes, but for the slope."""
        self._points.clear()
        self._bucket = -1

    def _close_bucket(self) -> None:
        points, (at_ns, least_ns) = self._points, self._least
        if points:
            before_ns, before_least_ns = points[-1]
            elapsed_ns = at_ns - before_ns
            moved_ns = least_ns - before_least_ns - self.slope * elapsed_ns
            if abs(moved_ns) > 2 * MAX_SLOPE * max(elapsed_ns, BUCKET_NS):
                moved = [(at, transit + moved_ns) for at, transit in points]
                points.clear()
                points.extend(moved)
        points.append(self._least)
        if len(points) >= MIN_POINTS:
            slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2)]
            self.slope = min(MAX_SLOPE, max(-MAX_SLOPE, median(slopes)))
