"""Time on the GPU: CUDA events behind a backlog with a cold L2, and graph replay.

Events: before each call a buffer larger than the L2 is read, so that the call finds neither its
inputs nor dirty lines there. A spinning kernel is queued first, long enough for the host to queue
everything behind it, so that no launch gap is measured; whether it lasted is checked. Variants are
interleaved call by call, since clocks drift. Graph replay leaves out the host altogether and shows
what a captured tick pays; there the L2 is cold only if the input sets it rotates among exceed it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

Call = Callable[[], object]

CYCLES_PER_SECOND = 2.0e9  # at most what a GPU clocks: the backlog lasts at least what is asked for
MAX_BACKLOG_S = 0.2
MAX_EVENTS_S = 3.0  # of one case, all variants together; a slow one is timed less often
MAX_GRAPH_S = 2.0
MIN_REPEATS = 5
GRAPH_CALLS = 24  # in one graph, unless an op says otherwise: its launch is under 2 % of most


@dataclass
class Samples:
    """Microseconds per call and, per variant, what spoils them."""

    us: dict[str, list[float]] = field(default_factory=dict)
    flaws: dict[str, str] = field(default_factory=dict)


class Timer(Protocol):
    """What the harness times with; tests put a fake one in its place."""

    def events(self, calls: Mapping[str, Sequence[Call]], repeats: int) -> Samples:
        """Times each variant `repeats` times at most; its calls (one per input set) rotate."""
        ...

    def graph(
        self, calls: Mapping[str, Sequence[Call]], repeats: int, *, at_least: int = GRAPH_CALLS
    ) -> Samples:
        """The same by replaying one graph per variant, of `at_least` calls; microseconds per call
        within it."""
        ...


class CudaTimer:
    """Timer of the current device. Allocates the buffer it clears the L2 with."""

    def __init__(self) -> None:
        self._sweep = torch.randn(4 * l2_bytes() // 4, device="cuda")  # four times the L2
        self._sum = torch.empty((), device="cuda")

    def clear_l2(self) -> None:
        torch.sum(self._sweep, dim=0, out=self._sum)

    def events(self, calls: Mapping[str, Sequence[Call]], repeats: int) -> Samples:
        samples = Samples(us={name: [] for name in calls})
        for runs in calls.values():
            for run in runs:  # first calls load modules and compile
                run()
        started = time.perf_counter()
        host_s = self._queue(calls, range(1), 0.0).host_s
        repeats = _affordable(repeats, time.perf_counter() - started, MAX_EVENTS_S)
        round_idx, per_chunk, margin = 0, 8, 2.0
        while round_idx < repeats:
            chunk = range(round_idx, min(repeats, round_idx + per_chunk))
            backlog_s = margin * host_s * len(chunk) + 1e-3
            queued = self._queue(calls, chunk, min(backlog_s, MAX_BACKLOG_S))
            if not queued.held and per_chunk > 1:
                # Late host: fewer launches (the driver's queue is finite), a longer backlog.
                per_chunk, margin = per_chunk // 2, 2 * margin
                continue
            if not queued.held:
                samples.flaws = dict.fromkeys(calls, "launch gaps may be included")
            for name, start, end in queued.pairs:
                samples.us[name].append(1000.0 * start.elapsed_time(end))
            round_idx += len(chunk)
        return samples

    def _queue(
        self, calls: Mapping[str, Sequence[Call]], rounds: range, backlog_s: float
    ) -> _Queued:
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.cuda._sleep(int(backlog_s * CYCLES_PER_SECOND))
        backlog_end = torch.cuda.Event()
        backlog_end.record()
        pairs = []
        for idx in rounds:
            for name, runs in calls.items():
                start, end = _event(), _event()
                self.clear_l2()
                start.record()
                runs[idx % len(runs)]()
                end.record()
                pairs.append((name, start, end))
        held, host_s = not backlog_end.query(), time.perf_counter() - started
        torch.cuda.synchronize()
        return _Queued(pairs, held, host_s)

    def graph(
        self, calls: Mapping[str, Sequence[Call]], repeats: int, *, at_least: int = GRAPH_CALLS
    ) -> Samples:
        samples = Samples()
        graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
        for name, runs in calls.items():
            try:
                graphs[name] = capture(runs, at_least)
                samples.us[name] = []
            except Exception as error:
                samples.flaws[name] = f"not captured: {type(error).__name__}: {error}"[:300]
                torch.cuda.synchronize()
        started = time.perf_counter()
        for graph, _ in graphs.values():  # the first replay also moves the graph to the GPU
            _replay_us(graph)
        repeats = _affordable(repeats, time.perf_counter() - started, MAX_GRAPH_S)
        for _ in range(repeats):
            for name, (graph, count) in graphs.items():
                samples.us[name].append(_replay_us(graph) / count)
        return samples


@dataclass(frozen=True)
class _Queued:
    """Start and end events of every call, done; held: the GPU had not begun when the host had
    queued the last one, so that no gap is in between; host_s: what the host took for it."""

    pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]
    held: bool
    host_s: float


def _affordable(repeats: int, round_s: float, limit_s: float) -> int:
    """At most `repeats`, at least MIN_REPEATS, in between as many as take `limit_s`."""
    return min(repeats, max(MIN_REPEATS, int(limit_s / max(round_s, 1e-9))))


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = _event(), _event()
    torch.cuda._sleep(int(200e-6 * CYCLES_PER_SECOND))  # the host queues the replay meanwhile
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000.0 * start.elapsed_time(end)


def l2_bytes() -> int:
    """Of the current GPU; 64 MB where torch does not know."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or (64 << 20)


def capture(runs: Sequence[Call], at_least: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of all runs in turn, several times over, and how many calls it holds."""
    rounds = -(-at_least // len(runs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Capture needs a warm-up on a stream that is not the default. A call that waits for the GPU is
    # refused here, since it would break the capture in a way that the allocator does not get over.
    with torch.cuda.stream(stream), _refuse_waiting():
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    graph.replay()
    torch.cuda.synchronize()
    return graph, rounds * len(runs)


@contextlib.contextmanager
def _refuse_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
