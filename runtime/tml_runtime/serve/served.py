"""One session of the service: it outlives the connections of its client, and ends once.

Lives on the event loop's thread alone; the session itself may be called from any thread.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..checks import FrameGrid
from ..errors import InputBackpressure, InputTypeError, InputValueError
from ..session import Session
from .frames import raw_frame
from .limits import Limits
from .outbox import Outbox
from .protocol import ErrorCode, Kind, Media, ProtocolError, encode_control

if TYPE_CHECKING:
    from .connection import Connection


class MediaIntake(Protocol):
    """Where media go on their way to a session: `tml_runtime.net.intake.Intake`.

    stamp: samples of the client's capture clock. arrived_ns: on the monotonic clock.
    """

    def audio(self, seq: int, stamp: int, pcm: np.ndarray, arrived_ns: int) -> object: ...

    def video(self, seq: int, stamp: int, frame: np.ndarray, arrived_ns: int) -> object: ...

    def text(self, text: str) -> object: ...

    def poll(self) -> object: ...

    def stats(self) -> Any: ...


MAX_TICKS = 16  # messages about ticks that wait to be sent; then the oldest is lost
MakeIntake = Callable[[Session], MediaIntake]


class ServedSession:
    """Session, intake and outbox, and the connection that they belong to just now, if any."""

    def __init__(
        self, session: Session, intake: MediaIntake, *, sample_rate: int, limits: Limits
    ) -> None:
        self.session = session
        self.intake = intake
        self.id = secrets.token_hex(8)
        self.resume_token = secrets.token_urlsafe(24)
        self.outbox = Outbox(
            max_items=limits.queue_items, max_bytes=limits.queue_bytes, sample_rate=sample_rate
        )
        self.connection: Connection | None = None
        self.ticks: deque[str] | None = None  # of a client that wants them: messages to be sent
        self.expiry: Any = None  # asyncio.TimerHandle while no connection has it
        self.text_seq = -1  # of the last text taken
        self.resumes = 0
        self.shed_frames = 0
        self._rate = sample_rate
        self._played = 0  # samples, as reported last

    @property
    def media_samples(self) -> int:
        """Now, on the session's clock."""
        return round(self.session.media_time * self._rate)

    def take_media(self, media: Media, frame: np.ndarray | None, arrived_ns: int) -> None:
        """Raises ProtocolError for what the session refuses; SessionFault, NotRunning."""
        try:
            if media.kind is Kind.AUDIO:
                pcm = np.frombuffer(media.payload, "<i2").astype(np.int16, copy=False)
                self.intake.audio(media.seq, media.stamp, pcm, arrived_ns)
            elif frame is not None:
                self.intake.video(media.seq, media.stamp, frame, arrived_ns)
        except (InputValueError, InputTypeError, InputBackpressure) as error:
            raise _refused(error) from None

    def take_raw(self, media: Media, grid: FrameGrid, arrived_ns: int) -> None:
        self.take_media(media, raw_frame(media, grid), arrived_ns)

    def take_text(self, seq: int, text: str) -> None:
        """A text with a sequence number that was taken already is not taken again."""
        if seq <= self.text_seq:
            return
        try:
            self.intake.text(text)
        except (InputValueError, InputTypeError, InputBackpressure) as error:
            raise _refused(error) from None
        self.text_seq = seq

    def report_position(self, played: int) -> None:
        """What the client has played, in samples of the media clock: no more than it was sent."""
        self._played = max(self._played, min(played, self.outbox.sent_end))

    def interrupt(self, played: int | None) -> int:
        """The client stopped playing at `played`; returns the new epoch, with the old one gone."""
        if played is not None:
            played = min(played, self.outbox.sent_end)
            self._played = played  # may lie before what was reported: the client knows best
        epoch = self.session.interrupt(self._played / self._rate)
        self.outbox.fence(epoch)
        return epoch

    def poll(self) -> int:
        """Move what the session said to the outbox; returns how much of it found no room there.
        And on with texts that wait for the session."""
        self.intake.poll()
        return sum(self.outbox.put(out, out.epoch) for out in self.session.poll())

    def want_ticks(self, wanted: bool) -> None:
        self.ticks = deque(maxlen=MAX_TICKS) if wanted else None

    def tell_ticks(self, records: np.ndarray, samples_per_tick: int) -> None:
        """records: of the metrics, those of the ticks that are not told yet."""
        if self.ticks is None:
            return
        for record in records:
            due = (int(record["tick"]) + 1 - self.session.first_tick) * samples_per_tick
            if due <= 0:
                continue  # before this session's first
            tick_ns = record["woke_ns"] - record["scheduled_ns"] + record["busy_ns"]
            values = {"ms": round(float(tick_ns) / 1e6, 3), "missed": bool(record["missed"])}
            skipped = int(record["skipped"])
            self.ticks.append(encode_control("tick", stamp=due, skipped=skipped, **values))

    def status(self) -> dict[str, Any]:
        """For people: no token is in it."""
        outbox, stats = self.outbox, self.intake.stats()
        return {
            "id": self.id,
            "connected": self.connection is not None,
            "epoch": self.session.epoch,
            "media_time": self.session.media_time,
            "played": self._played / self._rate,
            "resumes": self.resumes,
            "queued": len(outbox),
            "lost": outbox.lost,
            "stale": outbox.stale,
            "fenced": outbox.fenced,
            "shed_frames": self.shed_frames,
            "stats": asdict(self.session.stats),
            "intake": stats if isinstance(stats, dict) else asdict(stats),
        }


def token_digest(token: str) -> bytes:
    """What tokens are compared and looked up by, so that the time it takes tells nothing."""
    return hashlib.sha256(token.encode("utf-8", errors="replace")).digest()


def _refused(error: Exception) -> ProtocolError:
    return ProtocolError(str(error), field="input", code=ErrorCode.REFUSED_INPUT)
