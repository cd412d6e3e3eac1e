"""A live model with a script, what it read, and a background model that answers by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from fake_model import CONFIG, DELEGATE, SILENCE, FakeModel, make_runtime

from tml_runtime import ModelConfig, Runtime, Session
from tml_runtime.handoff import BackgroundModel, HandoffOptions, Request

QUIET = [SILENCE] * 4
SPEAK = [104, 105, SILENCE, 33]
ASK = [DELEGATE, *SPEAK[1:]]  # the model delegates, and goes on speaking
ASK_QUIETLY = [DELEGATE, SILENCE, SILENCE, SILENCE]


def script(*ticks: Sequence[int]) -> Callable[[int, int], Sequence[int]]:
    """What every slot says in each tick; nothing after the last."""
    return lambda tick, slot: ticks[tick] if tick < len(ticks) else QUIET


def make(
    background: BackgroundModel | None,
    say: Callable[[int, int], Sequence[int]],
    *,
    config: ModelConfig = CONFIG,
    options: HandoffOptions | None = None,
    **more,
) -> tuple[Runtime, FakeModel]:
    model = FakeModel(config, say=say)
    return make_runtime(model, background=background, handoff=options, **more)


def read(model: FakeModel, slot: int = 0) -> list[str]:
    """What a slot read in each tick."""
    rows = [[row for row in rows if row.slot == slot] for rows in model.heard]
    return ["".join(map(chr, row[0].text)) if row else "" for row in rows]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def line(session: Session):
    line = session._seat.inbox.line
    assert line is not None
    return line


class ByHand:
    """Gives to its n-th request what the test puts there: text, an exception, or None at last."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.closed = 0
        self._queues: list[asyncio.Queue] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def stream(self, request: Request) -> AsyncIterator[str]:
        number = len(self.requests)
        self._loop = asyncio.get_running_loop()
        self._queues.append(asyncio.Queue())
        self.requests.append(request)
        try:
            while (item := await self._queues[number].get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise

    async def close(self) -> None:
        self.closed += 1

    def give(self, number: int, *items: str | BaseException | None) -> None:
        """Returns when the model has taken them."""
        wait_for(lambda: len(self.requests) > number)
        loop, queue = self._loop, self._queues[number]
        assert loop is not None

        async def put() -> None:
            for item in items:
                queue.put_nowait(item)
            for _ in range(20):  # turns of the loop, for the engine to take what was given
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(put(), loop).result()
        wait_for(queue.empty)
