"""What a client of the service has heard and its application has not taken yet."""

from __future__ import annotations

import asyncio

from .events import Action, Event, Speech, Text

MAX_EVENTS = 256  # then the connection is read no further


class Inbound:
    """Events in order, those of output of the newest epoch only. For one event loop.

    Worked example: outputs 0, 1 and 2 of epoch 0 wait to be taken when an interruption is answered
    by epoch 1, whose first output has number 5: all three are dropped, 3 and 4 never come, and none
    of them is lost.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.lost = 0  # sequence numbers that never came and were not fenced off
        self._next_seq = 0
        self._events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue(MAX_EVENTS)

    def __len__(self) -> int:
        return self._events.qsize()

    def count(self, output: Speech | Text | Action) -> bool:
        """Note that it came; whether it is of the epoch and to be `put`."""
        self.lost += max(0, output.seq - self._next_seq)
        self._next_seq = max(self._next_seq, output.seq + 1)
        return output.epoch >= self.epoch

    async def put(self, event: Event) -> None:
        """Waits while too many were not taken."""
        await self._events.put(event)

    async def take(self) -> Event:
        """Waits for the next one. Raises what the session was ended by, or StopAsyncIteration."""
        event = await self._events.get()
        if event is None or isinstance(event, BaseException):
            self._events.put_nowait(event)  # for whoever asks again
            raise StopAsyncIteration if event is None else event
        return event

    async def end(self, error: BaseException | None = None) -> None:
        """Behind what was not taken yet."""
        await self._events.put(error)

    def end_now(self) -> None:
        self.make_room()
        self._events.put_nowait(None)

    def make_room(self) -> None:
        """Drop what is oldest, so that nobody waits in `put` or `end`."""
        while self._events.qsize() > MAX_EVENTS // 2:
            self._events.get_nowait()

    def begin_epoch(self, epoch: int, next_seq: int) -> None:
        """And drop what is older, of what was not taken yet. next_seq: of its first output."""
        self.epoch = max(self.epoch, epoch)
        self._next_seq = next_seq
        waiting = [self._events.get_nowait() for _ in range(self._events.qsize())]
        for event in waiting:
            if getattr(event, "epoch", self.epoch) >= self.epoch:
                self._events.put_nowait(event)
