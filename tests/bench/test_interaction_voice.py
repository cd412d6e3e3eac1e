"""Where Silero's network hears people, and when one who listens live knows of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from real_speech import real_speech

from bench import interaction_voice
from bench.interaction_voice import FRAME, RATE, SPEECH_S, Heard, listen, probabilities, speech
from tml_runtime.demo import media

FRAME_S = FRAME / RATE
PAD_S = 0.03  # Silero's own, on either side


@pytest.fixture(scope="module")
def talk() -> np.ndarray:
    return real_speech().recordings["sample.wav"]


def test_people_are_heard_where_they_talk(talk: np.ndarray) -> None:
    truth_C, heard_C = np.zeros(3000, bool), np.zeros(3000, bool)  # of 10 ms
    for line in media.media_path("sample.rttm").read_text().splitlines():
        begin, length = map(float, line.split()[3:5])
        truth_C[round(100 * begin) : round(100 * (begin + length))] = True
    (spans,) = speech([talk])
    for begin, end in spans:
        heard_C[round(100 * begin) : round(100 * end)] = True
    assert 0.7 < truth_C.mean() < 0.8  # it begins with silence
    assert np.mean(heard_C == truth_C) > 0.95


def test_silence_noise_and_tones_are_no_speech() -> None:
    t = np.arange(3 * RATE) / RATE
    tone = (0.3 * np.sin(2 * np.pi * 1000 * t)).astype(np.float32)
    noise = (0.01 * np.random.default_rng(0).standard_normal(len(t))).astype(np.float32)
    sounds = [np.zeros_like(tone), noise, tone, tone[:0], tone[: FRAME // 2]]
    assert speech(sounds) == [[]] * len(sounds)
    assert [len(row_F) for row_F in probabilities(sounds)] == [94, 94, 94, 0, 1]
    assert speech([]) == []


def test_a_recording_is_heard_beside_others_as_alone_and_as_the_package_hears_it(
    talk: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interaction_voice, "BATCH", 2)
    parts = [talk[: 12 * RATE], talk[10 * RATE :], talk[7 * RATE : 9 * RATE + 100]]
    network, package = interaction_voice._network(), interaction_voice._package()
    for part, spans, row_F in zip(parts, speech(parts), probabilities(parts), strict=True):
        alone = package.get_speech_timestamps(torch.from_numpy(part), network)
        assert spans == [(span["start"] / RATE, span["end"] / RATE) for span in alone]
        np.testing.assert_allclose(row_F, probabilities([part])[0], atol=1e-5)


def test_a_stream_is_heard_as_the_package_hears_it_frame_by_frame(talk: np.ndarray) -> None:
    part = np.concatenate([talk[5 * RATE : 19 * RATE], np.zeros(RATE, np.float32)])
    stream = interaction_voice._package().VADIterator(
        interaction_voice._network(), min_silence_duration_ms=100
    )
    events: list[dict[str, int]] = []
    for number in range(len(part) // FRAME):
        event = stream(torch.from_numpy(part[number * FRAME : (number + 1) * FRAME]))
        events += [{**event, "known": (number + 1) * FRAME}] if event else []
    heard = listen(probabilities([part])[0], 0.1)
    assert len(heard) > 1 and all(h.end - h.begin > SPEECH_S for h in heard)
    assert events == [
        event
        for begin, end, _, known in heard
        for event in (
            {"start": round(begin * RATE), "known": round((begin + PAD_S) * RATE) + FRAME},
            {"end": round(end * RATE), "known": round(known * RATE)},
        )
    ]


def frames(*runs: tuple[int, float]) -> np.ndarray:
    parts = [np.full(count, value, np.float32) for count, value in runs]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def test_when_a_turn_is_known() -> None:
    (heard,) = listen(frames((10, 0.1), (20, 0.9), (30, 0.1)), 0.55)
    assert heard == pytest.approx(
        Heard(
            begin=10 * FRAME_S - PAD_S,
            end=30 * FRAME_S + PAD_S,
            begin_known=18 * FRAME_S,  # 8 frames are the first that last SPEECH_S
            end_known=(31 + 18) * FRAME_S,  # 18 frames are the first that last 0.55 s
        )
    )


def test_what_lasts_less_than_a_quarter_of_a_second_is_none() -> None:
    assert 7 * FRAME_S < SPEECH_S < 8 * FRAME_S
    assert listen(frames((5, 0.0), (7, 0.9), (30, 0.0)), 0.55) == []
    assert len(listen(frames((5, 0.0), (8, 0.9), (30, 0.0)), 0.55)) == 1


def test_a_short_pause_is_part_of_a_turn_and_tells_nothing() -> None:
    (heard,) = listen(frames((4, 0.9), (6, 0.1), (3, 0.9), (30, 0.1)), 0.55)
    assert heard.begin_known == pytest.approx(11 * FRAME_S)  # not while it is silent
    assert heard.end == pytest.approx(13 * FRAME_S + PAD_S)
    (doubtful,) = listen(frames((4, 0.9), (20, 0.4), (4, 0.9), (30, 0.1)), 0.55)
    assert doubtful.begin_known == pytest.approx(8 * FRAME_S)  # 0.4 is no silence


def test_two_turns_and_one_that_does_not_end() -> None:
    both = listen(frames((9, 0.9), (30, 0.1), (9, 0.9), (30, 0.1)), 0.55)
    assert [round(heard.begin / FRAME_S) for heard in both] == [0, 38]
    assert listen(frames((9, 0.9), (5, 0.1)), 0.55) == []
    assert listen(frames(), 0.55) == []


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    interaction_voice._package.cache_clear()
    interaction_voice._package()
    assert torch.get_num_threads() == before
