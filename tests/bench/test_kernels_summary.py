"""What `bench tick --kernels` makes of what a profiler saw."""

from __future__ import annotations

import pytest

from bench.kernels import TOP, Span, show, summary


def test_times_and_gaps_of_a_tick() -> None:
    spans = [
        Span("a", 0, 4), Span("b", 5, 8), Span("a", 6, 10),  # b and a side by side
        Span("a", 200_000, 200_002), Span("b", 200_005, 200_010),  # the next tick
    ]  # fmt: skip
    found = summary(spans)
    assert found["ticks"] == 2
    assert found["kernels"] == [
        {"name": "a", "calls": 1.5, "us": pytest.approx(5.0)},
        {"name": "b", "calls": 1.0, "us": pytest.approx(4.0)},
    ]
    assert found["busy_us"] == pytest.approx(9.0) and found["idle_us"] == pytest.approx(2.0)


def test_ticks_that_the_profiler_may_have_cut_are_left_out() -> None:
    spans = [Span("a", 200_000 * n, 200_000 * n + us) for n, us in enumerate((1, 4, 6, 2))]
    found = summary(spans)
    assert (found["ticks"], found["busy_us"]) == (2, 5.0)


def test_small_ones_are_one_row() -> None:
    text = show(summary([Span(f"k{n}", n, n + 1) for n in range(TOP + 3)]))
    assert "3 others" in text and len(text.splitlines()) == 2 + TOP + 1


def test_nothing_ran() -> None:
    assert show(summary([])) == "no kernel ran"
