"""Medians and spreads of timed samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Of samples in one unit: their number, median, and the 10th and 90th percentile."""

    count: int
    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        ordered = sorted(samples)
        return cls(len(ordered), *(percentile(ordered, q) for q in (50.0, 10.0, 90.0)))


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100) of ascending samples, linear between neighbours.

    >>> percentile([1.0, 2.0, 4.0], 75)
    3.0
    """
    if not ordered:
        raise ValueError("no samples")
    at = (len(ordered) - 1) * q / 100.0
    low, high = math.floor(at), math.ceil(at)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def noise(first: Summary, second: Summary) -> float:
    """How far two runs of the same code are apart, as a fraction of the faster median."""
    return abs(first.median - second.median) / min(first.median, second.median)
