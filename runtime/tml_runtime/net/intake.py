"""From one client's packets to a session's media time.

The session's windows are the buffer: they take pieces in any order until they close. What is left
to do is to say where a piece belongs: late enough that the next ones come in time, no later, and
in step with a sound card that runs at a speed of its own.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

import numpy as np

from .. import checks
from ..conceal import Bridge
from ..errors import InputBackpressure, InputTypeError, InputValueError, LateInput
from ..session import Session
from .jitter import START_DELAY_NS, Arrival, DelayEstimator
from .sequence import Sequence, Spans, checked_counter
from .silence import SilenceDetector
from .stats import IntakeStats
from .stretch import extra_period, resample
from .timeline import Timeline

MAX_PIECE_S = 1  # of audio
MAX_TEXT_CHARS = 1024
MAX_WAITING_TEXTS = 64

MAX_EXCESS_MS = 100  # a delay longer than it should be by more is cut, not worked off
DRIFT_PART = 1 / 320  # of a piece's samples, put in or taken out anywhere: one in 20 ms
SILENCE_PART = 1 / 100  # the same in silence


class Intake:
    """Puts what arrives from one client into `session`.

    All calls come from one thread. `arrived_ns` is when a message came, on a monotonic clock that
    runs as the runtime's does (`time.monotonic_ns()`); call at once, since what counts is when a
    sample reaches its window. Counters (`seq` of audio, `seq` of video, `stamp`) count up from
    anywhere in 0..2**53-1 and do not wrap. `stamp` is the sender's count of audio samples: of the
    first sample of a piece, or when a frame was taken. It should run on while nothing is sent; if
    it stood still, the first 300 ms after that are lost.

    Input that no honest client sends raises InputTypeError or InputValueError and changes nothing.
    What a bad line does raises nothing and is counted: late, lost, doubled, too much at once. The
    session's own end (SessionClosed, SessionFault, NotRunning) is raised.
    """

    def __init__(self, session: Session, *, sample_rate: int = 16_000) -> None:
        """Raises InputValueError when the session does not hear `sample_rate`."""
        self._session = session
        self._rate = sample_rate
        with suppress(LateInput, InputBackpressure):  # no sample: only the rate is checked
            session.push_audio(np.empty(0, np.float32), session.open_t, sample_rate=sample_rate)
        self._delay = DelayEstimator()
        self._silence = SilenceDetector(sample_rate)
        self._timeline = Timeline()
        self._bridge = Bridge(sample_rate)
        self._tail = np.empty(0, np.float32)  # what was placed last, if nothing is missing after it
        self._allowance = 0.0  # samples that may be put in or taken out to follow the delay
        self._offset_ns: int | None = None  # media time minus the clock of arrivals
        self._heard = Spans()
        self._pieces, self._frames = Sequence(), Sequence()
        self._texts: deque[np.ndarray] = deque()  # ids, which the session takes when it has room
        self._count = dict.fromkeys(IntakeStats.__dataclass_fields__, 0)
        self._buffered_s = self._target_s = 0.0

    def audio(self, seq: int, stamp: int, pcm: np.ndarray, arrived_ns: int) -> None:
        """Mono samples, float32 or int16, at most MAX_PIECE_S of them."""
        is_new = self._pieces.is_new(seq)
        checked_counter("stamp", stamp)
        _check_time(arrived_ns)
        samples = checks.checked_pcm(pcm)
        if len(pcm) > MAX_PIECE_S * self._rate:
            raise InputValueError(f"pcm: {len(pcm)} samples, {MAX_PIECE_S=}: send shorter pieces")
        self._see_media_time(arrived_ns)
        self._push_texts()
        if not is_new:
            self._count["packets_duplicated"] += 1
            return
        is_newest = self._pieces.is_newest(seq)
        self._pieces.mark(seq)
        if len(samples) > 0 and not self._place(stamp, samples, arrived_ns, is_newest):
            self._count["packets_discarded"] += 1

    def video(self, seq: int, stamp: int, frame: np.ndarray, arrived_ns: int) -> None:
        """An RGB frame as `Session.push_video` takes it, taken at audio sample `stamp`.

        Before any audio has come, a frame is seen START_DELAY_NS after it arrived.
        """
        is_new = self._frames.is_new(seq)
        checked_counter("stamp", stamp)
        _check_time(arrived_ns)
        self._see_media_time(arrived_ns)
        self._push_texts()
        if not is_new:
            return
        pushed = self._push_frame(frame, self._frame_t(stamp, arrived_ns))
        self._frames.mark(seq)
        self._count["frames_dropped"] += not pushed

    def poll(self) -> None:
        """Call it now and then: what waits goes on though nothing else comes from the client."""
        self._push_texts()

    def text(self, text: str) -> None:
        """For the next tick, or, while the session's queue is full, for later (see `poll`).

        Raises InputBackpressure when MAX_WAITING_TEXTS wait already, InputValueError for more
        tokens than the session takes at once: a text that waits is never refused later.
        """
        if not isinstance(text, str):
            raise InputTypeError(f"text: expected str, got {type(text).__name__}")
        if len(text) > MAX_TEXT_CHARS:
            raise InputValueError(f"text: {len(text)} characters, {MAX_TEXT_CHARS=}: split it")
        if len(self._texts) == MAX_WAITING_TEXTS:
            self._count["backpressure"] += 1
            raise InputBackpressure(f"{MAX_WAITING_TEXTS} texts are waiting: send it later")
        self._texts.append(self._session.encode_text(text))
        self._push_texts()

    def stats(self) -> IntakeStats:
        heard = self._heard
        heard.pass_to(self._open_sample())
        counts = self._count | {
            "packets_received": self._pieces.received,
            "packets_lost": self._pieces.lost,
            "total_samples_received": heard.over,
            "concealed_samples": heard.missing,
            "concealment_events": heard.holes,
            "frames_received": self._frames.received,
            "texts_waiting": len(self._texts),
            "clock_steps": self._delay.clock_steps,
            "jitter_buffer_delay": self._buffered_s,
            "jitter_buffer_target_delay": self._target_s,
            "target_delay": self._delay.delay_ns / 1e9,
            "drift_ppm": self._delay.drift * 1e6,
        }
        return IntakeStats(**counts)

    # Audio

    def _place(self, stamp: int, pcm: np.ndarray, arrived_ns: int, is_newest: bool) -> bool:
        """Whether any of it can be heard."""
        line, stop, is_first = self._timeline, stamp + len(pcm), not self._delay.started
        backwards = not is_first and is_newest and stop <= line.next_stamp
        silent = self._silence.is_silent(pcm)
        arrival = self._delay.update(
            self._sent_ns(stamp),
            arrived_ns,
            silent_ns=self._sent_ns(len(pcm)) if silent else 0,
            backwards=backwards,
        )
        if arrival is Arrival.SUSPECT:
            return False
        if is_first or arrival is Arrival.STEP:
            sample = self._due_sample(stamp)
            line.restart(stamp, sample if is_first else max(sample, line.next_sample))
            self._tail = self._tail[:0]
        heard = False
        for at, end, sample in line.places(stamp, stop):  # what is older than the newest
            heard |= self._push(sample, pcm[at - stamp : end - stamp], arrived_ns)
        if stop > line.next_stamp:
            newest = pcm[max(0, line.next_stamp - stamp) :]
            heard |= self._place_newest(stop - len(newest), newest, arrived_ns, silent)
        return heard

    def _place_newest(self, stamp: int, pcm: np.ndarray, arrived_ns: int, silent: bool) -> bool:
        """Behind all that was placed before; whether it can be heard."""
        line, size = self._timeline, len(pcm)
        lost = stamp - line.next_stamp
        sample = line.next_sample + lost
        error = self._due_sample(stamp) - sample  # > 0: it is to come later
        too_late = error < -MAX_EXCESS_MS * self._rate // 1000
        if lost > 0:  # a hole may grow at once, and shrink when it must
            if error > 0 or too_late:
                sample = max(line.next_sample, sample + error)
                error = 0
            self._tail = self._tail[:0]
        elif too_late:
            self._count["removed_samples_for_acceleration"] += size
            self._tail = self._tail[:0]
            line.extend(stamp + size, line.next_sample)
            return False
        extra = self._extra(pcm, error, silent)
        out = self._follow(pcm, error - len(extra), silent)
        line.bend(stamp, sample + len(extra))
        line.extend(stamp + size, sample + len(extra) + len(out))
        if len(extra) > 0:
            out = np.concatenate([extra, out])
        self._keep_tail(out)
        return self._push(sample, out, arrived_ns)

    def _keep_tail(self, pcm: np.ndarray) -> None:
        short = self._bridge.source - len(pcm)
        self._tail = np.concatenate([self._tail[-short:], pcm]) if short > 0 else pcm[short:]

    def _extra(self, pcm: np.ndarray, error: int, silent: bool) -> np.ndarray:
        """What to put in before `pcm` when the delay has grown: all of it in silence, a period of
        the voice in speech."""
        if len(self._tail) < self._bridge.source or error <= 0:
            return self._tail[:0]
        if silent:
            extra = np.empty(error, np.float32)
            self._bridge.fill(self._tail, pcm, extra)
        else:
            extra = extra_period(self._tail, pcm, error, self._rate)
        self._count["inserted_samples_for_deceleration"] += len(extra)
        return extra

    def _follow(self, pcm: np.ndarray, error: int, silent: bool) -> np.ndarray:
        """`pcm` a sample or so longer or shorter, which nobody hears."""
        part = SILENCE_PART if silent else DRIFT_PART
        self._allowance = min(self._allowance, 1.0) + part * len(pcm)
        most = int(self._allowance)
        change = max(-most, min(most, error))
        if abs(error) < 2 or change == 0 or len(pcm) + change < 2:
            return pcm
        self._allowance -= abs(change)
        way = (
            "removed_samples_for_acceleration"
            if change < 0
            else "inserted_samples_for_deceleration"
        )
        self._count[way] += abs(change)
        return resample(pcm, len(pcm) + change)

    def _push(self, sample: int, pcm: np.ndarray, arrived_ns: int) -> bool:
        """Give the session what its windows still take; whether that is anything."""
        late = 0
        for _ in range(3):  # a window may close between two lines
            late = min(len(pcm), max(0, self._open_sample() - sample))
            if late == len(pcm):
                break
            try:
                self._session.push_audio(pcm[late:], (sample + late) / self._rate)
            except LateInput:
                continue
            except InputBackpressure:
                self._count["backpressure"] += 1
                return False
            self._count["late_samples"] += late
            self._note(sample + late, sample + len(pcm), arrived_ns)
            return True
        self._count["late_samples"] += len(pcm)
        return False

    def _note(self, start: int, stop: int, arrived_ns: int) -> None:
        assert self._offset_ns is not None
        self._heard.begin(start)
        self._heard.add(start, stop)
        middle_s = (start + stop) / (2 * self._rate)
        wait_s = middle_s - (arrived_ns + self._offset_ns) / 1e9
        self._count["jitter_buffer_emitted_count"] += stop - start
        self._buffered_s += (stop - start) * max(0.0, wait_s)
        self._target_s += (stop - start) * self._delay.delay_ns / 1e9

    # Video and text

    def _push_frame(self, frame: np.ndarray, t: float) -> bool:
        try:
            self._session.push_video(frame, t)
        except LateInput:
            return False
        except InputBackpressure:
            self._count["backpressure"] += 1
            return False
        return True

    def _frame_t(self, stamp: int, arrived_ns: int) -> float:
        assert self._offset_ns is not None
        if self._delay.started:
            due_ns = self._delay.due_ns(self._sent_ns(stamp))
        else:
            due_ns = arrived_ns + START_DELAY_NS
        return (due_ns + self._offset_ns) / 1e9

    def _push_texts(self) -> None:
        while self._texts:
            try:
                self._session.push_text(self._texts[0])
            except InputBackpressure:
                return
            self._texts.popleft()

    # Time

    def _see_media_time(self, arrived_ns: int) -> None:
        """Media time runs ahead of the clock of arrivals by no more than it is ever seen to."""
        offset_ns = round(self._session.media_time * 1e9) - arrived_ns
        if self._offset_ns is None or offset_ns < self._offset_ns:
            self._offset_ns = offset_ns
        self._heard.pass_to(self._open_sample())

    def _open_sample(self) -> int:
        return round(self._session.open_t * self._rate)

    def _sent_ns(self, samples: int) -> int:
        return samples * 1_000_000_000 // self._rate

    def _due_sample(self, stamp: int) -> int:
        """Where the sender's count is to lie on the session's line of samples."""
        assert self._offset_ns is not None
        due_ns = self._delay.due_ns(self._sent_ns(stamp)) + self._offset_ns
        return (due_ns * self._rate + 500_000_000) // 1_000_000_000


def _check_time(arrived_ns: int) -> None:
    if type(arrived_ns) is not int:
        raise InputTypeError(f"arrived_ns={arrived_ns!r}: expected an int")
