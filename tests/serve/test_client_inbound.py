"""What a client has heard and nobody has taken: order, epochs, numbers that never came, the end."""

from __future__ import annotations

import asyncio

import pytest

from tml_runtime.serve.events import Epoch, Notice, ServiceError, Text
from tml_runtime.serve.inbound import MAX_EVENTS, Inbound


def said(seq: int, epoch: int = 0) -> Text:
    return Text("word", stamp=0, epoch=epoch, seq=seq)


async def taken(inbound: Inbound) -> list:
    return [await inbound.take() for _ in range(len(inbound))]


def test_an_epoch_drops_what_is_older_and_loses_nothing() -> None:
    async def run() -> None:
        inbound = Inbound()
        await inbound.put(Notice("resumed", "after 1 attempts"))
        for seq in range(3):
            assert inbound.count(said(seq))
            await inbound.put(said(seq))
        inbound.begin_epoch(1, next_seq=5)
        await inbound.put(Epoch(1))
        assert not inbound.count(said(4, epoch=0))  # was on the way
        assert inbound.count(said(5, epoch=1))
        assert inbound.lost == 0 and inbound.epoch == 1
        assert await taken(inbound) == [Notice("resumed", "after 1 attempts"), Epoch(1)]

    asyncio.run(run())


def test_numbers_that_never_came_are_counted_once() -> None:
    inbound = Inbound()
    for seq in (0, 3, 1, 4):
        inbound.count(said(seq))
    assert inbound.lost == 2  # 1 and 2, before 1 came after all


@pytest.mark.parametrize("error", [None, ServiceError("gone", code="unknown_session")])
def test_the_end_comes_behind_what_was_said_and_stays(error: ServiceError | None) -> None:
    async def run() -> None:
        inbound = Inbound()
        await inbound.put(said(0))
        await inbound.end(error)
        assert await inbound.take() == said(0)
        for _ in range(2):
            with pytest.raises(StopAsyncIteration if error is None else ServiceError):
                await inbound.take()

    asyncio.run(run())


def test_who_waits_for_room_ends_though_nobody_takes_anything() -> None:
    async def run() -> None:
        inbound = Inbound()
        for seq in range(MAX_EVENTS):
            await inbound.put(said(seq))
        reader = asyncio.create_task(inbound.put(said(MAX_EVENTS)))
        await asyncio.sleep(0)
        assert not reader.done()
        inbound.make_room()
        await asyncio.wait_for(reader, 1.0)
        assert await taken(inbound) == [said(seq) for seq in range(MAX_EVENTS // 2, MAX_EVENTS + 1)]
        for seq in range(MAX_EVENTS):
            await inbound.put(said(seq))
        inbound.end_now()
        left = [await inbound.take() for _ in range(len(inbound) - 1)]
        assert left == [said(seq) for seq in range(MAX_EVENTS // 2, MAX_EVENTS)]
        with pytest.raises(StopAsyncIteration):
            await inbound.take()

    asyncio.run(run())
