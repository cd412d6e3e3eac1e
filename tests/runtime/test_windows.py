"""Media in, tick windows out: exactly what was pushed, whatever its pieces and their order."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from fake_model import CONFIG, FakeModel, make_runtime
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime import Session
from tml_runtime.conceal import MAX_HOLES
from tml_runtime.mailbox import AudioWindows, Inbox, Outbox, Pair
from tml_runtime.options import mailbox_spec

N = CONFIG.layout.samples_per_tick
RATE = CONFIG.layout.sample_rate
SPEC = mailbox_spec(CONFIG, CONFIG.layout, 2, 4, 3)


def ramp(num_windows: int) -> np.ndarray:
    """Samples that tell where they belong; none is zero."""
    return (1.0 + np.arange(num_windows * N)).astype(np.float32) / (16 * N)


def push_pieces(session: Session, pcm: np.ndarray, pieces: list[tuple[int, int]]) -> None:
    for start, stop in pieces:
        session.push_audio(pcm[start:stop], start / RATE)


@st.composite
def cuts(draw: st.DrawFn, num_windows: int) -> list[tuple[int, int]]:
    """The span of some windows in pieces of any size, in any order."""
    inner = draw(st.lists(st.integers(1, num_windows * N - 1), max_size=40, unique=True))
    edges = [0, *sorted(inner), num_windows * N]
    return draw(st.permutations(list(pairwise(edges))))


@given(pieces=cuts(3), repeated=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_any_pieces_in_any_order_are_heard_the_same(
    pieces: list[tuple[int, int]], repeated: int
) -> None:
    runtime, model = make_runtime()
    pcm = ramp(3)
    with runtime, runtime.open_session() as session:
        push_pieces(session, pcm, pieces + pieces[:repeated])  # a repeated piece changes nothing
        runtime.run_ticks(3)
        assert session.stats.missing_windows == session.stats.dropped_samples == 0
    heard = np.concatenate([rows[0].pcm for rows in model.heard])
    np.testing.assert_array_equal(heard, pcm)
    assert not any(rows[0].missing for rows in model.heard)


def concealed(line: np.ndarray, have: np.ndarray) -> np.ndarray:
    """Whole windows, holes filled sample by sample: the meaning of conceal.py, slowly."""
    source, fade = RATE // 50, RATE * 3 // 25
    heard = np.concatenate([np.zeros(source), np.where(have, line, 0.0)])  # as nothing came before
    at = np.concatenate([np.zeros(source, bool), have])
    origin = source  # where the hole begins that a window may begin within
    for first in range(source, len(heard), N):  # a window at a time: the next is not known yet
        edges = np.flatnonzero(np.diff(at[first : first + N], prepend=True, append=True))
        begins, ends = (first + edges[0::2]).tolist(), (first + edges[1::2]).tolist()
        following = [*begins, first + N][1:]
        for begin, end, stop in list(zip(begins, ends, following, strict=False))[:MAX_HOLES]:
            size, known = end - begin, min(source, stop - end)
            over = min(size, fade) if known else fade
            if begin > first or at[begin - 1]:
                origin = begin
            for i in range(size):
                left, right = begin + i - origin, size - 1 - i
                gain = max(0.0, 1 - (left + 0.5) / (over if origin == begin else fade))
                heard[begin + i] += gain * heard[origin - 1 - to_and_fro(left, source)]
                if known:
                    gain = max(0.0, 1 - (right + 0.5) / over)
                    heard[begin + i] += (
                        gain * heard[end + min(to_and_fro(right, source), known - 1)]
                    )
    return heard[source:]


def to_and_fro(distance: int, length: int) -> int:
    return min(distance % (2 * length), 2 * length - 1 - distance % (2 * length))


@given(pieces=cuts(3), lost=st.sets(st.integers(0, 39)))
@settings(max_examples=30, deadline=None)
def test_gaps_are_concealed_and_flag_exactly_their_windows(
    pieces: list[tuple[int, int]], lost: set[int]
) -> None:
    runtime, model = make_runtime()
    have = np.ones(3 * N, np.bool_)
    kept = [piece for i, piece in enumerate(pieces) if i not in lost]
    for start, stop in set(pieces) - set(kept):
        have[start:stop] = False
    with runtime, runtime.open_session() as session:
        push_pieces(session, ramp(3), kept)
        runtime.run_ticks(3)
    heard = np.concatenate([rows[0].pcm for rows in model.heard])
    np.testing.assert_array_equal(heard[have], ramp(3)[have])
    np.testing.assert_allclose(heard, concealed(ramp(3), have), atol=1e-5)
    has_gap = (~have.reshape(3, N)).any(1)
    assert [rows[0].missing for rows in model.heard] == has_gap.tolist()
    assert session.stats.missing_windows == has_gap.sum()


@pytest.mark.parametrize("value", [0.5, np.finfo(np.float32).max])
def test_a_long_gap_fades_to_silence(value: float) -> None:
    """Within 120 ms, of which the window it begins in has 100."""
    windows, fade = AudioWindows(12, N, RATE), RATE * 3 // 25
    loud, heard = np.full(N // 2, value, np.float32), np.empty((12, N), np.float32)
    windows.write(0, loud)
    windows.write(21 * N // 2, loud)
    missing = [windows.take(window, heard[window]) for window in range(12)]
    assert missing == [N // 2] + [N] * 9 + [N // 2, N]
    heard = heard.ravel().astype(np.float64)
    assert np.abs(heard).max() == value
    steps = np.abs(np.diff(heard[: 21 * N // 2 + 1]))
    assert steps.max() <= value / 1000  # no click where it begins and ends
    assert heard[N // 2 : N // 2 + fade].all() and not heard[N // 2 + fade : 10 * N].any()
    assert heard[10 * N : 11 * N].all()  # in the window it ends in, it rises towards what comes


def test_a_gap_between_two_pieces_goes_from_one_to_the_other() -> None:
    windows, out = AudioWindows(2, N, RATE), np.empty(N, np.float32)
    windows.write(0, np.full(100, 5.0, np.float32))
    windows.write(101, np.full(N - 101, 7.0, np.float32))
    assert windows.take(0, out) == 1
    assert out[99:102].tolist() == [5.0, 6.0, 7.0]


def test_nothing_of_before_a_skip_is_heard_after_it() -> None:
    windows, out = AudioWindows(2, N, RATE), np.empty(N, np.float32)
    windows.write(0, np.ones(N, np.float32))
    assert windows.take(0, out) == 0
    windows.forget_before(3)
    assert windows.take(3, out) == N
    assert not out.any()


def test_more_holes_than_a_bad_line_makes_are_zeros() -> None:
    windows, out = AudioWindows(2, N, RATE), np.empty(N, np.float32)
    for at in range(0, N, 2):
        windows.write(at, np.ones(1, np.float32))
    assert windows.take(0, out) == N // 2
    assert out.sum() == N // 2 + MAX_HOLES


def test_a_hole_beyond_those_does_not_come_back_in_the_next_window() -> None:
    windows, out = AudioWindows(2, N, RATE), np.empty(N, np.float32)
    for first in range(0, 4 * MAX_HOLES, 4):  # each followed by a hole of two, the last by the rest
        windows.write(first, np.full(2, 0.5, np.float32))
    windows.write(4 * MAX_HOLES, np.full(2, 0.5, np.float32))
    windows.take(0, out)
    assert not out[4 * MAX_HOLES + 2 :].any()
    assert windows.take(1, out) == N and not out.any()


def test_where_pieces_overlap_the_last_pushed_wins() -> None:
    runtime, model = make_runtime()
    with runtime, runtime.open_session() as session:
        session.push_audio(np.full(N, 0.25, np.float32), 0.0)
        session.push_audio(np.full(100, 0.5, np.float32), 50 / RATE)
        session.push_audio(np.full(100, 0.75, np.float32), 0.0)
        runtime.run_ticks(1)
    expected = np.repeat(np.float32([0.75, 0.5, 0.25]), [100, 50, N - 150])
    np.testing.assert_array_equal(model.heard[0][0].pcm, expected)


def test_int16_and_strided_samples() -> None:
    runtime, model = make_runtime()
    with runtime, runtime.open_session() as session:
        stereo = np.arange(2 * N, dtype=np.int16).reshape(N, 2) - 100
        session.push_audio(stereo[:, 0], 0.0, sample_rate=RATE)
        session.push_audio(np.array([-32768, 32767], np.int16), N / RATE)
        runtime.run_ticks(2)
    np.testing.assert_array_equal(model.heard[0][0].pcm, (np.arange(0, 2 * N, 2) - 100) / 32768)
    np.testing.assert_array_equal(model.heard[1][0].pcm[:2], [-1.0, 32767 / 32768])


def test_audio_that_loses_the_race_with_its_window_is_dropped_and_counted() -> None:
    inbox, out = Inbox(SPEC), np.empty(N, np.float32)
    assert inbox.take(0, out).missing_samples == N
    # The client still believes window 0 to be open, so it may reach to the end of window H - 1.
    pcm = ramp(SPEC.num_windows)
    assert inbox.put_audio(0, pcm)
    taken = inbox.take(1, out)
    assert (taken.dropped_samples, taken.missing_samples) == (N, 0)
    np.testing.assert_array_equal(out, pcm[N : 2 * N])
    # And when it knows that window 2 is closing, it may reach H windows beyond before the tick
    # thread has taken it.
    assert inbox.put_audio((2 + SPEC.num_windows) * N, ramp(1))
    assert inbox.take(2, out).dropped_samples == 0


def test_skipped_windows_are_dropped_and_leave_nothing_behind() -> None:
    windows, out = AudioWindows(4, N, RATE), np.empty(N, np.float32)
    assert windows.write(0, ramp(4)) == 0
    assert windows.forget_before(2) == 2 * N
    assert windows.forget_before(2) == 0
    assert windows.take(2, out) == 0
    assert windows.write(4 * N, ramp(3)[: 2 * N + 5]) == 0  # rows used for the second time
    assert windows.forget_before(1000) == N + 2 * N + 5
    assert windows.take(1000, out) == N
    assert not out.any()


@given(start=st.integers(-3 * N, 4 * N), size=st.integers(0, 3 * N), oldest=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_audio_windows_against_a_plain_array(start: int, size: int, oldest: int) -> None:
    windows, out = AudioWindows(8, N, RATE), np.empty(N, np.float32)
    windows.forget_before(oldest)
    line = np.zeros(16 * N, np.float32)
    pcm = np.arange(1, size + 1, dtype=np.float32)
    begin = min(start + size, max(start, oldest * N))
    line[max(begin, 0) : max(start + size, 0)] = pcm[begin - start :]
    assert windows.write(start, pcm) == begin - start
    for window in range(oldest, oldest + 8):
        expected = line[window * N : (window + 1) * N]
        assert windows.take(window, out) == np.count_nonzero(expected == 0.0)
        np.testing.assert_array_equal(out[expected != 0.0], expected[expected != 0.0])


def frame(value: int, height: int = 80, width: int = 80) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def see(stamps: list[float], *, max_frame_pairs: int = 3) -> tuple[FakeModel, int]:
    """Frame i, all pixels i + 1, is pushed at stamps[i]; four ticks. Returns how many were shed."""
    runtime, model = make_runtime(max_frame_pairs=max_frame_pairs)
    with runtime, runtime.open_session() as session:
        for i, t in enumerate(stamps):
            session.push_video(frame(i + 1), t)
        runtime.run_ticks(4)
        return model, session.stats.shed_frames


def values(model: FakeModel, tick: int) -> list[list[int]] | None:
    frames = model.heard[tick][0].frames
    return None if frames is None else frames[:, :, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("stamps", "pairs", "shed"),
    [
        ([], None, 0),
        ([0.1], [[1, 1]], 0),  # an odd one out is paired with itself
        ([0.0, 0.1], [[1, 2]], 0),
        ([0.1, 0.0], [[2, 1]], 0),  # by stamp, not by arrival
        ([0.0, 0.05, 0.1], [[1, 2], [3, 3]], 0),
        ([0.01 * i for i in range(7)], [[2, 3], [4, 5], [6, 7]], 1),  # the newest three pairs
        ([0.01 * i for i in reversed(range(8))], [[6, 5], [4, 3], [2, 1]], 2),
        ([0.1, 0.1], [[2, 2]], 1),  # the same stamp: the last one
        ([0.2, 0.1999], [[2, 2]], 0),  # 0.2 belongs to the next window
    ],
)
def test_video_is_paired(stamps: list[float], pairs: list[list[int]] | None, shed: int) -> None:
    model, num_shed = see(stamps)
    assert values(model, 0) == pairs
    assert num_shed == shed


def test_frames_belong_to_the_window_of_their_stamp() -> None:
    model, _ = see([0.6, 0.0, 0.3999999, 0.4])
    assert [values(model, tick) for tick in range(4)] == [[[2, 2]], [[3, 3]], [[4, 4]], [[1, 1]]]


@given(order=st.permutations(range(9)))
@settings(max_examples=30, deadline=None)
def test_frames_in_any_order_are_seen_the_same(order: list[int]) -> None:
    runtime, model = make_runtime(max_frame_pairs=2)
    with runtime, runtime.open_session() as session:
        for i in order:
            session.push_video(frame(i), 0.05 * i)  # windows 0, 1: four frames each; 2: one
        runtime.run_ticks(3)
        assert session.stats.shed_frames == 0
    assert [values(model, tick) for tick in range(3)] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 8]],
    ]


def test_a_window_has_one_frame_size_and_no_more_tokens_than_a_tick_takes() -> None:
    runtime, model = make_runtime(max_frame_pairs=3)
    with runtime, runtime.open_session() as session:
        session.push_video(frame(1, 40, 80), 0.0)
        session.push_video(frame(2, 80, 40), 0.05)
        session.push_video(frame(3, 40, 80), 0.1)
        for i in range(4):  # 16 x 12 = 192 tokens a pair, of 256
            session.push_video(frame(i, 480, 640), 0.2 + 0.01 * i)
        runtime.run_ticks(2)
        assert session.stats.shed_frames == 1 + 2
    frames = model.heard[0][0].frames
    assert frames is not None and frames.shape == (1, 2, 40, 80, 3)
    assert values(model, 0) == [[1, 3]]
    assert values(model, 1) == [[2, 3]]


def stays(pairs: list[Pair], values: list[list[int]]) -> bool:
    return [[np.unique(x).tolist() for x in pair] for pair in pairs] == [
        [[value] for value in pair] for pair in values
    ]


@given(seed=st.integers(0, 2**32 - 1), most=st.integers(1, SPEC.video_queue_frames))
@settings(max_examples=20, deadline=None)
def test_frames_stay_for_past_ticks_and_their_room_comes_back(seed: int, most: int) -> None:
    """Whatever waits for later windows and was shown lately, six more frames find room."""
    inbox, pcm_N, rng = Inbox(SPEC), np.empty(N, np.float32), np.random.default_rng(seed)
    shown: deque[tuple[list[Pair], list[list[int]]]] = deque(maxlen=SPEC.past_ticks + 1)
    window = number = 0
    for then in rng.choice(["take", "take", "take", "shed", "pass", "skip"], 60):
        for stamp in rng.integers((SPEC.num_windows + 1) * SPEC.window_ns, size=most).tolist():
            number = (number + 1) % 256
            picture = frame(number, 40, int(rng.choice([40, 80])))
            assert inbox.put_frame(window * SPEC.window_ns + stamp, picture)
        if then == "pass":
            inbox.pass_by(window)
        else:
            window += then == "skip"
            taken = inbox.take(window, pcm_N, shed=int(then == "shed"))
            assert then != "shed" or taken.pairs is None
            if taken.pairs is not None:
                values = [[int(x[0, 0, 0]) for x in pair] for pair in taken.pairs]
                shown.append((taken.pairs, values))
        window += 1
        assert all(stays(*each) for each in shown)


def test_six_frames_find_room_beside_full_windows_and_full_past_ticks() -> None:
    inbox, pcm_N = Inbox(SPEC), np.empty(N, np.float32)
    for window in range(3 * SPEC.past_ticks):
        for i in range(SPEC.video_queue_frames):
            stamp = (window + SPEC.num_windows) * SPEC.window_ns + i
            assert inbox.put_frame(stamp, frame(i, 40, 40))
        taken = inbox.take(window, pcm_N)
        assert (taken.pairs is not None) == (window >= SPEC.num_windows)


def test_a_client_far_ahead_is_refused_before_it_overwrites_what_is_seen() -> None:
    inbox, pcm_N = Inbox(SPEC), np.empty(N, np.float32)
    for i in range(SPEC.pool_frames):
        assert inbox.put_frame(i, frame(i, 40, 40))
    assert not inbox.put_frame(SPEC.pool_frames, frame(255, 40, 40))
    taken = inbox.take(0, pcm_N)
    assert taken.pairs is not None and taken.shed_frames == SPEC.pool_frames - 4
    for i in range(SPEC.pool_frames - 4):  # those that are seen keep their room
        assert inbox.put_frame(SPEC.window_ns + i, frame(255, 40, 40))
    assert not inbox.put_frame(2 * SPEC.window_ns, frame(255, 40, 40))
    newest = SPEC.pool_frames - np.arange(4, 0, -1)
    assert stays(taken.pairs, newest.reshape(2, 2).tolist())


@given(pieces=st.lists(st.lists(st.integers(0, 259), max_size=150), max_size=6))
@settings(max_examples=60, deadline=None)
def test_text_comes_in_order_and_no_more_than_a_tick_takes(pieces: list[list[int]]) -> None:
    runtime, model = make_runtime()
    limit = CONFIG.layout.max_text_tokens - 1
    with runtime, runtime.open_session() as session:
        for piece in pieces:
            session.push_text(piece)
        runtime.run_ticks(16)
    ids = [token for piece in pieces for token in piece]
    expected = [ids[at : at + limit] for at in range(0, 16 * limit, limit)]
    assert [rows[0].text for rows in model.heard] == expected


@pytest.mark.parametrize(("tokens", "samples"), [(5, N), (4, N + 1)])
def test_more_than_a_tick_says_is_refused(tokens: int, samples: int) -> None:
    outbox = Outbox(SPEC)
    with pytest.raises(ValueError, match=rf"output: \({tokens}, {samples}\)"):
        outbox.put(0, 0, np.zeros(tokens, np.int32), np.zeros(samples, np.float32))
    assert outbox.get() is None


def test_outbox_keeps_the_oldest_and_refuses_the_rest() -> None:
    outbox = Outbox(SPEC)
    token_K = np.array([1, 2, 3, 4], np.int32)
    published = [outbox.put(w, 0, token_K + w, ramp(1) * w) for w in range(40)]
    room = published.index(False)
    assert SPEC.output_queue_ticks <= room and not any(published[room:])
    for window in range(room):
        output = outbox.get()
        assert output is not None and output.window == window
        np.testing.assert_array_equal(output.token_K, token_K + window)
        np.testing.assert_array_equal(output.pcm, ramp(1) * window)
    assert outbox.get() is None
    assert outbox.put(99, 0, token_K, ramp(1)) and outbox.get() is not None
