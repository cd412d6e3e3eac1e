"""Refused input: the right error, the value named, and a session that does not know it happened."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fake_model import CONFIG, FakeModel, make_runtime

from tml_runtime import Session, errors
from tml_runtime.mailbox import MAX_QUEUED

N = CONFIG.layout.samples_per_tick
PCM = np.linspace(-0.5, 0.5, 320, dtype=np.float32)
FRAME = np.full((80, 120, 3), 7, np.uint8)


def with_sample(value: float) -> np.ndarray:
    pcm = PCM.copy()
    pcm[17] = value
    return pcm


# What it is caught as: our own error, and the builtin one.
TYPE = (errors.InputTypeError, TypeError)
VALUE = (errors.InputValueError, ValueError)
LATE = (errors.LateInput, ValueError)
FULL = (errors.InputBackpressure, BufferError)

Push = Callable[[Session], object]
AUDIO: list[tuple[Push, tuple[type, type], str]] = [
    (lambda s: s.push_audio(PCM, 0.4, sample_rate=8000), VALUE, "8000"),
    (lambda s: s.push_audio([0.0], 0.4), TYPE, "list"),
    (lambda s: s.push_audio(PCM.astype(np.float64), 0.4), TYPE, "float64"),
    (lambda s: s.push_audio(PCM > 0, 0.4), TYPE, "bool"),
    (lambda s: s.push_audio(PCM[:, None], 0.4), VALUE, r"\(320, 1\)"),
    (lambda s: s.push_audio(PCM[0], 0.4), TYPE, "float32"),
    (lambda s: s.push_audio(with_sample(np.nan), 0.4), VALUE, "17 .*nan"),
    (lambda s: s.push_audio(with_sample(-np.inf), 0.4), VALUE, "-inf"),
    (lambda s: s.push_audio(PCM, None), TYPE, "None"),
    (lambda s: s.push_audio(PCM, True), TYPE, "True"),
    (lambda s: s.push_audio(PCM, np.nan), VALUE, "nan"),
    (lambda s: s.push_audio(PCM, np.inf), VALUE, "inf"),
    (lambda s: s.push_audio(PCM, -0.1), LATE, "-0.1 lies before 0.4"),
    (lambda s: s.push_audio(PCM, 0.3999), LATE, "0.3999"),
    (lambda s: s.push_audio(PCM[:0], 0.3), LATE, "0.3"),
    (lambda s: s.push_audio(PCM, 3.6), FULL, "beyond 3.6"),
    (lambda s: s.push_audio(PCM, 3.59), FULL, "beyond 3.6"),
    (lambda s: s.push_audio(PCM, 1e300), FULL, "1e[+]300"),
    (lambda s: s.push_audio(PCM, 1e305), FULL, "1e[+]305"),  # infinitely many samples
    (lambda s: s.push_audio(PCM, 10**400), VALUE, "inf"),
]
VIDEO: list[tuple[Push, tuple[type, type], str]] = [
    (lambda s: s.push_video(FRAME.tolist(), 0.4), TYPE, "list"),
    (lambda s: s.push_video(FRAME / 255, 0.4), TYPE, "float64"),
    (lambda s: s.push_video(FRAME[:, :, 0], 0.4), VALUE, r"\(80, 120\)"),
    (lambda s: s.push_video(np.zeros((80, 80, 4), np.uint8), 0.4), VALUE, "4"),
    (lambda s: s.push_video(FRAME[:79], 0.4), VALUE, "height 79"),
    (lambda s: s.push_video(FRAME[:, :50], 0.4), VALUE, "width 50"),
    (lambda s: s.push_video(FRAME[:0], 0.4), VALUE, "height 0"),
    (
        lambda s: s.push_video(np.zeros((680, 640, 3), np.uint8), 0.4),
        VALUE,
        "680x640 is 272 tokens and a tick takes 256",
    ),
    (lambda s: s.push_video(FRAME, "0.4"), TYPE, "'0.4'"),
    (lambda s: s.push_video(FRAME, np.nan), VALUE, "nan"),
    (lambda s: s.push_video(FRAME, 0.399), LATE, "0.399"),
    (lambda s: s.push_video(FRAME, 3.6), FULL, "3.6"),
    (lambda s: s.push_video(FRAME, 1e300), FULL, "1e[+]300"),  # infinitely many ns
    (lambda s: s.push_video(FRAME, -1e300), LATE, "-1e[+]300"),
]
TEXT: list[tuple[Push, tuple[type, type], str]] = [
    (lambda s: s.push_text(b"bytes"), TYPE, "bytes"),
    (lambda s: s.push_text(5), TYPE, "5"),
    (lambda s: s.push_text([1.5]), TYPE, "1.5"),
    (lambda s: s.push_text(["a"]), TYPE, "'a'"),
    (lambda s: s.push_text([3, -1]), VALUE, "-1"),
    (lambda s: s.push_text([260]), VALUE, "260 is not in 0..259"),
    (lambda s: s.push_text(np.array([3, 260, -1])), VALUE, "260 is not in 0..259"),
    (lambda s: s.push_text(np.array([3.0])), TYPE, "3"),
    (lambda s: s.push_text(np.array([[3]])), TYPE, "3"),
    (lambda s: s.encode_text("x" * 4097), VALUE, "4097"),
    (lambda s: s.push_text("x" * 4097), VALUE, "4097"),
]


@pytest.mark.parametrize(("push", "kinds", "words"), AUDIO + VIDEO + TEXT)
def test_bad_input_leaves_the_session_as_it_was(
    push: Push, kinds: tuple[type, type], words: str
) -> None:
    def run(with_bad: bool) -> tuple[FakeModel, bytes]:
        runtime, model = make_runtime()
        with runtime, runtime.open_session() as session:
            session.push_audio(np.tile(PCM, 20), 0.1)
            runtime.run_ticks(2)
            session.push_audio(PCM, 0.45)
            session.push_video(FRAME, 0.5)
            session.push_text("hello")
            if with_bad:
                with pytest.raises(errors.TmlRuntimeError, match=words) as caught:
                    push(session)
                assert all(isinstance(caught.value, kind) for kind in kinds)
            runtime.run_ticks(17)  # so far that everything that might lie ahead comes up
            stats = repr(session.stats).encode()
            return model, stats + b"".join(o.pcm.tobytes() for o in session.poll())

    (model, heard), (other, other_heard) = run(True), run(False)
    assert heard == other_heard
    assert repr(model.heard) == repr(other.heard)
    for rows, other_rows in zip(model.heard, other.heard, strict=True):
        np.testing.assert_array_equal(rows[0].pcm, other_rows[0].pcm)


def test_late_input_says_from_where_on_it_is_in_time() -> None:
    runtime, model = make_runtime()
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(3)
        with pytest.raises(errors.LateInput) as caught:
            session.push_audio(np.ones(N, np.float32), 0.5)
        assert caught.value.open_t == session.open_t == 0.6
        late = round((caught.value.open_t - caught.value.t) * 16_000)
        session.push_audio(np.ones(N, np.float32)[late:], caught.value.open_t)
        runtime.run_ticks(1)
    heard = model.heard[3][0].pcm
    assert (heard == 1.0).sum() == N // 2 and (heard[: N // 2] == 1.0).all()


def test_the_whole_lead_may_be_filled_and_no_more() -> None:
    runtime, model = make_runtime(max_lead_ticks=5)
    pcm = np.arange(5 * N, dtype=np.float32) + 1
    with runtime, runtime.open_session() as session:
        for _ in range(2):  # a second time: the same windows' rows are used again
            t = session.open_t
            with pytest.raises(errors.InputBackpressure):
                session.push_audio(np.ones(5 * N + 1, np.float32), t)
            session.push_audio(pcm, t)
            runtime.run_ticks(5)
    heard = np.concatenate([rows[0].pcm for rows in model.heard])
    np.testing.assert_array_equal(heard, np.tile(pcm, 2))


def test_full_queues_refuse_and_lose_nothing() -> None:
    runtime, model = make_runtime()
    with runtime, runtime.open_session() as session:
        for i in range(MAX_QUEUED):
            session.push_audio(np.full(1, 0.5, np.float32), i / 16_000)
        with pytest.raises(errors.InputBackpressure, match="audio queue is full"):
            session.push_audio(np.full(1, 0.5, np.float32), MAX_QUEUED / 16_000)
        big = np.full((480, 640, 3), 9, np.uint8)
        with pytest.raises(errors.InputBackpressure, match="video queue is full"):
            for i in range(100):
                session.push_video(big, 0.001 * i)
        assert i >= 6
        with pytest.raises(errors.InputBackpressure, match="text queue is full"):
            for _ in range(100):
                session.push_text([65] * 1000)
        session.push_audio(PCM[:0], 0.0)  # no samples need no room
        runtime.run_ticks(1)
        session.push_audio(np.full(1, 0.5, np.float32), 0.2)
        session.push_video(big, 0.2)
        runtime.run_ticks(1)
    assert (model.heard[0][0].pcm[:MAX_QUEUED] == 0.5).all()
    assert model.heard[1][0].pcm[0] == 0.5
    assert model.heard[1][0].frames is not None


def test_a_text_as_long_as_the_queue_is_taken() -> None:
    runtime, model = make_runtime()
    with runtime, runtime.open_session() as session:
        session.push_text("x" * 4096)
        runtime.run_ticks(4096 // 63 + 1)
    assert sum(len(rows[0].text) for rows in model.heard) == 4096


def test_a_flood_of_text_is_refused_not_stored() -> None:
    runtime, model = make_runtime()
    accepted = 0
    with runtime, runtime.open_session() as session:
        for _ in range(50):
            try:
                while True:
                    session.push_text([65] * 100)
                    accepted += 100
            except errors.InputBackpressure:
                runtime.run_ticks(1)
    taken = sum(len(rows[0].text) for rows in model.heard)
    assert taken == 50 * 63
    assert accepted - taken < 20_000


def test_a_closed_session_takes_and_gives_nothing() -> None:
    runtime, model = make_runtime()
    with runtime, runtime.open_session() as session:
        session.close()
        session.close()
        for call in (
            lambda: session.push_audio(PCM, 0.0),
            lambda: session.push_video(FRAME, 0.0),
            lambda: session.push_text("x"),
            lambda: session.delegate("x"),
            lambda: session.interrupt(0.0),
            session.pause,
            session.resume,
            session.poll,
        ):
            with pytest.raises(errors.SessionClosed, match="closed"):
                call()
        runtime.run_ticks(1)
    assert model.heard == []


def test_a_stopped_runtime_takes_nothing_but_gives_what_is_there() -> None:
    runtime, _ = make_runtime()
    with runtime:
        session = runtime.open_session()
        session.push_audio(PCM, 0.0)
        runtime.run_ticks(2)
    with pytest.raises(errors.NotRunning, match="stopped"):
        session.push_audio(PCM, 0.4)
    with pytest.raises(errors.NotRunning, match="stopped"):
        runtime.open_session()
    with pytest.raises(errors.NotRunning, match="stopped"):
        runtime.run_ticks(1)
    assert len(session.poll()) == 2
    assert session.poll() == []
    runtime.stop()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": -1.0}, errors.InputValueError, "temperature=-1.0"),
        ({"temperature": float("nan")}, errors.InputValueError, "temperature=nan"),
        ({"temperature": "1"}, errors.InputTypeError, "temperature='1'"),
        ({"temperature": 1e39}, errors.InputValueError, "temperature=1e[+]39"),
        ({"temperature": 10**5000}, errors.InputValueError, "temperature=.above 1e300"),
        ({"priority": 2**31}, errors.InputValueError, "priority=2147483648"),
        ({"top_k": 1.0}, errors.InputTypeError, "top_k=1.0"),
        ({"top_k": -1}, errors.InputValueError, "top_k=-1"),
        ({"top_p": 0.0}, errors.InputValueError, "top_p=0.0"),
        ({"min_p": 1.5}, errors.InputValueError, "min_p=1.5"),
        ({"min_p": "0"}, errors.InputTypeError, "min_p='0'"),
        ({"seed": 2**63}, errors.InputValueError, "64 bits"),
        ({"seed": True}, errors.InputTypeError, "seed=True"),
    ],
)
def test_bad_session_options_take_no_slot(options: dict, error: type, words: str) -> None:
    runtime, _ = make_runtime()
    with runtime:
        with pytest.raises(error, match=words):
            runtime.open_session(**options)
        runtime.open_session()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_slots": 0}, errors.InputValueError, "num_slots=0"),
        ({"num_slots": 2.0}, errors.InputTypeError, "num_slots=2.0"),
        ({"seed": -1}, errors.InputValueError, "seed=-1"),
        ({"max_frame_pairs": 0}, errors.InputValueError, "max_frame_pairs=0"),
        ({"output_queue_ticks": -3}, errors.InputValueError, "output_queue_ticks=-3"),
        ({"layout": type(CONFIG.layout).preset("ms80")}, errors.InputValueError, "period_ms=80"),
        ({"layout": "ms80"}, errors.InputTypeError, "layout='ms80': expected a TurnLayout"),
        ({"budget": 1000}, errors.InputTypeError, "budget=1000: expected a KvBudget"),
        ({"handoff": "silent"}, errors.InputTypeError, "handoff='silent': expected a HandoffOpt"),
    ],
)
def test_bad_runtime_options(options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        make_runtime(**options)
