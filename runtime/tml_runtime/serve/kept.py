"""What a client has to say again when a connection breaks: texts and interruptions.

A message counts as said on a connection once `next` has given it; whether the service took it is
known from its answer, or from the `welcome` of the connection after.
"""

from __future__ import annotations

from collections import deque

from .protocol import encode_control

_MAX_TEXTS = 64


class Kept:
    """Texts in order, each on every connection until the service has taken it, and interruptions
    until they are answered.

    Worked example: texts 0, 1 and 2 and two interruptions were said when the line broke. The next
    connection's `welcome` has text 0 as the last one taken, and an epoch that is higher by one. So
    `next` gives the second interruption, text 1, text 2, and then None.
    """

    def __init__(self) -> None:
        self._texts: deque[tuple[int, str]] = deque(maxlen=_MAX_TEXTS)
        self._num_texts = 0
        self._said_seq = -1  # of the last text said on this connection
        self._interrupts: deque[int] = deque()  # where playback stopped; not answered yet
        self._num_asked = 0  # of those, on this connection

    def add_text(self, text: str) -> None:
        self._texts.append((self._num_texts, text))
        self._num_texts += 1

    def add_interrupt(self, played: int) -> None:
        self._interrupts.append(played)

    def next(self) -> str | None:
        """The message to send next on this connection; None when it had all of them."""
        if self._num_asked < len(self._interrupts):
            self._num_asked += 1
            return encode_control("interrupt", played=self._interrupts[self._num_asked - 1])
        for seq, text in self._texts:
            if seq > self._said_seq:
                self._said_seq = seq
                return encode_control("text", seq=seq, text=text)
        return None

    def answered(self) -> None:
        """The service has taken the oldest interruption."""
        if self._interrupts:
            self._interrupts.popleft()
            self._num_asked = max(0, self._num_asked - 1)

    def connected(self, *, text_seq: int, num_taken: int) -> None:
        """Another connection begins. text_seq: of the last text taken; num_taken: interruptions.

        Of interruptions that were not taken the last one stands for all.
        """
        self._said_seq = text_seq
        for _ in range(max(num_taken, len(self._interrupts) - 1)):
            self.answered()
        self._num_asked = 0
