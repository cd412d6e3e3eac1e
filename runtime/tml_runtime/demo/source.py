"""Recordings played as live microphones and cameras: 20 ms of sound and stamped frames, in time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from .._tick import now_ns
from ..errors import InputBackpressure, LateInput, NotRunning, SessionClosed, SessionFault
from ..session import Session
from .decode import SAMPLE_RATE, Clip

PIECE_MS = 20
PIECE = SAMPLE_RATE * PIECE_MS // 1000
# A piece is handed in this long before its media time: the place of a jitter buffer, which would
# hold the stream back by as much. At 60 ms a WiFi-like line completes 99 of 100 ticks.
LEAD_S = 0.06
MAX_EVENTS = 200_000  # the newest are kept, for the trace


@dataclass(frozen=True)
class Media:
    """What all sessions hear, see and read, each from its own place; all is played in a loop.

    pcm: float32 [n] at 16 kHz, silence if there is nothing to hear. clip: None if nothing to see.
    texts: seconds into the sound, ascending, and what is typed then.
    """

    pcm: np.ndarray
    clip: Clip | None
    texts: tuple[tuple[float, str], ...] = ()

    def heard(self, start_s: float, seconds: float) -> np.ndarray:
        """The sound a session that begins at `start_s` hears in its first `seconds`."""
        return self._loop(round(start_s * SAMPLE_RATE), round(seconds * SAMPLE_RATE))

    def typed(self, start_s: float) -> Iterator[tuple[int, str]]:
        """(ns, text) in the order in which a session that begins at `start_s` reads them."""
        loop_s = len(self.pcm) / SAMPLE_RATE
        turns = ((turn * loop_s + t - start_s, text) for turn in count() for t, text in self.texts)
        return ((round(t * 1e9), text) for t, text in turns if t >= 0)

    def _loop(self, start: int, count: int) -> np.ndarray:
        return self.pcm.take(np.arange(start, start + count), mode="wrap")


class InputEvent(NamedTuple):
    kind: str  # "audio", "video" or "text"
    stamp_ns: int  # media time
    pushed_ns: int  # when it was handed in, on now_ns' clock


class LiveSource:
    """One session's microphone and camera. `deliver` is called by one thread at a time.

    A piece of sound is due when its last sample has been heard, a frame when it is taken. What the
    session refuses is counted and gone, as it would be on a line.
    """

    def __init__(self, media: Media, session: Session, *, start_s: float) -> None:
        self._media = media
        self._session = session
        self._start = round(start_s * SAMPLE_RATE)
        self._num_pieces = self._num_frames = 0
        self.start_s = start_s
        self._typed = media.typed(start_s) if media.texts else iter(())
        self._next_text = next(self._typed, None)
        self.refused = 0
        self.late = 0
        self.level = 0.0  # RMS of the newest piece
        self.read = ""  # the newest text
        self.ended: str | None = None  # why nothing more is delivered
        self.events: deque[InputEvent] = deque(maxlen=MAX_EVENTS)

    @property
    def num_pieces(self) -> int:
        return self._num_pieces

    @property
    def num_frames(self) -> int:
        return self._num_frames

    @property
    def next_due_ns(self) -> int:
        """Media time of what comes next."""
        due_ns = (self._num_pieces + 1) * PIECE_MS * 1_000_000
        return due_ns if self._media.clip is None else min(due_ns, self._frame_ns())

    def deliver(self, until_ns: int) -> None:
        """Hand in everything due up to media time `until_ns`, frames strictly before it."""
        while self.ended is None and (self._num_pieces + 1) * PIECE_MS * 1_000_000 <= until_ns:
            stamp_ns = self._num_pieces * PIECE_MS * 1_000_000
            pcm = self._media._loop(self._start + self._num_pieces * PIECE, PIECE)
            self.level = float(np.sqrt(np.mean(np.square(pcm))))
            self._num_pieces += 1
            self._push("audio", pcm, stamp_ns)
        while self.ended is None and self._media.clip is not None and self._frame_ns() < until_ns:
            clip, stamp_ns = self._media.clip, self._frame_ns()
            index = round(self.start_s * clip.fps) + self._num_frames
            self._num_frames += 1
            self._push("video", clip.frames[index % len(clip.frames)], stamp_ns)

        while self.ended is None and self._next_text and self._next_text[0] < until_ns:
            stamp_ns, text = self._next_text
            self._next_text = next(self._typed, None)
            self.read = text
            self._push("text", text, stamp_ns)

    def _frame_ns(self) -> int:
        assert self._media.clip is not None
        return round(self._num_frames * 1e9 / self._media.clip.fps)

    def _push(self, kind: str, data: np.ndarray | str, stamp_ns: int) -> None:
        try:
            if isinstance(data, str):
                self._session.push_text(data)  # which has no time
            elif kind == "audio":
                self._session.push_audio(data, stamp_ns / 1e9)
            else:
                self._session.push_video(data, stamp_ns / 1e9)
        except LateInput:
            self.late += 1
        except InputBackpressure:
            self.refused += 1
        except (SessionFault, SessionClosed, NotRunning) as error:
            self.ended = str(error)
        else:
            self.events.append(InputEvent(kind, stamp_ns, now_ns()))


class Feeder:
    """The thread that plays sources in real time, each by its own session's media clock."""

    def __init__(self, sources: Sequence[tuple[LiveSource, Session]]) -> None:
        self._sources = sources
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tml-demo-feeder", daemon=True)
        self.error: BaseException | None = None  # what ended it early

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing more will be delivered. May be called more than once."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._stop.wait(self._deliver_all())
        except BaseException as error:
            self.error = error

    def _deliver_all(self) -> float:
        """Returns the seconds until something is due again."""
        rest_ns = PIECE_MS * 1_000_000
        for source, session in self._sources:
            if source.ended is not None:
                continue  # what would come next stays due for ever
            now_media_ns = round((session.media_time + LEAD_S) * 1e9)
            source.deliver(now_media_ns)
            rest_ns = min(rest_ns, source.next_due_ns - now_media_ns)
        return max(rest_ns, 1_000_000) / 1e9
