"""A service on a free local port, with a model small enough to see through."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import torch
from fake_model import CONFIG, MS40, FakeModel, make_runtime
from plain_intake import PlainIntake

from tml_runtime.errors import LoopFailed
from tml_runtime.serve.limits import Limits
from tml_runtime.serve.protocol import HEADER, SUBPROTOCOL, VERSION, Kind
from tml_runtime.serve.server import MetricsView, serving
from tml_runtime.serve.service import Service

FAST = replace(CONFIG, layout=MS40)
N = MS40.samples_per_tick
LIMITS = Limits(handshake_s=2.0, close_s=0.3, grace_s=20.0)


class CountingVocoder:
    """Frame k since the reset is k / 1024 all along, so a sample tells its tick."""

    def __init__(self) -> None:
        self._count = 0

    def push(self, mel_K_B: torch.Tensor) -> np.ndarray:
        frames = np.arange(self._count, self._count + len(mel_K_B)) % 1024 / 1024
        self._count += len(mel_K_B)
        return np.repeat(frames.astype(np.float32), MS40.dmel.hop)

    def reset(self) -> None:
        self._count = 0


class Served:
    """What a test has of a running service."""

    def __init__(self, service: Service, model: FakeModel, url: str) -> None:
        self.service = service
        self.model = model
        self.url = url
        self.http = url.replace("ws://", "http://").partition("/v1/")[0]

    @contextlib.asynccontextmanager
    async def raw(self, *, hello: dict | None = None, **options: Any) -> AsyncIterator[Raw]:
        """A client that sends what it likes. hello: {} for the usual one, None for none."""
        url = self.url + ("?resume=1" if hello and "resume" in hello else "")
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(url, protocols=(SUBPROTOCOL,), **options) as ws,
        ):
            raw = Raw(ws)
            if hello is not None:
                await raw.say(type="hello", **{"version": VERSION, **hello})
            yield raw

    async def get(self, path: str, **options: Any) -> tuple[int, dict]:
        async with (
            aiohttp.ClientSession() as http,
            http.get(self.http + path, **options) as response,
        ):
            return response.status, await response.json()


class Raw:
    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def say(self, **values: Any) -> None:
        await self.ws.send_str(json.dumps(values))

    async def media(self, kind: int, seq: int, stamp: int, payload: bytes, *size: int) -> None:
        width, height = size or (0, 0)
        header = HEADER.pack(kind, 0, 0, seq, stamp, 0, width, height)
        await self.ws.send_bytes(header + payload)

    async def audio(self, seq: int, stamp: int, pcm: np.ndarray) -> None:
        await self.media(Kind.AUDIO, seq, stamp, pcm.astype("<i2").tobytes())

    async def until(self, kind: str) -> dict:
        """The next JSON message of that type."""
        while True:
            message = await self.ws.receive(timeout=10)
            if message.type is aiohttp.WSMsgType.TEXT:
                values = json.loads(message.data)
                if values["type"] == kind:
                    return values
            elif message.type is not aiohttp.WSMsgType.BINARY:
                raise AssertionError(f"no {kind}, but {message}, {self.ws.close_code}")

    async def closed(self) -> int | None:
        """Reads until the end; returns the close code."""
        async for _ in self.ws:
            pass
        return self.ws.close_code


@contextlib.asynccontextmanager
async def serve(
    model: FakeModel | None = None,
    *,
    slots: int = 2,
    limits: Limits = LIMITS,
    token: str | None = None,
    origins: tuple[str, ...] = (),
    metrics: MetricsView | None = None,
    page: bool = False,
) -> AsyncIterator[Served]:
    model = FakeModel(FAST) if model is None else model
    runtime, _ = make_runtime(model, realtime=True, num_slots=slots, vocoder=CountingVocoder)
    runtime.start()
    try:
        service = Service(
            runtime, FAST, make_intake=PlainIntake, limits=limits, token=token, origins=origins
        )
        async with serving(service, metrics=metrics, page=page) as url:
            yield Served(service, model, url)
    finally:
        with contextlib.suppress(LoopFailed):
            runtime.stop()


async def eventually(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "waited in vain"
        await asyncio.sleep(0.005)
