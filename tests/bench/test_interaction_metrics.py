"""Each metric of `bench interaction` against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from bench.interaction_metrics import (
    BEST,
    Due,
    Word,
    alert_scores,
    backchannels,
    counting,
    divergence,
    floor_s,
    match_due,
    mean,
    merge,
    occupancy,
    pauc,
    quantiles,
    response_latencies,
    span_iou,
    stop_latencies,
    takeover,
    takes_over,
    timing_accuracy,
)


def words(*starts: float, text: str = "do") -> list[Word]:
    """Each 0.2 s long."""
    return [Word(start, start + 0.2, text) for start in starts]


# Turn-taking


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ([], False),
        (words(1.0), False),
        (words(1.0, 1.2, 1.4), False),  # three words in 0.6 s
        (words(1.0, 1.1, 1.2, 1.3), True),  # four
        (words(1.0, 1.79), False),  # 0.99 s
        (words(0.2, 1.0), True),  # 1 s, and 1.2 - 0.2 is rounded
        ([Word(0.0, 1.0, "long")], True),
    ],
)
def test_a_turn_is_taken_by_a_second_or_by_more_than_three_words(
    said: list[Word], taken: bool
) -> None:
    assert takes_over(said) is taken


def test_takeover_is_a_rate_and_the_latency_of_turns_taken() -> None:
    turns = [
        (1.0, words(1.4, 1.6, 1.8, 2.0)),
        (1.0, words(0.5, 0.7, 0.9, 1.1)),  # before the user has ended: clipped
        (1.0, words(1.2)),
        (1.0, []),
    ]
    rate, latency_s = takeover(turns)
    assert rate == 0.5
    assert latency_s == pytest.approx([0.4, 0.0])


def test_without_turns_there_is_no_rate() -> None:
    assert takeover([]) == (None, [])
    assert takeover([(0.0, [])]) == (0.0, [])


# Overlap


def test_spans_are_merged_over_gaps_that_are_not_longer() -> None:
    assert merge([], 0.6) == []
    assert merge([(0.0, 1.0)], 0.6) == [(0.0, 1.0)]
    assert merge([(0.0, 1.0), (1.6, 2.0)], 0.6) == [(0.0, 2.0)]  # 1.6 - 1.0 is rounded up
    assert merge([(0.0, 1.0), (1.61, 2.0)], 0.6) == [(0.0, 1.0), (1.61, 2.0)]
    assert merge([(0.0, 3.0), (1.0, 2.0)], 0.0) == [(0.0, 3.0)]
    assert merge([(5.0, 6.0), (0.0, 1.0)], 0.6) == [(0.0, 1.0), (5.0, 6.0)]  # in order of time


def test_the_stop_takes_as_long_as_both_speak() -> None:
    assert stop_latencies([(2.0, 4.0)], [(0.0, 2.5)]) == [0.5]
    assert stop_latencies([(2.0, 4.0)], [(0.0, 9.0)]) == [2.0]  # it never stops
    assert stop_latencies([(2.0, 4.0)], [(0.0, 2.0)]) == []  # it stopped before
    assert stop_latencies([], [(0.0, 2.0)]) == [] == stop_latencies([(0.0, 2.0)], [])
    both = stop_latencies([(1.0, 2.0), (5.0, 7.0)], [(0.0, 1.25), (4.0, 5.5), (6.5, 8.0)])
    assert both == [0.25, 0.5, 0.5]


def test_the_response_is_what_is_next_said_after_the_end() -> None:
    assert response_latencies([(2.0, 4.0)], [(0.0, 2.5), (4.75, 6.0)]) == [0.75]
    assert response_latencies([(2.0, 4.0)], [(0.0, 2.5)]) == []  # none
    assert response_latencies([(2.0, 4.0)], [(3.0, 5.0)]) == []  # begins before the end
    assert response_latencies([(2.0, 4.0)], [(4.0, 5.0)]) == []  # and not after it
    # Two ends before one answer: the later counts.
    assert response_latencies([(0.0, 1.0), (2.0, 3.0)], [(3.5, 4.0)]) == [0.5]


# Backchannels


def test_backchannels_are_short_and_have_few_words() -> None:
    assert backchannels([], []) == []
    assert backchannels([(1.0, 1.3)], words(1.0)) == [(1.0, 1.3)]
    assert backchannels([(1.0, 1.5)], words(1.0, 1.1, 1.2)) == []  # three words
    assert backchannels([(1.0, 2.0)], words(1.0)) == []  # a second
    assert backchannels([(1.0, 1.3)], words(5.0)) == [(1.0, 1.3)]  # a noise


def test_a_turn_discards_what_was_before_it_and_a_long_one_ends_the_search() -> None:
    one, turn, other, long = (0.0, 0.3), (1.0, 2.5), (4.0, 4.3), (5.0, 8.5)
    assert backchannels([one, turn, other], []) == [other]
    assert backchannels([one, long, (9.0, 9.2)], []) == [one]
    assert backchannels([one, (5.0, 8.0), (9.0, 9.2)], []) == [(9.0, 9.2)]  # three seconds, no more


def test_a_span_is_in_every_window_it_touches() -> None:
    share_W = occupancy([(0.1, 0.5)], 1.0)
    assert len(share_W) == 6
    assert share_W[:3] == pytest.approx([1 / 3] * 3) and share_W[3:] == pytest.approx(
        [0] * 3, abs=1e-6
    )
    assert occupancy([(0.6, 0.7)], 1.0)[3] == pytest.approx(1.0)  # 0.6 / 0.2 is below 3
    assert occupancy([], 1.0) == pytest.approx([1 / 6] * 6)
    beyond = occupancy([(0.9, 5.0)], 1.0)  # cut at the end
    assert beyond[4:] == pytest.approx([0.5, 0.5], abs=1e-6)


def test_divergence_by_hand() -> None:
    here, there = [(0.05, 0.15)], [(0.65, 0.75)]
    assert divergence(here, here, 1.0) == pytest.approx(0.0, abs=1e-6)
    assert divergence(here, there, 1.0) == pytest.approx(math.sqrt(math.log(2)), abs=1e-6)
    assert divergence([], there, 1.0) == 1.0
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4)
    nats = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert divergence(here, [*here, *there], 1.0) == pytest.approx(math.sqrt(nats), abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0, 4), st.floats(0, 1)), min_size=1, max_size=6),
    st.lists(st.tuples(st.floats(0, 4), st.floats(0, 1)), max_size=6),
)
def test_divergence_is_that_of_scipy(
    said: list[tuple[float, float]], expected: list[tuple[float, float]]
) -> None:
    p = [(start, start + length) for start, length in said]
    q = [(start, start + length) for start, length in expected]
    theirs = jensenshannon(occupancy(p, 5.0), occupancy(q, 5.0))
    assert divergence(p, q, 5.0) == pytest.approx(float(np.nan_to_num(theirs)), abs=1e-6)


# Counting


def test_counting_by_hand() -> None:
    assert counting([]) == (None, None)
    assert counting([(3, 3)]) == (0.0, 1.0)
    assert counting([(0, 0)]) == (0.0, 1.0)
    nmae, off_by_one = counting([(0, 0), (1, 0), (4, 5), (2, 4)])
    assert nmae == pytest.approx((0 + 1 / 0.1 + 1 / 5.1 + 2 / 4.1) / 4)
    assert off_by_one == 0.75


# Timing

WINDOW = {"early_s": 0.2, "late_s": 0.4}


@pytest.mark.parametrize(
    ("start", "text", "share"),
    [
        (2.0, "now", 1.0),
        (1.8, "now", 1.0),  # as early as may be
        (1.79, "now", 0.0),
        (2.4, "now", 1.0),
        (2.41, "now", 0.0),
        (2.0, "yes", 0.0),  # in time, and wrong
    ],
)
def test_content_and_time_count_together(start: float, text: str, share: float) -> None:
    said = [Word(start, start + 0.2, text)]
    assert timing_accuracy([Due(2.0, "now")], said, **WINDOW) == share


def test_nothing_due_and_nothing_said() -> None:
    assert timing_accuracy([], words(1.0), **WINDOW) is None
    assert timing_accuracy([Due(2.0, "now")], [], **WINDOW) == 0.0


def test_a_word_counts_once_and_the_earlier_one_is_served_first() -> None:
    due = [Due(2.2, "now"), Due(2.0, "now")]
    only = words(2.1, text="now")
    assert match_due(due, only, **WINDOW) == [None, only[0]]
    both = words(2.1, 2.3, text="now")
    for said in (both, both[::-1]):
        assert match_due(due, said, **WINDOW) == [both[1], both[0]]


# Proactive answers and alerts


@pytest.mark.parametrize(
    ("replies", "omega", "area"),
    [
        ([], 0.5, 0.25),
        ([(10.0, BEST)], 0.5, 1.0),  # at once
        ([(14.0, BEST)], 0.5, 0.625),  # at the end: half of the time is 0.5, half 2
        ([(12.0, BEST)], 0.5, (1 * 0.5 + 3 * 2) / 8),
        ([(12.0, 0.0)], 0.5, 1 * 0.5 / 8),  # wrong is worse than nothing
        ([(11.0, 0.0), (13.0, BEST)], 0.5, (0.5 * 0.5 + 1 * 0 + 2.5 * 2) / 8),
        ([(13.0, BEST), (11.0, 0.0)], 0.5, (0.5 * 0.5 + 1 * 0 + 2.5 * 2) / 8),
        ([(9.9, BEST), (14.1, BEST)], 0.5, 0.25),  # before and after the span
        ([(14.0, BEST)], 0.0, 0.25),
        ([(14.0, BEST)], 1.0, 1.0),
    ],
)
def test_pauc_by_hand(replies: list[tuple[float, float]], omega: float, area: float) -> None:
    assert pauc((10.0, 14.0), replies, omega) == pytest.approx(area)


def test_pauc_of_no_span_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1.0, 1.0\)"):
        pauc((1.0, 1.0), [])


def test_alerts_by_hand() -> None:
    truth = [(1.0, 2.0), (5.0, 6.0)]
    assert alert_scores([], truth) == (0.0, None, 0.0)
    assert alert_scores([(1.0, 2.0)], []) == (None, 0.0, None)
    assert alert_scores([], []) == (None, None, None)
    assert alert_scores(truth, truth) == (1.0, 1.0, 1.0)
    hit, precision, iou = alert_scores([(1.5, 2.5), (1.8, 1.9), (3.0, 3.5)], truth)
    assert (hit, precision) == (0.5, pytest.approx(2 / 3))
    assert iou == pytest.approx((0.5 / 1.5 + 0) / 2)
    # What began before is no hit, though it overlaps.
    assert alert_scores([(0.5, 2.0)], truth[:1]) == (0.0, 0.0, pytest.approx(1 / 1.5))


def test_iou_of_spans() -> None:
    assert span_iou((0.0, 1.0), (1.0, 2.0)) == 0.0
    assert span_iou((0.0, 4.0), (1.0, 2.0)) == 0.25
    assert span_iou((1.0, 1.0), (1.0, 1.0)) == 0.0


# Reaction


def test_the_floor_is_the_rest_of_the_window() -> None:
    assert floor_s(0.0, 0.2) == pytest.approx(0.2)
    assert floor_s(0.15, 0.2) == pytest.approx(0.05)
    assert floor_s(0.6, 0.2) == pytest.approx(0.2)  # 0.6 / 0.2 is below 3
    assert floor_s(0.59, 0.2) == pytest.approx(0.01)


def test_quantiles_and_means_of_nothing_one_and_many() -> None:
    assert quantiles([]) == {"p50": None, "p95": None, "p99": None}
    assert quantiles([0.3]) == {"p50": 0.3, "p95": 0.3, "p99": 0.3}
    assert quantiles([float(n) for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert mean([]) is None and mean(iter([1.0, 2.0])) == 1.5
