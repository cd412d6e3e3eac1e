"""Whole conversations on a real socket: what goes in is heard, what is said comes out."""

from __future__ import annotations

import asyncio
import io
import itertools
import json

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from fake_model import DELEGATE, SILENCE, FakeModel
from local_service import FAST, LIMITS, N, Raw, eventually, serve
from PIL import Image

from tml_runtime.serve.client import Client, connect
from tml_runtime.serve.events import Action, Epoch, Event, Notice, ServiceError, Speech, Text
from tml_runtime.serve.limits import Limits
from tml_runtime.serve.protocol import SUBPROTOCOL, Kind, ProtocolError, decode_media


def jpeg(width: int, height: int, color: tuple[int, int, int] = (200, 100, 50)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, "JPEG")
    return out.getvalue()


async def collect(client: Client, count: int, kind: type) -> list[Event]:
    """Events until there are `count` of `kind`, while silence is sent."""
    events: list[Event] = []
    async for event in client:
        await client.send_audio(np.zeros(320, np.int16))
        events.append(event)
        if sum(isinstance(found, kind) for found in events) >= count:
            break
    return events


def test_what_is_said_comes_out_in_order_and_in_time(run) -> None:
    model = FakeModel(
        FAST, say=lambda tick, slot: [(ord("a") + tick % 26, DELEGATE)[tick % 5 == 0]]
    )

    async def talk() -> None:
        async with serve(model) as served, connect(served.url, seed=3) as client:
            assert client.welcome.tick_ms == 40 and not client.welcome.resumed
            events = await collect(client, 20, Speech)
            assert client.lost_outputs == 0
        speech = [event for event in events if isinstance(event, Speech)]
        for before, after in itertools.pairwise(speech):
            assert int(after.pcm[0]) - int(before.pcm[0]) == 32  # no tick less
            assert len(after.pcm) == N
            assert after.stamp > before.stamp and after.stamp % N == 0  # some may be skipped
        assert speech[0].stamp >= N and speech[0].pcm[0] == 0  # the first tick is due when it ran
        seqs = [event.seq for event in events if isinstance(event, (Speech, Text, Action))]
        assert seqs == list(range(len(seqs)))
        assert any(event.text.isalpha() for event in events if isinstance(event, Text))
        assert {event.name for event in events if isinstance(event, Action)} == {"delegate"}

    run(talk())


def test_what_a_client_sends_is_heard_seen_and_read(run) -> None:
    async def talk() -> None:
        model = FakeModel(FAST)
        async with serve(model) as served, connect(served.url) as client:
            await client.send_text("grüße")
            raw = np.full((40, 80, 3), 7, np.uint8)
            for number in range(200):
                await client.send_audio(np.full(320, 1000, np.int16))
                await client.send_video(raw if number // 20 % 2 else jpeg(50, 70))
                await asyncio.sleep(0.01)
                rows = [row for rows in model.heard[1:] for row in rows]
                seen = {row.frames.shape[2:4] for row in rows if row.frames is not None}
                if seen == {(40, 80), (80, 80)} and any(not row.missing for row in rows):
                    break
            status = (await served.service.status())["service"]["sessions"][0]
        assert bytes(token for row in rows for token in row.text).decode() == "grüße"
        whole = [row.pcm for row in rows if not row.missing]  # holes in others are concealed
        assert whole and all((pcm == np.float32(1000 / 32768)).all() for pcm in whole)
        frames = [row.frames for row in rows if row.frames is not None]
        padded = next(frame[0, 0] for frame in frames if frame.shape[2:4] == (80, 80))
        assert abs(padded[:70, :50].astype(int) - [200, 100, 50]).max() < 8
        assert not padded[70:].any() and not padded[:, 50:].any()  # black right and below
        assert status["intake"]["text"] == 1 and status["intake"]["audio"] > 3

    run(talk())


def test_after_an_interruption_nothing_old_comes(run) -> None:
    """Even with all of a second of output waiting for its time in the service."""
    limits = Limits(**{**vars(LIMITS), "lead_s": 0.0})

    async def talk() -> None:
        async with serve(limits=limits) as served, served.raw(hello={}) as raw:
            await raw.until("welcome")
            (session,) = served.service.sessions
            for number in range(5):
                await speech(raw)
                await raw.say(type="interrupt", played=N * number)
                while True:  # what was on its way before the answer is of the old epoch
                    message = await raw.ws.receive(timeout=5)
                    if message.type is aiohttp.WSMsgType.TEXT:
                        epoch = json.loads(message.data)
                        break
                    assert decode_media(message.data, kinds=(Kind.SPEECH,)).epoch == number
                assert epoch["type"] == "epoch" and epoch["epoch"] == number + 1
                after = await speech(raw)
                assert after.epoch == number + 1 and after.seq >= epoch["next_seq"]
            assert session.session.epoch == 5

    async def speech(raw: Raw):
        message = await raw.ws.receive(timeout=5)
        assert message.type is aiohttp.WSMsgType.BINARY, message
        return decode_media(message.data, kinds=(Kind.SPEECH,))

    run(talk())


def test_the_client_drops_what_is_older_than_its_interruption(run) -> None:
    async def talk() -> None:
        async with serve() as served, connect(served.url) as client:
            await eventually(lambda: len(client._inbound) > 5)  # not taken yet
            await client.interrupt()
            await eventually(lambda: client.epoch == 1)
            events = await collect(client, 4, Speech)
        assert [event for event in events if isinstance(event, Epoch)] == [Epoch(1)]
        assert {event.epoch for event in events if isinstance(event, Speech)} == {1}

    run(talk())


def test_the_position_of_an_interruption_is_no_later_than_what_was_sent(run) -> None:
    async def talk() -> None:
        async with serve() as served, served.raw(hello={}) as raw:
            await raw.until("welcome")
            (session,) = served.service.sessions
            await eventually(lambda: session.outbox.sent_end > 0)
            await raw.say(type="position", played=2**53 - 1)
            await raw.say(type="interrupt")
            await raw.until("epoch")
            assert session._played <= session.outbox.sent_end
            await raw.say(type="interrupt", played=7)
            await raw.until("epoch")
            assert session._played == 7

    run(talk())


def test_output_waits_for_its_time(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no lead, a quarter of a tick's speech is sent when the media clock is there."""
    monkeypatch.setattr("tml_runtime.serve.outbox.MAX_PIECE_S", 0.01)
    limits = Limits(**{**vars(LIMITS), "lead_s": 0.0})

    async def talk() -> None:
        async with serve(limits=limits) as served, served.raw(hello={}) as raw:
            await raw.until("welcome")
            (session,) = served.service.sessions
            for _ in range(40):
                message = await raw.ws.receive(timeout=5)
                media = decode_media(message.data, kinds=(Kind.SPEECH,))
                assert media.stamp <= session.media_samples
                assert len(media.payload) == 2 * N // 4

    run(talk())


def test_a_client_that_leaves_frees_its_slot_at_once(run) -> None:
    async def talk() -> None:
        async with serve(slots=1) as served:
            for _ in range(3):
                async with connect(served.url) as client:
                    await collect(client, 1, Speech)
                await eventually(lambda: not served.service.sessions)
                await eventually(lambda: served.service.runtime.report()["slots_free"] == 1)
            assert served.service.counts.sessions == 3

    run(talk())


def test_two_sessions_have_their_own_output(run) -> None:
    model = FakeModel(FAST, say=lambda tick, slot: [ord("x") + slot if tick % 3 else SILENCE])

    async def talk() -> None:
        async with serve(model) as served, connect(served.url) as one, connect(served.url) as two:
            first, second = await asyncio.gather(collect(one, 5, Text), collect(two, 5, Text))
        said = [
            {event.text for event in events if isinstance(event, Text)}
            for events in (first, second)
        ]
        assert sorted(map(sorted, said)) == [["x"], ["y"]]
        assert not any(isinstance(event, Notice) for event in first + second)

    run(talk())


def test_a_prompt_is_read_or_refused_by_name(run) -> None:
    async def talk() -> None:
        async with serve() as served:
            async with connect(served.url, prompt="Be brief.") as client:
                await collect(client, 1, Speech)
            with pytest.raises(ServiceError, match=r"options: .*prompt") as caught:
                async with connect(served.url, prompt="x" * 1000):
                    pass
            assert caught.value.code == "bad_message"
            assert served.service.counts.sessions == 1

    run(talk())


@pytest.mark.parametrize(
    "lie",
    [
        "no JSON",
        "[]",
        '{"type":"epoch","epoch":"two"}',
        '{"type":"text","text":"without a stamp"}',
        b"short",
        bytes([Kind.AUDIO]) + bytes(40),  # goes up only
    ],
)
def test_a_service_that_lies_is_an_error_and_no_silence(run, lie: str | bytes) -> None:
    async def lying(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(protocols=(SUBPROTOCOL,))
        await ws.prepare(request)
        await ws.receive()
        await ws.send_str(json.dumps(WELCOME))
        await (ws.send_str(lie) if isinstance(lie, str) else ws.send_bytes(lie))
        await ws.receive()
        return ws

    async def talk() -> None:
        app = web.Application()
        app.router.add_get("/", lying)
        async with TestServer(app) as server, connect(str(server.make_url("/"))) as client:
            with pytest.raises(ProtocolError):
                await client.__anext__()

    run(talk())


WELCOME = {
    "type": "welcome", "version": 1, "session": "s", "resume": "r", "resumed": False, "grace_s": 1,
    "epoch": 0, "media_now": 0, "next_seq": 0, "text_seq": -1, "tick_ms": 40,
    "audio_in": {"sample_rate": 16_000}, "audio_out": {"sample_rate": 16_000},
    "video": {"patch": 40}, "a field of": "the future",
}  # fmt: skip
