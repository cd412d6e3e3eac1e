"""Time that only moves when told, and what a process does beside the tick only in its time."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ._tick import now_ns


class VirtualClock:
    """A clock for tests and for running faster than real time. Never goes back."""

    def __init__(self) -> None:
        self._now_ns = 0

    def now_ns(self) -> int:
        return self._now_ns

    def advance(self, ns: int) -> None:
        """What a step that takes `ns` would do; 0 by default, so ticks are always in time."""
        assert ns >= 0, ns
        self._now_ns += ns

    def sleep_until(self, ns: int) -> None:
        self._now_ns = max(self._now_ns, ns)


class _Automatic:
    """Python's own collections: off while anybody holds them off, then as they were before.

    forbidden: how many want no collection at all; one thread at a time makes graphs.
    """

    def __init__(self) -> None:
        self.forbidden = 0
        self._lock = threading.Lock()
        self._holders = 0
        self._was_enabled = False

    def hold(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0 and self._was_enabled:
                gc.enable()


_automatic = _Automatic()


class QuietCollector:
    """Takes Python's garbage collector off the tick: a full collection can stop it for 85 ms.

    As a context: nothing is collected on its own, and what exists on entering is frozen, so that
    later collections do not visit it. `rest(slack_ns)`, called when a tick's output is out, frees
    the youngest two generations, and now and then everything, provided that four times the CPU time
    it took last fits; cycles in a heap too large for that wait until the end. The setting belongs
    to the process: use one at a time.
    """

    FULL_EVERY = 64  # ticks

    def __init__(self) -> None:
        self._ticks = 0
        self._full_ns = 0  # CPU time of the last full collection

    def __enter__(self) -> None:
        if _automatic.forbidden == 0:
            gc.collect()
        gc.freeze()
        _automatic.hold()

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        _automatic.release()

    def rest(self, slack_ns: int) -> None:
        self._ticks += 1
        if _automatic.forbidden > 0:
            return
        if self._ticks >= self.FULL_EVERY and 4 * self._full_ns < slack_ns:
            begin_ns = time.thread_time_ns()
            gc.collect()
            self._full_ns = time.thread_time_ns() - begin_ns
            self._ticks = 0
        elif slack_ns > 0:
            gc.collect(1)


@contextmanager
def garbage_waits() -> Iterator[None]:
    """No collection of ours or of Python's own begins in here, and what only a collection frees is
    freed before.

    Around the capture of CUDA graphs, which fails when another graph is freed meanwhile.
    """
    if _automatic.forbidden == 0:
        gc.collect()
    _automatic.hold()
    _automatic.forbidden += 1
    try:
        yield
    finally:
        _automatic.forbidden -= 1
        _automatic.release()


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """How many threads torch uses on the CPU, in the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Collections:
    """When Python's garbage collections of this process ran; all its threads wait for one.

    The last KEPT are known. The collector says that one is over only when its thread has the GIL
    again, which may be after others ran: one that has not said so ends, for `between`, at `to_ns`.
    """

    KEPT = 64

    def __init__(self) -> None:
        self.begun = 0
        self._begin_ns, self._end_ns = [0] * self.KEPT, [0] * self.KEPT

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        """What `gc.callbacks` asks for. Collections do not nest."""
        if phase == "start":
            row = self.begun % self.KEPT
            self._begin_ns[row], self._end_ns[row] = now_ns(), 0
            self.begun += 1
        else:
            self._end_ns[(self.begun - 1) % self.KEPT] = now_ns()

    def between(self, first: int, from_ns: int, to_ns: int) -> tuple[int, int, int]:
        """Of collections number `first` and on, those that overlap the given time: how many, how
        much of it they took, and when the last of them ended, 0 for none."""
        count = took_ns = ended_ns = 0
        for number in range(max(first, self.begun - self.KEPT), self.begun):
            row = number % self.KEPT
            end_ns = min(self._end_ns[row] or to_ns, to_ns)
            overlap_ns = end_ns - max(self._begin_ns[row], from_ns)
            if overlap_ns > 0:
                count, took_ns, ended_ns = count + 1, took_ns + overlap_ns, end_ns
        return count, took_ns, ended_ns


@functools.cache
def garbage_collections() -> Collections:
    """Those of this process, from the first call on."""
    counted = Collections()
    gc.callbacks.append(counted)
    return counted


@contextmanager
def quick_switches() -> Iterator[None]:
    """Another thread that runs Python gives way to the tick in 10 us, not in the usual 5 ms.

    A tick asks for the interpreter after every op that gave it up. Of the whole process; it matters
    only while another thread wants to run Python.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
