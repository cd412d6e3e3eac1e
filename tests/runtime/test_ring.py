from __future__ import annotations

import random
import threading
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tml_runtime._tick import Ring

HEADER = 4  # bytes that a message costs beside its own


class RingMachine(RuleBasedStateMachine):
    """A ring is a queue with a byte budget. Small capacities make every position wrap around."""

    @initialize(capacity=st.sampled_from([1, 16, 17, 32, 100, 256]))
    def make(self, capacity: int) -> None:
        self.ring = Ring(capacity)
        self.model: deque[bytes] = deque()
        self.dropped = 0
        self.sent = 0
        assert self.ring.capacity == max(16, 1 << (capacity - 1).bit_length())

    def push(self, size: int) -> None:
        message = random.Random(self.sent).randbytes(size)
        self.sent += 1
        used = sum(len(m) + HEADER for m in self.model)
        fits = used + size + HEADER <= self.ring.capacity
        assert self.ring.push(message) == fits
        if fits:
            self.model.append(message)
        else:
            self.dropped += 1

    @rule(data=st.data())
    def push_any(self, data: st.DataObject) -> None:
        self.push(data.draw(st.integers(0, self.ring.max_message)))

    @rule()
    def push_longest(self) -> None:
        self.push(self.ring.max_message)

    @rule(count=st.integers(1, 8))
    def push_empty(self, count: int) -> None:
        for _ in range(count):
            self.push(0)

    @precondition(lambda self: self.model)
    @rule(count=st.integers(1, 4))
    def pop(self, count: int) -> None:
        for _ in range(min(count, len(self.model))):
            assert self.ring.pop() == self.model.popleft()

    @precondition(lambda self: not self.model)
    @rule()
    def pop_nothing(self) -> None:
        assert self.ring.pop() is None

    @rule()
    def push_too_long(self) -> None:
        with pytest.raises(ValueError, match=f"size={self.ring.max_message + 1}"):
            self.ring.push(bytes(self.ring.max_message + 1))

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "ring"):
            assert len(self.ring) == len(self.model)
            assert self.ring.dropped == self.dropped


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def test_two_threads() -> None:
    """What arrives is what was accepted, in order and whole; what was not is counted."""
    ring = Ring(4096)
    rng = random.Random(1)
    messages = [rng.randbytes(rng.randrange(300)) for _ in range(20_000)]
    accepted: list[bytes] = []
    received: list[bytes] = []
    done = threading.Event()

    def produce() -> None:
        accepted.extend(m for m in messages if ring.push(m))
        done.set()

    def consume() -> None:
        while True:
            over = done.is_set()  # read before the ring is found empty
            message = ring.pop()
            if message is not None:
                received.append(message)
            elif over:
                return

    threads = [threading.Thread(target=produce), threading.Thread(target=consume)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received == accepted
    assert ring.dropped == len(messages) - len(accepted)
    assert len(ring) == 0


@pytest.mark.parametrize(
    "data", [bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("B", (2, 2))]
)
def test_any_contiguous_buffer(data: bytearray | memoryview) -> None:
    ring = Ring(64)
    assert ring.push(data)
    assert ring.pop() == b"abcd"


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (memoryview(b"abcd")[::2], BufferError, "contiguous"),
        ("text", TypeError, "str"),
        (None, TypeError, "NoneType"),
    ],
)
def test_bad_message_leaves_the_ring_alone(data: object, error: type, words: str) -> None:
    ring = Ring(64)
    with pytest.raises(error, match=words):
        ring.push(data)  # type: ignore[arg-type]
    assert len(ring) == 0
    assert ring.dropped == 0


@pytest.mark.parametrize("capacity", [0, 2**31 + 1])
def test_bad_capacity(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity={capacity}"):
        Ring(capacity)
