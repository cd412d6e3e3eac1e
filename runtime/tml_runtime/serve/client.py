"""A client of the service, for asyncio: media and text in, speech, text and actions out.

    async with connect("ws://127.0.0.1:8760/v1/session") as client:
        await client.send_audio(pcm)
        async for event in client: ...

A connection that breaks is resumed by itself while the session's grace period lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np

from .events import (
    Epoch,
    Event,
    Notice,
    ServiceError,
    Welcome,
    as_int16,
    output_event,
    parse_message,
    refused,
    service_error,
    speech_event,
)
from .inbound import Inbound
from .kept import Kept
from .playback import Playback
from .protocol import (
    MAX_STAMP,
    SUBPROTOCOL,
    VERSION,
    ErrorCode,
    Kind,
    Media,
    ProtocolError,
    decode_media,
    encode_control,
    encode_media,
)

_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)  # between attempts to resume; the last one goes on
_POSITION_EVERY_S = 0.2
_HEARTBEAT_S = 10.0
_MAX_MESSAGE_BYTES = 1 << 20
_FRAME_MS = 20
# What says that no connection could be had, and nothing of the session, which waits.
_TRIED_AGAIN = ("exhausted", "http", "handshake_timeout", "slow_consumer")


class _ConnectionLostError(Exception):
    """The connection ended without the service having said that the session did."""


@contextlib.asynccontextmanager
async def connect(url: str, *, token: str | None = None, **options: Any) -> AsyncIterator[Client]:
    """A session at `url`, which ends with the context.

    options: of `Runtime.open_session`: temperature, top_k, top_p, min_p, seed, prompt. Raises
    ServiceError when the service refuses, with its code and when to try again; OSError when nobody
    listens.
    """
    async with aiohttp.ClientSession() as http:
        client = Client(http, url, token=token, options=options)
        await client.open()
        try:
            yield client
        finally:
            await client.close()


class Client:
    """Made by `connect`. All of it belongs to one event loop.

    Iteration gives events until the session ends; it raises ServiceError when the service ended it.
    Speech and text of an epoch that an interruption ended are dropped here. Media sent while the
    connection is broken are lost, as on any line; texts and interruptions are sent again.
    """

    def __init__(
        self, http: aiohttp.ClientSession, url: str, *, token: str | None, options: dict[str, Any]
    ) -> None:
        self._http = http
        self._url = url
        self._token = token
        self._options = options
        self._ws: aiohttp.ClientWebSocketResponse[Any] | None = None
        self._welcome: Welcome | None = None
        self._inbound = Inbound()
        self._reader: asyncio.Task[None] | None = None
        self._resending: asyncio.Task[None] | None = None
        self._socket: Any = None  # of the newest connection
        self._closed = False
        self._audio_seq = self._video_seq = 0
        self._capture = 0  # samples sent and about to be: the capture clock
        self._rest = np.zeros(0, np.int16)  # not yet a whole frame
        self._kept = Kept()
        self._told_s = 0.0
        self._clock = (0.0, 0)  # a time here, and the media clock then
        self.playback = Playback(1)
        self.resumes = 0
        self.unsent_frames = 0  # while there was no connection

    @property
    def welcome(self) -> Welcome:
        """What the service said last when the session began or went on."""
        assert self._welcome is not None, "not connected"
        return self._welcome

    @property
    def epoch(self) -> int:
        return self._inbound.epoch

    @property
    def lost_outputs(self) -> int:
        """Sequence numbers that never came and were not fenced off."""
        return self._inbound.lost

    @property
    def media_now(self) -> float:
        """Seconds on the session's media clock now, as well as the welcome told it."""
        at_s, media = self._clock
        return media / self.welcome.sample_rate_out + time.monotonic() - at_s

    # Sending

    async def send_audio(self, pcm: np.ndarray, *, stamp: int | None = None) -> None:
        """Mono samples, int16 or float32 in [-1, 1], that follow those sent before.

        They go in frames of 20 ms; what is left waits for the next call. stamp: where `pcm` begins
        on the capture clock, in samples, when some were left out.
        """
        samples = as_int16(pcm)
        if stamp is not None and stamp != self._capture + len(self._rest):
            self._capture, self._rest = stamp, samples
        else:
            self._rest = np.concatenate([self._rest, samples])
        size = self.welcome.sample_rate_in * _FRAME_MS // 1000
        while len(self._rest) >= size:
            frame, self._rest = self._rest[:size], self._rest[size:]
            await self.send_piece(frame, seq=self._audio_seq, stamp=self._capture)
            self._audio_seq += 1
            self._capture += size
        await self._tell_position()

    async def send_piece(self, pcm: np.ndarray, *, seq: int, stamp: int) -> None:
        """One frame of int16 samples, for a caller that numbers and stamps them itself."""
        payload = memoryview(pcm.astype("<i2", copy=False).tobytes())
        await self._send_media(Media(Kind.AUDIO, seq, stamp, payload, self.epoch))

    async def send_video(self, frame: np.ndarray | bytes, *, stamp: int | None = None) -> None:
        """A JPEG as bytes, or a raw uint8 RGB frame [H, W, 3], both sides multiples of the patch.

        stamp: when it was taken, in samples of the capture clock; by default now, which is the end
        of the audio sent so far.
        """
        at = self._capture + len(self._rest) if stamp is None else stamp
        seq, self._video_seq = self._video_seq, self._video_seq + 1
        if isinstance(frame, np.ndarray):
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(f"frame: expected uint8 [H, W, 3]: {frame.dtype} {frame.shape}")
            height, width, _ = frame.shape
            payload = memoryview(frame.tobytes())
            media = Media(Kind.RGB, seq, at, payload, self.epoch, width, height)
        else:
            media = Media(Kind.JPEG, seq, at, memoryview(frame), self.epoch)
        await self._send_media(media)

    async def send_text(self, text: str) -> None:
        """Text for the model, in order; sent again if the connection breaks on the way."""
        self._kept.add_text(text)
        await self._send_kept()

    async def interrupt(self, played: int | None = None) -> None:
        """Stop the model's speech: what was not played was not said.

        played: the last sample heard, on the media clock; by default what `playback` reckons. What
        was sent before the service heard of it is dropped here once it answers with an `Epoch`.
        If the connection is broken, or breaks before the answer, it is asked again on the next.
        """
        if played is not None and not (isinstance(played, int) and 0 <= played <= MAX_STAMP):
            raise ValueError(f"{played=} is no sample of the media clock")
        stopped = self.playback.stop(time.monotonic())
        self._kept.add_interrupt(stopped if played is None else played)
        await self._send_kept()

    # Life

    async def open(self) -> None:
        try:
            await self._connect()
        except (_ConnectionLostError, ProtocolError) as error:
            raise ServiceError(str(error), code="unreachable") from None
        self._reader = asyncio.create_task(self._read_all(), name="tml-client")

    async def close(self) -> None:
        """Say bye and end the session. More than once is no error."""
        if self._closed:
            return
        self._closed = True
        await self._say_bye()
        if self._reader is not None:
            self._inbound.make_room()  # the reader can end though nobody takes its events
            await asyncio.wait([self._reader], timeout=1.0)
            if not self._reader.done():  # no answer; whoever iterates must not wait for one
                self._reader.cancel()
                await asyncio.wait([self._reader])
                self._inbound.end_now()
        if self._ws is not None:
            await self._ws.close()
        if self._resending is not None:
            self._resending.cancel()

    async def _say_bye(self) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):
            if self._ws is not None and not self._ws.closed:
                await self._ws.send_str(encode_control("bye"))

    def drop_connection(self) -> None:
        """Cut the connection, as a bad line does. The session is resumed."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def __aiter__(self) -> Client:
        return self

    async def __anext__(self) -> Event:
        return await self._inbound.take()

    # The connection

    async def _connect(self) -> None:
        resume = None if self._welcome is None else self._welcome.resume
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        began_s = time.monotonic()
        try:
            ws = await self._http.ws_connect(
                self._url,
                params={} if resume is None else {"resume": "1"},
                protocols=(SUBPROTOCOL,),
                headers=headers,
                max_msg_size=_MAX_MESSAGE_BYTES,
                heartbeat=_HEARTBEAT_S,
                autoclose=True,
            )
        except aiohttp.WSServerHandshakeError as error:
            raise refused(error) from None
        try:
            await ws.send_str(
                encode_control("hello", version=VERSION, resume=resume, options=self._options)
            )
            self._welcome = welcome = await self._await_welcome(ws)
        except BaseException:
            await ws.close()
            raise
        arrived_s = time.monotonic()
        self._clock = ((began_s + arrived_s) / 2, welcome.media_now)
        if resume is None:
            self.playback = Playback(welcome.sample_rate_out)
        num_taken = max(0, welcome.epoch - self.epoch)
        self._kept.connected(text_seq=welcome.text_seq, num_taken=num_taken)
        if num_taken > 0:  # and the answers were lost with the old connection
            self._inbound.begin_epoch(welcome.epoch, welcome.next_seq)
        self._ws, self._socket = ws, ws.get_extra_info("socket")

    async def _await_welcome(self, ws: aiohttp.ClientWebSocketResponse[Any]) -> Welcome:
        message = await ws.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise _ConnectionLostError(f"no welcome: {message.type!r}")
        values = parse_message(message.data)
        if values["type"] == "welcome":
            return Welcome.parse(values)
        raise service_error(values)

    async def _read_all(self) -> None:
        try:
            while True:
                try:
                    await self._read()
                except (_ConnectionLostError, aiohttp.ClientError, ConnectionError) as error:
                    if self._closed:
                        break
                    await self._inbound.put(Notice("connection_lost", str(error)))
                    if not await self._resume():
                        break
                else:
                    break
        except Exception as error:  # whoever iterates gets it: a reader that died is no silence
            await self._inbound.end(error)
        else:
            await self._inbound.end()

    async def _resume(self) -> bool:
        """Whether there is a connection again; False once the client was closed. Raises
        ServiceError when the session is gone, or cannot be reached for too long."""
        give_up_s = time.monotonic() + self.welcome.grace_s
        self._ws = None
        self.drop_connection()  # else who waits for room on a dead line would for minutes
        epoch = self.epoch
        attempt, wait_s = 0, 0.0
        while not self._closed:
            await asyncio.sleep(max(wait_s, _RETRY_S[min(attempt, len(_RETRY_S) - 1)]))
            attempt += 1
            try:
                await self._connect()
            except (_ConnectionLostError, aiohttp.ClientError, OSError) as error:
                if time.monotonic() > give_up_s:
                    raise ServiceError(str(error), code="unreachable") from None
                continue
            except ServiceError as error:
                wait_s = error.retry_after_s or 0.0
                if error.code not in _TRIED_AGAIN or time.monotonic() + wait_s > give_up_s:
                    raise
                continue
            self.resumes += 1
            self._resending = asyncio.create_task(self._send_again(), name="tml-client-again")
            await self._inbound.put(Notice("resumed", f"after {attempt} attempts"))
            if self.epoch > epoch:
                await self._inbound.put(Epoch(self.epoch))
            if self._closed:  # meanwhile, when there was nothing to say it on
                await self._say_bye()
            return True
        return False

    async def _send_again(self) -> None:
        with contextlib.suppress(ServiceError):  # closed meanwhile
            await self._send_kept()

    async def _read(self) -> None:
        """Until the session ends. Raises _ConnectionLostError, ServiceError, ProtocolError."""
        ws = self._ws
        assert ws is not None
        async for message in ws:
            if message.type is aiohttp.WSMsgType.BINARY:
                try:
                    media = decode_media(message.data, kinds=(Kind.SPEECH,))
                except ProtocolError as error:
                    if error.code is not ErrorCode.UNKNOWN_KIND or message.data[0] in list(Kind):
                        raise
                    continue  # of a later version
                await self._on_speech(media)
            elif message.type is aiohttp.WSMsgType.TEXT:
                values = parse_message(message.data)
                if values["type"] == "bye":
                    if not self._closed and values.get("reason") != "bye":
                        raise service_error(values)
                    return
                await self._on_message(values)
        raise _ConnectionLostError(f"closed with code {ws.close_code}")

    async def _on_speech(self, media: Media) -> None:
        event = speech_event(media)
        if self._inbound.count(event):
            self.playback.received(event.stamp, len(event.pcm), time.monotonic())
            await self._inbound.put(event)

    async def _on_message(self, values: dict[str, Any]) -> None:
        kind = values["type"]
        if kind == "epoch":
            epoch, next_seq = values.get("epoch"), values.get("next_seq")
            if not isinstance(epoch, int) or not isinstance(next_seq, int):
                raise ProtocolError("epoch and next_seq are integers", field="epoch")
            self._kept.answered()
            self._inbound.begin_epoch(epoch, next_seq)
            await self._inbound.put(Epoch(self.epoch))
        elif kind == "error":
            error = service_error(values)
            if error.code == "slow_consumer":  # the session waits
                raise _ConnectionLostError(str(error))
            if values.get("fatal"):
                raise error
            await self._inbound.put(Notice(error.code, str(values.get("message"))))
        elif kind in ("text", "action"):
            event = output_event(values)
            assert event is not None
            if self._inbound.count(event):
                await self._inbound.put(event)

    async def _send_media(self, media: Media) -> None:
        if not await self._send(encode_media(media)):
            self.unsent_frames += 1

    async def _send_kept(self) -> None:
        """All that this connection has not had, in order, whichever task comes first: a message is
        written before anything is waited for."""
        while (message := self._kept.next()) is not None:
            if not await self._send(message):
                return

    async def _send(self, message: str | bytes) -> bool:
        if self._closed:
            raise ServiceError("the client was closed", code="closed")
        ws = self._ws
        if ws is None or ws.closed:
            return False
        try:
            if isinstance(message, str):
                await ws.send_str(message)
            else:
                await ws.send_bytes(message)
        except (ConnectionError, RuntimeError):  # the reader finds out and resumes
            return False
        except asyncio.CancelledError:  # aiohttp's senders wait for room together, and end together
            if _is_cancelled():
                raise
        return True

    async def _tell_position(self) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _POSITION_EVERY_S:
            self._told_s = now_s
            await self._send(encode_control("position", played=self.playback.position(now_s)))


def _is_cancelled() -> bool:
    """Whether somebody cancelled this task. Before Python 3.11 tasks do not say, so: yes."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is None or cancelling() > 0
