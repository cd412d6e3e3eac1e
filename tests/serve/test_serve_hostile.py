"""What a bad client does to itself, while a good one beside it misses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import aiohttp
import numpy as np
import pytest
from local_service import LIMITS, N, Raw, Served, eventually, serve

from tml_runtime.serve.client import Client, connect
from tml_runtime.serve.events import Speech
from tml_runtime.serve.protocol import HEADER, CloseCode, Kind
from tml_runtime.serve.wire import SPARE_BYTES

Attack = Callable[[Served, Raw], Awaitable[None]]


@contextlib.asynccontextmanager
async def good_client(served: Served) -> AsyncIterator[Client]:
    """Checks at the end that its speech came without a hole, and still comes."""
    async with connect(served.url) as client:
        stamps: list[int] = []

        async def listen() -> None:
            async for event in client:
                if isinstance(event, Speech):
                    stamps.append(event.stamp)

        listening = asyncio.create_task(listen())
        yield client
        before = len(stamps)
        await eventually(lambda: len(stamps) > before + 2)
        assert not listening.done() and client.resumes == client.lost_outputs == 0
        skipped = served.service.runtime.report()["skipped"]
        holes = sum((b - a) // N - 1 for a, b in itertools.pairwise(stamps))
        assert 0 <= holes <= skipped
        listening.cancel()


async def send_garbage(served: Served, raw: Raw) -> None:
    rng = random.Random(5)
    for size in (0, 1, 23, 24, 25, 100, 3000):
        await raw.ws.send_bytes(rng.randbytes(size))
        await raw.ws.send_str(rng.randbytes(size).hex())


async def send_wrong_kinds(served: Served, raw: Raw) -> None:
    for kind in (0, 4, 17, 255):
        await raw.media(kind, 0, 0, b"ab")
    await raw.say(type="sing")
    await raw.say(type="hello", version=1)


async def send_json_bombs(served: Served, raw: Raw) -> None:
    await raw.ws.send_str("[" * 16_000)
    await raw.ws.send_str("9" * 16_000)
    await raw.ws.send_str('{"type":"text","seq":0,"text":"' + "a" * 20_000 + '"}')


async def send_bad_frames(served: Served, raw: Raw) -> None:
    await raw.media(Kind.JPEG, 0, 0, b"\xff\xd8\xff\xe0 no more")
    await raw.media(Kind.RGB, 1, 0, b"", 65_535, 65_535)
    await raw.media(Kind.RGB, 2, 0, bytes(3 * 41 * 40), 41, 40)
    await raw.audio(0, 2**53 - 1, np.zeros(320))


@pytest.mark.parametrize(
    "attack", [send_garbage, send_wrong_kinds, send_json_bombs, send_bad_frames]
)
def test_a_bad_message_is_refused_and_the_session_goes_on(run, attack: Attack) -> None:
    async def talk() -> None:
        async with serve() as served, good_client(served), served.raw(hello={}) as raw:
            await raw.until("welcome")
            await attack(served, raw)
            error = await raw.until("error")
            assert error["fatal"] is False and error["code"] and error["message"]
            await raw.say(type="interrupt", played=0)
            assert (await raw.until("epoch"))["epoch"] == 1

    run(talk())


def test_too_many_bad_messages_end_connection_and_session(run) -> None:
    async def talk() -> None:
        limits = replace(LIMITS, max_errors=5)
        async with serve(limits=limits) as served, good_client(served):
            async with served.raw(hello={}) as raw:
                for _ in range(10):
                    await raw.ws.send_str("no")
                assert await raw.closed() == CloseCode.BAD_MESSAGE
            await eventually(lambda: len(served.service.sessions) == 1)

    run(talk())


async def too_large(served: Served, raw: Raw) -> None:
    await raw.ws.send_bytes(bytes(served.service.max_message_bytes + 1))


async def too_many(served: Served, raw: Raw) -> None:
    for _ in range(1000):
        await raw.say(type="position", played=0)


async def too_many_pings(served: Served, raw: Raw) -> None:
    for _ in range(1000):
        await raw.ws.ping()


async def too_many_pongs(served: Served, raw: Raw) -> None:
    for _ in range(1000):
        await raw.ws.pong()


async def too_much(served: Served, raw: Raw) -> None:
    for number in range(40):
        await raw.media(Kind.RGB, number, 0, bytes(40 * 80 * 3), 80, 40)


def frame(opcode: int, payload: bytes = b"", *, last: bool) -> bytes:
    """Of a client, masked with zeros, so that the payload is as it is."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([last << 7 | opcode]) + length + bytes(4) + payload


def write(raw: Raw, data: bytes) -> None:
    """Past aiohttp's client, which sends whole messages."""
    writer = raw.ws._writer
    assert writer is not None
    writer.transport.write(data)


async def too_many_fragments(served: Served, raw: Raw) -> None:
    """Of one message, which never ends: each is empty."""
    fragment = frame(0, last=False)
    count = (served.service.max_message_bytes + SPARE_BYTES) // len(fragment) + 1
    write(raw, frame(2, b"x", last=False) + count * fragment)


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (too_large, aiohttp.WSCloseCode.MESSAGE_TOO_BIG),
        (too_many, CloseCode.RATE_LIMITED),
        (too_many_pings, CloseCode.RATE_LIMITED),
        (too_many_pongs, CloseCode.RATE_LIMITED),
        (too_much, CloseCode.RATE_LIMITED),
        (too_many_fragments, CloseCode.RATE_LIMITED),
    ],
)
def test_a_flood_ends_its_connection_and_session(run, attack: Attack, code: int) -> None:
    async def talk() -> None:
        limits = replace(LIMITS, messages_per_s=60.0, bytes_per_s=20_000.0, burst_s=4.0)
        async with serve(limits=limits) as served, good_client(served), served.raw(hello={}) as raw:
            await raw.until("welcome")
            with contextlib.suppress(ConnectionError):  # closed while it floods
                await attack(served, raw)
            assert await raw.closed() == code
            await eventually(lambda: len(served.service.sessions) == 1)  # its session, too

    run(talk())


def test_who_floods_before_hello_is_told_and_cut(run) -> None:
    async def talk() -> None:
        async with serve() as served, good_client(served):
            async with served.raw() as raw:
                await too_many_fragments(served, raw)
                assert (await raw.until("error"))["code"] == "rate_limited"
                assert await raw.closed() == CloseCode.RATE_LIMITED
            await eventually(lambda: len(served.service.connections) == 1)

    run(talk())


def test_messages_in_fragments_are_taken_however_many_come(run) -> None:
    """Headers and all, more bytes come than may be of no message."""

    async def talk() -> None:
        async with serve(limits=replace(LIMITS, bytes_per_s=1e9)) as served:
            picture = HEADER.pack(Kind.RGB, 0, 0, 0, 0, 0, 80, 40) + bytes(40 * 80 * 3)
            cuts = [picture[at : at + 600] for at in range(0, len(picture), 600)]
            frames = [frame(0 if at else 2, cut, last=False) for at, cut in enumerate(cuts)]
            message = b"".join(frames) + frame(0, last=True)
            count = (served.service.max_message_bytes + SPARE_BYTES) // len(message) + 2
            async with served.raw(hello={}) as raw:
                await raw.until("welcome")
                for _ in range(count):
                    write(raw, message)
                    await asyncio.sleep(0.001)
                await raw.say(type="interrupt", played=0)
                assert (await raw.until("epoch"))["epoch"] == 1

    run(talk())


@pytest.mark.parametrize(("bytes_per_s", "code"), [(4e6, "too_large"), (4000.0, "rate_limited")])
def test_a_character_of_two_bytes_counts_as_two(run, bytes_per_s: float, code: str) -> None:
    async def talk() -> None:
        limits = replace(LIMITS, bytes_per_s=bytes_per_s, burst_s=4.0)
        async with serve(limits=limits) as served, served.raw(hello={}) as raw:
            await raw.until("welcome")
            await raw.ws.send_str("é" * 9000)
            assert (await raw.until("error"))["code"] == code

    run(talk())


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (None, CloseCode.HANDSHAKE_TIMEOUT),
        ("nonsense", CloseCode.BAD_MESSAGE),
        ('{"type":"bye"}', CloseCode.BAD_MESSAGE),
        ('{"type":"hello","version":99}', CloseCode.BAD_MESSAGE),
        ('{"type":"hello","version":1,"options":{"top_p":0}}', CloseCode.BAD_MESSAGE),
        ('{"type":"hello","version":1,"resume":"who knows"}', CloseCode.UNKNOWN_SESSION),
        (b"bytes", CloseCode.BAD_MESSAGE),
    ],
)
def test_a_wrong_first_message_opens_nothing(run, first, code: int) -> None:
    async def talk() -> None:
        async with serve(limits=replace(LIMITS, handshake_s=0.3)) as served:
            async with served.raw() as raw:
                if isinstance(first, str):
                    await raw.ws.send_str(first)
                elif first is not None:
                    await raw.ws.send_bytes(first)
                assert (await raw.until("error"))["fatal"] is True
                assert await raw.closed() == code
            assert served.service.counts.sessions == 0
            await eventually(lambda: not served.service.connections)

    run(talk())


def test_who_pings_and_never_says_hello_is_cut(run) -> None:
    async def talk() -> None:
        async with serve(limits=replace(LIMITS, handshake_s=0.5)) as served, served.raw() as raw:

            async def ping() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        await raw.ws.ping()
                        await asyncio.sleep(0.1)

            pinging = asyncio.create_task(ping())
            assert (await raw.until("error"))["code"] == "handshake_timeout"
            assert await raw.closed() == CloseCode.HANDSHAKE_TIMEOUT
            pinging.cancel()

    run(talk())


def test_a_ping_is_answered(run) -> None:
    async def talk() -> None:
        async with serve() as served, served.raw(hello={}, autoping=False) as raw:
            await raw.until("welcome")
            await raw.ws.ping(b"are you there")
            message = await raw.ws.receive()
            while message.type is not aiohttp.WSMsgType.PONG:
                message = await asyncio.wait_for(raw.ws.receive(), 10)
            assert message.data == b"are you there"

    run(talk())


def test_a_connection_that_never_asks_is_cut(run) -> None:
    async def talk() -> None:
        async with serve(limits=replace(LIMITS, handshake_s=0.3)) as served:
            host, port = served.http.removeprefix("http://").split(":")
            for request in (b"", b"GET /v1/session HTTP/1.1\r\nHost: x\r\nX: "):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(request)
                assert await asyncio.wait_for(reader.read(), 10) == b""
                writer.close()

    run(talk())


def test_a_slow_consumer_is_closed_and_may_come_back(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not read, but its socket stays open: output piles up, is lost, and it is cut."""
    monkeypatch.setattr("tml_runtime.serve.connection._SOCKET_BYTES", 8192)  # 0.2 s of speech

    async def talk() -> None:
        limits = replace(LIMITS, queue_items=4, max_lost=4, stale_s=1e6)
        async with serve(limits=limits) as served, good_client(served):
            reader, writer, token = await connect_without_reading(served)
            (session,) = (s for s in served.service.sessions if s.resume_token == token)
            await eventually(lambda: session.connection is None)
            assert session.outbox.lost > 4 and served.service.counts.slow_consumers == 1
            async with served.raw(hello={"resume": token}) as raw:
                assert (await raw.until("welcome"))["resumed"] is True
            writer.transport.abort()
            del reader

    run(talk())


async def connect_without_reading(served: Served):
    """A WebSocket by hand, with so small a window that the kernel holds next to nothing."""
    host, port = served.http.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    writer.write(
        b"GET /v1/session HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        b"Sec-WebSocket-Protocol: tml.v1\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    hello = b'{"type":"hello","version":1}'
    writer.write(frame(1, hello, last=True))
    await eventually(lambda: len(served.service.sessions) == 2)
    return reader, writer, served.service.sessions[-1].resume_token


def test_random_messages_never_end_the_service(run) -> None:
    """A fixed number of seeded messages that are almost right."""

    async def talk() -> None:
        rng = random.Random(11)
        limits = replace(LIMITS, max_errors=10**6, messages_per_s=1e6, bytes_per_s=1e9)
        async with serve(limits=limits) as served, good_client(served), served.raw(hello={}) as raw:
            await raw.until("welcome")
            for _ in range(300):
                header = HEADER.pack(
                    rng.choice([1, 2, 3, 17]), 0, 0, rng.getrandbits(32),
                    rng.choice([0, 1600, 2**40, 2**52]), rng.getrandbits(32),
                    rng.choice([0, 40, 80]), rng.choice([0, 40, 80]),
                )  # fmt: skip
                await raw.ws.send_bytes(header + rng.randbytes(rng.choice([0, 2, 640, 4800])))
            await raw.say(type="interrupt", played=2**53 - 1)
            assert (await raw.until("epoch"))["epoch"] == 1

    run(talk())
