from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime._tick import Schedule

INT64_MAX = 2**63 - 1


class FakeClock:
    """Runs a schedule on made-up time and checks every promise of it at every step."""

    def __init__(self, start_ns: int, period_ns: int) -> None:
        self.start, self.period = start_ns, period_ns
        self.schedule = Schedule(start_ns, period_ns)
        self.now = start_ns
        self.last = -1  # the last tick that is accounted for
        self.run = self.misses = self.skipped = 0

    def step(self, oversleep: int, work: int, failed: bool = False) -> None:
        s = self.schedule
        self.now = max(self.now, s.next_wake_ns) + oversleep
        tick, skipped = s.begin(self.now)
        # Exactly the tick in whose period we are: so no two ever begin in one period, and those
        # skipped are exactly those whose time has passed.
        assert (self.now - self.start) // self.period == tick + 1
        assert skipped == tick - self.last - 1
        self.now += work
        late = self.now > self.start + (tick + 2) * self.period
        assert s.end(self.now, failed) == (late or failed)
        self.last = tick
        self.run += 1
        self.skipped += skipped
        self.misses += skipped + (late or failed)

    def check(self) -> None:
        s = self.schedule
        assert s.next_tick == self.last + 1
        assert s.next_wake_ns == self.start + (self.last + 2) * self.period
        assert (s.ticks, s.misses, s.skipped) == (self.last + 1, self.misses, self.skipped)
        assert s.ticks == self.run + self.skipped


def times(period: int) -> st.SearchStrategy[int]:
    """Mostly within a period, at its edges, and many periods long."""
    near = [0, 1, period - 1, period, period + 1, 2 * period, 2 * period + 1]
    return st.one_of(
        st.sampled_from(near), st.integers(0, period), st.integers(0, 1_000_000 * period)
    )


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_tick_is_accounted_for(data: st.DataObject) -> None:
    period = data.draw(st.sampled_from([1, 2, 3, 200, 200_000_000]))
    clock = FakeClock(data.draw(st.integers(0, 10**15)), period)
    for _ in range(data.draw(st.integers(1, 40))):
        clock.step(data.draw(times(period)), data.draw(times(period)), data.draw(st.booleans()))
        clock.check()


def test_no_drift_over_a_million_ticks() -> None:
    period, ticks = 200_000_000, 10**6
    clock = FakeClock(123_456_789, period)
    rng = random.Random(0)
    while clock.run < ticks:
        overrun = rng.random() < 1e-3
        clock.step(rng.randrange(1000), rng.randrange(5 * period) if overrun else period // 2)
    clock.check()
    assert clock.skipped > 0
    assert clock.misses > clock.skipped


def test_on_time_ticks_never_miss() -> None:
    schedule = Schedule(0, 200)
    for tick in range(1000):
        assert schedule.begin(schedule.next_wake_ns) == (tick, 0)
        assert not schedule.end(schedule.deadline_ns(tick))  # done exactly by the deadline
    assert (schedule.ticks, schedule.misses) == (1000, 0)


def test_worked_example() -> None:
    schedule = Schedule(0, 200)
    assert schedule.begin(200) == (0, 0)
    assert schedule.end(710)  # deadline 400
    assert schedule.next_tick == 1
    assert schedule.begin(710) == (2, 1)  # 1 had to be done by 600; 2 began at 600
    assert not schedule.end(800)
    assert (schedule.ticks, schedule.misses, schedule.skipped) == (3, 2, 1)
    assert schedule.next_wake_ns == 800


def test_times_stay_at_the_end_of_int64() -> None:
    schedule = Schedule(5, 2**62)
    assert schedule.wake_ns(0) == 2**62 + 5
    assert schedule.deadline_ns(0) == schedule.wake_ns(1) == schedule.wake_ns(2**62) == INT64_MAX
    assert schedule.wake_ns(INT64_MAX) == INT64_MAX
    assert schedule.begin(INT64_MAX) == (0, 0)
    assert not schedule.end(INT64_MAX)
    with pytest.raises(ValueError, match="next_wake_ns"):  # its true time is beyond int64
        schedule.begin(INT64_MAX)
    skipping = Schedule(0, 1)
    assert skipping.begin(INT64_MAX) == (INT64_MAX - 1, INT64_MAX - 1)
    skipping.end(INT64_MAX)
    assert skipping.ticks == INT64_MAX


@pytest.mark.parametrize(
    ("start", "period", "words"), [(-1, 200, "start_ns=-1"), (0, 0, "period_ns=0")]
)
def test_bad_times(start: int, period: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(start, period)


def test_misuse_changes_nothing() -> None:
    schedule = Schedule(0, 200)
    with pytest.raises(RuntimeError, match="no tick has begun"):
        schedule.end(200)
    for early in (-1, 0, 199):
        with pytest.raises(ValueError, match=f"now_ns={early}"):
            schedule.begin(early)
    assert schedule.begin(200) == (0, 0)
    with pytest.raises(RuntimeError, match="tick 0 has not ended"):
        schedule.begin(400)
    with pytest.raises(ValueError, match="tick=-1"):
        schedule.wake_ns(-1)
    assert not schedule.end(300)
    assert (schedule.ticks, schedule.misses, schedule.next_tick) == (1, 0, 1)
