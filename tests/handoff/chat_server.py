"""A real HTTP server on this machine that answers chat completions as a test tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Answer = Callable[["Call"], Awaitable[web.StreamResponse | None]]


def chunk(content: Any = None, finish: str | None = None, **more: Any) -> bytes:
    """One event of a streamed chat completion."""
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    return event(json.dumps({**head, "choices": [choice], **more}))


def event(data: str | bytes) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    return b"data: " + data + b"\n\n"


class Call:
    """One request, and the streamed answer to it."""

    def __init__(self, server: ChatServer, request: web.Request, body: Any, number: int) -> None:
        self.server, self.request, self.body, self.number = server, request, body, number
        self.response: web.StreamResponse | None = None

    async def begin(self, content_type: str = "text/event-stream", **headers: str) -> None:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = web.StreamResponse(headers={"Content-Type": content_type, **headers})
        await self.response.prepare(self.request)

    async def send(self, *pieces: bytes) -> None:
        if self.response is None:
            await self.begin()
        assert self.response is not None
        for piece in pieces:
            await self.response.write(piece)

    async def stall(self) -> None:
        """Until the server is closed, or the client has gone."""
        self.server.stalled.set()
        await self.server.released.wait()

    def drop(self) -> None:
        assert self.request.transport is not None
        self.request.transport.abort()


class ChatServer:
    """In a thread of its own. `calls` are those that came in; `url` is the client's base_url."""

    def __init__(self, answer: Answer) -> None:
        self.calls: list[Call] = []
        self.stalled = threading.Event()  # a call stalls
        self.released = asyncio.Event()
        self._answer = answer
        self._ready = threading.Event()
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ChatServer:
        self._thread.start()
        assert self._ready.wait(30.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self.released.set)
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(30.0)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._on_call)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._port = runner.addresses[0][1]
        self._ready.set()
        await self._closing.wait()
        await runner.cleanup()

    async def _on_call(self, request: web.Request) -> web.StreamResponse:
        call = Call(self, request, await request.json(), len(self.calls))
        self.calls.append(call)
        response = await self._answer(call)
        return response or call.response or web.Response()
