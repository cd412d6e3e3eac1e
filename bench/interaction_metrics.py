"""Metrics of interaction as they were published: pure functions of words, spans and counts.

Times are seconds on one clock. docs/interaction.md names paper and year of each metric, and says
what was chosen where a paper leaves it open. A mean of nothing is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .stats import percentile

TURN_S, TURN_WORDS = 1.0, 3  # what is shorter and has no more words does not take the turn
USER_GAP_S, MODEL_GAP_S = 0.6, 0.5  # pauses within one stretch of speech
BACKCHANNEL_WORDS, LONG_S = 2, 3.0
WINDOW_S = 0.2  # of the times at which backchannels come
COUNT_OFFSET = 0.1
OMEGA = 0.5
UNANSWERED, BEST = 0.5, 2.0  # scores of PAUC: before any reply, and of a right one
_TINY = 1e-10  # so that no window is empty, as in the released code
_CLOSE = 1e-9  # seconds: times that are equal but for their rounding

Span = tuple[float, float]  # begin and end


class Word(NamedTuple):
    start: float
    end: float
    text: str


class Due(NamedTuple):
    """A word that is to begin at `t`."""

    t: float
    text: str


def mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def merge(spans: Iterable[Span], gap_s: float) -> list[Span]:
    """Spans in order of time, one for all those that are no more than `gap_s` apart.

    >>> merge([(2.0, 3.0), (0.0, 1.0), (1.5, 1.8)], 0.5)
    [(0.0, 3.0)]
    """
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start - merged[-1][1] <= gap_s + _CLOSE:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


# Turn-taking


def takes_over(words: Sequence[Word]) -> bool:
    """Whether words, in order of time, last a second from the first to the last, or are more than
    three."""
    if not words:
        return False
    return words[-1].end - words[0].start >= TURN_S - _CLOSE or len(words) > TURN_WORDS


class Takeover(NamedTuple):
    rate: float | None
    latency_s: list[float]  # of turns that were taken


def takeover(turns: Sequence[tuple[float, Sequence[Word]]]) -> Takeover:
    """turns: when the user's ended, and the words that answer it. Who speaks up before that has a
    latency of zero."""
    taken = [(end, words) for end, words in turns if takes_over(words)]
    latency_s = [max(0.0, words[0].start - end) for end, words in taken]
    return Takeover(len(taken) / len(turns) if turns else None, latency_s)


# Overlap


def stop_latencies(user: Sequence[Span], model: Sequence[Span]) -> list[float]:
    """How long each overlap lasts, in order of time. Both are merged: with USER_GAP_S, with
    MODEL_GAP_S. A model that does not stop overlaps to the end of the user's speech."""
    overlaps = [
        (max(u_start, m_start), min(u_end, m_end))
        for u_start, u_end in user
        for m_start, m_end in model
    ]
    return [end - start for start, end in sorted(overlaps) if end > start]


def response_latencies(user: Sequence[Span], model: Sequence[Span]) -> list[float]:
    """From the end of the user's speech to the next time that the model begins to speak; where
    several ends have the same next, from the last of them. Both merged as for the stop."""
    ends: dict[float, float] = {}
    for _, end in user:
        nexts = [start for start, _ in model if start > end]
        if nexts:
            ends[min(nexts)] = max(end, ends.get(min(nexts), end))
    return [start - end for start, end in sorted(ends.items())]


# Backchannels


def backchannels(segments: Sequence[Span], words: Sequence[Word]) -> list[Span]:
    """Of the model's stretches of speech, those shorter than a second with two words at most.

    As in the released code, a stretch that takes the turn discards those before it, and one of
    more than three seconds ends the search.
    """
    found: list[Span] = []
    for start, end in segments:
        if end - start > LONG_S:
            break
        said = [w for w in words if w.start <= end and (w.end > start or w.start >= start)]
        if end - start >= TURN_S or len(said) > BACKCHANNEL_WORDS:
            found = []
        else:
            found.append((start, end))
    return found


def occupancy(spans: Sequence[Span], duration_s: float) -> np.ndarray:
    """float64: the share of each window of 0.2 s in all spans; a span is in every window that it
    touches."""
    count_W = np.zeros(_window(duration_s) + 1)
    for start, end in spans:
        count_W[_window(start) : _window(end) + 1] += 1
    share_W = count_W + _TINY
    return share_W / share_W.sum()


def divergence(said: Sequence[Span], expected: Sequence[Span], duration_s: float) -> float:
    """Jensen-Shannon, as released: the square root, in nats, so at most 0.833; 1 for who says
    nothing."""
    if not said:
        return 1.0
    p_W, q_W = occupancy(said, duration_s), occupancy(expected, duration_s)
    m_W = (p_W + q_W) / 2
    nats = (np.sum(p_W * np.log(p_W / m_W)) + np.sum(q_W * np.log(q_W / m_W))) / 2
    return math.sqrt(max(0.0, float(nats)))


def _window(t: float) -> int:
    return max(0, math.floor(t / WINDOW_S + _CLOSE))


# Counting


class Counting(NamedTuple):
    nmae: float | None
    off_by_one: float | None


def counting(counts: Sequence[tuple[int, int]]) -> Counting:
    """counts: (said, true). nmae: |said - true| / (true + 0.1). off_by_one: within one."""
    return Counting(
        mean(abs(said - true) / (true + COUNT_OFFSET) for said, true in counts),
        mean(float(abs(said - true) <= 1) for said, true in counts),
    )


# Timing


def match_due(
    due: Sequence[Due], words: Sequence[Word], *, early_s: float, late_s: float
) -> list[Word | None]:
    """For each that is due, the first word that is right in content and time, or None: it begins
    within t - early_s .. t + late_s. No word counts twice."""
    free = sorted(words)
    matched: dict[int, Word] = {}
    for number in sorted(range(len(due)), key=lambda n: due[n].t):
        t, text = due[number]
        for word in free:
            in_time = t - early_s - _CLOSE <= word.start <= t + late_s + _CLOSE
            if in_time and word.text == text:
                matched[number] = word
                free.remove(word)
                break
    return [matched.get(number) for number in range(len(due))]


def timing_accuracy(
    due: Sequence[Due], words: Sequence[Word], *, early_s: float, late_s: float
) -> float | None:
    """The share of those due that are right in content and time; one of the two earns nothing."""
    matched = match_due(due, words, early_s=early_s, late_s=late_s)
    return mean(float(word is not None) for word in matched)


# Proactive answers and alerts


def pauc(span: Span, replies: Sequence[tuple[float, float]], omega: float = OMEGA) -> float:
    """The area under the score of the newest reply over `span`, 0..1. Raises ValueError for a span
    that is empty.

    replies: (time, score 0..BEST); those outside the span do not count. Before the first, the score
    is UNANSWERED. Times from the span's begin are multiplied by 1 - omega: at 1 only content
    counts, at 0 a right reply at the end is worth no more than none.

    >>> pauc((0.0, 2.0), []), pauc((0.0, 2.0), [(0.0, 2.0)]), pauc((0.0, 2.0), [(2.0, 2.0)])
    (0.25, 1.0, 0.625)
    """
    begin, end = span
    if end <= begin:
        raise ValueError(f"{span=}: nothing can be replied in it")
    area, x, score = 0.0, 0.0, UNANSWERED
    for t, new in sorted(replies, key=lambda reply: reply[0]):
        if begin - _CLOSE <= t <= end + _CLOSE:
            at = max(0.0, (t - begin) * (1 - omega))
            area += (at - x) * score
            x, score = at, new
    area += (end - begin - x) * score
    return area / ((end - begin) * BEST)


class Alerts(NamedTuple):
    """hit: of true spans, those in which an alert begins. precision: of alerts, those that begin in
    a true span. iou: of each true span with the alert that fits it best, the mean."""

    hit: float | None
    precision: float | None
    iou: float | None


def alert_scores(alerts: Sequence[Span], truth: Sequence[Span]) -> Alerts:
    return Alerts(
        mean(float(any(_begins_in(alert, span) for alert in alerts)) for span in truth),
        mean(float(any(_begins_in(alert, span) for span in truth)) for alert in alerts),
        mean(max((span_iou(alert, span) for alert in alerts), default=0.0) for span in truth),
    )


def span_iou(one: Span, other: Span) -> float:
    """What both have over what any of them has; 0 for two without length."""
    both = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    any_ = one[1] - one[0] + other[1] - other[0] - both
    return both / any_ if any_ > 0 else 0.0


def _begins_in(alert: Span, span: Span) -> bool:
    return span[0] - _CLOSE <= alert[0] <= span[1] + _CLOSE


# Reaction


def floor_s(t: float, period_s: float) -> float:
    """The least that a loop in ticks can take for something that begins at `t`: it is heard when
    its window has ended, and answered from then on.

    A loop whose tick takes all of its period is heard a period later.
    """
    window = math.floor(t / period_s + _CLOSE)
    return (window + 1) * period_s - t


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99; None without a value."""
    ordered = sorted(values)
    return {f"p{q}": percentile(ordered, q) if ordered else None for q in (50, 95, 99)}
