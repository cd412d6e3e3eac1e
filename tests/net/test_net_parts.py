"""The small parts of the intake, each against the plain meaning of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime import errors
from tml_runtime.net.sequence import MAX_COUNTER, MAX_SEQ_JUMP, SEQ_WINDOW, Sequence, Spans
from tml_runtime.net.silence import SilenceDetector
from tml_runtime.net.stretch import extra_period, resample
from tml_runtime.net.timeline import MAX_BENDS, Timeline

RATE = 16_000


@given(
    start=st.integers(0, 10**15),
    steps=st.lists(st.integers(-SEQ_WINDOW + 1, 40), max_size=80),
)
@settings(max_examples=60, deadline=None)
def test_sequence_against_a_set(start: int, steps: list[int]) -> None:
    sequence, seen = Sequence(), set[int]()
    for step in [0, *steps]:
        seq = max(0, (max(seen) if seen else start) + step)
        assert sequence.is_new(seq) == (seq not in seen)
        assert sequence.is_newest(seq) == (not seen or seq > max(seen))
        if seq not in seen:
            sequence.mark(seq)
            seen.add(seq)
        assert sequence.received == len(seen)
        assert sequence.lost == max(seen) - min(seen) + 1 - len(seen)


FAR = [2**32 - SEQ_WINDOW, 2**32 + MAX_SEQ_JUMP + 1]


@pytest.mark.parametrize("seq", [0, *FAR, -1, MAX_COUNTER + 1])
def test_a_number_no_stream_comes_to_is_refused(seq: int) -> None:
    sequence = Sequence()
    sequence.mark(2**32)
    with pytest.raises(errors.InputValueError, match=str(seq)):
        sequence.is_new(seq)
    assert sequence.received == 1


def test_numbers_next_to_those_are_taken() -> None:
    for seq in (0, MAX_COUNTER):
        assert Sequence().is_new(seq)
    sequence = Sequence()
    sequence.mark(2**32)
    assert sequence.is_new(FAR[0] + 1) and sequence.is_new(FAR[1] - 1)


@given(
    pieces=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=40),
    passes=st.lists(st.integers(0, 80), max_size=40),
)
@settings(max_examples=100, deadline=None)
def test_spans_against_a_plain_array(pieces: list[tuple[int, int]], passes: list[int]) -> None:
    spans, filled, cursor = Spans(), np.zeros(100, bool), 0
    spans.begin(0)
    for (start, size), to in zip(pieces, [*passes, *[0] * len(pieces)], strict=False):
        start = max(start, cursor)
        spans.add(start, start + size)
        filled[start : start + size] = True
        cursor = max(cursor, to)
        spans.pass_to(to)
        over = filled[:cursor]
        assert spans.over == cursor
        assert spans.missing == np.count_nonzero(~over)
        assert spans.holes == np.count_nonzero(~over & np.concatenate([[True], over])[:-1])


def test_spans_count_from_the_first_sample_on() -> None:
    spans = Spans()
    spans.pass_to(500)
    spans.begin(1000)
    spans.begin(0)
    spans.pass_to(900)
    spans.pass_to(1010)
    assert (spans.over, spans.missing, spans.holes) == (10, 10, 1)


@given(
    moves=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(-1, 3)),
        max_size=30,
    ),
    ask=st.tuples(st.integers(0, 200), st.integers(0, 200)),
)
@settings(max_examples=100, deadline=None)
def test_a_timeline_keeps_order_and_gives_each_count_one_place(
    moves: list[tuple[int, int, int, int]], ask: tuple[int, int]
) -> None:
    line, before = Timeline(), {}
    line.restart(10, 1000)
    for lost, later, size, longer in moves:
        stamp, sample = line.next_stamp + lost, line.next_sample + lost + later
        line.bend(stamp, sample)
        line.extend(stamp + size, sample + max(0, size + longer))
        now = {
            at + i: sample + i
            for at, end, sample in line.places(0, line.next_stamp + 50)
            for i in range(end - at)
        }
        assert before.items() <= now.items()  # a place is for ever
        before = now
    stamps, samples = list(before), list(before.values())
    assert stamps == sorted(stamps) and samples == sorted(set(samples))
    assert all(s < line.next_sample for s in samples)
    part = [(at, end) for at, end, _ in line.places(*ask)]
    asked = [at for first, end in part for at in range(first, end)]
    assert asked == [at for at in stamps if ask[0] <= at < ask[1]]


def test_a_timeline_does_not_grow_with_its_age() -> None:
    line = Timeline()
    line.restart(0, 0)
    for i in range(1, 5000):
        line.extend(10 * i, 11 * i)
    assert len(line._stamps) == len(line._samples) == MAX_BENDS
    assert list(line.places(49_970, 49_990)) == [(49_970, 49_980, 54_967), (49_980, 49_990, 54_978)]
    assert list(line.places(0, 100)) == []


@pytest.mark.parametrize(("size", "longer"), [(320, 1), (320, -1), (320, -3), (2, 1), (3, -1)])
def test_resampling_keeps_ends_and_straight_lines(size: int, longer: int) -> None:
    out = resample(np.arange(size, dtype=np.float32), size + longer)
    np.testing.assert_allclose(out, np.linspace(0, size - 1, size + longer), atol=1e-4)
    assert out.dtype == np.float32


@pytest.mark.parametrize("hz", [80, 120, 215, 390])
def test_an_extra_period_of_a_voice_is_not_heard(hz: int) -> None:
    t = np.arange(960) / RATE
    k = np.array([[1.0], [2.0], [3.0]])
    voice = (np.sin(2 * np.pi * hz * k * t + k) / k).sum(0).astype(np.float32)
    before, after = voice[:640], voice[640:]
    extra = extra_period(before, after, 300, RATE)
    periods = len(extra) * hz / RATE
    assert len(extra) <= 240 and abs(periods - round(periods)) * RATE / hz <= 1.0
    longer = np.concatenate([before, extra, after])
    steepest = np.abs(np.diff(voice)).max()
    assert np.abs(np.diff(longer)).max() <= 1.3 * steepest  # no click


@given(
    before=st.integers(0, 400),
    after=st.integers(0, 400),
    most=st.integers(0, 400),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_an_extra_period_fits_what_there_is(before: int, after: int, most: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sound = [rng.standard_normal(size).astype(np.float32) for size in (before, after)]
    extra = extra_period(sound[0], sound[1], most, RATE)
    assert len(extra) <= min(240, most, after)
    assert len(extra) == 0 or np.isfinite(extra).all()
    if min(before, after, most) >= 320:
        assert len(extra) >= 40
    assert len(extra_period(np.zeros(320, np.float32), np.zeros(320, np.float32), 320, RATE)) > 0


def test_silence_is_told_from_speech_in_a_quiet_and_in_a_noisy_room() -> None:
    rng = np.random.default_rng(3)
    for noise in (0.0, 1e-4, 3e-3):
        detector, found = SilenceDetector(RATE), []
        for i in range(500):
            speaks = i >= 50 and i // 25 % 2
            pcm = noise * rng.standard_normal(320) + speaks * 0.1 * np.sin(np.arange(320) * 0.1)
            found.append(detector.is_silent(pcm.astype(np.float32)) == (not speaks))
        assert np.mean(found) > 0.99
    loud = SilenceDetector(RATE)
    assert not any(loud.is_silent(np.full(320, 0.1, np.float32)) for _ in range(500))
