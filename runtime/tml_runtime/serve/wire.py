"""What a WebSocket may bring in that is not a message: frames have no limit but the one held here.

A message may come in any number of frames, empty ones too, and none is seen before the last has
come. Until then nobody counts them, and each costs the thread time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# More than aiohttp reads ahead of whoever takes its messages: 512 KiB of them, and one read.
SPARE_BYTES = 1 << 20
_FRAMING_BYTES = 64  # of a message, whatever its length; and a byte for as many of its own


class WireMeter(asyncio.Protocol):
    """Between a transport and its protocol: counts the bytes that came and are of no message taken.

    With more than `most` it calls `on_excess`, once, and hands nothing on from then on.
    """

    def __init__(self, most: int, on_excess: Callable[[], None]) -> None:
        self._most = most
        self._on_excess = on_excess
        self._num_bytes = 0
        self._is_over = False
        self._inner: asyncio.Protocol

    def watch(self, transport: asyncio.Transport) -> None:
        inner = transport.get_protocol()
        assert isinstance(inner, asyncio.Protocol)
        self._inner = inner
        transport.set_protocol(self)

    def take(self, num_bytes: int) -> None:
        """A message of that many bytes was taken, whose frames had headers."""
        taken = num_bytes + num_bytes // _FRAMING_BYTES + _FRAMING_BYTES
        self._num_bytes = max(0, self._num_bytes - taken)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        self._num_bytes += len(data)
        if self._num_bytes > self._most:
            self._is_over = True
            self._on_excess()
        else:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def size_of(data: str | bytes) -> int:
    """Of a message as it came: a text is UTF-8."""
    if isinstance(data, str) and not data.isascii():
        return len(data.encode())
    return len(data)
