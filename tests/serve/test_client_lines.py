"""The Python client against servers, and proxies before them, that say what it must live with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tml_runtime.serve.client import connect
from tml_runtime.serve.events import Event, Notice, ServiceError
from tml_runtime.serve.load import Caller
from tml_runtime.serve.protocol import HEADER

WELCOME = {
    "type": "welcome", "version": 1, "session": "s", "resume": "r", "resumed": False,
    "grace_s": 20.0, "epoch": 0, "media_now": 0, "next_seq": 0, "text_seq": -1, "tick_ms": 200,
    "lead_ms": 250, "audio_in": {"sample_rate": 16000}, "audio_out": {"sample_rate": 16000},
    "video": {"patch": 40},
}  # fmt: skip
Answer = Callable[[web.Request, int], Awaitable[web.StreamResponse]]


async def greet(request: web.Request, number: int) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(protocols=("tml.v1",))
    await ws.prepare(request)
    await ws.receive()
    await ws.send_json(WELCOME | {"resumed": number > 1})
    return ws


async def say_bye(ws: web.WebSocketResponse) -> web.WebSocketResponse:
    await ws.send_json({"type": "bye", "reason": "bye", "message": ""})
    await ws.close()
    return ws


async def events_of(answer: Answer) -> tuple[list[Event], int]:
    """What a client sees of a server that answers its n-th connection so, and how many it made."""
    number = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal number
        number += 1
        return await answer(request, number)

    app = web.Application()
    app.router.add_get("/v1/session", handle)
    async with TestServer(app) as server, connect(str(server.make_url("/v1/session"))) as client:
        return [event async for event in client], number


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_has_no_connection_yet_is_asked_again(status: int, run) -> None:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        if number == 2:
            return web.json_response({}, status=status, headers={"Retry-After": "0"})
        ws = await greet(request, number)
        if number == 1:
            request.transport.abort()  # pyright: ignore[reportOptionalMemberAccess]
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
