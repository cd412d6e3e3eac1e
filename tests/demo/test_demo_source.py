"""Live sources: what is handed in, when, and what happens to what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tml_runtime.demo.client import Answers, printable
from tml_runtime.demo.decode import Clip
from tml_runtime.demo.live import meter
from tml_runtime.demo.source import Feeder, LiveSource, Media
from tml_runtime.demo.timeline import Timeline, _draw_ticks, tick_bars
from tml_runtime.errors import InputBackpressure, LateInput, SessionFault
from tml_runtime.metrics import RECORD
from tml_runtime.perfetto import stage_spans
from tml_runtime.session import SpeechOut


class FakeSession:
    """Notes what is pushed; raises what it is told to."""

    def __init__(self) -> None:
        self.audio: list[tuple[float, np.ndarray]] = []
        self.video: list[tuple[float, int]] = []
        self.texts: list[str] = []
        self.error: Exception | None = None
        self.media_time = 0.0

    def push_audio(self, pcm: np.ndarray, t: float) -> None:
        if self.error is not None:
            raise self.error
        self.audio.append((t, pcm))

    def push_video(self, frame: np.ndarray, t: float) -> None:
        self.video.append((t, int(frame[0, 0, 0])))

    def push_text(self, text: str) -> None:
        self.texts.append(text)


def make(fps: float | None = 10.0, start_s: float = 0.0) -> tuple[LiveSource, FakeSession]:
    """1 s of a ramp to hear; 4 frames, numbered, to see."""
    numbers = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    clip = None if fps is None else Clip(np.tile(numbers, (1, 40, 40, 3)), fps)
    media = Media(np.arange(16_000, dtype=np.float32) / 16_000, clip)
    session = FakeSession()
    return LiveSource(media, session, start_s=start_s), session  # type: ignore[arg-type]


@pytest.mark.parametrize("steps_ms", [[200, 400], [400], [20] + [37] * 9 + [400]], ids=str)
def test_all_that_is_due_is_handed_in_once_and_in_order(steps_ms: list[int]) -> None:
    source, session = make()
    at = 0
    for step in steps_ms:
        at = step if step in (200, 400) else at + step
        source.deliver(min(at, 400) * 1_000_000)
    assert [round(t * 1000) for t, _ in session.audio] == list(range(0, 400, 20))
    heard = np.concatenate([pcm for _, pcm in session.audio])
    np.testing.assert_array_equal(heard, np.arange(6400, dtype=np.float32) / 16_000)
    assert session.video == [(0.0, 0), (0.1, 1), (0.2, 2), (0.3, 3)]  # not the one at 0.4


@pytest.mark.parametrize(
    ("start_s", "read"),
    [
        (0.0, [(0.1, "a"), (0.5, "b"), (1.1, "a"), (1.5, "b")]),
        (0.25, [(0.25, "b"), (0.85, "a"), (1.25, "b")]),
    ],
)
def test_texts_are_typed_when_they_are_due_and_again_in_the_next_turn(
    start_s: float, read: list[tuple[float, str]]
) -> None:
    session = FakeSession()
    media = Media(np.zeros(16_000, np.float32), None, ((0.1, "a"), (0.5, "b")))
    source = LiveSource(media, session, start_s=start_s)  # type: ignore[arg-type]
    for t, text in read:
        source.deliver(round(t * 1e9))
        before = list(session.texts)
        source.deliver(round(t * 1e9) + 1)
        assert session.texts == [*before, text]
    assert [event.stamp_ns for event in source.events if event.kind == "text"] == [
        round(t * 1e9) for t, _ in read
    ]


def test_sound_is_due_when_it_has_been_heard_and_a_frame_when_it_is_taken() -> None:
    source, session = make()
    source.deliver(19_999_999)
    assert (len(session.audio), len(session.video)) == (0, 1)
    assert source.next_due_ns == 20_000_000
    source.deliver(20_000_000)
    assert (len(session.audio), len(session.video)) == (1, 1)


def test_recordings_are_looped_from_their_start() -> None:
    source, session = make(start_s=0.9)
    source.deliver(1_300_000_000)
    heard = np.concatenate([pcm for _, pcm in session.audio])
    ramp = np.arange(16_000, dtype=np.float32) / 16_000
    np.testing.assert_array_equal(heard, np.concatenate([ramp[14_400:], ramp, ramp[:3200]]))
    assert [number for _, number in session.video[:5]] == [1, 2, 3, 0, 1]  # 9 % 4 first


@pytest.mark.parametrize(
    ("error", "refused", "late"),
    [(InputBackpressure("full"), 2, 0), (LateInput("late", t=0.0, open_t=0.2), 0, 2)],
    ids=["full", "late"],
)
def test_what_is_refused_is_counted_and_gone(error: Exception, refused: int, late: int) -> None:
    source, session = make(fps=None)
    session.error = error
    source.deliver(40_000_000)
    session.error = None
    source.deliver(60_000_000)
    assert (source.refused, source.late) == (refused, late)
    assert [round(t * 1000) for t, _ in session.audio] == [40]
    assert [event.stamp_ns for event in source.events] == [40_000_000]


def test_a_session_that_is_over_ends_its_source() -> None:
    source, session = make()
    session.error = SessionFault("not finite", t=0.0)
    source.deliver(400_000_000)
    assert source.ended == "not finite"
    session.error = None
    source.deliver(800_000_000)
    assert session.audio == []


def test_feeder_plays_by_the_sessions_clock_and_stops() -> None:
    source, session = make()
    session.media_time = 0.34  # and 60 ms ahead of it
    feeder = Feeder([(source, session)])  # type: ignore[list-item]
    feeder.start()
    for _ in range(1000):
        if source.num_pieces >= 20:
            break
        feeder._stop.wait(0.005)
    feeder.stop()
    assert feeder.error is None
    assert len(session.audio) == 20
    session.media_time = 1.0
    assert len(session.audio) == 20


def test_feeder_does_not_hurry_for_a_session_that_is_over() -> None:
    (over, its_session), (live, session) = make(), make()
    its_session.error = SessionFault("not finite", t=0.0)
    feeder = Feeder([(over, its_session), (live, session)])  # type: ignore[list-item]
    for now_s, rest_s in ((0.0, 0.001), (1.0, 0.02), (1.013, 0.007)):
        its_session.media_time = session.media_time = now_s
        assert feeder._deliver_all() == pytest.approx(rest_s)


def test_feeder_keeps_what_ended_it() -> None:
    source, session = make()
    session.error = ZeroDivisionError("unexpected")
    session.media_time = 1.0
    feeder = Feeder([(source, session)])  # type: ignore[list-item]
    feeder.start()
    feeder._thread.join(10)
    assert isinstance(feeder.error, ZeroDivisionError)
    feeder.stop()


def test_answers_are_placed_at_their_media_times() -> None:
    ones = np.ones(3200, np.float32)
    answers = Answers(speech=[SpeechOut(ones, 0.2, 16_000), SpeechOut(2 * ones, 0.6, 16_000)])
    pcm = answers.pcm(0.7)  # the last piece is cut off; a tick between them was lost
    assert pcm.shape == (11_200,)
    steps = [(0, 3200, 0.0), (3200, 6400, 1.0), (6400, 9600, 0.0), (9600, 11_200, 2.0)]
    for start, stop, value in steps:
        assert (pcm[start:stop] == value).all()
    assert not answers.pcm(0.1).any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain é", "plain é"), ("\x1b[31m\n", "·[31m·"), ("\ufffd\u05d0漢", "···"), ("", "")],
)
def test_text_cannot_harm_a_terminal(text: str, expected: str) -> None:
    assert printable(text) == expected


@pytest.mark.parametrize(
    ("rms", "filled"), [(0.0, 0), (10**-3, 0), (10 ** (-35 / 20), 4), (10**-0.5, 8), (2.0, 8)]
)
def test_meter(rms: float, filled: int) -> None:
    assert meter(rms, 8) == "█" * filled + "·" * (8 - filled)


def records(count: int) -> np.ndarray:
    made = np.zeros(count, RECORD)
    made["tick"] = np.arange(count)
    made["scheduled_ns"] = (made["tick"] + 1) * 200_000_000
    made["woke_ns"] = made["scheduled_ns"] + 1_000_000
    made["busy_ns"] = 10_000_000
    made["stage_ns"][:, :3] = (2_000_000, 6_000_000, 5_000_000)
    return made


STAGES = ("take", "model", "model.steps")


def test_stages_follow_one_another_and_parts_lie_within() -> None:
    (record,) = records(1)
    woke = int(record["woke_ns"])
    assert list(stage_spans(record, STAGES, woke)) == [
        ("take", woke, 2_000_000),
        ("model", woke + 2_000_000, 6_000_000),
        ("model.steps", woke + 2_000_000, 5_000_000),
    ]


def test_bars_add_up_to_the_tick() -> None:
    t_s, parts_ms, missed = tick_bars(records(3), STAGES, 200)
    np.testing.assert_allclose(t_s, [0.2, 0.4, 0.6])
    assert {name: ms[0] for name, ms in parts_ms.items()} == {
        "wake": 1.0, "take": 2.0, "steps": 5.0, "other": 3.0
    }  # fmt: skip
    assert not missed.any()


@pytest.mark.parametrize(
    "stages",
    [
        (),  # ended in the first tick
        ("take", "publish"),
        ("take", "model", *(f"model.{part}" for part in "abcd"), "publish"),  # as many as there are
    ],
    ids=len,
)
def test_bars_are_drawn_as_tall_as_their_ticks(stages: tuple[str, ...]) -> None:
    nothing, made = np.zeros(0, np.float32), records(3)
    timeline = Timeline(
        "", "", 0.8, 200, nothing, None, 0.0, nothing, Answers(), made, stages, True
    )  # fmt: skip
    axis = Figure().subplots()
    _draw_ticks(axis, timeline)
    bars = [bar for bar in axis.patches if isinstance(bar, Rectangle)]
    tops = [bar.get_y() + bar.get_height() for bar in bars]
    assert max(tops) == pytest.approx(11.0)  # 1 ms late, 10 ms busy


def test_a_bar_of_many_ticks_shows_the_slowest_and_any_miss() -> None:
    made = records(4000)
    made["busy_ns"][1234] = 150_000_000
    made["skipped"][3210] = 1
    t_s, parts_ms, missed = tick_bars(made, STAGES, 200)
    total_ms = np.sum(list(parts_ms.values()), axis=0)
    assert len(t_s) == 400
    assert total_ms.max() == pytest.approx(151.0)
    assert t_s[total_ms.argmax()] == pytest.approx(1235 * 0.2)
    assert missed.tolist().count(True) == 1


def test_no_ticks_no_bars() -> None:
    t_s, parts_ms, missed = tick_bars(records(0), STAGES, 200)
    assert len(t_s) == len(missed) == 0
    assert all(len(ms) == 0 for ms in parts_ms.values())


def test_nothing_played_yet_has_a_level_of_zero() -> None:
    source, _ = make()
    assert meter(source.level, 4) == "····"
    source.deliver(900_000_000)
    assert source.level > 0.5  # the ramp's end
