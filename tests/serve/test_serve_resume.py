"""A dropped connection: its session waits, is found again, or ends when nobody comes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel
from local_service import FAST, LIMITS, N, Served, eventually, serve

from tml_runtime.serve.client import Client, connect
from tml_runtime.serve.events import Event, Notice, ServiceError, Speech
from tml_runtime.serve.protocol import CloseCode, Kind, decode_media
from tml_runtime.session import SpeechOut


async def listen(client: Client, events: list[Event]) -> None:
    async for event in client:
        events.append(event)


def cut(served: Served) -> None:
    """As a network does: without a word."""
    (connection,) = served.service.connections
    connection._cut()


def test_the_client_finds_its_session_again(run) -> None:
    async def talk() -> None:
        events: list[Event] = []
        async with serve() as served, connect(served.url) as client:
            listening = asyncio.create_task(listen(client, events))
            first = client.welcome
            for number in range(2):
                await eventually(lambda: sum(isinstance(e, Speech) for e in events) > 3)
                cut(served)
                await eventually(lambda n=number: client.resumes == n + 1)
                events.clear()
            await eventually(lambda: sum(isinstance(e, Speech) for e in events) > 3)
            assert client.welcome.resumed and client.welcome.session == first.session
            assert served.service.counts.sessions == 1 and served.service.counts.resumed == 2
            listening.cancel()
        stamps = [event.stamp for event in events if isinstance(event, Speech)]
        assert stamps == sorted(stamps)
        await eventually(lambda: not served.service.sessions)

    run(talk())


def test_who_left_before_it_was_welcomed_holds_no_place(run) -> None:
    """It does not know the token by which it could come back."""

    async def talk() -> None:
        async with serve(slots=1, limits=replace(LIMITS, grace_s=60.0)) as served:
            admit = served.service.admit
            left = asyncio.Event()

            async def slowly(*args: Any) -> Any:
                await left.wait()
                await asyncio.sleep(0.1)
                return await admit(*args)

            served.service.admit = slowly  # type: ignore[method-assign]
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(connect(served.url).__aenter__(), 0.2)
            left.set()
            await eventually(lambda: served.service.counts.sessions == 1)
            await eventually(lambda: not served.service.sessions)
            async with connect(served.url):
                pass

    run(talk())


def test_a_session_without_a_client_is_paused(run) -> None:
    async def talk() -> None:
        async with serve() as served:
            async with served.raw(hello={}) as raw:
                token = (await raw.until("welcome"))["resume"]
                (session,) = served.service.sessions
                calls: list[str] = []
                for name in ("pause", "resume"):
                    do = getattr(session.session, name)
                    record = lambda do=do, name=name: (calls.append(name), do())  # noqa: E731
                    setattr(session.session, name, record)
            await eventually(lambda: calls == ["pause"])
            async with served.raw(hello={"resume": token}) as raw:
                await raw.until("welcome")
                assert calls == ["pause", "resume"]

    run(talk())


def test_stale_speech_is_not_replayed(run) -> None:
    async def talk() -> None:
        async with serve(limits=replace(LIMITS, stale_s=0.1)) as served:
            async with served.raw(hello={}) as raw:
                token = (await raw.until("welcome"))["resume"]
                (session,) = served.service.sessions
                cut(served)
            await eventually(lambda: session.connection is None)
            gone = session.media_samples
            session.outbox.put(SpeechOut(np.zeros(N, np.float32), gone / 16_000, 16_000), 0)
            await eventually(lambda: session.media_samples > gone + 8000)
            async with served.raw(hello={"resume": token}) as raw:
                welcome = await raw.until("welcome")
                message = await raw.ws.receive(timeout=5)
                media = decode_media(message.data, kinds=(Kind.SPEECH,))
                assert media.stamp > gone + 4000
                assert session.outbox.stale >= 1 and welcome["next_seq"] <= media.seq

    run(talk())


def test_a_text_is_read_once_though_it_is_sent_again(run) -> None:
    model = FakeModel(FAST)

    async def talk() -> None:
        async with serve(model) as served, connect(served.url) as client:
            listening = asyncio.create_task(listen(client, []))
            await client.send_text("one ")
            await eventually(lambda: read(model) == b"one ")
            cut(served)
            for word in ("two ", "three"):
                await client.send_text(word)  # into a line that is broken, or being mended
            await eventually(lambda: client.resumes == 1)
            await eventually(lambda: read(model) == b"one two three")
            listening.cancel()

    def read(model: FakeModel) -> bytes:
        return bytes(token for rows in model.heard for row in rows for token in row.text)

    run(talk())


def test_a_second_connection_takes_over(run) -> None:
    async def talk() -> None:
        async with serve() as served, served.raw(hello={}) as old:
            token = (await old.until("welcome"))["resume"]
            async with served.raw(hello={"resume": token}) as new:
                assert (await new.until("welcome"))["resumed"]
                assert (await old.until("error"))["code"] == "taken_over"
                assert await old.closed() == CloseCode.TAKEN_OVER
                await new.say(type="interrupt", played=0)
                await new.until("epoch")
                assert len(served.service.sessions) == 1

    run(talk())


def test_after_the_grace_period_the_slot_is_free(run) -> None:
    async def talk() -> None:
        limits = replace(LIMITS, grace_s=0.2)
        async with serve(slots=1, limits=limits) as served:
            async with served.raw(hello={}) as raw:
                token = (await raw.until("welcome"))["resume"]
            with pytest.raises(ServiceError):  # it is kept for now
                async with connect(served.url):
                    pass
            await eventually(lambda: served.service.counts.expired == 1)
            await eventually(lambda: served.service.runtime.report()["slots_free"] == 1)
            async with served.raw(hello={"resume": token}) as raw:
                assert (await raw.until("error"))["code"] == "unknown_session"
                assert await raw.closed() == CloseCode.UNKNOWN_SESSION
            async with connect(served.url) as client:
                assert not client.welcome.resumed

    run(talk())


def test_a_client_that_cannot_come_back_says_so(run) -> None:
    async def talk() -> None:
        limits = replace(LIMITS, grace_s=0.0)
        async with serve(limits=limits) as served, connect(served.url) as client:
            cut(served)
            with pytest.raises(ServiceError) as caught:
                async for event in client:
                    assert isinstance(event, (Speech, Notice))
            assert caught.value.code == "unknown_session"
            with pytest.raises(ServiceError):
                await client.__anext__()  # and again

    run(talk())


def test_who_closes_without_a_connection_waits_for_nobody(run) -> None:
    async def talk() -> None:
        async with serve() as served:
            events: list[Event] = []
            async with connect(served.url) as client:
                listening = asyncio.create_task(listen(client, events))
                client._url = "ws://127.0.0.1:9/v1/session"  # nobody answers any more
                client.drop_connection()
                await eventually(lambda: any(isinstance(e, Notice) for e in events))
            await asyncio.wait_for(listening, 10)

    run(talk())


def test_who_closes_while_it_comes_back_still_says_bye(run) -> None:
    async def talk() -> None:
        async with serve() as served:
            events: list[Event] = []
            async with connect(served.url) as client:
                listening = asyncio.create_task(listen(client, events))
                cut(served)
                await eventually(lambda: any(isinstance(e, Notice) for e in events))
            await asyncio.wait_for(listening, 10)
            await eventually(lambda: not served.service.sessions)  # long before the grace is over

    run(talk())
