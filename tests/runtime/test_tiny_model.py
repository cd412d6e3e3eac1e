"""The loop with a real model, the smallest, and the real vocoder: determinism and isolation."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from tml_runtime import InteractionModel, ModelConfig, Runtime, Session, TurnLayout, errors
from tml_runtime.model import KvBudget
from tml_runtime.session import ActionOut, SpeechOut, TextOut

CONFIG = ModelConfig.preset("tiny", layout=TurnLayout.preset("ms80"))
N = CONFIG.layout.samples_per_tick


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return InteractionModel.random(CONFIG)


def push(session: Session, seed: int, tick: int) -> None:
    rng = np.random.default_rng([seed, tick])
    t = session.open_t
    session.push_audio(rng.normal(0, 0.1, N).astype(np.float32), t)
    if (seed + tick) % 2:
        session.push_video(rng.integers(0, 256, (40, 80, 3), np.uint8), t)
        session.push_text("héllo"[: tick + 1])


def said(outputs: list[SpeechOut | TextOut | ActionOut]) -> list[tuple]:
    return [
        (out.t, out.pcm.tobytes()) if isinstance(out, SpeechOut) else (out.t, out)
        for out in outputs
    ]


def test_a_session_says_the_same_alone_in_company_and_on_a_used_slot(
    model: InteractionModel,
) -> None:
    def run(others_before: int) -> list[tuple]:
        with Runtime(model, num_slots=3, realtime=False) as runtime:
            others = [runtime.open_session(seed=100 + i) for i in range(others_before)]
            for tick in range(others_before):
                for i, other in enumerate(others):
                    push(other, i + 1, tick)
                runtime.run_ticks(1)
            if others:
                others.pop(0).close()  # whose slot the session gets
            session = runtime.open_session(seed=1)
            for tick in range(3):
                push(session, 0, tick)
                for i, other in enumerate(others):
                    push(other, i + 7, tick)
                runtime.run_ticks(1)
            return said(session.poll())

    alone = run(0)
    assert run(0) == alone
    assert run(3) == alone
    times = [t for t, out in alone if isinstance(out, bytes)]
    np.testing.assert_allclose(times, [0.08, 0.16, 0.24])


def disturb(runtime: Runtime, others: list[Session], rng: np.random.Generator, tick: int) -> None:
    """What others do in a service: come with a prompt or in vain, push, interrupt, pause, leave."""
    prompt = [5] * int(rng.integers(1, 40)) if rng.random() < 0.7 else None
    with suppress(errors.ResourceExhausted):
        others.append(runtime.open_session(seed=tick, priority=tick % 3, prompt=prompt))
    for other in list(others):
        what = rng.random()
        if what < 0.15:
            other.poll()
            other.close()
            others.remove(other)
        elif what < 0.3:
            other.interrupt(max(0.0, other.media_time - 0.1))
        elif what < 0.4:
            other.pause()
        elif what < 0.5:
            other.resume()
        else:
            push(other, int(rng.integers(100)), int(rng.integers(20)))


def test_a_session_says_the_same_in_a_busy_service(model: InteractionModel) -> None:

    def run(busy: bool) -> list[tuple]:
        rng, others = np.random.default_rng(7), []
        pages = 1 + 3 * sum(KvBudget().pages().values())  # fewer than slots
        with Runtime(model, num_slots=4, realtime=False, global_pages=pages) as runtime:
            session = runtime.open_session(seed=1, priority=9)
            for tick in range(14):
                push(session, 0, tick)
                if tick == 6:
                    session.interrupt(session.media_time - 0.1)
                if busy:
                    disturb(runtime, others, rng, tick)
                runtime.run_ticks(1)
            report = runtime.report()
            assert not busy or (report["sessions_opened"] > 4 and report["sessions_refused"] > 0)
            return said(session.poll())

    assert run(busy=True) == run(busy=False)


def test_absurdly_loud_input_harms_no_other_session(model: InteractionModel) -> None:
    def run(loud: bool) -> list[tuple]:
        with Runtime(model, num_slots=2, realtime=False) as runtime:
            sessions = [runtime.open_session(seed=1), runtime.open_session(seed=2)]
            for tick in range(2):
                push(sessions[1], 3, tick)
                if loud and tick == 0:
                    sessions[0].push_audio(np.full(N, 3e38, np.float32), 0.0)
                runtime.run_ticks(1)
            try:
                assert all(
                    np.isfinite(o.pcm).all() for o in sessions[0].poll() if hasattr(o, "pcm")
                )
            except errors.SessionFault:
                assert loud
            return said(sessions[1].poll())

    assert run(loud=True) == run(loud=False)


def test_a_record_tells_what_a_tick_appended(model: InteractionModel) -> None:
    with Runtime(model, num_slots=2, realtime=False) as runtime:
        session = runtime.open_session(seed=1)
        session.push_audio(np.zeros(N, np.float32), 0.0)
        session.push_text([1, 2, 3])
        runtime.run_ticks(1)
        other = runtime.open_session(seed=2)
        session.push_video(np.zeros((40, 80, 3), np.uint8), session.open_t)
        runtime.run_ticks(1)
        report = runtime.report()
        del other
    layout = CONFIG.layout
    rows, columns = CONFIG.patch.grid(40, 80)
    first = [0, 3, layout.audio_tokens, 0, layout.num_steps]
    # Nothing was heard in the second, of which each session is told by a token.
    second = [0, 2, 2 * layout.audio_tokens, rows * columns, 2 * layout.num_steps]
    assert runtime.metrics.records()["tokens"].tolist() == [first, second]
    assert list(report["tokens"].values()) == np.add(first, second).tolist()
