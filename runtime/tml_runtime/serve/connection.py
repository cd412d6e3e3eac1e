"""One WebSocket: its first message, what it brings, and what goes out on it, until it ends.

Whatever a client sends, the harm is its own: a message that breaks the protocol is answered with an
error, too many of them end connection and session, and no other one notices. A client that is gone,
or too slow, finds its session again within the grace period.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque

import numpy as np
from aiohttp import WebSocketError, WSMessage, WSMsgType, web

from .._tick import now_ns
from .limits import TokenBucket
from .pictures import Pictures
from .protocol import (
    MAX_CONTROL_BYTES,
    SUBPROTOCOL,
    VERSION,
    Bye,
    CloseCode,
    ErrorCode,
    Hello,
    Interrupt,
    Kind,
    Media,
    Position,
    ProtocolError,
    TextIn,
    decode_control,
    decode_media,
    encode_control,
)
from .served import ServedSession
from .service import Refusal, Service
from .wire import SPARE_BYTES, WireMeter, size_of

# What the kernel and the transport may hold of a client that does not read. Speech is 32 kB a
# second, so it is noticed in seconds and not in minutes.
_SOCKET_BYTES = 65_536
_MAX_URGENT = 64  # control messages that wait to be sent
_LEFT = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED)
logger = logging.getLogger("tml_runtime.serve")


class Connection:
    """Runs in the request's task; a second one sends."""

    def __init__(self, service: Service, request: web.Request, *, authorized: bool) -> None:
        limits = service.limits
        self.service = service
        self.served: ServedSession | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._authorized = authorized
        self._request = request
        self._ws = web.WebSocketResponse(
            timeout=limits.close_s,
            heartbeat=limits.heartbeat_s or None,
            protocols=(SUBPROTOCOL,),
            compress=False,
            max_msg_size=service.max_message_bytes,
            autoping=False,  # `_next` answers, and counts them
            writer_limit=_SOCKET_BYTES // 4,
        )
        self._urgent: deque[str] = deque()  # control messages, before any output
        self._wake = asyncio.Event()
        self._close_code: CloseCode | None = None  # set once: the server wants the end
        self._can_return = False  # the client has the token by which it resumes
        self._offended = False  # aiohttp has closed: no WebSocket frame, or too large a message
        self._messages = TokenBucket(limits.messages_per_s, limits.burst_s)
        self._bytes = TokenBucket(limits.bytes_per_s, limits.burst_s)
        self._wire = WireMeter(service.max_message_bytes + SPARE_BYTES, self._end_flood)
        self._num_errors = 0
        self._num_lost = 0
        self._told_s = 0.0  # when a refused input was last told
        self._pictures = Pictures(
            service.decoders, service.grid, self._on_picture, self._refuse_message
        )

    async def run(self) -> web.WebSocketResponse:
        """From the upgrade to the end, however it comes."""
        self.service.connections.add(self)
        self.service.counts.connections += 1
        sender: asyncio.Task[None] | None = None
        try:
            await self._ws.prepare(self._request)
            self._bound_buffers()
            sender = asyncio.create_task(self._send_all())
            await self._open(await self._hello())
            await self._receive_all()
        except Refusal as refusal:
            self.end(refusal)
        except ConnectionError:
            pass  # gone: `detach` keeps the session
        except Exception:
            logger.exception("a connection failed")
            self.end(Refusal(ErrorCode.INTERNAL, CloseCode.INTERNAL, "the service has a bug"))
        finally:
            dropped = self._close_code in (None, CloseCode.SLOW_CONSUMER)
            keep = dropped and self._can_return and not self._offended
            self.service.detach(self, keep=keep)
            await self._finish(sender)
            self.service.connections.discard(self)
            if not self.done.done():
                self.done.set_result(None)
        return self._ws

    # Called by the service

    def wake(self, num_lost: int = 0) -> None:
        """There is output to send, and `num_lost` more had no room."""
        self._wake.set()
        self._num_lost += num_lost
        if self._num_lost > self.service.limits.max_lost and self._close_code is None:
            self.service.counts.slow_consumers += 1
            self.end(
                Refusal(
                    ErrorCode.SLOW_CONSUMER,
                    CloseCode.SLOW_CONSUMER,
                    f"{self._num_lost} outputs were lost since this client did not read",
                )
            )

    def end(self, refusal: Refusal) -> None:
        """Say why, close, and cut the connection when the client does not answer. At most once."""
        if self._close_code is not None:
            return
        if self.served is None:
            self.service.counts.refuse(refusal.code.value)
        if refusal.close is CloseCode.DRAINING:
            self._say("bye", reason=refusal.code.value, message=str(refusal))
        else:
            self._say(
                "error",
                code=refusal.code.value,
                message=str(refusal),
                fatal=True,
                **refusal.figures,
            )
        self._close(refusal.close)

    # Coming in

    async def _hello(self) -> Hello:
        limit_s = self.service.limits.handshake_s
        try:
            message = await asyncio.wait_for(self._next(), limit_s)
        except asyncio.TimeoutError:
            raise Refusal(
                ErrorCode.HANDSHAKE_TIMEOUT,
                CloseCode.HANDSHAKE_TIMEOUT,
                f"no hello within {limit_s:g} s",
            ) from None
        if message.type in (*_LEFT, WSMsgType.ERROR):
            raise ConnectionResetError("left before hello")
        try:
            if message.type is not WSMsgType.TEXT or size_of(message.data) > MAX_CONTROL_BYTES:
                raise ProtocolError("the first message is not hello", field="type")
            hello = decode_control(message.data)
            if not isinstance(hello, Hello):
                raise ProtocolError("the first message is not hello", field="type")
        except ProtocolError as error:
            raise Refusal(
                error.code, CloseCode.BAD_MESSAGE, str(error), field=error.field
            ) from None
        if not self._authorized and not (hello.token and self.service.is_token(hello.token)):
            raise Refusal(ErrorCode.UNAUTHORIZED, CloseCode.UNAUTHORIZED, "wrong or no token")
        return hello

    async def _open(self, hello: Hello) -> None:
        self.served, self._can_return = await self.service.admit(self, hello)
        self.served.want_ticks(hello.ticks)
        served, service = self.served, self.service
        layout, limits = service.layout, service.limits
        self._say(
            "welcome",
            version=VERSION,
            session=served.id,
            resume=served.resume_token,
            resumed=self._can_return,
            grace_s=limits.grace_s,
            epoch=served.session.epoch,
            media_now=served.media_samples,
            next_seq=served.outbox.oldest_seq,
            text_seq=served.text_seq,
            tick_ms=layout.period_ms,
            lead_ms=round(limits.lead_s * 1000),
            audio_in={"format": "pcm16", "sample_rate": layout.sample_rate, "frame_ms": 20},
            audio_out={"format": "pcm16", "sample_rate": layout.sample_rate},
            video={
                "patch": service.grid.patch,
                "extra_columns": service.grid.extra_columns,
                "max_tokens": service.grid.max_tokens,
            },
            limits={
                "message_bytes": service.max_message_bytes,
                "messages_per_s": limits.messages_per_s,
                "bytes_per_s": limits.bytes_per_s,
            },
            hint=service.hint,
        )

    async def _receive_all(self) -> None:
        while (message := await self._next()).type not in _LEFT:
            if self._close_code is not None:
                continue  # what comes now is read so that the closing handshake can end
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                self._offended = isinstance(message.data, WebSocketError)
                return
            if self._urgent:  # what is answered goes out though more lies ready to be read
                await asyncio.sleep(0)
            self._check_rate(size := size_of(message.data))
            try:
                if message.type is WSMsgType.TEXT:
                    self._on_control(message.data, size)
                else:
                    self._on_media(decode_media(message.data), now_ns())
            except ProtocolError as error:
                self._refuse_message(error)

    async def _next(self) -> WSMessage:
        """The next message but pings and pongs, which count as any other."""
        while True:
            message = await self._ws.receive()
            if message.type not in (WSMsgType.PING, WSMsgType.PONG):
                return message
            await asyncio.sleep(0)  # else who sends nothing else would have the thread to himself
            if self._close_code is None:
                self._check_rate(size_of(message.data))
                if message.type is WSMsgType.PING:
                    await self._ws.pong(message.data)

    def _check_rate(self, num_bytes: int) -> None:
        self._wire.take(num_bytes)
        now_s = asyncio.get_running_loop().time()
        if not self._messages.take(1, now_s=now_s):
            what = f"more than {self.service.limits.messages_per_s:g} messages a second"
        elif not self._bytes.take(num_bytes, now_s=now_s):
            what = f"more than {self.service.limits.bytes_per_s:g} bytes a second"
        else:
            return
        raise Refusal(ErrorCode.RATE_LIMITED, CloseCode.RATE_LIMITED, what)

    def _end_flood(self) -> None:
        what = "too many bytes came that are of no whole message"
        self.end(Refusal(ErrorCode.RATE_LIMITED, CloseCode.RATE_LIMITED, what))

    def _on_control(self, text: str, num_bytes: int) -> None:
        served = self._session()
        if num_bytes > MAX_CONTROL_BYTES:
            raise ProtocolError(
                f"{num_bytes} bytes, more than {MAX_CONTROL_BYTES}",
                field="",
                code=ErrorCode.TOO_LARGE,
            )
        message = decode_control(text)
        with self.service.guard(served):
            if isinstance(message, TextIn):
                served.take_text(message.seq, message.text)
            elif isinstance(message, Interrupt):
                epoch = served.interrupt(message.played)
                self._say("epoch", epoch=epoch, next_seq=served.outbox.oldest_seq)
            elif isinstance(message, Position):
                served.report_position(message.played)
            elif isinstance(message, Bye):
                self._say("bye", reason="bye", message="as you wish")
                self._close(CloseCode.BYE)
            else:
                raise ProtocolError("a second hello", field="type")

    def _on_media(self, media: Media, arrived_ns: int) -> None:
        served = self._session()
        if media.kind is Kind.JPEG:
            served.shed_frames += self._pictures.add(media, arrived_ns)
            return
        with self.service.guard(served):
            if media.kind is Kind.AUDIO:
                served.take_media(media, None, arrived_ns)
            else:
                served.take_raw(media, self.service.grid, arrived_ns)

    def _on_picture(self, media: Media, frame: np.ndarray, arrived_ns: int) -> None:
        served = self._session()
        if served.connection is self:
            with self.service.guard(served):
                served.take_media(media, frame, arrived_ns)

    def _refuse_message(self, error: ProtocolError) -> None:
        if error.code is ErrorCode.REFUSED_INPUT:  # late, or a full queue: no sin, but seldom told
            now_s = asyncio.get_running_loop().time()
            if now_s - self._told_s < 1.0:
                return
            self._told_s = now_s
        else:
            self._num_errors += 1
        if self._num_errors > self.service.limits.max_errors:
            message = f"too many messages were refused; the last: {error}"
            self.end(Refusal(ErrorCode.BAD_MESSAGE, CloseCode.BAD_MESSAGE, message))
        else:
            self._say(
                "error", code=error.code.value, message=str(error), field=error.field, fatal=False
            )

    def _session(self) -> ServedSession:
        assert self.served is not None
        return self.served

    # Going out

    def _say(self, kind: str, **values: object) -> None:
        if len(self._urgent) >= _MAX_URGENT and self._close_code is None:
            self._close(CloseCode.SLOW_CONSUMER)
            return
        self._urgent.append(encode_control(kind, **values))
        self._wake.set()

    def _close(self, code: CloseCode) -> None:
        """Once what is urgent has been sent; at once when that takes too long."""
        self._close_code = code
        self._wake.set()
        asyncio.get_running_loop().call_later(self.service.limits.close_s, self._cut)

    async def _send_all(self) -> None:
        try:
            while True:
                if self._urgent:
                    is_welcome = self.served is not None  # or something after it
                    await self._ws.send_str(self._urgent.popleft())
                    self._can_return |= is_welcome
                elif self._close_code is not None:
                    await self._ws.close(code=self._close_code)
                    return
                elif (output := self._next_output()) is None:
                    await self._sleep()
                elif isinstance(output, str):
                    await self._ws.send_str(output)
                else:
                    await self._ws.send_bytes(output)
        except (ConnectionError, RuntimeError):  # aiohttp's for a socket that is closed
            self._cut()

    def _next_output(self) -> str | bytes | None:
        served, limits = self.served, self.service.limits
        if served is None or served.connection is not self:
            return None
        if served.ticks:
            return served.ticks.popleft()
        rate = self.service.layout.sample_rate
        item = served.outbox.take(
            served.media_samples,
            lead=round(limits.lead_s * rate),
            stale=round(limits.stale_s * rate),
        )
        return None if item is None else item.data

    async def _sleep(self) -> None:
        """Until woken, or the next output is due."""
        timer = None
        served, rate = self.served, self.service.layout.sample_rate
        start = None if served is None else served.outbox.next_start()
        if served is not None and start is not None:
            wait_s = (start - served.media_samples) / rate - self.service.limits.lead_s
            timer = asyncio.get_running_loop().call_later(max(0.001, wait_s), self._wake.set)
        await self._wake.wait()
        self._wake.clear()
        if timer is not None:
            timer.cancel()

    async def _finish(self, sender: asyncio.Task[None] | None) -> None:
        self._pictures.stop()
        if sender is None:
            return
        if self._close_code is None:
            sender.cancel()  # the client left: nothing more can be said
        else:
            await asyncio.wait([sender], timeout=2 * self.service.limits.close_s)
            sender.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sender
        self._cut()

    def _bound_buffers(self) -> None:
        transport = self._request.transport
        if transport is None:
            return
        self._wire.watch(transport)
        transport.set_write_buffer_limits(high=_SOCKET_BYTES // 4)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)

    def _cut(self) -> None:
        transport = self._request.transport
        if transport is not None:
            transport.abort()
