"""The baseline of `bench interaction`, what sound and pictures tell, and what a take keeps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cue_media import made_footage, made_speech
from interaction_actor import Actor, LevelVocoder
from real_speech import real_speech

from bench.interaction_hear import first_sound, flash_frame, segments, tone_begin
from bench.interaction_run import held_out_episodes
from bench.interaction_score import figures
from bench.interaction_take import PERIOD_S, RATE, REST, WINDOW, Take
from bench.interaction_turns import SILENCE_S, play_turns, turns
from tml_runtime.demo.cue.stage import CUE_HZ, Episode, Stage
from tml_runtime.demo.cue.words import ID

MEDIA = made_speech(1), made_footage(1)
OPTIONS: dict[str, Any] = {"vocoder": LevelVocoder}


def episodes(*tasks: str, each: int = 2, ticks: int = 60) -> list[Episode]:
    return held_out_episodes(each, ticks, *MEDIA, tasks)


# Turn by turn


def test_turns_are_what_the_detector_hears_and_what_is_written() -> None:
    stage = Stage(40, np.random.default_rng(0), real_speech(), MEDIA[1])
    stage.read(2, "speak")
    stage.speak_up(10, 1.0)
    stage.tone(20, CUE_HZ)
    (found,) = turns([stage.finish("made", lose=0.0, sees=True)])
    assert [turn.text for turn in found] == [(ID["speak"],), ()]
    assert found[0].end_known == 2 * PERIOD_S
    assert (found[1].begin, found[1].end) == pytest.approx((2.0, 3.0), abs=0.2)
    assert 0.25 <= found[1].begin_known - found[1].begin < 0.5
    assert found[1].end_known - found[1].end == pytest.approx(SILENCE_S, abs=0.064)


def test_who_speaks_to_the_end_has_a_turn_and_a_silent_room_has_none() -> None:
    stage, silent = (Stage(24, np.random.default_rng(0), real_speech(), MEDIA[1]) for _ in "ab")
    stage.talk(8, 24)
    found, none = turns([made.finish("made", lose=0.0, sees=True) for made in (stage, silent)])
    assert none == []
    assert found[-1].end == pytest.approx(24 * PERIOD_S, abs=0.2)
    assert found[-1].end_known < (24 + REST) * PERIOD_S
    assert turns([]) == []


def test_turn_by_turn_a_request_is_answered_and_no_cue_is() -> None:
    made = episodes("speak", "count_flash", each=2)
    scale = [[ID["do"]]] * 300
    actor: Any = Actor([scale if episode.task == "speak" else [] for episode in made])
    takes = play_turns(actor, made, **OPTIONS)
    got = figures(takes, on_grid=False)
    assert got["takeover_rate"] == 1.0
    assert got["count_off_by_one"] < 1.0 and got["alert_hit"] == 0.0
    for take in takes:  # it never says two things at a time
        starts = [word.start for word in take.words]
        assert all(a < b for a, b in pairwise(starts))


# What is heard


def test_the_model_is_heard_where_it_is_loud() -> None:
    pcm = np.zeros(RATE, np.float32)
    pcm[4800:8000] = 0.1
    assert segments(np.zeros(0, np.float32), RATE) == []
    assert segments(pcm, RATE) == [(0.3, 0.5)]
    pcm[9600:12_800] = pcm[14_720:] = 0.1  # after 0.1 s, and after 0.12 s
    assert np.array(segments(pcm, RATE)) == pytest.approx(np.array([(0.3, 0.8), (0.92, 1.0)]))
    assert first_sound(pcm, RATE, 0.0, 1.0) == 0.3
    assert first_sound(pcm, RATE, 0.4, 1.0) == 0.4
    assert first_sound(pcm, RATE, 0.52, 0.58) is None


@pytest.mark.parametrize("begin_s", [0.0, 0.05, 0.11])
def test_the_begin_of_a_tone_is_found_beside_a_voice(begin_s: float) -> None:
    rng = np.random.default_rng(0)
    pcm = (0.05 * rng.standard_normal(WINDOW)).astype(np.float32)
    first = round(begin_s * RATE)
    pcm[first:] += 0.2 * np.sin(2 * np.pi * 1003 * np.arange(WINDOW - first) / RATE)
    assert tone_begin(pcm, RATE, CUE_HZ) == pytest.approx(begin_s, abs=0.0101)


def test_the_frame_of_a_flash() -> None:
    frames = np.zeros((2, 40, 40, 3), np.uint8)
    assert flash_frame(frames) == 0
    frames[1] = 240
    assert flash_frame(frames) == 1
    frames[0] = 240
    assert flash_frame(frames) == 0


def test_what_is_said_outside_an_episode_is_not_its() -> None:
    take = Take(episodes("cue", each=1, ticks=24)[0], 5.0)
    take.add_words(-0.2, [ID["do"]])
    take.add_words(take.duration_s, [ID["do"]])
    take.add_speech(-0.1, np.ones(WINDOW, np.float32))
    take.add_speech(take.duration_s - 0.1, np.ones(WINDOW, np.float32))
    assert take.words == []
    assert take.pcm_N[: WINDOW // 2].all() and not take.pcm_N[WINDOW // 2]
    assert take.pcm_N.sum() == WINDOW
