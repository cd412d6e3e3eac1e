"""Why a tick missed: the rule of `tml_runtime.misses`, on ticks made to measure."""

from __future__ import annotations

import doctest

import pytest
from fake_ticks import MS, PERIOD_MS, FakeTicks
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime import gpu, metrics, misses, top
from tml_runtime.misses import Reason, skipped_behind

POWER_CAP, IDLE = 0x4, 0x1


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"model": 250}, Reason.MODEL),
        ({"take": 250}, Reason.INPUT),
        ({"publish": 250}, Reason.PUBLISH),
        ({"outside": 250}, Reason.OTHER),
        ({"late": 190}, Reason.WOKE_LATE),
        ({"late": 190, "model": 100}, Reason.WOKE_LATE),  # 190 above its usual, the model 50
        ({"late": 80, "model": 190}, Reason.MODEL),  # 140 above
        ({"model": 250, "gc": 180}, Reason.GARBAGE),
        ({"model": 250, "gc": 100}, Reason.GARBAGE),  # half of the 200 above the usual
        ({"model": 250, "gc": 99}, Reason.MODEL),
        ({"late_gc": 190}, Reason.GARBAGE),
        ({"late": 150, "late_gc": 20}, Reason.WOKE_LATE),
        ({"model": 250, "throttle": POWER_CAP}, Reason.THROTTLED),
        ({"model": 250, "throttle": IDLE}, Reason.MODEL),  # idle clocks are no slowdown
        ({"take": 250, "throttle": POWER_CAP}, Reason.INPUT),  # the host's time, not the GPU's
        ({"model": 250, "gc": 180, "throttle": POWER_CAP}, Reason.GARBAGE),
    ],
)
def test_the_reason_of_a_miss(
    parts: dict[str, float], reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = FakeTicks(monkeypatch)
    assert ticks.reason(**parts) is reason
    report = ticks.metrics.report()
    counted = {name: n for name, n in report["misses_by_reason"].items() if n}
    assert counted == {reason.name.lower(): 1}


def test_a_tick_that_waited_for_the_one_before_missed_for_its_overrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = FakeTicks(monkeypatch)
    assert ticks.reason(model=350) is Reason.MODEL  # done 153 ms after the next one is due
    record = ticks.run()
    assert record["missed"] and Reason(int(record["reason"])) is Reason.OVERRUN
    assert record["before_done_ns"] - record["scheduled_ns"] == 153 * MS
    assert ticks.run()["reason"] == Reason.NONE


def test_without_a_usual_tick_the_longest_part_is_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = FakeTicks(monkeypatch)
    assert Reason(int(ticks.run(model=250)["reason"])) is Reason.MODEL
    for _ in range(5):  # each begins late too, but never by more than the model takes
        assert Reason(int(ticks.run(model=190, take=20)["reason"])) is Reason.MODEL
    ticks = FakeTicks(monkeypatch)
    assert Reason(int(ticks.run(late=199)["reason"])) is Reason.WOKE_LATE


def test_what_is_usual_is_learned_from_the_newest_ticks_that_were_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = FakeTicks(monkeypatch, capacity=8)
    for _ in range(20):
        ticks.run(model=5, take=150)
    for _ in range(8):  # the ring has forgotten the others
        ticks.run(model=150, take=5)
    assert Reason(int(ticks.run(model=160, take=60)["reason"])) is Reason.INPUT
    assert ticks.metrics.USUAL == 128


@given(st.integers(0, 12), st.integers(0, 5_000), st.integers(-1_000, 10_000), st.integers(1, 400))
@settings(deadline=None, max_examples=200)
def test_skipped_ticks_are_told_apart(
    skipped: int, scheduled: int, before_done: int, period: int
) -> None:
    due = [scheduled - j * period for j in range(1, skipped + 1)]
    behind = skipped_behind(
        skipped, scheduled_ns=scheduled, before_done_ns=before_done, period_ns=period
    )
    assert behind == sum(t < before_done for t in due)


def test_skipped_ticks_count_as_misses_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = FakeTicks(monkeypatch)
    ticks.run(model=450)  # done 53 ms after tick 2 was due
    ticks.run(skip=4)  # ticks 1 and 2 could not run, the thread slept through 3 and 4
    report = ticks.metrics.report()
    counted = {name: n for name, n in report["misses_by_reason"].items() if n}
    assert counted == {"model": 1, "overrun": 2, "woke_late": 2}
    assert report["misses"] == 5 and ticks.wrong == "miss"


@pytest.mark.parametrize(
    ("took", "reason"), [(199, "woke_late"), (200, "garbage"), (400, "garbage")]
)
def test_ticks_that_a_collection_slept_through_are_its_own(
    took: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = FakeTicks(monkeypatch)
    ticks.run()
    ticks.now_ns = 2 * PERIOD_MS * MS  # ticks 1 and 2 are slept through, 400 ms of it
    ticks.collect(took)
    record = ticks.run(skip=2)
    assert record["skipped"] == 2 and Reason(int(record["skip_reason"])).name.lower() == reason
    counted = {name: n for name, n in ticks.metrics.report()["misses_by_reason"].items() if n}
    assert counted == {reason: 2}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["model", "take", "publish", "late", "late_gc", "outside"]),
            st.integers(0, 500),
            st.integers(0, 3),
        ),
        max_size=40,
    )
)
@settings(deadline=None, max_examples=40)
def test_every_miss_has_one_reason(told: list[tuple[str, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        ticks = FakeTicks(monkeypatch, capacity=16)
        for part, ms, skip in told:
            record = ticks.run(**{part: ms}, skip=skip)
            assert (record["reason"] != Reason.NONE) == record["missed"]
        report = ticks.metrics.report()
    late = ticks.metrics.tick_times
    assert sum(report["misses_by_reason"].values()) == report["misses"]
    assert report["skipped"] == sum(skip for _, _, skip in told)
    in_time = int(late.counts[: late.bounds_ns.index(PERIOD_MS * MS) + 1].sum())
    assert report["misses"] - report["skipped"] == len(told) - in_time


@pytest.mark.parametrize("module", [gpu, metrics, misses, top], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
