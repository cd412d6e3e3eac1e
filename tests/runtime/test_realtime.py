"""The loop in real time, with the C++ tick thread. No limit on how fast: a machine may be busy."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_model import CONFIG, MS40, FakeModel, make_runtime

from tml_runtime import Runtime, Session, errors
from tml_runtime.clock import QuietCollector, garbage_waits
from tml_runtime.session import SpeechOut

FAST = replace(CONFIG, layout=MS40)
PERIOD_NS = 40_000_000
N = MS40.samples_per_tick


def make_live(model: FakeModel | None = None, **options) -> tuple[Runtime, FakeModel]:
    return make_runtime(model or FakeModel(FAST), realtime=True, **options)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def play(session: Session, pcm: np.ndarray) -> None:
    """Push half windows, up to ten windows ahead of the clock; what is late is lost."""
    for start in range(0, len(pcm), N // 2):
        wait_for(lambda at=start: at / 16_000 < session.media_time + 0.4)
        with contextlib.suppress(errors.LateInput):
            session.push_audio(pcm[start : start + N // 2], start / 16_000)


def test_a_live_source_is_heard_window_by_window() -> None:
    runtime, model = make_live(output_queue_ticks=1000)
    pcm = np.arange(30 * N, dtype=np.float32) + 1
    session = runtime.open_session()  # before the start, so that its clock is the runtime's
    assert session.media_time == 0.0
    with runtime:
        play(session, pcm)
        wait_for(lambda: session.open_t > 1.3)
        assert session.media_time > 1.2
    records, outputs = runtime.metrics.records(), session.poll()
    heard = [rows[0] for rows in model.heard[1:]]  # the first is the warm-up on silence

    assert len(heard) == len(records) == len(outputs)
    assert any(not rows.missing for rows in heard)
    for rows, tick, out in zip(heard, records["tick"].tolist(), outputs, strict=True):
        assert isinstance(out, SpeechOut) and out.t == pytest.approx(0.04 * (tick + 1))
        expected = pcm[tick * N : (tick + 1) * N]
        assert rows.missing or (len(expected) == N and (rows.pcm == expected).all())
        assert rows.pcm.min() >= 0.0 and rows.pcm.max() <= pcm.max()  # what is concealed, too


def test_time_is_absolute_and_every_tick_is_accounted_for() -> None:
    stall = {3: 0.13, 8: 0.05}  # seconds
    runtime, _ = make_live(FakeModel(FAST, on_tick=lambda n: time.sleep(stall.get(n, 0.0))))
    session = runtime.open_session()
    with runtime:
        wait_for(lambda: runtime.metrics.count > 16)
    assert session.stats.skipped_ticks >= 2
    records, report = runtime.metrics.records(), runtime.report()
    thread = runtime._thread
    assert thread is not None
    start_ns = thread.start_ns
    assert (records["scheduled_ns"] == start_ns + (records["tick"] + 1) * PERIOD_NS).all()
    assert (records["woke_ns"] >= records["scheduled_ns"]).all()
    assert (records["done_ns"] >= records["woke_ns"]).all()
    late = records["done_ns"] > records["scheduled_ns"] + PERIOD_NS
    assert (records["missed"] == late).all() and late.sum() >= 2
    assert (np.diff(records["tick"]) == records["skipped"][1:] + 1).all()
    assert report["ticks"] + report["skipped"] == records["tick"][-1] + 1 == thread.ticks
    assert report["skipped"] == thread.skipped >= 2
    assert report["misses"] == late.sum() + report["skipped"]
    assert report["mode"] == "realtime" and report["scheduling"] == "default"


def test_clients_on_many_threads() -> None:
    runtime, _ = make_live(num_slots=4, output_queue_ticks=1000)
    failures: list[BaseException] = []

    def talk(number: int) -> None:
        try:
            for _ in range(4):
                with runtime.open_session() as session:
                    for _ in range(10):
                        with contextlib.suppress(errors.LateInput):
                            session.push_audio(np.full(N, 0.5, np.float32), session.open_t + 0.2)
                        session.push_text(f"from {number}")
                        session.poll()
                        time.sleep(0.005)
        except BaseException as error:
            failures.append(error)

    with runtime:
        threads = [threading.Thread(target=talk, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda: runtime.report()["slots_free"] == 4)
    assert failures == []
    assert runtime.report()["sessions_opened"] == 8


def test_stop_is_final_and_gives_back_what_it_borrowed() -> None:
    assert gc.isenabled()
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    runtime, model = make_live(cpu_threads=threads + 1)
    with runtime:
        assert not gc.isenabled() and torch.get_num_threads() == threads + 1
        assert sys.getswitchinterval() == pytest.approx(1e-5)
        with pytest.raises(errors.NotRunning, match="running already"):
            runtime.start()
        session = runtime.open_session()
        wait_for(lambda: session.open_t > 0.0)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert (torch.get_num_threads(), sys.getswitchinterval()) == (threads, interval)
    ticks = model.ticks
    with pytest.raises(errors.NotRunning, match="stopped"):
        session.push_text("x")
    with pytest.raises(errors.NotRunning, match="stopped already"):
        runtime.start()
    assert session.poll() != []
    runtime.stop()
    time.sleep(0.1)
    assert model.ticks == ticks


def test_the_warm_up_leaves_no_trace() -> None:
    runtime, model = make_live(num_slots=2)
    with runtime, runtime.open_session() as session:
        wait_for(lambda: session.stats.ticks > 1)  # so the first is out
        state, output = runtime._state, session.poll()[0]
    assert len(model.heard[0]) == 2  # every slot
    assert state.resets[1] == 1  # after the warm-up; slot 0 again when its session was over
    assert isinstance(output, SpeechOut)
    assert output.pcm[0] == 1.0 + state.sampling[0]["seed"] % 1000  # one missing window, frame 0


def test_a_tick_that_raises_reaches_every_client() -> None:
    def explode(tick: int) -> None:
        if tick == 3:
            raise ZeroDivisionError("tick 3")

    runtime, _ = make_live(FakeModel(FAST, on_tick=explode))
    runtime.start()
    session = runtime.open_session()

    def failed() -> bool:
        try:
            session.push_text("x")
        except errors.LoopFailed as error:
            return isinstance(error.__cause__, ZeroDivisionError)
        except errors.InputBackpressure:
            pass
        return False

    wait_for(failed)
    with pytest.raises(errors.LoopFailed) as caught:
        runtime.stop()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert gc.isenabled()
    runtime.stop()


class Cycle:
    """Garbage that only the collector finds, and says so."""

    def __init__(self, freed: list[int]) -> None:
        self.me, self.freed = self, freed

    def __del__(self) -> None:
        self.freed.append(1)


def test_garbage_waits_for_slack() -> None:
    freed: list[int] = []
    collector = QuietCollector()
    with collector:
        Cycle(freed)
        junk = [[i] for i in range(5000)]  # enough to set off a collection, were it enabled
        assert len(junk) == 5000 and freed == []
        collector.rest(-1)
        assert freed == []
        collector.rest(10_000_000)
        assert freed == [1]
    assert gc.isenabled()


def test_garbage_goes_before_and_after_but_not_within() -> None:
    freed: list[int] = []
    Cycle(freed)
    with garbage_waits():
        assert freed == [1]
        Cycle(freed)
        junk = [[i] for i in range(5000)]
        assert len(junk) == 5000 and freed == [1]
        with garbage_waits():
            assert freed == [1]
        with QuietCollector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_no_tick_collects_while_garbage_waits() -> None:
    freed: list[int] = []
    collector = QuietCollector()
    with collector:
        with garbage_waits():
            Cycle(freed)
            collector.rest(10_000_000)
            assert freed == []
        collector.rest(10_000_000)
        assert freed == [1] and not gc.isenabled()
    assert gc.isenabled()


def test_old_garbage_is_collected_only_if_it_fits() -> None:
    freed: list[int] = []
    collector = QuietCollector()
    with collector:
        kept = Cycle(freed)
        collector.rest(1)
        collector.rest(1)  # now it is in the oldest generation
        del kept
        for _ in range(QuietCollector.FULL_EVERY):
            collector.rest(0)
        assert freed == []  # no slack, nothing
        collector._full_ns = 1_000_000_000
        collector.rest(3_999_999_999)
        assert freed == []  # it took a second last time
        collector.rest(4_000_000_001)
        assert freed == [1] and collector._full_ns < 1_000_000_000
