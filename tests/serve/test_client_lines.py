"""The Python client against servers, and proxies before them, that say what it must live with."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestServer
from local_service import eventually

from tml_runtime.serve.client import Client, connect
from tml_runtime.serve.events import Epoch, Event, Notice, ServiceError, Speech
from tml_runtime.serve.kept import Kept
from tml_runtime.serve.load import Caller
from tml_runtime.serve.protocol import HEADER, Kind

WELCOME = {
    "type": "welcome", "version": 1, "session": "s", "resume": "r", "resumed": False,
    "grace_s": 20.0, "epoch": 0, "media_now": 0, "next_seq": 0, "text_seq": -1, "tick_ms": 200,
    "lead_ms": 250, "audio_in": {"sample_rate": 16000}, "audio_out": {"sample_rate": 16000},
    "video": {"patch": 40},
}  # fmt: skip
Answer = Callable[[web.Request, int], Awaitable[web.StreamResponse]]


async def greet(request: web.Request, number: int, **values: object) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(protocols=("tml.v1",))
    await ws.prepare(request)
    await ws.receive()
    await ws.send_json(WELCOME | {"resumed": number > 1} | values)
    return ws


async def say_bye(ws: web.WebSocketResponse) -> web.WebSocketResponse:
    await ws.send_json({"type": "bye", "reason": "bye", "message": ""})
    await ws.close()
    return ws


async def speak(ws: web.WebSocketResponse, seq: int, epoch: int) -> None:
    await ws.send_bytes(HEADER.pack(Kind.SPEECH, 0, 0, seq, 0, epoch, 0, 0) + b"xx")


def cut(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


@contextlib.asynccontextmanager
async def client_of(answer: Answer) -> AsyncIterator[Client]:
    """A client of a server that answers its n-th connection so."""
    numbers = itertools.count(1)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await answer(request, next(numbers))

    app = web.Application()
    app.router.add_get("/v1/session", handle)
    async with TestServer(app) as server, connect(str(server.make_url("/v1/session"))) as client:
        yield client


async def events_of(answer: Answer) -> tuple[list[Event], int]:
    """What a client sees of a server that answers its n-th connection so, and how many it made."""
    last = 0

    async def counted(request: web.Request, number: int) -> web.StreamResponse:
        nonlocal last
        last = number
        return await answer(request, number)

    async with client_of(counted) as client:
        return [event async for event in client], last


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_has_no_connection_yet_is_asked_again(status: int, run) -> None:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        if number == 2:
            return web.json_response({}, status=status, headers={"Retry-After": "0"})
        ws = await greet(request, number)
        if number == 1:
            cut(request)
            return ws
        return await say_bye(ws)

    async def talk() -> None:
        events, number = await events_of(answer)
        assert number == 3
        assert [e.code for e in events if isinstance(e, Notice)] == ["connection_lost", "resumed"]

    run(talk())


def test_who_read_too_slowly_comes_back(run) -> None:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        ws = await greet(request, number)
        if number > 1:
            return await say_bye(ws)
        await ws.send_json({"type": "error", "code": "slow_consumer", "message": "", "fatal": True})
        await ws.close(code=4430)
        return ws

    async def talk() -> None:
        events, number = await events_of(answer)
        assert number == 2
        assert [e.code for e in events if isinstance(e, Notice)] == ["connection_lost", "resumed"]

    run(talk())


def test_what_a_later_version_sends_is_ignored(run) -> None:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        ws = await greet(request, number)
        await ws.send_json({"type": "novel", "x": 1})
        await ws.send_bytes(HEADER.pack(18, 0, 0, 0, 0, 0, 0, 0) + b"xx")
        return await say_bye(ws)

    run(_nothing(answer))


async def _nothing(answer: Answer) -> None:
    assert await events_of(answer) == ([], 1)


@pytest.mark.parametrize("first", ["close", "nonsense"])
def test_who_is_not_welcomed_hears_why(first: str, run) -> None:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        ws = web.WebSocketResponse(protocols=("tml.v1",))
        await ws.prepare(request)
        await ws.receive()
        if first == "nonsense":
            await ws.send_json({"type": "welcome"})
        await ws.close(code=1012)
        return ws

    async def talk() -> None:
        with pytest.raises(ServiceError) as refused:
            await events_of(answer)
        assert refused.value.code == "unreachable"

    run(talk())


def test_a_caller_whose_url_is_none_fails_alone(run) -> None:
    caller = Caller(0, "ws://.foo/", token=None, up=None, down=None)  # type: ignore[arg-type]

    async def talk() -> None:
        await asyncio.wait_for(caller.run(np.zeros(320, np.int16), 1.0, lambda: None), 20.0)

    run(talk())
    assert caller.load.error


# Interruptions and broken lines


async def control(ws: web.WebSocketResponse, kind: str) -> dict:
    """The next message of that type."""
    while (values := await ws.receive_json())["type"] != kind:
        pass
    return values


async def listen(client: Client, events: list[Event]) -> None:
    async for event in client:
        events.append(event)


def test_an_interruption_that_was_taken_counts_though_its_answer_was_lost(run) -> None:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        if number == 1:
            ws = await greet(request, number)
            for seq in range(3):
                await speak(ws, seq, epoch=0)
            await control(ws, "interrupt")
            cut(request)
            return ws
        ws = await greet(request, number, epoch=1, next_seq=9)
        await speak(ws, 9, epoch=0)
        await speak(ws, 10, epoch=1)
        with pytest.raises(asyncio.TimeoutError):  # it is not asked for again
            await asyncio.wait_for(control(ws, "interrupt"), 0.2)
        return await say_bye(ws)

    async def talk() -> None:
        async with client_of(answer) as client:
            await eventually(lambda: len(client._inbound) == 3)  # not taken yet
            await client.interrupt()
            await eventually(lambda: client.resumes == 1)
            events = [event async for event in client]
            assert client.epoch == 1 and client.lost_outputs == 0
        assert [type(event) for event in events] == [Notice, Notice, Epoch, Speech]
        assert {getattr(event, "epoch", 1) for event in events} == {1}

    run(talk())


@pytest.mark.parametrize("broken", [False, True], ids=["as it breaks", "while it is broken"])
def test_an_interruption_that_was_not_taken_is_asked_again(broken: bool, run) -> None:
    asked: list[int] = []

    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        ws = await greet(request, number)
        if number == 1:
            await ws.receive()  # and nothing is done about it
            cut(request)
            return ws
        asked.append((await control(ws, "interrupt"))["played"])
        await ws.send_json({"type": "epoch", "epoch": 1, "next_seq": 0})
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(control(ws, "interrupt"), 0.2)
        return await say_bye(ws)

    async def talk() -> None:
        async with client_of(answer) as client:
            if broken:
                client.drop_connection()
                await eventually(lambda: client._ws is None)
            await client.interrupt(7)
            await client.interrupt(9)  # stands for both
            events = [event async for event in client]
        assert asked == [9]
        assert [type(event) for event in events] == [Notice, Notice, Epoch]

    run(talk())


def test_an_interruption_is_of_a_sample_of_the_media_clock(run) -> None:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        ws = await greet(request, number)
        await ws.receive()
        return await say_bye(ws)

    async def talk() -> None:
        async with client_of(answer) as client:
            for played in (-1, 2**53, 1.5):
                with pytest.raises(ValueError, match="played"):
                    await client.interrupt(played)  # type: ignore[arg-type]

    run(talk())


def test_only_what_was_not_taken_is_said_again() -> None:
    kept = Kept()
    for played in (5, 6, 7):
        kept.add_text(f"text {played}")
        kept.add_interrupt(played)
        assert said(kept) == [played, f"text {played}"]
    kept.answered()
    assert said(kept) == []
    kept.connected(text_seq=0, num_taken=0)
    assert said(kept) == [7, "text 6", "text 7"]
    kept.connected(text_seq=1, num_taken=1)
    assert said(kept) == ["text 7"]
    kept.add_text("more")
    kept.connected(text_seq=2, num_taken=0)
    assert said(kept) == ["more"]


def said(kept: Kept) -> list[int | str]:
    """Where each interruption was, and each text."""
    what: list[int | str] = []
    while (message := kept.next()) is not None:
        values = json.loads(message)
        what.append(values["played"] if values["type"] == "interrupt" else values["text"])
    return what


# Much to say again, on a line that takes little


class Choked:
    """A server whose first connection breaks, and whose second reads nothing until `reads`."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.texts: list[int] = []
        self.frames = 0

    async def answer(self, request: web.Request, number: int) -> web.WebSocketResponse:
        ws = await greet(request, number)
        if number == 1:
            cut(request)
            return ws
        assert request.transport is not None
        request.transport.pause_reading()  # type: ignore[attr-defined]
        await self.reads.wait()
        request.transport.resume_reading()  # type: ignore[attr-defined]
        async for message in ws:
            if message.type is WSMsgType.BINARY:
                self.frames += 1
            elif (values := json.loads(message.data))["type"] == "text":
                self.texts.append(values["seq"])
        return ws

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """Comes back with 60 long texts to be said, into buffers that are full before the last."""
        async with client_of(self.answer) as client:
            await eventually(lambda: client._ws is None)
            for _ in range(60):
                await client.send_text("\U0001f600" * 1000)
            ws_connect = client._http.ws_connect

            async def connect_narrowly(*args: Any, **options: Any) -> Any:
                ws = await ws_connect(*args, **options)
                ws.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                return ws

            client._http.ws_connect = connect_narrowly  # type: ignore[method-assign]
            await eventually(lambda: client.resumes == 1)
            try:
                yield client
            finally:
                self.reads.set()


def test_what_is_written_while_texts_are_sent_again_comes_after_them(run) -> None:
    async def talk() -> None:
        server = Choked()
        async with server.client() as client:
            listening = asyncio.create_task(listen(client, []))
            writing = asyncio.create_task(client.send_text("last"))
            speaking = asyncio.create_task(client.send_audio(np.zeros(320, np.int16)))
            await asyncio.sleep(0.1)
            server.reads.set()
            await asyncio.wait([writing, speaking])
            await eventually(lambda: len(server.texts) >= 61)
            assert server.texts == list(range(61))
            assert server.frames == 1 and client.unsent_frames == 0
            listening.cancel()

    run(talk())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks do not say who was cancelled")
def test_who_is_cancelled_while_texts_are_sent_again_holds_up_no_other(run) -> None:
    async def talk() -> None:
        server, events = Choked(), []
        async with server.client() as client:
            listening = asyncio.create_task(listen(client, events))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.send_text("last"), 0.1)
            server.reads.set()
            await eventually(lambda: len(server.texts) >= 61)
            assert server.texts == list(range(61))
            await client.send_text("one more")
            await eventually(lambda: server.texts[-1] == 61)
            assert not listening.done()
            listening.cancel()

    run(talk())


def test_who_closes_while_texts_are_sent_again_is_let_go(run) -> None:
    async def talk() -> None:
        async with Choked().client() as client:
            listening = asyncio.create_task(listen(client, []))
            await asyncio.wait_for(client.close(), 15.0)
            await asyncio.wait_for(listening, 1.0)
            with pytest.raises(ServiceError):
                await client.send_text("more")

    run(talk())


def test_who_waits_for_room_on_a_line_that_died_is_let_go(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tml_runtime.serve.client._HEARTBEAT_S", 0.4)
    over = asyncio.Event()

    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        ws = await greet(request, number)
        if number > 1:
            return await say_bye(ws)
        assert request.transport is not None
        request.transport.pause_reading()  # type: ignore[attr-defined]
        await over.wait()
        cut(request)
        return ws

    async def talk() -> None:
        async with client_of(answer) as client:
            for _ in range(100):
                await asyncio.wait_for(client.send_video(bytes(1 << 20)), 10.0)
            assert [event async for event in client][-1] == Notice("resumed", "after 1 attempts")
            over.set()

    run(talk())
