"""What sessions hear and see while they are measured, and who feeds them.

`Feed` fills windows ahead of media time, as if there were no line. `Caller` is a client behind one:
it captures 20 ms of audio at a time and frames between, and puts in what the line lets through,
when it does. `pump` runs callers on either clock, all from the thread that calls it.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

import numpy as np

from tml_runtime import Runtime, Session
from tml_runtime._tick import now_ns
from tml_runtime.errors import InputBackpressure, LateInput, SessionFault
from tml_runtime.model import TurnLayout
from tml_runtime.net.faults import Link
from tml_runtime.net.intake import Intake
from tml_runtime.session import SpeechOut

LEAD = 4  # windows that a Feed is ahead of media time
PIECE_NS = 20_000_000
POLL_NS = 5_000_000  # between two looks at every caller: turn latencies are up to that longer
FRAMES_PER_TICK = 2  # one pair
JPEG_BITS = 2  # a pixel, on the line
_LOOP_S = 10  # of audio, then it begins anew
_PAUSE = (1.5, 2.0)  # seconds of every two: silence, as between sentences
_LOOP_FRAMES = 8

FrameSize = tuple[int, int]  # width and height in pixels


class Media:
    """Noise with pauses, and noisy pictures: made once, then gone through in a loop.

    The same seed and position give the same; `frame` None: no pictures.
    """

    def __init__(self, layout: TurnLayout, *, seed: int, frame: FrameSize | None = None) -> None:
        self.sample_rate = layout.dmel.sample_rate
        self.frame = frame
        rng = np.random.default_rng(seed)
        self._size = _LOOP_S * self.sample_rate
        pcm = 0.1 * rng.standard_normal(self._size, dtype=np.float32)
        second = np.arange(self._size) / self.sample_rate % _PAUSE[1]
        pcm[second >= _PAUSE[0]] = 0.0
        self._pcm = np.concatenate([pcm, pcm[: self.sample_rate]])  # no slice reaches its end
        width, height = frame or (0, 0)
        self._frames = rng.integers(0, 256, (_LOOP_FRAMES, height, width, 3), dtype=np.uint8)

    def pcm(self, start: int, size: int) -> np.ndarray:
        """float32, from sample `start` on, at most a second."""
        at = start % self._size
        return self._pcm[at : at + size]

    def picture(self, number: int) -> np.ndarray:
        return self._frames[number % _LOOP_FRAMES]


class Feed:
    """One session's input on a line without delay: whole windows, and frames with them."""

    def __init__(self, session: Session, media: Media, layout: TurnLayout) -> None:
        self.session = session
        self._media = media
        self._period_s = layout.period_ms / 1000
        self._num_samples = layout.samples_per_tick
        self._next = 0

    def push_until(self, media_time: float, lead: int) -> None:
        """Fill every window that begins before `lead` windows after media time."""
        while self._next * self._period_s < media_time + (lead - 0.5) * self._period_s:
            t = self._next * self._period_s
            try:
                self._push(t)
            except LateInput:  # this thread was held up; the loop counts the window
                pass
            except InputBackpressure:  # the loop was: its windows are not open yet
                return
            self._next += 1

    def _push(self, t: float) -> None:
        pcm = self._media.pcm(self._next * self._num_samples, self._num_samples)
        self.session.push_audio(pcm, t)
        for k in range(FRAMES_PER_TICK if self._media.frame else 0):
            frame = self._media.picture(self._next * FRAMES_PER_TICK + k)
            self.session.push_video(frame, t + (k + 0.25) * self._period_s / FRAMES_PER_TICK)


class Caller:
    """One client of a session, `begin_ns` on; times are on the runtime's clock.

    turn_ms: since the last `take_turns`, from the end of a window to the moment its speech was
    polled. fault: why the session ended before its time; from then on the caller does nothing.
    """

    def __init__(
        self, session: Session, media: Media, line: Link, layout: TurnLayout, begin_ns: int
    ) -> None:
        self.session = session
        self.intake = Intake(session, sample_rate=media.sample_rate)
        self.fault: str | None = None
        self._turn_ms: list[float] = []
        self._media = media
        self._line = line
        self._begin_ns = begin_ns
        self._piece = media.sample_rate * PIECE_NS // 1_000_000_000
        self._frame_ns = layout.period_ms * 1_000_000 // FRAMES_PER_TICK
        self._num_pieces = self._num_frames = 0
        self._on_the_way: list[tuple[int, int, bool, int]] = []  # arrival, order, is audio, number
        self._order = count()

    def run(self, now_ns: int) -> None:
        """Send what was captured by now, put in what has arrived, poll. Raises NotRunning."""
        if self.fault is not None:
            return
        try:
            self._send(now_ns)
            self._receive(now_ns)
            self._poll()
        except SessionFault as fault:
            self.fault = str(fault)

    def take_turns(self) -> list[float]:
        taken, self._turn_ms = self._turn_ms, []
        return taken

    def _send(self, now_ns: int) -> None:
        while (due_ns := self._begin_ns + (self._num_pieces + 1) * PIECE_NS) <= now_ns:
            while self._media.frame and (frame_ns := self._frame_due_ns()) <= due_ns:
                width, height = self._media.frame
                self._put(frame_ns, width * height * JPEG_BITS // 8, False, self._num_frames)
                self._num_frames += 1
            self._put(due_ns, 2 * self._piece, True, self._num_pieces)
            self._num_pieces += 1

    def _frame_due_ns(self) -> int:
        return self._begin_ns + self._num_frames * self._frame_ns + self._frame_ns // 2

    def _put(self, sent_ns: int, num_bytes: int, is_audio: bool, number: int) -> None:
        for at_ns in self._line.send(sent_ns, num_bytes):
            heapq.heappush(self._on_the_way, (at_ns, next(self._order), is_audio, number))

    def _receive(self, now_ns: int) -> None:
        waiting = self._on_the_way
        while waiting and waiting[0][0] <= now_ns:
            _, _, is_audio, number = heapq.heappop(waiting)
            if is_audio:
                stamp = number * self._piece
                self.intake.audio(number, stamp, self._media.pcm(stamp, self._piece), now_ns)
            else:
                taken_ns = number * self._frame_ns + self._frame_ns // 2
                stamp = taken_ns * self._media.sample_rate // 1_000_000_000
                self.intake.video(number, stamp, self._media.picture(number), now_ns)

    def _poll(self) -> None:
        for out in self.session.poll():
            if isinstance(out, SpeechOut):  # one a tick, due when its window had ended
                self._turn_ms.append(1000 * (self.session.media_time - out.t))


class Client(Protocol):
    """What `pump` runs: a Caller, or another that does its work when it is told the time."""

    def run(self, now_ns: int) -> None: ...


class Clock(Protocol):
    def now_ns(self) -> int: ...

    def sleep_until(self, ns: int) -> None: ...


class RealTime:
    """A started runtime's."""

    def now_ns(self) -> int:
        return now_ns()

    def sleep_until(self, ns: int) -> None:
        time.sleep(max(0, ns - now_ns()) / 1e9)


class VirtualTime:
    """A virtual clock that runs each tick when it is due. Nobody else may run ticks."""

    def __init__(self, runtime: Runtime) -> None:
        assert runtime.clock is not None
        self._runtime, self._clock = runtime, runtime.clock
        self._period_ns = runtime.layout.period_ms * 1_000_000
        self._ticks = 0

    def now_ns(self) -> int:
        return self._clock.now_ns()

    def sleep_until(self, ns: int) -> None:
        while (self._ticks + 1) * self._period_ns <= ns:
            self._runtime.run_ticks(1)
            self._ticks += 1
        self._clock.sleep_until(ns)


def clock_of(runtime: Runtime) -> Clock:
    return RealTime() if runtime.clock is None else VirtualTime(runtime)


def pump(
    callers: Sequence[Client],
    clock: Clock,
    until_ns: int,
    on_second: Callable[[], None] = lambda: None,
) -> None:
    """Run them, one after another, until then. Raises LoopFailed when a tick raised."""
    next_ns = clock.now_ns() + 1_000_000_000
    while (at_ns := clock.now_ns()) < until_ns:
        for caller in callers:
            caller.run(at_ns)
        if at_ns >= next_ns:
            next_ns += 1_000_000_000
            on_second()
        clock.sleep_until(min(until_ns, at_ns + POLL_NS))
    for caller in callers:  # what the last tick said
        caller.run(until_ns)
