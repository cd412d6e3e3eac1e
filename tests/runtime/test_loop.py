"""The loop on its virtual clock: what comes out when, for whom, and what a tick may not disturb."""

from __future__ import annotations

import gc
import sys
from itertools import pairwise

import numpy as np
import pytest
from fake_model import CONFIG, DELEGATE, SILENCE, YIELD, FakeModel, FakeVocoder, make_runtime

from tml_runtime import Runtime, Session, errors
from tml_runtime.session import ActionOut, SpeechOut, TextOut

N = CONFIG.layout.samples_per_tick
PERIOD_NS = 200_000_000


def speech(session: Session) -> np.ndarray:
    pieces = [out for out in session.poll() if isinstance(out, SpeechOut)]
    return np.concatenate([out.pcm for out in pieces]) if pieces else np.zeros(0, np.float32)


def noise(seed: int, num_windows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, num_windows * N).astype(np.float32)


def test_output_has_the_media_time_at_which_it_is_due() -> None:
    said = [
        [SILENCE] * 4,
        [104, 105, SILENCE, 33],
        [DELEGATE, 104, YIELD, DELEGATE],
        [0xC3, SILENCE, SILENCE, 0xE2],
        [0x82, 0xAC, 0x41, 0xFF],
    ]
    runtime, _ = make_runtime(FakeModel(say=lambda tick, slot: said[tick]))
    with runtime:
        runtime.run_ticks(0)
        session = runtime.open_session()
        runtime.run_ticks(5)
        outputs = session.poll()
    assert [out for out in outputs if not isinstance(out, SpeechOut)] == [
        TextOut("hi", (104, 105), 0.4),
        TextOut("!", (33,), 0.55),
        ActionOut("delegate", 0.6),
        TextOut("h", (104,), 0.65),
        ActionOut("yield", 0.7),
        ActionOut("delegate", 0.75),
        TextOut("", (0xC3,), 0.8),
        TextOut("\ufffd", (0xE2,), 0.95),  # C3 had no second byte
        TextOut("€A\ufffd", (0x82, 0xAC, 0x41, 0xFF), 1.0),
    ]
    spoken = [out for out in outputs if isinstance(out, SpeechOut)]
    assert [out.t for out in spoken] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(out.pcm.dtype == np.float32 and len(out.pcm) == N for out in spoken)
    assert all(out.sample_rate == 16_000 and not out.pcm.flags.writeable for out in spoken)


def test_a_session_hears_from_the_window_that_begins_when_it_opens() -> None:
    runtime, model = make_runtime(num_slots=2)
    with runtime:
        first = runtime.open_session()
        runtime.run_ticks(3)
        second = runtime.open_session()
        assert (first.media_time, second.media_time) == (0.6, 0.0)
        second.push_audio(noise(1), 0.0)
        first.push_audio(noise(2), 0.6)
        runtime.run_ticks(1)
        assert (second.media_time, second.open_t, first.open_t) == (0.2, 0.2, 0.8)
        assert second.poll()[0].t == 0.2
    assert [len(rows) for rows in model.heard] == [1, 1, 1, 2]
    np.testing.assert_array_equal(model.heard[3][0].pcm, noise(2))
    np.testing.assert_array_equal(model.heard[3][1].pcm, noise(1))


def test_opened_within_a_window_a_session_begins_with_the_next() -> None:
    runtime, model = make_runtime(num_slots=2)
    with runtime:
        runtime.clock.advance(PERIOD_NS // 4)
        session = runtime.open_session()
        assert session.media_time == -0.15
        session.push_audio(noise(1), 0.0)
        runtime.run_ticks(2)
    assert [len(rows) for rows in model.heard] == [1]
    np.testing.assert_array_equal(model.heard[0][0].pcm, noise(1))


def drive(runtime: Runtime, session: Session, seed: int, ticks: int) -> bytes:
    """A session with all kinds of input; everything it says."""
    heard = b""
    for _ in range(ticks):
        t = session.open_t
        session.push_audio(noise(seed), t)
        session.push_video(np.full((40, 80, 3), seed % 256, np.uint8), t)
        session.push_text([seed % 256] * 70)
        runtime.run_ticks(1)
        heard += speech(session).tobytes()
    return heard


def test_a_slot_keeps_nothing_of_its_last_session() -> None:
    runtime, model = make_runtime()
    with runtime:
        fresh = runtime.open_session(seed=5)
        alone = drive(runtime, fresh, seed=1, ticks=3)
        fresh.close()
        leaver = runtime.open_session(seed=6)
        drive(runtime, leaver, seed=9, ticks=2)
        leaver.push_audio(noise(9, 8), leaver.open_t)  # left in the rings and windows
        leaver.push_text([9] * 1000)
        leaver.push_video(np.full((40, 40, 3), 9, np.uint8), leaver.open_t + 0.3)
        leaver.close()
        again = runtime.open_session(seed=5)
        before = model.ticks
        assert drive(runtime, again, seed=1, ticks=3) == alone
    assert [rows[0].slot for rows in model.heard] == [0] * len(model.heard)
    assert all(9 not in rows[0].text for rows in model.heard[before:])


def test_a_faulty_session_harms_no_other() -> None:
    def run(faulty: set[tuple[int, int]]) -> tuple[list[Session], list[bytes], Runtime]:
        runtime, _ = make_runtime(FakeModel(faulty=faulty), num_slots=3)
        heard = [b"", b"", b""]
        with runtime:
            sessions = [runtime.open_session(seed=i) for i in range(3)]
            for tick in range(6):
                for i, session in enumerate(sessions):
                    if (i, tick > 2) != (1, True):
                        session.push_audio(noise(i + tick), session.open_t)
                runtime.run_ticks(1)
                for i in (0, 2):
                    heard[i] += speech(sessions[i]).tobytes()
        return sessions, heard, runtime

    sessions, heard, runtime = run({(2, 1)})
    _, healthy, _ = run(set())
    assert heard[0] == healthy[0] and heard[2] == healthy[2]
    for call in (sessions[1].poll, lambda: sessions[1].push_text("x")):
        with pytest.raises(errors.SessionFault, match=r"t=0\.4 .*not finite") as caught:
            call()
        assert caught.value.t == 0.4
    sessions[1].close()
    report = runtime.report()
    assert (report["faults"], report["slots_free"]) == (1, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_speech_that_is_not_finite_is_a_fault(value: float) -> None:
    runtime, model = make_runtime(num_slots=2)
    with runtime:
        broken, other = runtime.open_session(), runtime.open_session()
        runtime.run_ticks(1)
        runtime._state.memory[0] = value
        runtime.run_ticks(1)
        assert np.isfinite(speech(other)).all()
        with pytest.raises(errors.SessionFault):
            broken.poll()
        replacement = runtime.open_session()  # its slot is reset before it is used again
        runtime.run_ticks(1)
        assert np.isfinite(speech(replacement)).all()
        runtime._state.memory[0] = value
        runtime.run_ticks(1)
        with pytest.raises(errors.SessionFault) as caught:
            replacement.poll()
        assert caught.value.t == 0.2  # on its own clock
    assert model.heard[2][0].slot == 0


@pytest.mark.parametrize(
    ("pcm", "words"),
    [
        (None, "no such voice"),
        (np.zeros(N + 1, np.float32), "ended"),
        (np.r_[np.zeros(N - 1, np.float32), np.float32("nan")], "samples were not finite"),
    ],
)
def test_a_broken_vocoder_ends_only_its_session(pcm: np.ndarray | None, words: str) -> None:
    class Broken(FakeVocoder):
        def push(self, mel_K_B):
            if pcm is None:
                raise KeyError("no such voice")
            return pcm

    vocoders = [Broken(), FakeVocoder()]
    runtime, _ = make_runtime(num_slots=2, vocoder=lambda: vocoders.pop(0))
    with runtime:
        broken, other = runtime.open_session(), runtime.open_session()
        runtime.run_ticks(2)
        with pytest.raises(errors.SessionFault, match=words):
            broken.poll()
        assert len(speech(other)) == 2 * N
        assert runtime.report()["faults"] == 1


def test_a_vocoder_that_cannot_begin_ends_only_its_session() -> None:
    class Broken(FakeVocoder):
        resets = 0

        def reset(self) -> None:
            super().reset()
            self.resets += 1  # the first is of its making
            if self.resets in (2, 4):
                raise KeyError("no such voice")

    vocoders: list[FakeVocoder] = [FakeVocoder(), Broken()]
    runtime, _ = make_runtime(num_slots=2, vocoder=lambda: vocoders.pop(0))
    with runtime:
        other = runtime.open_session()
        runtime.run_ticks(1)
        for first_ticks in (0, 2):  # as it is let in, and as it is interrupted
            broken = runtime.open_session()
            runtime.run_ticks(first_ticks)
            broken.interrupt(0.0)
            runtime.run_ticks(1)
            with pytest.raises(errors.SessionFault, match="no such voice"):
                broken.push_text("x")
        runtime.run_ticks(1)
        assert len(speech(other)) == 6 * N
        assert runtime.report()["faults"] == 2


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_what_comes_while_a_skipped_window_passes_a_paused_session(kind: str) -> None:
    """A client's push between what raises the bound and what closes the windows below it."""
    runtime, _ = make_runtime()
    with runtime, runtime.open_session() as session:
        runtime.run_ticks(2)
        session.pause()
        runtime.run_ticks(1)
        seat = session._seat
        pass_by = seat.inbox.pass_by

        def pushed(window: int) -> tuple[int, int]:
            t = (seat.open_window + 15) * 0.2
            if kind == "audio":
                session.push_audio(noise(0), t)
            else:
                session.push_video(np.zeros((40, 40, 3), np.uint8), t)
            return pass_by(window)

        seat.inbox.pass_by = pushed
        assert runtime.clock is not None
        runtime.clock.advance(3 * 200_000_000)
        runtime.run_ticks(1)
        session.push_text("x")  # it lives


def test_a_session_whose_window_cannot_be_taken_ends_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, model = make_runtime(num_slots=3)
    with runtime:
        sessions = [runtime.open_session() for _ in range(3)]
        runtime.run_ticks(1)

        def take(*_: object) -> None:
            raise RuntimeError("a ring is damaged")

        monkeypatch.setattr(sessions[1]._seat, "take", take)
        runtime.run_ticks(2)
        with pytest.raises(errors.SessionFault, match="a ring is damaged"):
            sessions[1].poll()
        assert [len(speech(sessions[i])) for i in (0, 2)] == [3 * N, 3 * N]
        assert [row.slot for row in model.heard[-1]] == [0, 2]
        assert runtime.report()["faults"] == 1


def test_who_does_not_poll_loses_its_own_newest_output_only() -> None:
    runtime, _ = make_runtime(num_slots=2, output_queue_ticks=5)
    with runtime:
        slow, quick = runtime.open_session(), runtime.open_session()
        times = []
        for _ in range(40):
            runtime.run_ticks(1)
            times += [out.t for out in quick.poll()]
        np.testing.assert_allclose(times, 0.2 * np.arange(1, 41))
        kept = [out.t for out in slow.poll()]
        assert 5 <= len(kept) < 40
        np.testing.assert_allclose(kept, 0.2 * np.arange(1, len(kept) + 1))
        assert slow.stats.lost_outputs == 40 - len(kept) == runtime.report()["lost_outputs"]
        assert quick.stats.lost_outputs == 0
        runtime.run_ticks(1)
        assert [out.t for out in slow.poll()] == pytest.approx([8.2])


def test_an_overrun_is_counted_and_skipped_never_replayed() -> None:
    late_ns = {2: 2 * PERIOD_NS + 1, 4: PERIOD_NS // 2, 5: PERIOD_NS + 1}  # of the n-th tick run
    model = FakeModel(on_tick=lambda n: runtime.clock.advance(late_ns.get(n, 0)))
    runtime, _ = make_runtime(model)
    with runtime, runtime.open_session() as session:
        pcm = np.arange(12 * N, dtype=np.float32) + 1
        session.push_audio(pcm, 0.0)
        for t in (0.6, 0.61, 0.8):  # in windows 3 and 4
            session.push_video(np.zeros((40, 40, 3), np.uint8), t)
        runtime.run_ticks(9)
        outputs = session.poll()
        report, stats = runtime.report(), session.stats
    records = runtime.metrics.records()
    # Tick 2 takes 400 ms and a little: tick 3, due by 800 ms, is over by then; tick 4 runs late.
    # The sixth that runs, tick 6, takes a little over its 200 ms: missed, but nothing is skipped.
    ran = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert records["tick"].tolist() == ran
    assert records["skipped"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert records["missed"].tolist() == [tick in (2, 6) for tick in ran]
    assert (report["ticks"], report["skipped"], report["misses"]) == (9, 1, 3)
    assert (records["woke_ns"] >= records["scheduled_ns"]).all()
    assert records["scheduled_ns"].tolist() == [(tick + 1) * PERIOD_NS for tick in ran]

    for tick, rows in zip(ran, model.heard, strict=True):
        np.testing.assert_array_equal(rows[0].pcm, pcm[tick * N : (tick + 1) * N])
        assert rows[0].missing == (tick == 4)
    assert (stats.ticks, stats.skipped_ticks, stats.missing_windows) == (9, 1, 1)
    assert (stats.dropped_samples, stats.shed_frames) == (N, 2)
    assert (report["dropped_samples"], report["shed_frames"]) == (N, 2)
    np.testing.assert_allclose([out.t for out in outputs], [0.2 * (tick + 1) for tick in ran])


def test_a_long_overrun_drops_whole_windows_of_every_session() -> None:
    model = FakeModel(on_tick=lambda n: runtime.clock.advance(50 * PERIOD_NS * (n == 1)))
    runtime, _ = make_runtime(model, num_slots=2)
    with runtime:
        one, two = runtime.open_session(), runtime.open_session()
        for session in (one, two):
            session.push_audio(noise(1, 16), 0.0)
        runtime.run_ticks(2)
        assert one.open_t == 0.4  # nothing ran since: the next tick decides what is skipped
        runtime.run_ticks(1)
        assert runtime.metrics.records()["tick"].tolist() == [0, 1, 51]
        assert one.open_t == two.open_t == 10.4
        assert one.stats.dropped_samples == two.stats.dropped_samples == 14 * N
        assert runtime.report()["dropped_samples"] == 28 * N
        one.push_audio(noise(2, 16), one.open_t)
        runtime.run_ticks(1)
    assert runtime.report()["misses"] == 1 + 49
    assert [row.missing for row in model.heard[2]] == [True, True]
    assert not model.heard[2][0].pcm.any()
    np.testing.assert_array_equal(model.heard[3][0].pcm, noise(2, 16)[:N])


def test_slots_run_out_and_come_back() -> None:
    runtime, _ = make_runtime(num_slots=2)
    with runtime:
        kept, closed = runtime.open_session(), runtime.open_session()
        with pytest.raises(errors.ResourceExhausted, match="all 2 slots are taken, 0 of") as caught:
            runtime.open_session()
        assert (caught.value.in_use, caught.value.closing, caught.value.capacity) == (2, 0, 2)
        assert runtime.report()["sessions_refused"] == 1
        closed.close()
        session = runtime.open_session()
        runtime.run_ticks(1)
        assert len(speech(session)) == len(speech(kept)) == N
        del session  # a session nobody can reach gives its slot back
        gc.collect()
        runtime.open_session()


def test_a_thousand_sessions_on_three_slots() -> None:
    runtime, model = make_runtime(num_slots=3)
    expected = []
    with runtime:
        open_sessions: list[Session] = []
        for number in range(1000):
            if len(open_sessions) == 3:
                open_sessions.pop(number % 3).close()
            session = runtime.open_session()
            session.push_text([number // 256, number % 256])
            open_sessions.append(session)
            expected.append([number // 256, number % 256])
            if number % 2:
                runtime.run_ticks(1)
        runtime.run_ticks(1)
        assert runtime.report()["sessions_opened"] == 1000
        assert all(len(speech(session)) > 0 for session in open_sessions)
    heard = [row.text for rows in model.heard for row in rows if row.text]
    # Once, in order of opening; sessions that closed before their first tick said nothing.
    assert len(heard) > 500
    assert sorted(heard) == [text for text in expected if text in heard]
    assert runtime.report()["rows"] == sum(len(rows) for rows in model.heard)


def test_ten_thousand_ticks_hold_no_more_memory_than_one_thousand() -> None:
    runtime, _ = make_runtime(FakeModel(keep=False, say=lambda tick, slot: [65] * 4))
    pcm = noise(3)
    with runtime, runtime.open_session() as session:

        def run(num_ticks: int) -> int:
            for _ in range(num_ticks):
                t = session.open_t
                session.push_audio(pcm, t)
                session.push_video(np.zeros((40, 40, 3), np.uint8), t)
                session.push_text([66] * 63)
                runtime.run_ticks(1)
                if len(session.poll()) != 2:
                    raise AssertionError(t)
            gc.collect()
            return sys.getallocatedblocks()

        after_some = run(1000)
        after_all = run(9000)
        assert session.stats.missing_windows == 0
    assert after_all - after_some < 1000  # one object kept per tick would be 9000


@pytest.mark.parametrize("seed", [0, 7])
def test_two_runs_give_the_same_bytes(seed: int) -> None:
    def run(seed: int) -> bytes:
        runtime, _ = make_runtime(num_slots=2, seed=seed)
        with runtime:
            first = runtime.open_session()
            heard = drive(runtime, first, seed=3, ticks=4)
            second = runtime.open_session()
            return heard + drive(runtime, second, seed=4, ticks=4) + speech(first).tobytes()

    assert run(seed) == run(seed)
    assert run(seed) != run(seed + 1)


def test_sessions_draw_from_different_seeds_unless_given_one() -> None:
    runtime, _ = make_runtime(num_slots=3)
    with runtime:
        options = {"seed": 11, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125}
        sessions = [runtime.open_session(), runtime.open_session()]
        sessions.append(runtime.open_session(**options))
        runtime.run_ticks(1)
        sampling = runtime._state.sampling
    assert sampling[2] == options
    assert sampling[0].pop("seed") != sampling[1].pop("seed")
    default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert sampling[0] == sampling[1] == default


def test_a_tick_that_raises_ends_the_loop_and_says_why() -> None:
    def explode(tick: int) -> None:
        if tick == 2:
            raise ZeroDivisionError("tick 2")

    runtime, _ = make_runtime(FakeModel(on_tick=explode))
    with runtime, runtime.open_session() as session:
        with pytest.raises(errors.LoopFailed) as caught:
            runtime.run_ticks(5)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        for call in (
            lambda: session.push_text("x"),
            lambda: runtime.open_session(),
            lambda: runtime.run_ticks(1),
        ):
            with pytest.raises(errors.LoopFailed) as caught:
                call()
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert len(session.poll()) == 2


def test_each_mode_refuses_what_the_other_can() -> None:
    virtual, _ = make_runtime()
    with pytest.raises(errors.NotRunning, match="run_ticks"):
        virtual.start()
    with pytest.raises(errors.InputValueError, match="num_ticks=-1"):
        virtual.run_ticks(-1)
    realtime, _ = make_runtime(realtime=True)
    with pytest.raises(errors.NotRunning, match="start"):
        realtime.run_ticks(1)


def test_the_report_adds_up() -> None:
    runtime, _ = make_runtime(num_slots=2)
    with runtime:
        session = runtime.open_session()
        drive(runtime, session, seed=1, ticks=3)
        other = runtime.open_session()
        runtime.run_ticks(2)
        report = runtime.report()
        assert other.stats.missing_windows == 2
    assert (report["mode"], report["period_ms"], report["ticks"]) == ("virtual", 200, 5)
    assert (report["rows"], report["missing"], report["misses"]) == (7, 4, 0)
    for value in (report["tick_ms"], *report["stages_ms"].values()):
        assert list(value) == ["p50", "p99", "p999", "max"]
        assert 0 <= value["p50"] <= value["p99"] <= value["p999"] <= value["max"]
    assert report["wake_ms"]["max"] == 0.0
    records = runtime.metrics.records()
    assert all(b - a == PERIOD_NS for a, b in pairwise(records["scheduled_ns"]))
    stages = dict(zip(runtime.metrics.stages, records["stage_ns"].T, strict=False))
    assert list(stages) == ["take", "model", "model.think", "publish"]
    parts = stages["take"] + stages["model"] + stages["publish"]
    assert (parts <= records["busy_ns"]).all() and (stages["model.think"] == 1).all()
