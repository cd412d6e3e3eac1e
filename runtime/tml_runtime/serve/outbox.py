"""Output of one session on its way to its client: bounded, in order, and never stale.

Lives on the event loop's thread alone. Every output has a sequence number, also one that is then
lost or fenced off, so that a client can see what it did not get.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from ..session import ActionOut, SpeechOut, TextOut
from .protocol import MAX_SEQ, Kind, Media, encode_control, encode_media

MAX_PIECE_S = 0.1  # of speech in one message


@dataclass(frozen=True, slots=True)
class Item:
    """One message, ready to be sent. Times are samples of the media clock."""

    seq: int
    start: int  # when it is due
    end: int  # when its speech is over; of text and actions, `start`
    epoch: int
    speech: bool
    data: bytes | str


class Outbox:
    """Takes what a session said, gives what is to be sent now."""

    def __init__(self, *, max_items: int, max_bytes: int, sample_rate: int) -> None:
        self._items: deque[Item] = deque()
        self._num_bytes = 0
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._rate = sample_rate
        self.next_seq = 0
        self.lost = 0  # found no room
        self.stale = 0  # speech whose time had passed
        self.fenced = 0  # of an epoch that was over
        self.sent_end = 0  # samples: the end of the last speech that was handed out

    def __len__(self) -> int:
        return len(self._items)

    @property
    def oldest_seq(self) -> int:
        """Of what waits, or else of what is said next."""
        return self._items[0].seq if self._items else self.next_seq

    def put(self, out: SpeechOut | TextOut | ActionOut, epoch: int) -> int:
        """Queue one output, speech in pieces; returns how many messages found no room."""
        before = self.lost
        start = round(out.t * self._rate)
        if isinstance(out, SpeechOut):
            pcm = pcm16(out.pcm)
            size = max(1, round(MAX_PIECE_S * self._rate))
            for at in range(0, len(pcm), size):
                self._put_speech(start + at, epoch, pcm[at : at + size])
        elif isinstance(out, TextOut):
            seq = self._seq()
            text = encode_control("text", seq=seq, epoch=epoch, stamp=start, text=out.text)
            self._put(Item(seq, start, start, epoch, False, text))
        else:
            seq = self._seq()
            text = encode_control("action", seq=seq, epoch=epoch, stamp=start, name=out.name)
            self._put(Item(seq, start, start, epoch, False, text))
        return self.lost - before

    def fence(self, epoch: int) -> None:
        """Drop what is older than `epoch`."""
        kept = [item for item in self._items if item.epoch >= epoch]
        self.fenced += len(self._items) - len(kept)
        self._items = deque(kept)
        self._num_bytes = sum(len(item.data) for item in kept)

    def take(self, now: int, *, lead: int, stale: int) -> Item | None:
        """The oldest item if it is due within `lead` samples; speech that ended more than `stale`
        samples ago is dropped and counted.
        """
        while self._items:
            item = self._items[0]
            if item.start - lead > now:
                return None
            self._items.popleft()
            self._num_bytes -= len(item.data)
            if item.speech and item.end + stale < now:
                self.stale += 1
                continue
            if item.speech:
                self.sent_end = max(self.sent_end, item.end)
            return item
        return None

    def next_start(self) -> int | None:
        """When the oldest item is due."""
        return self._items[0].start if self._items else None

    def _put_speech(self, start: int, epoch: int, pcm: np.ndarray) -> None:
        seq = self._seq()
        media = Media(Kind.SPEECH, seq, start, memoryview(pcm.tobytes()), epoch)
        self._put(Item(seq, start, start + len(pcm), epoch, True, encode_media(media)))

    def _put(self, item: Item) -> None:
        if (
            len(self._items) >= self._max_items
            or self._num_bytes + len(item.data) > self._max_bytes
        ):
            self.lost += 1
            return
        self._items.append(item)
        self._num_bytes += len(item.data)

    def _seq(self) -> int:
        seq = self.next_seq
        self.next_seq = (seq + 1) & MAX_SEQ
        return seq


def pcm16(pcm: np.ndarray) -> np.ndarray:
    """float32 to little-endian int16; what is beyond full scale is clipped.

    >>> pcm16(np.array([0.0, 0.5, -1.0, 2.0], np.float32)).tolist()
    [0, 16384, -32768, 32767]
    """
    return np.clip(np.rint(pcm * 32768.0), -32768, 32767).astype("<i2")
