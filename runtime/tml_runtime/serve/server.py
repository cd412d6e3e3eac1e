"""The service on a socket: routes, who may connect, and the life of the process.

There is no TLS here: on anything but loopback, put a reverse proxy in front that has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aiohttp import web

from ..errors import InputValueError, LoopFailed
from ..loop import Runtime
from .connection import Connection
from .page import add_page, page_origins
from .protocol import PATH, SUBPROTOCOL, ErrorCode
from .service import Service

# What to call, with how many were refused by error, and its content type.
MetricsView = tuple[Callable[[Runtime, Mapping[str, int]], bytes], str]
_MAX_REQUEST_BYTES = 4096  # of an HTTP request's body: none has one


def check_reachable(host: str, token: str | None) -> None:
    """Raises InputValueError for a host that others can reach, without a token."""
    if token is not None and len(token) < 16:
        raise InputValueError("token: shorter than 16 characters, so it could be guessed")
    if token is None and not _is_loopback(host):
        raise InputValueError(
            f"host {host!r} is not a loopback address, so everybody could connect: give a token"
        )


def make_app(
    service: Service, *, metrics: MetricsView | None = None, page: bool = False
) -> web.Application:
    """Routes of `service`. metrics: what GET /metrics answers with, if it is to be there. page: the
    demo's page at /."""
    server = _Server(service, metrics)
    app = web.Application(client_max_size=_MAX_REQUEST_BYTES)
    app.router.add_get(PATH, server.session)
    app.router.add_get("/healthz", server.health)
    app.router.add_get("/status", server.status)
    if metrics is not None:
        app.router.add_get("/metrics", server.metrics)
    if page:
        add_page(app)
    return app


@contextlib.asynccontextmanager
async def serving(
    service: Service,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    metrics: MetricsView | None = None,
    page: bool = False,
) -> AsyncIterator[str]:
    """Listen while the context lasts, then say goodbye to all clients; gives the URL to connect to.

    port 0: any that is free. page: with the demo's page, which may connect when it was loaded from
    the address listened on. Raises OSError when the address cannot be had.
    """
    handshake_s = service.limits.handshake_s
    runner = web.AppRunner(
        make_app(service, metrics=metrics, page=page),
        access_log=None,
        keepalive_timeout=handshake_s,  # also for a connection that sends no request
        shutdown_timeout=service.limits.close_s,
    )
    await runner.setup()
    service.start()
    try:
        site = web.TCPSite(runner, host, port, backlog=service.limits.max_connections)
        await site.start()
        address = runner.addresses[0]
        if page:
            service.origins += page_origins(address[0], address[1])
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        yield f"ws://{shown}:{address[1]}{PATH}"
    finally:
        await service.stop()
        await runner.cleanup()


async def serve_until_over(
    service: Service,
    *,
    host: str,
    port: int,
    metrics: MetricsView | None = None,
    page: bool = False,
    on_ready: Callable[[str], None],
) -> signal.Signals | None:
    """Serve until SIGTERM or SIGINT, which is returned, or None when the tick loop has failed."""
    loop, got = asyncio.get_running_loop(), asyncio.Event()
    caught: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        caught.append(number)
        got.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    async with serving(service, host=host, port=port, metrics=metrics, page=page) as url:
        on_ready(url)
        waits = [asyncio.create_task(event.wait()) for event in (got, service.over)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    return caught[0] if caught and service.failure is None else None


def run_service(
    make_service: Callable[[], Service],
    runtime: Runtime,
    *,
    host: str,
    port: int,
    metrics: MetricsView | None = None,
    page: bool = False,
    on_ready: Callable[[str], None],
) -> signal.Signals | None:
    """Start `runtime`, serve it, stop it. As `serve_until_over`; raises OSError."""

    async def serve() -> signal.Signals | None:
        return await serve_until_over(
            make_service(), host=host, port=port, metrics=metrics, page=page, on_ready=on_ready
        )

    runtime.start()
    try:
        return asyncio.run(serve())
    finally:
        with contextlib.suppress(LoopFailed):  # clients and caller know
            runtime.stop()


class _Server:
    """Answers requests."""

    def __init__(self, service: Service, metrics: MetricsView | None) -> None:
        self._service = service
        self._metrics = metrics

    async def session(self, request: web.Request) -> web.StreamResponse:
        """The WebSocket. What can be refused before the upgrade is refused as HTTP."""
        origin = request.headers.get("Origin")
        if origin is not None and origin not in self._service.origins:
            message = f"origin {origin!r:.100} is not allowed"
            return self._refuse(403, error="forbidden", message=message)
        authorized = self._authorized(request)
        if authorized is False:
            return self._unauthorized()
        if SUBPROTOCOL not in _offered(request) or not _is_upgrade(request):
            message = f"a WebSocket with subprotocol {SUBPROTOCOL!r} is served here"
            headers = {"Upgrade": "websocket"}
            return self._refuse(426, headers, error="upgrade_required", message=message)
        if len(self._service.connections) >= self._service.limits.max_connections:
            return self._refuse(
                503,
                {"Retry-After": "1"},
                error=ErrorCode.EXHAUSTED.value,
                message="too many connections",
                connections=len(self._service.connections),
            )
        no_room = None if "resume" in request.query else self._service.no_room()
        if authorized and no_room is not None:
            headers = {"Retry-After": str(no_room.figures.get("retry_after_s", 5))}
            error = no_room.code.value
            return self._refuse(503, headers, error=error, message=str(no_room), **no_room.figures)
        return await Connection(self._service, request, authorized=authorized is True).run()

    async def health(self, request: web.Request) -> web.Response:
        ready = self._service.ready
        return _json(200 if ready else 503, alive=self._service.failure is None, ready=ready)

    async def status(self, request: web.Request) -> web.Response:
        if self._authorized(request) is not True:
            return self._unauthorized()
        return _json(200, **await self._service.status())

    async def metrics(self, request: web.Request) -> web.Response:
        if self._authorized(request) is not True:
            return self._unauthorized()
        assert self._metrics is not None
        render, content_type = self._metrics
        refused = dict(self._service.counts.refused)
        body = await self._service.call(lambda runtime: render(runtime, refused))
        return web.Response(body=body, headers={"Content-Type": content_type})

    def _authorized(self, request: web.Request) -> bool | None:
        """None: no header came, and a token is needed."""
        if not self._service.needs_token:
            return True
        header = request.headers.get("Authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        return scheme.lower() == "bearer" and self._service.is_token(token.strip())

    def _unauthorized(self) -> web.Response:
        return self._refuse(
            401,
            {"WWW-Authenticate": "Bearer"},
            error=ErrorCode.UNAUTHORIZED.value,
            message="wrong or no token",
        )

    def _refuse(
        self, status: int, headers: dict[str, str] | None = None, /, *, error: str, **values: Any
    ) -> web.Response:
        self._service.counts.refuse(error)
        return _json(status, headers, error=error, **values)


def _json(status: int, headers: dict[str, str] | None = None, /, **values: Any) -> web.Response:
    text = json.dumps(values, default=_plain)
    return web.Response(
        text=text + "\n", status=status, headers=headers, content_type="application/json"
    )


def _plain(value: Any) -> Any:
    """numpy's numbers, and whatever else a report may hold."""
    return value.item() if hasattr(value, "item") else str(value)


def _offered(request: web.Request) -> list[str]:
    headers = request.headers.getall("Sec-WebSocket-Protocol", [])
    return [name.strip() for header in headers for name in header.split(",")]


def _is_upgrade(request: web.Request) -> bool:
    return web.WebSocketResponse(protocols=(SUBPROTOCOL,)).can_prepare(request).ok


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
