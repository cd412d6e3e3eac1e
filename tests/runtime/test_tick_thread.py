"""The tick thread on the real clock. Timings are reported, never asserted: what is asserted is that
every tick number is accounted for exactly once and every scheduled time is exact."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from tml_runtime import _tick
from tml_runtime._tick import TickRecord, TickThread, now_ns

MS = 1_000_000


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came"
        time.sleep(0.001)


def check_account(thread: TickThread, records: list[TickRecord], period: int) -> None:
    """Every tick that is over is in `records` once: done, or missed."""
    done, missed = [], []
    for r in records:
        missed += range(r.tick - r.skipped, r.tick)
        (missed if r.missed else done).append(r.tick)
        assert r.scheduled_ns == thread.start_ns + (r.tick + 1) * period
        assert r.scheduled_ns <= r.woke_ns < r.scheduled_ns + period  # else it were skipped
        assert r.woke_ns <= r.done_ns
    assert sorted(done + missed) == list(range(thread.ticks))
    assert len(missed) == thread.misses
    assert sum(r.skipped for r in records) == thread.skipped
    assert thread.records_dropped == 0
    assert [r.tick for r in records] == sorted(r.tick for r in records)


def test_clock_is_monotonic() -> None:
    before = time.monotonic_ns()
    now = now_ns()
    assert before <= now <= time.monotonic_ns()


def test_python_step() -> None:
    seen: list[int] = []
    local = threading.local()

    def step(tick: int) -> None:
        local.count = getattr(local, "count", 0) + 1  # one thread state for all ticks
        seen.append(tick)
        assert local.count == len(seen)

    thread = TickThread(step, 5 * MS)
    assert (thread.start_ns, thread.ticks, thread.running) == (0, 0, False)
    assert thread.scheduling == "not started"
    thread.start()
    assert thread.running
    records: list[TickRecord] = []
    while len(seen) < 40:
        time.sleep(0.01)
        records += thread.drain()
    thread.stop()
    records += thread.drain()
    assert not thread.running
    assert [r.tick for r in records] == seen
    check_account(thread, records, 5 * MS)
    assert thread.drain() == []


def test_beside_a_thread_that_burns_python(record_property: Callable[[str, object], None]) -> None:
    burning = True

    def burn() -> None:
        while burning:
            sum(range(100))

    burner = threading.Thread(target=burn)
    burner.start()
    thread = TickThread(lambda tick: None, 10 * MS)
    thread.start()
    wait_for(lambda: thread.ticks >= 100)
    thread.stop()
    burning = False
    burner.join()
    records = thread.drain()
    check_account(thread, records, 10 * MS)
    late_us = sorted((r.woke_ns - r.scheduled_ns) / 1000 for r in records)
    step_us = sorted((r.done_ns - r.woke_ns) / 1000 for r in records)
    for name, values in (("wake_error_us", late_us), ("step_with_gil_us", step_us)):
        for label, at in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
            value = values[min(len(values) - 1, int(at * len(values)))]
            record_property(f"{name}_{label}", round(value, 1))


def test_overrun_is_skipped_and_counted() -> None:
    period = 20 * MS

    def step(tick: int) -> None:
        if tick == 2:
            time.sleep(2.5 * period / 1e9)

    thread = TickThread(step, period)
    thread.start()
    wait_for(lambda: thread.ticks >= 8)
    thread.stop()
    records = thread.drain()
    check_account(thread, records, period)
    by_tick = {r.tick: r for r in records}
    if 2 in by_tick:  # unless the machine itself slept through it
        assert by_tick[2].missed
        assert 3 not in by_tick
    assert thread.misses >= 2
    assert thread.skipped >= 1


def test_records_are_bounded_and_drops_counted() -> None:
    thread = TickThread(lambda tick: None, MS, max_records=1)
    thread.start()
    wait_for(lambda: thread.ticks - thread.skipped >= 5)
    thread.stop()
    kept = thread.drain()
    assert len(kept) == 1
    assert len(kept) + thread.records_dropped == thread.ticks - thread.skipped


def test_step_that_raises() -> None:
    error = ValueError("row 3 is NaN")

    def step(tick: int) -> None:
        if tick >= 3:
            raise error

    thread = TickThread(step, 2 * MS)
    thread.start()
    wait_for(lambda: not thread.running)
    records = thread.drain()  # what ran comes first
    assert records[-1].missed
    assert records[-1].tick >= 3
    check_account(thread, records, 2 * MS)
    depths = []
    for call in (thread.drain, thread.stop, thread.drain, thread.stop):
        with pytest.raises(ValueError, match="row 3 is NaN") as caught:
            call()
        assert caught.value is error
        assert caught.traceback[-1].name == "step"
        depths.append(len(caught.traceback))
    assert len(set(depths)) == 1


def test_restart_is_refused() -> None:
    thread = TickThread(lambda tick: None, 5 * MS)
    thread.start()
    with pytest.raises(RuntimeError, match="runs once"):
        thread.start()
    assert thread.running
    thread.stop()
    with pytest.raises(RuntimeError, match="runs once"):
        thread.start()
    never_started = TickThread(lambda tick: None, 5 * MS)
    never_started.stop()
    with pytest.raises(RuntimeError, match="runs once"):
        never_started.start()


def test_stop_is_prompt_in_a_long_period() -> None:
    thread = TickThread(lambda tick: None, 3600 * 1000 * MS)
    thread.start()
    thread.stop()  # returns before the hour is over
    assert (thread.ticks, thread.running) == (0, False)


def test_stop_from_many_threads_at_once() -> None:
    seen: list[int] = []
    thread = TickThread(seen.append, MS)
    thread.start()
    wait_for(lambda: len(seen) > 3)
    after: list[int] = []

    def stop() -> None:
        thread.stop()
        after.append(len(seen))

    stoppers = [threading.Thread(target=stop) for _ in range(8)]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join()
    assert set(after) == {len(seen)}  # no step ran once any of them had returned


def test_stop_from_the_step() -> None:
    seen: list[int] = []

    def step(tick: int) -> None:
        seen.append(tick)
        thread.stop()

    thread = TickThread(step, MS)
    thread.start()
    wait_for(lambda: not thread.running)
    thread.stop()
    assert len(seen) == 1


def test_dropping_it_stops_it() -> None:
    seen: list[int] = []
    thread = TickThread(seen.append, MS)
    thread.start()
    wait_for(lambda: len(seen) > 3)
    del thread
    count = len(seen)
    time.sleep(0.02)
    assert len(seen) == count


def test_dropping_it_in_its_own_step() -> None:
    seen: list[int] = []
    holder: list[TickThread] = []
    started = threading.Event()

    def step(tick: int) -> None:
        started.wait()  # the call of start() refers to it too
        holder.clear()
        seen.append(tick)

    step_gone = weakref.ref(step)
    holder.append(TickThread(step, MS))
    holder[0].start()
    started.set()
    del step
    wait_for(lambda: step_gone() is None)
    assert len(seen) == 1


@pytest.mark.parametrize("raises", [False, True])
def test_a_cycle_through_the_step_is_collected(raises: bool) -> None:
    class Owner:
        def __init__(self) -> None:
            self.count = 0
            self.thread = TickThread(self.step, MS)
            self.thread.start()

        def step(self, tick: int) -> None:
            self.count += 1
            if raises:
                raise ValueError(tick)

    def run_and_drop() -> weakref.ref[Owner]:
        owner = Owner()
        wait_for(lambda: owner.count > 0)
        if raises:
            wait_for(lambda: not owner.thread.running)
        return weakref.ref(owner)

    gone = run_and_drop()

    def collected() -> bool:  # a step that is running keeps its owner for a moment
        gc.collect()
        return gone() is None

    wait_for(collected)


def test_priority_is_reported_and_never_fatal() -> None:
    plain = TickThread(lambda tick: None, MS)
    asked = TickThread(lambda tick: None, MS, priority=1)
    for thread in (plain, asked):
        thread.start()
        wait_for(lambda t=thread: t.ticks > 0)
        thread.stop()
    assert plain.scheduling == "default"
    refused = r"(nice -10|default); SCHED_FIFO refused: .+"
    assert re.fullmatch(rf"SCHED_FIFO 1|{refused}", asked.scheduling)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"step": 3}, TypeError, "expected a callable, got int"),
        ({"period_ns": 0}, ValueError, "period_ns=0"),
        ({"period_ns": 1.5}, TypeError, "period_ns"),
        ({"spin_ns": -1}, ValueError, "spin_ns=-1"),
        ({"priority": 100}, ValueError, "priority=100"),
        ({"priority": -1}, ValueError, "priority=-1"),
        ({"max_records": 0}, ValueError, "max_records=0"),
        ({"max_records": 2**40}, ValueError, f"max_records={2**40}"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    arguments = {"step": lambda tick: None, "period_ns": MS} | change
    with pytest.raises(error, match=words):
        TickThread(**arguments)


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=os.environ
    )


# The module alone: its package would import torch, which these scripts do not need.
IMPORT = f"""
import importlib.util, os, time
spec = importlib.util.spec_from_file_location("_tick", {_tick.__file__!r})
_tick = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_tick)
TickThread = _tick.TickThread
"""


def test_exit_with_a_running_thread() -> None:
    script = IMPORT + (
        "threads = [TickThread(lambda tick: sum(range(1000)), 100_000) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "time.sleep(0.05)\n"
        "print('over')\n"
    )
    for _ in range(3):
        done = run_script(script)
        assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_fork_with_a_running_thread() -> None:
    """The child has no tick thread: everything returns, nothing runs, and it can make its own."""
    script = IMPORT + (
        "import warnings; warnings.simplefilter('ignore')\n"
        "seen = []\n"
        "thread = TickThread(seen.append, 1_000_000)\n"
        "thread.start()\n"
        "while len(seen) < 3: time.sleep(0.001)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    count = len(seen)\n"
        "    assert not thread.running\n"
        "    thread.drain(); thread.stop(); time.sleep(0.02)\n"
        "    assert len(seen) == count\n"
        "    own = TickThread(seen.append, 1_000_000); own.start()\n"
        "    while len(seen) < count + 3: time.sleep(0.001)\n"
        "    own.stop()\n"
        "    raise SystemExit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
        "assert thread.running; thread.stop(); print('over')\n"
    )
    done = run_script(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")
