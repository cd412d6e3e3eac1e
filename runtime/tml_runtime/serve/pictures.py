"""JPEGs of one connection on their way to its session: decoded in a thread, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from ..checks import FrameGrid
from .frames import decode_jpeg
from .protocol import Media, ProtocolError


class Pictures:
    """Of those that come while one is decoded the newest waits; a client that sends more than can
    be decoded has the others shed."""

    def __init__(
        self,
        decoders: Executor,
        grid: FrameGrid,
        seen: Callable[[Media, np.ndarray, int], None],
        refused: Callable[[ProtocolError], None],
    ) -> None:
        """seen: takes each message with its frame and when it arrived; refused: what is no JPEG,
        and what `seen` raises."""
        self._decoders = decoders
        self._grid = grid
        self._seen = seen
        self._refused = refused
        self._waiting: tuple[Media, int] | None = None
        self._decoding: asyncio.Task[None] | None = None

    def add(self, media: Media, arrived_ns: int) -> int:
        """How many are shed for it."""
        num_shed = int(self._waiting is not None)
        self._waiting = media, arrived_ns
        if self._decoding is None:
            self._decoding = asyncio.create_task(self._decode())
        return num_shed

    def stop(self) -> None:
        if self._decoding is not None:
            self._decoding.cancel()

    async def _decode(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (waiting := self._waiting) is not None:
                self._waiting = None
                media, arrived_ns = waiting
                try:
                    frame = await loop.run_in_executor(
                        self._decoders, decode_jpeg, media.payload, self._grid
                    )
                    self._seen(media, frame, arrived_ns)
                except ProtocolError as error:
                    self._refused(error)
        finally:
            self._decoding = None
