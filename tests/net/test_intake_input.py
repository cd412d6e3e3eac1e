"""What a client may not send, and what becomes of pictures, text and full queues."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fake_model import make_runtime
from hypothesis import given, settings
from hypothesis import strategies as st
from net_rig import FRAME, FRAME_NS, MS, RATE, WINDOW, S, make_intake, ramp

from tml_runtime import errors
from tml_runtime._tick import now_ns
from tml_runtime.net.intake import MAX_TEXT_CHARS, MAX_WAITING_TEXTS, Intake
from tml_runtime.text import ByteTokenizer

FRAME_RGB = np.zeros((40, 40, 3), np.uint8)
BAD: list[tuple[Callable[[Intake, int], object], type[Exception], str]] = [
    (lambda i, at: i.audio(-1, 0, ramp(0), at), errors.InputValueError, "seq=-1"),
    (lambda i, at: i.audio(2_000_000, 0, ramp(0), at), errors.InputValueError, "seq=2000000"),
    (lambda i, at: i.audio(2**53, 0, ramp(0), at), errors.InputValueError, "seq="),
    (lambda i, at: i.audio(1.0, 0, ramp(0), at), errors.InputTypeError, "seq=1.0"),  # type: ignore
    (lambda i, at: i.audio(True, 0, ramp(0), at), errors.InputTypeError, "seq=True"),
    (lambda i, at: i.audio(50, -1, ramp(0), at), errors.InputValueError, "stamp=-1"),
    (lambda i, at: i.audio(50, 2**53, ramp(0), at), errors.InputValueError, "stamp="),
    (lambda i, at: i.audio(50, float("nan"), ramp(0), at), errors.InputTypeError, "nan"),  # type: ignore
    (lambda i, at: i.audio(50, 16_000, ramp(0), 0.5), errors.InputTypeError, "0.5"),  # type: ignore
    (lambda i, at: i.audio(50, 16_000, ramp(0) * np.nan, at), errors.InputValueError, "nan"),
    (lambda i, at: i.audio(50, 16_000, ramp(0, 16_001), at), errors.InputValueError, "16001"),
    (
        lambda i, at: i.audio(50, 16_000, ramp(0).astype(float), at),
        errors.InputTypeError,
        "float64",
    ),
    (lambda i, at: i.audio(50, 16_000, ramp(0)[:, None], at), errors.InputValueError, "320, 1"),
    (lambda i, at: i.audio(50, 16_000, b"\0" * 640, at), errors.InputTypeError, "bytes"),  # type: ignore
    (lambda i, at: i.video(-1, 16_000, FRAME_RGB, at), errors.InputValueError, "seq=-1"),
    (lambda i, at: i.video(5, None, FRAME_RGB, at), errors.InputTypeError, "stamp=None"),  # type: ignore
    (lambda i, at: i.video(5, 16_000, FRAME_RGB / 2, at), errors.InputTypeError, "float64"),
    (lambda i, at: i.video(5, 16_000, FRAME_RGB[:39], at), errors.InputValueError, "39"),
    (lambda i, at: i.text(b"x"), errors.InputTypeError, "bytes"),  # type: ignore
    (lambda i, at: i.text("x" * (MAX_TEXT_CHARS + 1)), errors.InputValueError, "1025"),
]


@pytest.mark.parametrize(("send", "error", "words"), BAD)
def test_hostile_input_is_refused_and_changes_nothing(
    send: Callable[[Intake, int], object], error: type[Exception], words: str
) -> None:
    def run(with_bad: bool) -> tuple[bytes, str]:
        runtime, model = make_runtime()
        clock = runtime.clock
        assert clock is not None
        with runtime, runtime.open_session() as session:
            intake = Intake(session)
            for i in range(80):
                at = (i + 1) * FRAME_NS
                while (runtime.metrics.count + 1) * 200 * MS <= at:
                    runtime.run_ticks(1)
                clock.sleep_until(at)
                intake.audio(i, i * FRAME, ramp(i * FRAME) / 2**16, at)
                if i % 10 == 0:
                    intake.video(i // 10, i * FRAME, FRAME_RGB, at)
                if with_bad and i == 49:
                    with pytest.raises(error, match=words):
                        send(intake, at)
            runtime.run_ticks(2)
            heard = b"".join(rows[0].pcm.tobytes() for rows in model.heard)
            return heard, repr((intake.stats(), session.stats))

    assert run(True) == run(False)


@given(
    calls=st.lists(
        st.tuples(
            st.integers(-3, 3),
            st.one_of(st.integers(-400, 400), st.integers(-(10**9), 10**9)),
            st.integers(0, 700),
            st.integers(0, 60 * MS),
        ),
        max_size=60,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_a_client_sends_what_is_heard_is_bounded(calls: list) -> None:
    intake, line = make_intake(30)
    seq, stamp, at = 5, 10**10, 0
    for jump, off, size, later in calls:
        seq, stamp, at = seq + jump, stamp + 320, at + later
        line.now_ns = at
        try:
            intake.audio(max(0, seq), max(0, stamp + off), ramp(0, size), at)
        except errors.InputValueError:
            continue
        stats = intake.stats()
        assert 0.020 - 1e-6 <= stats.target_delay <= 0.2 + 1e-6
        if line.pushes:
            assert max(start + len(pcm) for start, pcm in line.pushes) / RATE <= at / S + 1.0
    line.now_ns = 25 * S
    stats = intake.stats()
    filled = stats.total_samples_received - stats.concealed_samples
    assert filled == np.count_nonzero(~np.isnan(line.heard))


def test_pictures_lie_where_the_sound_of_their_time_does() -> None:
    runtime, model = make_runtime()
    clock = runtime.clock
    assert clock is not None
    with runtime, runtime.open_session() as session:
        intake = Intake(session)
        intake.video(0, 12_345, FRAME_RGB + 9, 0)  # before any sound: 80 ms after it came
        for i in range(60):
            at = (i + 1) * FRAME_NS
            while (runtime.metrics.count + 1) * 200 * MS <= at:
                runtime.run_ticks(1)
            clock.sleep_until(at)
            pcm = np.full(FRAME, 0.5, np.float32)
            if i == 20:
                pcm[0] = 0.75
                intake.video(1, i * FRAME, FRAME_RGB + 7, at)
                intake.video(1, i * FRAME, FRAME_RGB + 8, at)  # the same again
            intake.audio(i, i * FRAME, pcm, at)
        intake.video(2, 0, FRAME_RGB, at)  # too late
        intake.video(3, 10**12, FRAME_RGB, at)  # too early
        runtime.run_ticks(2)
        stats = intake.stats()
    marked = [tick for tick, rows in enumerate(model.heard) if (rows[0].pcm == 0.75).any()]
    seen = [None if rows[0].frames is None else int(rows[0].frames.max()) for rows in model.heard]
    assert marked == [(20 * FRAME + 1600) // WINDOW]
    assert [(tick, value) for tick, value in enumerate(seen) if value is not None] == [
        (0, 9),
        (marked[0], 7),
    ]
    assert (stats.frames_received, stats.frames_dropped) == (4, 2)


def test_a_picture_before_any_sound_waits_as_sound_would() -> None:
    intake, line = make_intake(1, queue=1)
    line.now_ns = at = 150 * MS
    intake.video(0, 12_345, FRAME_RGB, at)
    intake.video(1, 12_345, FRAME_RGB, at)  # finds the queue full
    assert [t for t, _ in line.frames] == [pytest.approx(0.23)]
    stats = intake.stats()
    assert (stats.frames_received, stats.frames_dropped, stats.backpressure) == (2, 1, 1)


def test_as_much_as_may_come_at_once_is_taken() -> None:
    intake, line = make_intake(10)
    intake.audio(0, 0, ramp(0, RATE), 0)
    intake.text("x" * MAX_TEXT_CHARS)
    assert line.texts == [[120] * MAX_TEXT_CHARS]
    assert intake.stats().jitter_buffer_emitted_count == RATE


@pytest.mark.parametrize("then", [Intake.poll, lambda intake: intake.audio(0, 0, ramp(0), 0)])
def test_texts_wait_in_order_and_are_bounded(then: Callable[[Intake], object]) -> None:
    intake, line = make_intake(10, queue=3)
    texts = [f"{i}" for i in range(3 + MAX_WAITING_TEXTS)]
    for text in texts:
        intake.text(text)
    with pytest.raises(errors.InputBackpressure, match="waiting"):
        intake.text("one more")
    stats = intake.stats()
    assert (stats.texts_waiting, stats.backpressure) == (MAX_WAITING_TEXTS, 1)
    line.queue = 10**6
    then(intake)
    assert line.texts == [list(text.encode()) for text in texts]


class WideTokenizer(ByteTokenizer):
    """Five tokens for a character, as of a text that is normalised."""

    def __init__(self) -> None:
        self.num_encoded = 0

    def encode(self, text: str) -> list[int]:
        self.num_encoded += 1
        return 5 * super().encode(text)


def test_a_text_that_waits_is_encoded_once() -> None:
    tokenizer = WideTokenizer()
    runtime, _ = make_runtime(tokenizer=tokenizer)
    with runtime, runtime.open_session() as session:
        intake = Intake(session)
        for _ in range(60):
            intake.text("x" * 800)
        assert intake.stats().texts_waiting > 0
        for i in range(100):
            intake.audio(i, i * FRAME, ramp(i * FRAME) / 2**16, 0)
            intake.poll()
        assert tokenizer.num_encoded == 60


@pytest.mark.parametrize("num_before", [0, 60])
def test_a_text_of_too_many_tokens_is_refused_at_once(num_before: int) -> None:
    """Behind a full queue, too: nothing is left to be said when its turn comes."""
    runtime, _ = make_runtime(tokenizer=WideTokenizer())
    with runtime, runtime.open_session() as session:
        intake = Intake(session)
        for _ in range(num_before):
            intake.text("x" * 800)
        waiting = intake.stats().texts_waiting
        assert (waiting > 0) == (num_before > 0)
        with pytest.raises(errors.InputValueError, match="5120 tokens"):
            intake.text("x" * MAX_TEXT_CHARS)
        assert intake.stats().texts_waiting == waiting
        while intake.stats().texts_waiting > 0:
            runtime.run_ticks(10)
            intake.poll()


def test_full_queues_of_the_session_are_counted_not_raised() -> None:
    runtime, _ = make_runtime()
    with runtime, runtime.open_session() as session:
        intake = Intake(session)
        for i in range(2000):  # one sample each
            intake.audio(i, i, ramp(i, 1), 0)
        for i in range(100):
            intake.video(i, 0, np.zeros((480, 640, 3), np.uint8), 0)
        stats = intake.stats()
        assert stats.backpressure > 1000
        assert stats.packets_discarded > 1000 and stats.frames_dropped > 80
        runtime.run_ticks(1)


def test_the_end_of_a_session_reaches_the_caller() -> None:
    runtime, _ = make_runtime()
    with runtime, runtime.open_session() as session:
        intake = Intake(session)
        intake.audio(0, 0, ramp(0), 0)
        session.close()
        with pytest.raises(errors.SessionClosed):
            intake.audio(1, FRAME, ramp(FRAME), FRAME_NS)


def test_a_rate_the_session_does_not_hear_is_refused() -> None:
    runtime, _ = make_runtime()
    with runtime, runtime.open_session() as session, pytest.raises(errors.InputValueError):
        Intake(session, sample_rate=48_000)


def test_arrivals_are_told_on_the_clock_that_ticks_run_by() -> None:
    before, now, after = time.monotonic_ns(), now_ns(), time.monotonic_ns()
    assert before <= now <= after


def test_stats_are_frozen_and_complete() -> None:
    intake, _ = make_intake(1)
    stats = intake.stats()
    assert stats == replace(stats) and stats.target_delay == 0.08
    with pytest.raises(AttributeError):
        stats.packets_lost = 1  # type: ignore[misc]
