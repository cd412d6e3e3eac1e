"""Episodes of the `cue` model: the same for a seed, and due is what the instruction says."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cue_media import made_footage, made_speech
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_kernels.ops.dmel.reference import log_mel_ref
from tml_runtime.demo.cue.speech import Footage
from tml_runtime.demo.cue.stage import ASK_HZ, CUE_HZ, SIDE, WINDOW, Episode
from tml_runtime.demo.cue.tasks import MAX_COUNT, TASKS, make_episode
from tml_runtime.demo.cue.voices import made_voices
from tml_runtime.demo.cue.words import (
    CONFIG,
    ID,
    NUMBERS,
    SCALE,
    SILENT_LEVEL,
    SPOKEN,
    WORDS,
    WordTokenizer,
    voice_V_K_B,
)  # fmt: skip

SPEECH, FOOTAGE = made_speech(), made_footage()


def make(task: str, num_ticks: int, seed: int, **changed: object) -> Episode:
    return make_episode(task, num_ticks, seed, SPEECH, FOOTAGE, **changed)  # type: ignore


def said(episode: Episode) -> list[tuple[int, str]]:
    return [(tick, WORDS[word]) for tick, word in enumerate(episode.said_T) if word]


def read(episode: Episode) -> list[tuple[int, list[str]]]:
    return [(tick, [WORDS[i] for i in ids]) for tick, ids in enumerate(episode.text) if ids]


def loudness(episode: Episode, tick: int, hz: float) -> float:
    """The largest amplitude within 2 % of that frequency, in any 50 ms of a tick."""
    pieces = episode.pcm_T_W[tick].reshape(4, -1)
    spectrum = np.abs(np.fft.rfft(pieces, 16_000)) * 2 / pieces.shape[1]
    return float(spectrum[:, round(hz * 0.98) : round(hz * 1.02)].max())


@pytest.mark.parametrize("task", TASKS)
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**32), num_ticks=st.integers(24, 90))
def test_a_seed_gives_the_same_episode_whatever_was_made_before(
    task: str, seed: int, num_ticks: int
) -> None:
    first = make(task, num_ticks, seed)
    make(task, 24, seed + 1)
    again = make(task, num_ticks, seed)
    for name in ("pcm_T_W", "frames_T_2_Y_Y_3", "seen_T", "missing_T", "said_T", "speech_T"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.text, first.events) == (again.text, again.events)
    assert len(first) == len(first.pcm_T_W) == len(first.text) == num_ticks
    assert first.pcm_T_W.dtype == np.float32 and np.abs(first.pcm_T_W).max() <= 1.0
    assert first.frames_T_2_Y_Y_3.shape == (num_ticks, 2, SIDE, SIDE, 3)
    assert not first.pcm_T_W[first.missing_T].any()
    assert not (first.missing_T & (first.said_T != 0)).any()
    assert all(0 <= event.tick < num_ticks for event in first.events)


@pytest.mark.parametrize(("what", "seed"), [(w, s) for w in ("tone", "flash") for s in range(4)])
def test_now_is_due_exactly_so_many_ticks_after_each_cue(what: str, seed: int) -> None:
    episode = make(f"wait_{what}", 80, seed, lose=0.0)
    ((begin, (_, name, number)),) = read(episode)
    assert name == what
    delay = NUMBERS.index(number)
    due = [tick for tick, word in said(episode) if word == "now"]
    assert due and min(due) > begin + delay
    for tick in range(begin + 1, 80 - delay):
        frames = episode.frames_T_2_Y_Y_3[tick].reshape(2, -1)
        white = bool((frames.min(axis=1) >= 225).any())
        if what == "flash":
            assert white == (tick + delay in due), tick
        elif tick + delay in due:
            assert loudness(episode, tick, CUE_HZ) > 0.08, tick


@pytest.mark.parametrize("task", ["count_tone", "count_flash", "count_motion"])
@pytest.mark.parametrize("seed", range(4))
def test_counts_go_up_one_by_one_to_what_the_score_is_told(task: str, seed: int) -> None:
    episode = make(task, 120, seed)
    numbers = [NUMBERS.index(word) for _, word in said(episode)]
    assert numbers == list(range(1, len(numbers) + 1))
    (count,) = [event.word for event in episode.events if event.kind == "count"]
    assert count == len(numbers) <= MAX_COUNT


def test_the_square_is_below_again_where_a_motion_is_counted() -> None:
    episode = make("count_motion", 60, 3)
    for tick, _ in said(episode):
        frames = episode.frames_T_2_Y_Y_3[tick - 1 : tick + 1].reshape(4, SIDE, -1)
        rows = [np.flatnonzero(frame.max(axis=1) > 165) for frame in frames]
        assert max(int(r[-1]) for r in rows) > SIDE - 5
        assert min(int(r[0]) for r in rows) < SIDE - 15


@pytest.mark.parametrize("seed", range(6))
def test_it_yields_after_two_ticks_of_speech_and_not_after_one(seed: int) -> None:
    episode = make("speak", 90, seed, lose=0.0)
    starts = [tick for tick, words in read(episode) if words == ["speak"]]
    assert [WORDS[episode.said_T[tick]] for tick in starts] == ["do"] * len(starts)
    energy = np.square(episode.pcm_T_W).mean(axis=1)
    quiet = np.median(energy)
    for event in episode.events:
        if event.kind == "interruption":
            assert WORDS[episode.said_T[event.tick]] in SCALE
            assert WORDS[episode.said_T[event.tick + 1]] == "<yield>"
            assert energy[event.tick] > 3 * quiet and energy[event.tick + 1] > 3 * quiet
        elif event.kind == "backchannel":
            assert energy[event.tick] > 3 * quiet
            assert energy[event.tick + 1] < energy[event.tick] / 3
            three = episode.said_T[event.tick : event.tick + 3]
            assert all(WORDS[word] in SCALE for word in three)


@pytest.mark.parametrize("seed", range(4))
def test_results_are_said_as_they_come(seed: int) -> None:
    episode = make("ask", 90, seed, lose=0.0)
    for tick, words in read(episode)[1:]:
        assert words[0] == "[result]" and words[2] == "[/result]"
        assert (tick, words[1]) in said(episode)
    asked = [tick for tick, word in said(episode) if word == "<delegate>"]
    assert all(loudness(episode, tick, ASK_HZ) > 0.08 for tick in asked)


@pytest.mark.parametrize("seed", range(4))
def test_ticks_at_set_times_until_stop(seed: int) -> None:
    episode = make("every", 60, seed)
    (begin, (_, period)), *rest = read(episode)
    due = [tick for tick, _ in said(episode)]
    stop = rest[0][0] if rest else 60
    assert due == list(range(begin + NUMBERS.index(period), stop, NUMBERS.index(period)))


def test_sections_are_parted_by_stop() -> None:
    episode = make("cue", 90, 5, sections=3)
    stops = [tick for tick, words in read(episode) if words[0] == "stop"]
    assert {30, 60} <= set(stops)


@pytest.mark.parametrize(("num_ticks", "sections"), [(23, 1), (47, 2), (0, 1)])
def test_too_short_an_episode_is_refused(num_ticks: int, sections: int) -> None:
    with pytest.raises(ValueError, match=f"num_ticks={num_ticks} is less than 24"):
        make("cue", num_ticks, 0, sections=sections)


def test_without_clips_there_are_still_pictures() -> None:
    episode = make_episode("count_flash", 30, 1, SPEECH, Footage({}, SIDE))
    assert episode.frames_T_2_Y_Y_3.max() >= 225


def test_words_are_one_id_each_and_come_back() -> None:
    assert len(set(WORDS)) == len(WORDS) == CONFIG.vocab.num_valid
    assert {name: ID[f"<{name.removesuffix('_turn')}>"] for name in CONFIG.vocab.specials} == (
        CONFIG.vocab.specials
    )
    tokenizer = WordTokenizer()
    assert [WORDS[i] for i in tokenizer.encode("Wait TONE 3, [result] 12 [/result] 13 xyz")] == [
        "wait", "tone", "three", "[result]", "twelve", "[/result]", "<unknown>", "<unknown>",
    ]  # fmt: skip
    assert tokenizer.encode("") == tokenizer.encode(" \n") == []
    assert tokenizer.decoder().decode([ID["do"], ID["re"], 63, -1]) == (
        "do re <unknown> <unknown> "
    )
    assert all(re.fullmatch(r"\w+", word) for word in SPOKEN)


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=60)
def test_any_text_is_ids_in_range(text: str) -> None:
    assert all(0 <= i < CONFIG.vocab.num_valid for i in WordTokenizer().encode(text))


def test_brackets_alone_are_read_at_once() -> None:
    """For each of them, all the others would be looked at, and nobody's tick would come."""
    assert WordTokenizer().encode("[" * 1_000_000) == []
    assert WordTokenizer().encode("[[result] 3") == [ID["[result]"], ID["three"]]


def test_every_spoken_word_sounds_like_no_other() -> None:
    voice = voice_V_K_B()
    heard = {word: voice[ID[word]] for word in SPOKEN}
    for word, mel in heard.items():
        assert mel.max() > -1.5
        others = [float((mel - other).abs().mean()) for w, other in heard.items() if w != word]
        assert min(others) > 0.1, word
    assert (voice[ID["wait"]] == SILENT_LEVEL).all() and (voice[0] == SILENT_LEVEL).all()


def test_a_cue_tone_stands_out_of_speech() -> None:
    """In the levels that the model hears, so that what is asked of it can be known."""
    episode = make("cue", 60, 2, lose=0.0)
    signal = torch.from_numpy(episode.pcm_T_W.reshape(1, -1))
    mel_F_B = log_mel_ref(torch.nn.functional.pad(signal, (800, 0)), CONFIG.layout.dmel)[0]
    band = int(log_mel_ref(torch.sin(torch.arange(1600) * 2 * torch.pi * CUE_HZ / 16_000)[None],
                           CONFIG.layout.dmel)[0, 0].argmax())  # fmt: skip
    best_T = mel_F_B.view(60, -1, 80)[:, :, band].amax(1)
    due = [tick for tick, word in said(episode) if word == "yes"]
    assert due and min(best_T[due]) > best_T.median() + 0.5
    assert len(signal[0]) == 60 * WINDOW


@pytest.mark.parametrize("seed", range(12))
def test_varied_pictures_are_never_taken_for_a_flash(seed: int) -> None:
    varied = Footage(FOOTAGE.clips, SIDE, varied=True)
    frames = varied.excerpt(np.random.default_rng(seed), 50)
    assert frames.shape == (50, SIDE, SIDE, 3) and frames.dtype == np.uint8
    assert frames.max() <= 250 and frames.min(axis=(1, 2, 3)).max() < 225
    again = varied.excerpt(np.random.default_rng(seed), 50)
    np.testing.assert_array_equal(frames, again)


def test_varied_pictures_are_cut_between_scenes() -> None:
    """A film that jumps to another scene for some frames is no flash."""
    varied = Footage(FOOTAGE.clips, SIDE, varied=True)
    jumps = []
    for seed in range(12):
        frames = varied.excerpt(np.random.default_rng(seed), 120).astype(float)
        jumps.append(np.abs(np.diff(frames.mean(axis=(1, 2)), axis=0)).max())
    assert sum(jump > 15 for jump in jumps) >= 2


def test_some_varied_pictures_are_light_and_grey() -> None:
    """As nearly white as they can be, since that is what is hard to tell from a flash."""
    varied = Footage(FOOTAGE.clips, SIDE, varied=True)
    light = 0
    for seed in range(40):
        frames = varied.excerpt(np.random.default_rng(seed), 20).astype(float)
        middle = frames.mean(axis=(1, 2))  # of each frame: red, green, blue
        light += ((middle.min(-1) > 120) & (np.ptp(middle, axis=-1) < 12)).any()
    assert light >= 4


def test_smooth_surfaces_fill_much_of_a_picture_and_never_all() -> None:
    """A white sky or a road is what a flash is most easily taken for."""
    black, free, shares = np.zeros((60, SIDE, SIDE, 3), np.uint8), set(), []
    for seed in range(24):
        frames = Footage({}, SIDE)._behind_surfaces(black, np.random.default_rng(seed))
        assert frames.shape == black.shape and frames.dtype == np.uint8 and not black.any()
        dark = frames.max(axis=-1) == 0
        always_dark = [dark.all(axis=(0, axis)) for axis in (2, 1)]  # rows, columns
        assert max(mask.sum() for mask in always_dark) >= SIDE // 8
        free.add(always_dark[0].sum() > always_dark[1].sum())
        shares.append((frames.min(axis=-1) > 160).mean(axis=(1, 2)).max())
    assert free == {True, False}  # surfaces lie across and upright
    assert max(shares) > 0.7 and sum(share > 0.3 for share in shares) > 8


def test_what_passes_through_a_picture_is_a_part_of_it() -> None:
    first = set()
    for seed in range(8):
        frames = np.zeros((150, SIDE, SIDE, 3), np.uint8)
        Footage({}, SIDE)._pass_through(frames, np.random.default_rng(seed))
        alone = [frame for frame in frames if len(np.unique(frame.reshape(-1, 3), axis=0)) == 2]
        covered = np.any(np.array(alone), axis=-1)
        rows, columns = covered.any(2), covered.any(1)
        np.testing.assert_array_equal(covered, rows[:, :, None] & columns[:, None])
        assert rows.sum(1).max() <= 3 * SIDE // 4
        first.add(bool(columns[0, 0]))
    assert first == {True, False}  # from the left and from the right


def test_made_voices_are_those_of_several_people() -> None:
    pcm = made_voices(20.0)
    assert pcm.dtype == np.float32 and pcm.shape == (320_000,) and np.isfinite(pcm).all()
    np.testing.assert_array_equal(pcm, made_voices(20.0))
    assert not np.array_equal(pcm, made_voices(20.0, seed=1))
    assert 0.02 < np.sqrt(np.mean(pcm**2)) < 0.2 and np.abs(pcm).max() < 1
    pitches = [_pitch_hz(pcm[at : at + 16_000]) for at in range(0, 320_000, 16_000)]
    assert max(pitches) > 1.5 * min(pitches)


@pytest.mark.parametrize("seed", range(3))
def test_varied_speech_is_as_loud_as_any_and_has_other_pitches(seed: int) -> None:
    varied = replace(SPEECH, varied=True)
    plain_N, varied_N = (
        speech.excerpt(np.random.default_rng(seed), 32_000) for speech in (SPEECH, varied)
    )
    assert varied_N.dtype == np.float32 and varied_N.shape == (32_000,)
    assert 0.01 < np.sqrt(np.mean(varied_N**2)) < 0.3
    again_N = varied.excerpt(np.random.default_rng(seed), 32_000)
    np.testing.assert_array_equal(varied_N, again_N)
    assert not np.allclose(varied_N, plain_N)
    pitches = {_pitch_hz(varied.excerpt(np.random.default_rng(n), 32_000)) for n in range(12)}
    assert max(pitches) > 1.4 * 130 and min(pitches) < 130 / 1.2


def _pitch_hz(pcm_N: np.ndarray) -> float:
    """Of the buzz: where its autocorrelation is largest beyond the first few lags."""
    spectrum = np.abs(np.fft.rfft(pcm_N, 2 * len(pcm_N))) ** 2
    return 16_000 / (60 + int(np.fft.irfft(spectrum)[60:300].argmax()))


@pytest.mark.parametrize("task", ["wait_tone", "count_flash", "count_motion", "every"])
def test_how_often_somebody_talks_changes_nothing_else(task: str) -> None:
    never, always = (make(task, 60, 1, lose=0.0, talks=talks) for talks in (0.0, 1.0))
    assert not never.speech_T.any() and always.speech_T.mean() > 0.9
    np.testing.assert_array_equal(never.said_T, always.said_T)


@pytest.mark.parametrize("task", ["count_tone", "count_flash", "count_motion"])
def test_at_a_slow_pace_there_are_gaps_beyond_a_local_window(task: str) -> None:
    """And bursts, so that not only small numbers have to be remembered."""
    window = CONFIG.local_heads.window
    assert window is not None
    gaps, last = [], []
    for seed in range(6):
        due = [tick for tick, _ in said(make(task, 150, seed, pace=4.0))]
        gaps += np.diff(due).tolist()
        last.append(len(due))
    assert sum(gap * 9 > window for gap in gaps) >= 6  # tokens
    assert sum(gap < 12 for gap in gaps) > len(gaps) / 3
    assert max(last) >= 6


def test_at_a_quick_pace_there_is_more_to_answer() -> None:
    due = [
        sum(len(said(make("wait_tone", 60, seed, pace=pace))) for seed in range(5))
        for pace in (1.0, 0.1)
    ]
    assert due[1] > 1.5 * due[0]


@pytest.mark.parametrize(("task", "least"), [("wait_tone", 1), ("every", 2)])
def test_delays_are_bounded(task: str, least: int) -> None:
    for delays, most in ((1, max(1, least)), (2, 2), (4, 4), (8, 8)):
        episodes = [make(task, 40, seed, delays=delays) for seed in range(60)]
        given = {NUMBERS.index(read(episode)[0][1][-1]) for episode in episodes}
        assert given == set(range(least, most + 1))
