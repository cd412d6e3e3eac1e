"""What a session may ask for beside ticks: to be interrupted, to pause, to read a prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import CONFIG, SILENCE, FakeModel, make_runtime

from tml_kernels.kv_cache import OutOfPages
from tml_runtime import InteractionModel, ModelConfig, Runtime, Session, errors
from tml_runtime.graph import TickGraphs
from tml_runtime.model import KvBudget
from tml_runtime.model.buffers import Bucket
from tml_runtime.recall import PAST_TICKS
from tml_runtime.session import SpeechOut, TextOut
from tml_runtime.upkeep import PATIENCE, READ_TOKENS

N = CONFIG.layout.samples_per_tick
PERIOD_NS = 200_000_000


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, N).astype(np.float32)


def hear(runtime: Runtime, *sessions: Session, ticks: int = 1) -> None:
    for _ in range(ticks):
        for session in sessions:
            session.push_audio(noise(round(session.open_t * 5)), session.open_t)
        runtime.run_ticks(1)


def talker() -> FakeModel:
    """Says 65, 66, 67, 68 in every tick."""
    return FakeModel(say=lambda tick, slot: [65, 66, 67, 68])


# Interruptions


def test_nothing_said_before_an_interruption_is_polled_after_it() -> None:
    runtime, _ = make_runtime(talker())
    with runtime, runtime.open_session() as session:
        hear(runtime, session, ticks=3)
        assert session.interrupt(0.3) == session.epoch == 1
        assert session.poll() == []
        hear(runtime, session)
        outputs = session.poll()
        assert [(type(out), out.epoch) for out in outputs] == [(SpeechOut, 1), (TextOut, 1)]
        stats = session.stats
        assert (stats.fenced_outputs, stats.interruptions, stats.unforgotten) == (3, 1, 0)


def test_output_of_a_tick_that_was_running_is_fenced_too() -> None:
    model = talker()
    runtime, _ = make_runtime(model)
    with runtime, runtime.open_session() as session:
        model.on_tick = lambda tick: session.interrupt(0.0) if tick == 1 else None
        hear(runtime, session, ticks=2)
        assert session.poll() == []
        hear(runtime, session)
        assert {out.epoch for out in session.poll()} == {1}


@pytest.mark.parametrize(
    ("played_t", "position", "said"),
    [
        (0.0, 0, [[], [], []]),
        (0.2, 0, [[], [], []]),  # tick 0 is heard from 0.2 s on
        (0.249, 0, [[], [], []]),
        (0.25, 0, [[65], [], []]),
        (0.4, 1, [[], []]),
        (0.55, 1, [[65, 66, 67], []]),
        (0.75, 2, [[65, 66, 67]]),
        (0.8, None, []),
        (9.0, None, []),
        (1e300, None, []),  # infinitely many ns
        (-1e300, 0, [[], [], []]),
    ],
)
def test_the_model_remembers_what_was_played(
    played_t: float, position: int | None, said: list[list[int]]
) -> None:
    runtime, model = make_runtime(talker())
    with runtime, runtime.open_session() as session:
        hear(runtime, session, ticks=3)
        memory = runtime._state.memory[0]
        session.interrupt(played_t)
        assert model.replayed == []  # the client's thread does not touch the model
        runtime.run_ticks(0)
        hear(runtime, session)
    padded = [(tokens + 4 * [SILENCE])[:4] for tokens in said]
    assert model.replayed == ([] if position is None else [(0, position, padded)])
    # What was heard is remembered all the same, here bit for bit.
    last = float(np.float64(noise(3).sum()))
    assert runtime._state.memory[0] == 0.5 * memory + last


def test_sound_that_was_not_played_is_quiet_though_no_word_was_said() -> None:
    class Watched(FakeModel):
        def replay(self, state, slot, position, past):
            self.mel_M_B = past[0].mel_M_B
            return super().replay(state, slot, position, past)

    model = Watched()
    runtime, _ = make_runtime(model)
    with runtime, runtime.open_session() as session:
        hear(runtime, session)
        session.interrupt(0.25)  # one of four output steps
        hear(runtime, session)
    quiet = CONFIG.layout.dmel.level_min
    assert (model.mel_M_B[0] != quiet).all() and (model.mel_M_B[1:] == quiet).all()


def test_pictures_and_text_that_came_meanwhile_are_remembered_too() -> None:
    memories = []
    for interrupted in (False, True):
        runtime, _ = make_runtime(talker())
        with runtime, runtime.open_session() as session:
            for n in range(3):
                session.push_video(np.full((40, 40, 3), n + 1, np.uint8), session.open_t)
                session.push_text([n + 1])
                hear(runtime, session)
            if interrupted:
                session.interrupt(0.0)
            hear(runtime, session)
            memories.append(runtime._state.memory[0])
            assert session.stats.interruptions == interrupted
    assert memories[0] == memories[1]


def test_half_a_character_of_before_an_interruption_begins_none_after_it() -> None:
    said = [[SILENCE, SILENCE, SILENCE, 0xC3], [0xA9, SILENCE, SILENCE, SILENCE]]
    runtime, _ = make_runtime(FakeModel(say=lambda tick, slot: said[tick]))
    with runtime, runtime.open_session() as session:
        hear(runtime, session)
        assert TextOut("", (0xC3,), 0.35) in session.poll()
        session.interrupt(0.4)
        hear(runtime, session)
        assert TextOut("\ufffd", (0xA9,), 0.4, epoch=1) in session.poll()


def test_a_second_interruption_goes_on_from_what_the_first_left() -> None:
    runtime, model = make_runtime(talker())
    with runtime, runtime.open_session() as session:
        hear(runtime, session, ticks=2)
        session.interrupt(0.3)  # two steps of tick 0
        hear(runtime, session)
        session.interrupt(0.7)  # of tick 2 two; what came before is as it was
        hear(runtime, session)
        session.interrupt(0.3)
        hear(runtime, session)
    quiet = [SILENCE] * 4
    two = [65, 66, SILENCE, SILENCE]
    assert [ticks for _, _, ticks in model.replayed] == [
        [two, quiet],
        [two],
        [quiet, quiet],  # ticks 0 and 1 are so already
    ]


def test_the_earlier_of_two_interruptions_between_ticks_counts() -> None:
    runtime, model = make_runtime(talker())
    with runtime, runtime.open_session() as session:
        hear(runtime, session, ticks=2)
        assert (session.interrupt(0.25), session.interrupt(0.5)) == (1, 2)
        hear(runtime, session)
        assert model.replayed[0][2][0] == [65, SILENCE, SILENCE, SILENCE]
        assert session.stats.interruptions == 1  # the model was told once
        assert {out.epoch for out in session.poll()} == {2}


def test_no_more_than_the_newest_ticks_are_taken_back() -> None:
    runtime, model = make_runtime(talker())
    with runtime, runtime.open_session() as session:
        hear(runtime, session, ticks=PAST_TICKS + 5)
        session.interrupt(0.0)
        hear(runtime, session)
    assert [(position, len(ticks)) for _, position, ticks in model.replayed] == [(5, PAST_TICKS)]


def test_what_is_silent_already_is_not_replayed() -> None:
    """So a client that interrupts in every tick costs one pass over the layers, not eight."""
    runtime, model = make_runtime(talker())
    with runtime, runtime.open_session() as session:
        for _ in range(PAST_TICKS + 3):
            hear(runtime, session)
            session.interrupt(0.0)
        hear(runtime, session)
        memory = runtime._state.memory[0]
    assert [len(ticks) for _, _, ticks in model.replayed] == [1] * (PAST_TICKS + 3)
    other, _ = make_runtime(talker())
    with other, other.open_session() as session:
        hear(other, session, ticks=PAST_TICKS + 4)
        assert other._state.memory[0] == memory


def test_what_the_cache_cannot_follow_stays_and_is_counted() -> None:
    runtime, _ = make_runtime(talker())
    with runtime, runtime.open_session() as session:
        hear(runtime, session, ticks=3)
        runtime._state.ends[0].clear()
        memory = runtime._state.memory[0]
        session.interrupt(0.0)
        hear(runtime, session)
        assert session.stats.unforgotten == 1
        assert runtime._state.memory[0] == 0.5 * memory + float(np.float64(noise(3).sum()))
        assert {out.epoch for out in session.poll()} == {1}  # it is fenced in any case


def test_a_replay_that_fails_ends_its_session_only() -> None:
    class Broken(FakeModel):
        def replay(self, state, slot, position, past):
            raise OutOfPages("none left")

    runtime, _ = make_runtime(Broken(say=lambda tick, slot: [65] * 4), num_slots=2)
    with runtime:
        broken, other = runtime.open_session(), runtime.open_session()
        hear(runtime, broken, other, ticks=2)
        broken.interrupt(0.0)
        other.poll()
        runtime.run_ticks(1)
        with pytest.raises(errors.SessionFault, match="none left"):
            broken.poll()
        assert len(other.poll()) == 2
        assert runtime.report()["faults"] == 1


@pytest.mark.parametrize("played_t", [float("nan"), "0.2", True, None])
def test_a_bad_playback_position_interrupts_nothing(played_t: object) -> None:
    runtime, model = make_runtime(talker())
    with runtime, runtime.open_session() as session:
        hear(runtime, session)
        with pytest.raises((errors.InputTypeError, errors.InputValueError), match="t: expected"):
            session.interrupt(played_t)  # type: ignore[arg-type]
        hear(runtime, session)
        assert (session.epoch, model.replayed, len(session.poll())) == (0, [], 4)


# Pauses


def test_a_paused_session_sits_ticks_out_and_goes_on() -> None:
    runtime, model = make_runtime(talker(), num_slots=2)
    with runtime:
        paused, other = runtime.open_session(), runtime.open_session()
        hear(runtime, paused, other, ticks=2)
        paused.pause()
        paused.push_audio(noise(1), paused.open_t)
        paused.poll()
        runtime.run_ticks(3)
        assert runtime._state.away == {0}
        assert (paused.poll(), paused.open_t, paused.media_time) == ([], 1.0, 1.0)
        paused.resume()
        paused.push_audio(noise(5), 1.0)
        runtime.run_ticks(2)
        assert [out.t for out in paused.poll() if isinstance(out, SpeechOut)] == [1.2, 1.4]
        stats = paused.stats
    assert [len(rows) for rows in model.heard] == [2, 2, 1, 1, 1, 2, 2]
    again = model.heard[5][0]
    assert (again.slot, again.missing) == (0, True)
    np.testing.assert_array_equal(again.pcm, noise(5))
    assert (stats.ticks, stats.absent_ticks, stats.skipped_ticks) == (4, 3, 0)
    assert stats.dropped_samples == N


def test_keys_are_put_away_only_where_they_were_seen_to_fit() -> None:
    runtime, _ = make_runtime(num_slots=2)
    put_away = runtime._state.put_away

    def slowly(slot: int) -> None:
        put_away(slot)
        runtime.clock.advance(PERIOD_NS // 2)

    runtime._state.put_away = slowly
    deadline(runtime, left_ns=PERIOD_NS)
    with runtime:
        first, second = runtime.open_session(), runtime.open_session()
        runtime.run_ticks(1)
        first.pause()
        runtime.run_ticks(1)
        second.pause()
        runtime.run_ticks(1)
        assert runtime._state.away == {0}  # the second would take all of what there is
        runtime.run_ticks(1)
        assert runtime._state.away == {0, 1}  # a little less, by now


def test_who_floods_a_paused_session_fills_its_own_bounds_only() -> None:
    runtime, _ = make_runtime()
    with runtime, runtime.open_session() as session:
        session.pause()
        for _ in range(50):
            for t in (session.open_t, session.open_t + 0.2):
                session.push_audio(noise(1), t)
                session.push_video(np.zeros((40, 40, 3), np.uint8), t)
            runtime.run_ticks(1)
        assert session.stats.shed_frames == 50 * 2 - 1  # of the last window's two, one is to come
        session.close()


# Prompts


def deadline(runtime: Runtime, left_ns: int) -> None:
    """From here on each tick leaves so much, on the virtual clock too."""
    upkeep, clock = runtime._upkeep, runtime.clock
    rest = type(upkeep).rest
    upkeep.rest = lambda seats, tick, end_ns: rest(  # type: ignore[method-assign]
        upkeep, seats, tick, clock.now_ns() + left_ns
    )


def test_a_prompt_is_read_before_anything_is_heard() -> None:
    runtime, model = make_runtime(num_slots=2, budget=KvBudget(anchor=200))
    ids = [token % 250 for token in range(2 * READ_TOKENS + 1)]
    with runtime:
        session = runtime.open_session(prompt=ids)
        other = runtime.open_session(prompt="hi", priority=2)
        runtime.run_ticks(1)  # a virtual clock leaves all the time there is, to one piece a tick
        assert (session.stats.absent_ticks, other.stats.absent_ticks) == (1, 1)
        runtime.run_ticks(3)
        assert [out.t for out in session.poll()] == [pytest.approx(0.8)]
        assert [out.t for out in other.poll()] == pytest.approx([0.4, 0.6, 0.8])
        expected = 0.0
        for token in ids:
            expected = 0.5 * expected + token
        assert runtime._state.ends[0][len(ids)] == expected
        assert runtime._state.ends[1][2] == 0.5 * ord("h") + ord("i")
        assert runtime._state.priority == [0, 2]
    assert [[row.slot for row in rows] for rows in model.heard] == [[1], [1], [0, 1]]
    assert model.heard[2][0].missing


def test_a_prompt_cannot_be_taken_back() -> None:
    runtime, model = make_runtime(talker())
    with runtime, runtime.open_session(prompt="hi") as session:
        runtime.run_ticks(3)
        session.interrupt(0.0)
        runtime.run_ticks(1)
    assert [position for _, position, _ in model.replayed] == [2]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [([1] * 65, "65 tokens, but KvBudget.anchor=64"), ([-1], "-1"), (b"hi", "bytes"), (5, "5")],
)
def test_a_bad_prompt_takes_no_slot(prompt: object, says: str) -> None:
    runtime, _ = make_runtime()
    with runtime:
        with pytest.raises((errors.InputTypeError, errors.InputValueError), match=says):
            runtime.open_session(prompt=prompt)  # type: ignore[arg-type]
        runtime.open_session()


def test_a_prompt_that_finds_no_time_ends_its_session() -> None:
    runtime, _ = make_runtime(num_slots=2)
    with runtime:
        waiting, other = runtime.open_session(prompt="hi"), runtime.open_session()
        deadline(runtime, left_ns=0)
        runtime.run_ticks(PATIENCE)
        assert waiting.poll() == []
        other.poll()
        runtime.run_ticks(2)
        with pytest.raises(errors.SessionFault, match="2 tokens of the prompt found no time"):
            waiting.poll()
        assert len(other.poll()) == 2
        assert runtime.report()["faults"] == 1


def test_a_prompt_that_is_read_slowly_is_read() -> None:
    """Patience is with one piece: a long prompt may take longer than that."""
    runtime, _ = make_runtime(budget=KvBudget(anchor=PATIENCE * READ_TOKENS))
    with runtime, runtime.open_session(prompt=[1] * (3 * READ_TOKENS)) as session:
        for _ in range(3):
            deadline(runtime, left_ns=0)
            runtime.run_ticks(PATIENCE - 1)
            deadline(runtime, left_ns=PERIOD_NS)
            runtime.run_ticks(1)
        assert session.poll() == []
        runtime.run_ticks(1)
        assert len(session.poll()) == 1


def test_a_piece_that_once_took_long_holds_up_no_prompt_for_ever() -> None:
    """One that is too long for any tick, as the first is that compiles something."""

    class Slow(FakeModel):
        def read(self, state, slot, ids):
            super().read(state, slot, ids)
            runtime.clock.advance(costs.pop())

    costs = [0, 0, 0, 5 * PERIOD_NS]
    runtime, _ = make_runtime(Slow())
    deadline(runtime, left_ns=PERIOD_NS)
    waited = []
    with runtime:
        for _ in range(4):
            with runtime.open_session(prompt="hi") as session:
                for _ in range(PATIENCE // 2):
                    runtime.run_ticks(1)
                    session.poll()
                assert session.stats.ticks > 0
                waited.append(session.stats.absent_ticks)
    assert costs == []
    assert waited == [1, 37, 1, 1]  # 5 * (15 / 16) ** 36 < 1 / 2


# With the model itself


def test_a_real_session_forgets_what_was_not_played() -> None:
    """It says the same as one that heard the same and whose speech was cut off as it was said."""
    model = InteractionModel.random(ModelConfig.preset("tiny"))
    spoken = []
    for played_t in (0.5, 0.5, 5.0):
        with Runtime(model, realtime=False) as runtime:
            session = runtime.open_session(seed=3, prompt="You are kind.")
            hear(runtime, session, ticks=4)
            session.interrupt(played_t)
            hear(runtime, session, ticks=2)
            speech = [out.pcm for out in session.poll() if isinstance(out, SpeechOut)]
            spoken.append(np.concatenate(speech))
            assert (session.stats.interruptions, session.stats.unforgotten) == (1, 0)
            runtime._state.cache.check_invariants()
    np.testing.assert_array_equal(spoken[0], spoken[1])
    assert np.abs(spoken[0] - spoken[2]).max() > 1e-3


@pytest.mark.parametrize("when", ["before", "during"])
def test_who_interrupts_and_pauses_is_forgotten_in_time(when: str) -> None:
    """The cache remembers ends of ticks for seconds, and a pause may last for minutes."""
    model = InteractionModel.random(ModelConfig.preset("tiny"))
    with Runtime(model, num_slots=2, realtime=False) as runtime:
        session, other = runtime.open_session(seed=3), runtime.open_session()
        hear(runtime, session, other, ticks=6)
        if when == "before":
            session.interrupt(0.9)
        session.pause()
        hear(runtime, other, ticks=2)
        if when == "during":
            session.interrupt(0.9)
            hear(runtime, other)
        assert runtime._state.cache.stats().suspended == 1
        hear(runtime, other, ticks=20)
        session.resume()
        hear(runtime, session, other)
        assert (session.stats.interruptions, session.stats.unforgotten) == (1, 0)
        runtime._state.cache.check_invariants()


def test_pictures_that_a_tick_had_no_shapes_for_do_not_lose_the_place() -> None:
    """A replay may append more than the tick did; the next one begins where it ended."""
    model = InteractionModel.random(ModelConfig.preset("tiny"))
    with Runtime(model, realtime=False) as runtime, runtime.open_session(seed=3) as session:
        TickGraphs(model, runtime._state, buckets=[Bucket(1, 40, 0)], mode="eager")
        for _ in range(4):
            for _ in range(2):
                session.push_video(np.zeros((40, 40, 3), np.uint8), session.open_t)
                hear(runtime, session)
            assert runtime.report()["shed_frames"] > 0
            session.interrupt(0.0)
            hear(runtime, session)
            seat = runtime._slots.seats()[0]
            assert seat.position == runtime._state.length(0)
        assert (session.stats.interruptions, session.stats.unforgotten) == (4, 0)
        runtime._state.cache.check_invariants()


def test_a_real_session_pauses_and_goes_on() -> None:
    model = InteractionModel.random(ModelConfig.preset("tiny"))
    with Runtime(model, num_slots=2, realtime=False) as runtime:
        session, other = runtime.open_session(), runtime.open_session()
        hear(runtime, session, other, ticks=2)
        session.pause()
        other.poll()
        hear(runtime, other, ticks=2)
        assert runtime._state.cache.stats().suspended == 1
        session.resume()
        hear(runtime, session, other, ticks=1)
        assert runtime._state.cache.stats().suspended == 0
        assert len(session.poll()) > 0
        runtime._state.cache.check_invariants()


def test_keys_in_fp8_serve_all_that_a_session_may_ask() -> None:
    model = InteractionModel.random(ModelConfig.preset("tiny"))
    fp8 = torch.float8_e4m3fn
    with Runtime(model, realtime=False, page_dtype=fp8) as runtime:
        assert runtime._state.groups[0].pages.k_pages_L_P_G_R_C.dtype == fp8
        session = runtime.open_session(prompt="Hello.")
        hear(runtime, session, ticks=3)  # in the first, the prompt is read
        session.interrupt(0.5)
        hear(runtime, session)
        session.pause()
        runtime.run_ticks(1)
        session.resume()
        hear(runtime, session)
        assert (session.stats.ticks, session.stats.unforgotten) == (4, 0)
        assert all(np.isfinite(out.pcm).all() for out in session.poll() if hasattr(out, "pcm"))
        runtime._state.cache.check_invariants()
    with pytest.raises(errors.InputValueError, match=r"page_dtype=torch\.int8"):
        Runtime(model, page_dtype=torch.int8)
    half = InteractionModel.random(ModelConfig.preset("tiny"), dtype=torch.float16)
    with pytest.raises(errors.InputValueError, match="not of a float16 model"):
        Runtime(half, realtime=False, page_dtype=torch.float8_e4m3fn)
