"""What a client sends over any line, in a session's media time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from fake_model import make_runtime
from hypothesis import given, settings
from hypothesis import strategies as st
from net_rig import FRAME, FRAME_NS, MS, RATE, WINDOW, Line, S, hear, make_intake, over, ramp

from tml_runtime.net.faults import Link, Profile
from tml_runtime.net.intake import Intake

LOUD, SILENT = 1.0, 2.0**-40


def sent(count: int, *, ppm: float = 0.0, size: int = FRAME) -> list[int]:
    """When each of `count` pieces, whole, leaves the sender."""
    return [round((i + 1) * size * S / RATE * (1.0 + ppm * 1e-6)) for i in range(count)]


def arrive(
    profile: Profile, count: int, seed: int = 0, *, ppm: float = 0.0, size: int = FRAME
) -> list[tuple[int, int]]:
    return over(Link(profile, seed), sent(count, ppm=ppm, size=size))


def check_order(line: Line) -> None:
    """No sample of the line is written twice, and none comes before an older one."""
    pushes = sorted(line.pushes, key=lambda push: push[0])
    ends = [(start, start + len(pcm)) for start, pcm in pushes]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    newest = [float(pcm[-1]) for _, pcm in pushes]
    assert newest == sorted(newest)


LINES = st.builds(
    Profile,
    jitter_ms=st.sampled_from([0.0, 5.0, 40.0]),
    good_to_bad=st.sampled_from([0.0, 0.05]),
    bad_to_good=st.just(0.4),
    stall_every_s=st.sampled_from([0.0, 1.0]),
    stall_ms=st.just(150.0),
    reorder=st.sampled_from([0.0, 0.2]),
    reorder_ms=st.sampled_from([25.0, 90.0]),
    duplicate=st.sampled_from([0.0, 0.2]),
)


@given(profile=LINES, seed=st.integers(0, 99), scale=st.sampled_from([LOUD, SILENT]))
@settings(max_examples=40, deadline=None)
def test_no_sample_is_heard_twice_and_their_order_is_kept(
    profile: Profile, seed: int, scale: float
) -> None:
    intake, line = make_intake(9)
    hear(intake, line, arrive(profile, 300, seed), scale=scale)
    check_order(line)
    if scale == LOUD:  # what is put in to wait lies between its neighbours, on a straight line
        heard = line.heard[~np.isnan(line.heard)]
        assert np.diff(heard).min() >= -0.1  # of 1: float32 rounds
    stats = intake.stats()
    assert stats.packets_received + stats.packets_lost <= 300
    assert 0.020 <= stats.target_delay <= 0.2001
    written = np.count_nonzero(~np.isnan(line.heard))
    assert written == stats.jitter_buffer_emitted_count
    line.now_ns = 9 * S
    stats = intake.stats()
    assert stats.total_samples_received - stats.concealed_samples == written


def test_a_good_line_changes_no_sample() -> None:
    intake, line = make_intake(20)
    hear(intake, line, arrive(Profile(delay_ms=15), 500))
    first = int(np.flatnonzero(~np.isnan(line.heard))[0])
    assert first == (35 + 80) * 16  # a piece, the way here, the delay
    np.testing.assert_array_equal(line.heard[first : first + 500 * FRAME], ramp(0, 500 * FRAME))
    stats = intake.stats()
    assert stats.jitter_buffer_emitted_count == 500 * FRAME
    mean_delay_s = stats.jitter_buffer_delay / stats.jitter_buffer_emitted_count
    assert mean_delay_s == pytest.approx(0.09)  # the middle of a piece is 10 ms after its first
    assert stats.jitter_buffer_target_delay / (500 * FRAME) == pytest.approx(0.08)
    assert (stats.concealed_samples, stats.packets_lost, stats.clock_steps) == (0, 0, 0)


@given(lost=st.sets(st.integers(1, 148), max_size=30))
@settings(max_examples=20, deadline=None)
def test_loss_shows_in_exactly_the_windows_it_hits(lost: set[int]) -> None:
    runtime, model = make_runtime()
    clock = runtime.clock
    assert clock is not None
    with runtime, runtime.open_session() as session:
        intake = Intake(session)
        for i in range(150):
            at = (i + 1) * FRAME_NS
            while (runtime.metrics.count + 1) * 200 * MS <= at:
                runtime.run_ticks(1)
            clock.sleep_until(at)
            if i not in lost:
                intake.audio(i, i * FRAME, ramp(i * FRAME) / 2**16, at)
        runtime.run_ticks(16 - runtime.metrics.count)
        stats = intake.stats()
    first = 100 * 16  # 20 ms for the piece itself and 80 of delay
    expected = {0} | {(150 * FRAME + first) // WINDOW}  # where the stream begins and ends
    for i in lost:
        start = first + i * FRAME
        expected |= {start // WINDOW, (start + FRAME - 1) // WINDOW}
    flagged = {tick for tick, rows in enumerate(model.heard) if rows[0].missing}
    assert flagged == expected
    assert stats.packets_lost == len(lost)
    holes_end = 16 * WINDOW - (first + 150 * FRAME)
    assert stats.concealed_samples == len(lost) * FRAME + holes_end


def test_what_comes_late_or_twice_is_cut_and_counted() -> None:
    """Piece i lies at 110 ms + i * 20; the second window begins within piece 4."""
    intake, line = make_intake(1)
    in_time = [(30 * MS + i * FRAME_NS, i) for i in (0, 1, 3, 5)]
    hear(intake, line, [*in_time, (205 * MS, 4), (205 * MS, 4), (206 * MS, 2)])
    np.testing.assert_array_equal(line.heard[WINDOW : WINDOW + 480], ramp(4 * FRAME + 160, 480))
    line.now_ns = 400 * MS
    stats = intake.stats()
    assert (stats.packets_received, stats.packets_duplicated, stats.packets_discarded) == (6, 1, 1)
    assert stats.late_samples == 160 + FRAME
    assert stats.total_samples_received == 2 * WINDOW - 1760
    # Pieces 2 and 4, and from the end of 5 on.
    assert (stats.concealment_events, stats.concealed_samples) == (3, FRAME + 160 + 2720)


def test_a_message_that_waited_for_its_call_delays_no_later_one() -> None:
    """Only the first was taken 50 ms after it had come; what it added is worked off in silence."""
    intake, line = make_intake(20)
    for i in range(900):
        at = (i + 1) * FRAME_NS
        line.now_ns = at + 50 * MS * (i == 0)
        intake.audio(i, i * FRAME, ramp(i * FRAME, scale=SILENT), at)
    first, _ = line.pushes[0]
    last, _ = line.pushes[-1]
    assert first == (20 + 80 + 50) * 16
    assert last / RATE - at / S == pytest.approx(intake.stats().target_delay, abs=0.001)


@pytest.mark.parametrize("name", ["clean", "wifi", "4g"])
def test_a_line_costs_few_windows_and_a_small_delay(name: str) -> None:
    intake, line = make_intake(125)
    hear(intake, line, arrive(Profile.named(name), 6000), scale=SILENT)
    stats = intake.stats()
    most = {"clean": 1, "wifi": 20, "4g": 60}[name]  # of 600 windows
    assert len([w for w in line.missing_windows() if w < 600]) <= most
    mean_delay_s = stats.jitter_buffer_target_delay / stats.jitter_buffer_emitted_count
    assert mean_delay_s <= {"clean": 0.025, "wifi": 0.06, "4g": 0.06}[name]
    assert stats.clock_steps == 0


@pytest.mark.parametrize(("ppm", "scale"), [(300, SILENT), (-300, LOUD)])
def test_an_hour_of_clock_drift_costs_no_window_and_no_delay(ppm: float, scale: float) -> None:
    size, hour = 12_800, 4500  # pieces of 800 ms: the same drift with few calls
    intake, line = make_intake(3620)
    waits_s: list[float] = []
    before = intake.stats()
    profile = Profile(delay_ms=20, jitter_ms=1)
    for i, (at, index) in enumerate(arrive(profile, hour, ppm=ppm, size=size)):
        hear(intake, line, [(at, index)], scale=scale, size=size)
        if i % 375 == 374:
            now = intake.stats()
            samples = now.jitter_buffer_emitted_count - before.jitter_buffer_emitted_count
            waits_s.append((now.jitter_buffer_delay - before.jitter_buffer_delay) / samples)
            before = now
    assert [w for w in line.missing_windows() if 4 < w < 17_985] == []
    assert max(waits_s[1:]) - min(waits_s[1:]) <= 0.005
    stats = intake.stats()
    assert stats.drift_ppm == pytest.approx(ppm, abs=5)
    followed = stats.inserted_samples_for_deceleration - stats.removed_samples_for_acceleration
    worked_off = 0.06 * RATE if scale == SILENT else 0  # the start's 80 ms down to 20
    assert followed == pytest.approx(ppm * 1e-6 * 3600 * RATE - worked_off, abs=200)
    assert (stats.clock_steps, stats.packets_discarded) == (0, 0)


@pytest.mark.parametrize("step_s", [10, -10])
def test_a_clock_that_is_set_costs_a_window_or_two(step_s: int) -> None:
    intake, line = make_intake(45)
    arrivals = arrive(Profile(delay_ms=20, jitter_ms=3), 2000)
    for at, i in arrivals:
        line.now_ns = at
        stamp = i * FRAME + (12 + step_s * (i >= 1000)) * RATE
        intake.audio(i, stamp, ramp(i * FRAME, scale=SILENT), at)
    check_order(line)
    missing = [w for w in line.missing_windows() if 0 < w < 199]
    assert 1 <= len(missing) <= 2 and all(100 <= w <= 102 for w in missing)
    stats = intake.stats()
    assert (stats.clock_steps, stats.packets_discarded) == (1, 4)
    assert stats.target_delay < 0.05


def test_a_clock_that_is_set_while_the_delay_is_long_keeps_the_order() -> None:
    """What comes then is due before the end of what was placed."""
    intake, line = make_intake(10)
    late = [180 * MS * (i % 6 == 0 and i < 190) for i in range(300)]
    for at, i in sorted((at + late[i], i) for i, at in enumerate(sent(300))):
        line.now_ns = at
        stamp = i * FRAME + 10 * RATE * (i >= 200)
        intake.audio(i, stamp, ramp(i * FRAME, scale=SILENT), at)
    check_order(line)
    assert intake.stats().clock_steps == 1


def test_in_silence_the_delay_grows_at_once() -> None:
    intake, line = make_intake(8)
    late = [120 * MS * (i >= 200) for i in range(240)]
    hear(intake, line, [(at + late[i], i) for i, at in enumerate(sent(240))], scale=SILENT)
    delay_s = line.pushes[-1][0] / RATE - sent(240)[-1] / S
    assert delay_s == pytest.approx(intake.stats().target_delay, abs=0.002)
    assert delay_s > 0.12


@pytest.mark.parametrize("scale", [LOUD, SILENT])
def test_what_is_put_in_and_taken_out_adds_up(scale: float) -> None:
    """The line becomes slower, so the delay grows, and after ten seconds it shrinks again."""
    intake, line = make_intake(20)
    arrivals = [(at + 120 * MS * (at > 4 * S), i) for i, at in enumerate(sent(900))]
    hear(intake, line, arrivals, scale=scale)
    stats = intake.stats()
    inserted = stats.inserted_samples_for_deceleration
    removed = stats.removed_samples_for_acceleration
    assert inserted > 0 and (removed > 0 or scale == LOUD)
    placed = stats.jitter_buffer_emitted_count + stats.late_samples
    assert placed == 900 * FRAME + inserted - removed


def test_a_laptop_that_slept_is_heard_again_within_half_a_second() -> None:
    intake, line = make_intake(60)
    arrivals = [
        (at + (i >= 1000) * 10 * S, i) for at, i in arrive(Profile(delay_ms=20, jitter_ms=3), 2000)
    ]
    hear(intake, line, arrivals, scale=SILENT)
    check_order(line)
    missing = [w for w in line.missing_windows() if 0 < w < 249]
    assert missing == list(range(missing[0], missing[-1] + 1))
    assert missing[0] == 100 and 150 < missing[-1] <= 152  # it sleeps for 50 windows
    assert intake.stats().clock_steps == 1


def test_an_outage_of_a_second_is_missing_and_leaves_no_delay() -> None:
    intake, line = make_intake(25)
    hear(intake, line, arrive(Profile.named("outage"), 1000), scale=SILENT)
    missing = [w for w in line.missing_windows() if 0 < w < 99]
    assert missing == [*range(45, 51), *range(95, 99)] or missing == [
        *range(45, 50),
        *range(95, 99),
    ]
    stats = intake.stats()
    assert stats.packets_lost == 50 and stats.packets_discarded == 0  # the second has not ended
    assert stats.target_delay < 0.035


def test_all_that_was_held_up_may_come_at_once() -> None:
    """Before anything was heard, and in the middle."""
    intake, line = make_intake(65)
    arrivals = [(max(at, 2 * S), i) for at, i in arrive(Profile(delay_ms=20), 3000)]
    arrivals = [(15 * S if 12 * S < at < 15 * S else at, i) for at, i in arrivals]
    hear(intake, line, arrivals, scale=SILENT)
    check_order(line)
    stats = intake.stats()
    assert stats.clock_steps == 0
    missing = [w for w in line.missing_windows() if w < 300]
    assert missing[:10] == [*range(10)] and set(missing[10:]) <= {10, *range(60, 76)}
    assert {*range(61, 74)} <= set(missing)
    assert stats.target_delay < 0.025
    last = max(line.pushes, key=lambda push: push[0])
    assert last[0] / RATE + 0.02 - line.now_ns / S < 0.08  # no delay is left of it


def test_a_flood_is_cut_and_not_stored() -> None:
    intake, line = make_intake(30)
    for i in range(5000):  # 100 s of sound in 10
        line.now_ns = at = i * 2 * MS
        intake.audio(i, i * FRAME, ramp(i * FRAME, scale=SILENT), at)
        ahead_s = max(start for start, _ in line.pushes) / RATE - at / S
        assert ahead_s <= 0.4
    check_order(line)
    stats = intake.stats()
    assert stats.packets_discarded > 3000
    assert stats.removed_samples_for_acceleration > 3000 * FRAME


@pytest.mark.parametrize("name", ["wifi", "loss5"])
def test_memory_does_not_grow_with_time(name: str) -> None:
    def size(intake: Intake) -> int:
        parts = (intake._heard._starts, intake._timeline._stamps, intake._delay._best)
        return sum(map(len, parts)) + len(intake._delay._drift._points)

    intake, line = make_intake(240)
    largest: list[int] = [0, 0]
    for n, (at, i) in enumerate(arrive(Profile.named(name), 2000, size=5 * FRAME)):
        hear(intake, line, [(at, i)], size=5 * FRAME, scale=SILENT)
        largest[n > 1000] = max(largest[n > 1000], size(intake))
    assert largest[1] <= max(2 * largest[0], 400)
