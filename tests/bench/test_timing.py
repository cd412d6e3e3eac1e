"""The timer's bookkeeping on a made-up GPU; what it measures on a real one is a gpu test."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from bench import timing
from bench.timing import CudaTimer


class FakeGpu:
    """Stands in for torch.cuda: work takes no time on the host, and on the GPU what it says.

    The backlog is over by the time the host has queued a chunk iff that chunk has more than
    `max_ahead` calls.
    """

    def __init__(self, max_ahead: int) -> None:
        self.max_ahead = max_ahead
        self.now_us = 0.0
        self.queued = 0
        self.log: list[str] = []
        self.backlogs: list[int] = []

    def synchronize(self) -> None:
        self.queued = 0

    def sleep(self, cycles: int) -> None:
        self.backlogs.append(cycles)
        self.now_us += cycles / 2000.0

    def event(self, enable_timing: bool = False) -> SimpleNamespace:
        event = SimpleNamespace(at_us=0.0)

        def record() -> None:
            event.at_us = self.now_us

        event.record = record
        event.query = lambda: self.queued > self.max_ahead
        event.elapsed_time = lambda end: (end.at_us - event.at_us) / 1000.0
        return event

    def work(self, name: str, us: float) -> None:
        self.log.append(name)
        self.queued += 1
        self.now_us += us


@pytest.fixture
def make_timer(monkeypatch: pytest.MonkeyPatch):
    def make(max_ahead: int) -> tuple[CudaTimer, FakeGpu]:
        gpu = FakeGpu(max_ahead)
        cuda = timing.torch.cuda
        monkeypatch.setattr(cuda, "synchronize", gpu.synchronize)
        monkeypatch.setattr(cuda, "_sleep", gpu.sleep, raising=False)
        monkeypatch.setattr(cuda, "Event", gpu.event)
        timer = object.__new__(CudaTimer)
        monkeypatch.setattr(timer, "clear_l2", lambda: gpu.work("clear", 60.0), raising=False)
        return timer, gpu

    return make


def calls(gpu: FakeGpu) -> dict[str, Sequence]:
    return {
        "a": [lambda: gpu.work("a0", 5.0), lambda: gpu.work("a1", 7.0)],
        "b": [lambda: gpu.work("b", 11.0)],
    }


def test_calls_are_timed_alone_interleaved_and_rotated(make_timer) -> None:
    timer, gpu = make_timer(max_ahead=1000)
    samples = timer.events(calls(gpu), repeats=20)
    assert samples.us == {"a": pytest.approx([5.0, 7.0] * 10), "b": pytest.approx([11.0] * 20)}
    assert samples.flaws == {}
    assert gpu.log[-8:] == ["clear", "a0", "clear", "b", "clear", "a1", "clear", "b"]


def test_late_host_gets_shorter_chunks_behind_longer_backlogs(make_timer) -> None:
    timer, gpu = make_timer(max_ahead=8)  # two rounds of two calls and two sweeps
    samples = timer.events(calls(gpu), repeats=5)
    assert samples.flaws == {}
    assert {name: len(us) for name, us in samples.us.items()} == {"a": 5, "b": 5}
    assert min(gpu.backlogs[1:]) >= 2_000_000  # at least a millisecond, the probe apart


def test_host_that_never_keeps_ahead_is_flagged(make_timer) -> None:
    timer, gpu = make_timer(max_ahead=0)
    samples = timer.events(calls(gpu), repeats=3)
    assert set(samples.flaws) == {"a", "b"}
    assert samples.us["b"] == pytest.approx([11.0] * 3)
