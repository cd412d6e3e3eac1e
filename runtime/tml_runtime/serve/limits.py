"""What one client may take of the service, and what the service promises to hold back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InputValueError


@dataclass(frozen=True)
class Limits:
    """Bounds of the service and of each connection; docs/protocol.md says what happens at each."""

    max_connections: int = 64
    handshake_s: float = 5.0  # from the connection to `hello`
    messages_per_s: float = 200.0
    bytes_per_s: float = 4e6
    burst_s: float = 4.0  # how long a client may have been silent and then send it all at once
    max_errors: int = 32  # messages refused on one connection, before it is closed
    queue_items: int = 128  # output that waits to be sent
    queue_bytes: int = 512_000
    max_lost: int = 64  # outputs that found no room on one connection, before it is closed
    stale_s: float = 1.0  # speech that much past its time is not sent
    lead_s: float = 0.25  # output is sent no earlier than that before its time
    grace_s: float = 30.0  # how long a session waits for a dropped client
    heartbeat_s: float = 10.0
    close_s: float = 1.0  # for the closing handshake; then the connection is cut

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise InputValueError(f"{name}={value} is not a finite number >= 0")
        for name in ("max_connections", "messages_per_s", "bytes_per_s", "queue_items"):
            if getattr(self, name) < 1:
                raise InputValueError(f"{name}={getattr(self, name)} is less than 1")


class TokenBucket:
    """At most `rate` units a second in the long run, and `rate * burst_s` at once.

    >>> bucket = TokenBucket(rate=10.0, burst_s=0.2)
    >>> bucket.take(2, now_s=0.0), bucket.take(1, now_s=0.0), bucket.take(1, now_s=0.1)
    (True, False, True)
    """

    def __init__(self, rate: float, burst_s: float) -> None:
        self._rate = rate
        self._most = self._left = rate * burst_s
        self._at_s = -math.inf

    def take(self, units: float, *, now_s: float) -> bool:
        """False, and nothing is taken, when there are not that many."""
        if now_s > self._at_s:
            self._left = min(self._most, self._left + self._rate * (now_s - self._at_s))
            self._at_s = now_s
        if units > self._left:
            return False
        self._left -= units
        return True
