"""How a CUDA graph is captured, and how it is started and waited for: in one call of C++ that
leaves the interpreter to others meanwhile, or by torch where `tml_kernels._cuda` was not built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ._tick import now_ns
from .clock import garbage_waits
from .errors import CaptureError


@contextmanager
def capture(
    what: str, *, stream: torch.cuda.Stream, pool: Any = None
) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is queued in here, instantiated on leaving. Raises CaptureError that names
    `what`; the current stream is then the one of before again, which torch does not see to. Its
    allocator may take that capture for one that goes on: nothing is captured after it, and no
    memory given back, but in another process."""
    before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph(keep_graph=True)
    try:
        with garbage_waits(), torch.cuda.graph(graph, pool=pool, stream=stream):
            yield graph
        graph.instantiate()
    except RuntimeError as error:
        torch.cuda.set_stream(before)
        raise CaptureError(f"{what} could not be captured: {error}") from error


class Launched(NamedTuple):
    """On the clock of `_tick.now_ns`."""

    launch_ns: int  # before the call that launches
    start_ns: int  # the GPU began
    end_ns: int  # and had done it all
    done_ns: int  # the thread that waited went on

    def stage_ns(self) -> dict[str, int]:
        return {
            "launch_gap": max(0, self.start_ns - self.launch_ns),
            "gpu": self.end_ns - self.start_ns,
            "fetch": max(0, self.done_ns - self.end_ns),
        }


class TorchLaunch:
    """By torch. For one thread, and graphs of one device on its current stream."""

    def __init__(self) -> None:
        self._origin = torch.cuda.Event(enable_timing=True)
        self._start = torch.cuda.Event(enable_timing=True, external=True)
        self._end = torch.cuda.Event(enable_timing=True, blocking=True)

    def mark_start(self) -> None:
        """While a graph is captured, before anything else of it."""
        self._start.record()

    def run(self, graph: torch.cuda.CUDAGraph) -> Launched:
        """Nothing else is queued: the GPU's times are counted from just before the launch."""
        self._origin.record()
        launch_ns = now_ns()
        graph.replay()
        self._end.record()
        self._end.synchronize()
        done_ns = now_ns()
        start_ns, end_ns = (
            launch_ns + int(1e6 * self._origin.elapsed_time(event))
            for event in (self._start, self._end)
        )
        return Launched(launch_ns, start_ns, end_ns, done_ns)


class NativeLaunch:
    """As TorchLaunch; ImportError where `tml_kernels._cuda` was not built."""

    def __init__(self) -> None:
        from tml_kernels import _cuda

        self._launch = _cuda.GraphLaunch()

    def mark_start(self) -> None:
        self._launch.mark_start(_stream())

    def run(self, graph: torch.cuda.CUDAGraph) -> Launched:
        return Launched(*self._launch.run(graph.raw_cuda_graph_exec(), _stream()))


def make_launch() -> NativeLaunch | TorchLaunch:
    """Of the current device."""
    try:
        return NativeLaunch()
    except ImportError:
        return TorchLaunch()


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
