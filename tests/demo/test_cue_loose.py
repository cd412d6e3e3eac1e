"""Loose episodes: cues anywhere between two ticks, and packets that a line loses."""

from __future__ import annotations

import numpy as np
import pytest
from cue_media import made_footage, made_speech
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime.demo.cue import stage
from tml_runtime.demo.cue.lessons import LESSONS, draw_episodes
from tml_runtime.demo.cue.line import BURST, lose_packets, lost_packets
from tml_runtime.demo.cue.speech import Footage
from tml_runtime.demo.cue.stage import CUE_HZ, RATE, SIDE, WINDOW, Episode
from tml_runtime.demo.cue.tasks import TASKS, make_episode
from tml_runtime.demo.cue.words import ID

SPEECH, FOOTAGE = made_speech(), made_footage()


def make(task: str, seed: int, **changed: object) -> Episode:
    return make_episode(task, 80, seed, SPEECH, FOOTAGE, loose=True, **changed)  # type: ignore


@pytest.fixture
def no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "LOSSY", 0.0)


def amplitude(pcm: np.ndarray) -> float:
    """Of the cue tone in so many samples."""
    t = np.arange(len(pcm)) / RATE
    # the tone is within 1 % of its frequency: in 40 ms that turns by less than a half
    return float(2 * np.abs(np.exp(-2j * np.pi * CUE_HZ * t) @ pcm) / len(pcm))


@pytest.mark.usefixtures("no_loss")
def test_a_tone_may_begin_in_the_tick_before_and_is_heard_in_its_own() -> None:
    early, pieces = 0, 0
    for seed in range(8):
        episode = make("count_tone", seed, lose=0.0, talks=0.0, pace=1.0)
        sound = episode.pcm_T_W.reshape(80, 10, -1)  # of 20 ms
        for event in (event for event in episode.events if event.kind == "due"):
            in_tick = [amplitude(pcm) > 0.05 for pcm in sound[event.tick]]
            assert sum(in_tick) >= 2, (seed, event)
            early += amplitude(sound[event.tick - 1, -1]) > 0.05
            pieces += 1
    assert 0.1 < early / pieces < 0.6


@pytest.mark.usefixtures("no_loss")
def test_a_flash_across_two_ticks_is_that_of_the_first() -> None:
    across = 0
    for seed in range(12):
        episode = make("count_flash", seed, lose=0.0)
        white_T = (episode.frames_T_2_Y_Y_3.min(axis=(2, 3, 4)) >= 225).any(1)
        due_T = episode.said_T != 0
        assert (white_T[due_T]).all()
        late_T = white_T & ~due_T
        assert due_T[np.flatnonzero(late_T) - 1].all()
        across += late_T.sum()
    assert across > 0


@pytest.mark.usefixtures("no_loss")
def test_noises_lie_over_two_ticks_and_interruptions_begin_late() -> None:
    over_two = late = 0
    for seed in range(12):
        episode = make("speak", seed, lose=0.0)
        energy = np.square(episode.pcm_T_W).reshape(80, 10, -1).mean(-1)
        heard = energy > 3 * np.median(energy)
        for event in episode.events:
            if event.kind == "backchannel":
                here, after = heard[event.tick], heard[event.tick + 1]
                assert here.any() or after.any()
                assert here.sum() + after.sum() <= 11  # in 20 ms, begun ones too
                over_two += here.any() and after.any()
                three = episode.said_T[event.tick : event.tick + 3]
                assert (three != ID["<yield>"]).all() and (three != 0).all()
            elif event.kind == "interruption":
                late += not heard[event.tick, :4].any()
                assert heard[event.tick + 1].sum() >= 5
                assert episode.said_T[event.tick + 1] == ID["<yield>"]
    assert over_two > 3 and late > 1


@pytest.mark.usefixtures("no_loss")
def test_ticks_in_which_something_is_due_may_be_lost_and_those_of_cues_may_not() -> None:
    lost_due = 0
    for seed in range(10):
        episode = make("wait_flash", seed, lose=0.3, talks=0.0)
        white_T = (episode.frames_T_2_Y_Y_3.min(axis=(2, 3, 4)) >= 225).any(1)
        assert episode.seen_T[white_T].all()
        lost_due += (episode.missing_T & (episode.said_T != 0)).sum()
    assert lost_due > 3


def test_packets_are_lost_of_ticks_with_cues_too_and_concealed() -> None:
    flagged = 0
    for seed in range(10):
        episode = make("count_tone", seed, lose=0.0, talks=0.0)
        due_T = episode.said_T != 0
        flagged += (episode.missing_T & due_T).sum()
        loud = np.abs(episode.pcm_T_W).max(1)
        assert (loud[due_T] > 0.05).mean() > 0.9
    assert flagged > 3


def test_the_same_seed_loses_the_same() -> None:
    for task in TASKS:
        first, again = make(task, 3), make(task, 3)
        for name in ("pcm_T_W", "frames_T_2_Y_Y_3", "seen_T", "missing_T", "said_T"):
            np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


@given(share=st.floats(0, 0.3), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_packets_are_lost_in_bursts(share: float, seed: int) -> None:
    count = 30_000
    lost_J = lost_packets(count, share, np.random.default_rng(seed))
    assert lost_J.shape == (count,)
    bursts = np.count_nonzero(lost_J[1:] & ~lost_J[:-1]) + int(lost_J[0])
    # of so many packets; five standard deviations of a sum of bursts
    spread = 5 * np.sqrt(count * share * 2 * BURST)
    assert abs(lost_J.sum() - share * count) <= spread + BURST
    if bursts > 300:
        assert lost_J.sum() / bursts == pytest.approx(BURST, rel=0.3)


def test_no_packets_are_none() -> None:
    assert len(lost_packets(0, 0.5, np.random.default_rng(0))) == 0


def test_what_is_lost_is_what_a_session_lacks() -> None:
    rng = np.random.default_rng(5)
    pcm_T_W = rng.standard_normal((6, WINDOW)).astype(np.float32)
    lost_J = np.zeros(60, bool)
    lost_J[[0, 25, 26, 39, 40]] = True
    lost_J[50:] = True
    heard = pcm_T_W.copy()
    missing_T = lose_packets(heard, lost_J, RATE)
    assert missing_T.tolist() == [True, False, True, True, True, True]
    came = ~np.repeat(lost_J, 320)
    np.testing.assert_array_equal(heard.reshape(-1)[came], pcm_T_W.reshape(-1)[came])
    filled = heard.reshape(60, 320)[lost_J]
    assert np.abs(filled[1:4]).max(axis=1).min() > 0.1  # mirrored from beside
    assert not filled[-4:].any()  # faded away
    assert not np.array_equal(heard, pcm_T_W)


def test_lessons_say_how_many_episodes_are_loose(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bool] = []

    def note(*_: object, loose: bool, **__: object) -> None:
        drawn.append(loose)

    monkeypatch.setattr("tml_runtime.demo.cue.lessons.make_episode", note)
    losses = dict.fromkeys(TASKS, 1.0)
    for lesson in LESSONS:
        drawn.clear()
        for step in range(400):
            draw_episodes((0, step, 0), lesson, losses, SPEECH, Footage({}, SIDE))
        assert np.mean(drawn) == pytest.approx(lesson.loose, abs=0.06)
    assert [lesson.loose for lesson in LESSONS][:3] == [0, 0, 0]
    assert all(lesson.loose > 0 for lesson in LESSONS[3:])
