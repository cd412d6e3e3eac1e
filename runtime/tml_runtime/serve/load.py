"""Many clients of one service, in one process and in real time, each behind a bad line of its own.

A frame is captured every 20 ms and sent when the line would have delivered it, or never; what comes
down is taken as received when the line would have delivered that. A line that lets nothing through
for `_CUT_S` also breaks its connection, as it would in the end, and the client resumes.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import Protocol

import aiohttp
import numpy as np

from .client import Client, connect
from .events import ServiceError, Speech
from .load_report import SessionLoad
from .protocol import HEADER

FRAME_MS = 20
_CUT_S = 0.8
_SETTLE_S = 1.0  # after the last frame, for the answers


class Line(Protocol):
    """One direction of a line: `tml_runtime.net.faults.Link`."""

    def send(self, now_ns: int, num_bytes: int) -> list[int]:
        """When a packet sent now arrives, in ns of the same clock; empty: it is lost."""
        ...


class Caller:
    """One session: speaks for some seconds, listens, and counts."""

    def __init__(self, number: int, url: str, *, token: str | None, up: Line, down: Line) -> None:
        self.load = SessionLoad(number)
        self._url = url
        self._token = token
        self._up = up
        self._down = down
        self._stamps: dict[int, float] = {}  # of a tick's first piece: when it arrived, media time

    async def run(self, pcm: np.ndarray, seconds: float, on_frame: Callable[[], None]) -> None:
        """Play int16 `pcm` in a loop. Ends early when the service ends the session."""
        try:
            async with connect(self._url, token=self._token, seed=self.load.number) as client:
                listening = asyncio.create_task(self._listen(client))
                speaking = asyncio.create_task(self._speak(client, pcm, seconds, on_frame))
                try:
                    await asyncio.wait([listening, speaking], return_when=asyncio.FIRST_COMPLETED)
                    if speaking.done() and speaking.exception() is None:
                        await asyncio.wait([listening], timeout=_SETTLE_S)
                finally:
                    await self._end(listening, speaking)
                    self._sum_up(client)
        except (ServiceError, OSError, ValueError, aiohttp.ClientError) as error:
            self.load.error = str(error)

    async def _speak(
        self, client: Client, pcm: np.ndarray, seconds: float, on_frame: Callable[[], None]
    ) -> None:
        size = client.welcome.sample_rate_in * FRAME_MS // 1000
        waiting: list[tuple[int, int, int, np.ndarray]] = []  # arrival, order, stamp, frame
        begin_ns = arrived_ns = time.monotonic_ns()
        order = count()
        num_frames = round(seconds * 1000 / FRAME_MS)
        for number in range(num_frames):
            due_ns = begin_ns + (number + 1) * FRAME_MS * 1_000_000  # when its last sample is there
            await self._deliver(client, waiting, until_ns=due_ns)
            stamp = number * size
            frame = np.take(pcm, range(stamp, stamp + size), mode="wrap")
            arrivals = self._up.send(due_ns, HEADER.size + frame.nbytes)
            for at_ns in arrivals:
                heapq.heappush(waiting, (at_ns, next(order), stamp, frame))
            self.load.frames_sent += 1
            self.load.frames_lost += not arrivals
            if arrivals:
                arrived_ns = due_ns
            elif due_ns - arrived_ns > _CUT_S * 1e9:
                arrived_ns = due_ns
                client.drop_connection()
            on_frame()
        if waiting:
            await self._deliver(client, waiting, until_ns=max(waiting)[0])

    @staticmethod
    async def _deliver(client: Client, waiting: list, *, until_ns: int) -> None:
        """Send what the line delivers until then, each when it does."""
        while True:
            next_ns = min(until_ns, waiting[0][0]) if waiting else until_ns
            await asyncio.sleep(max(0.0, (next_ns - time.monotonic_ns()) / 1e9))
            if not waiting or waiting[0][0] > until_ns:
                return
            _, _, stamp, frame = heapq.heappop(waiting)
            await client.send_piece(frame, seq=stamp // len(frame), stamp=stamp)

    async def _listen(self, client: Client) -> None:
        async for event in client:
            if isinstance(event, Speech):
                size = HEADER.size + event.pcm.nbytes
                arrivals = self._down.send(time.monotonic_ns(), size)
                if not arrivals:
                    self.load.outputs_lost += 1
                    continue
                delay_s = (arrivals[0] - time.monotonic_ns()) / 1e9
                tick = (
                    event.stamp * 1000 // (client.welcome.tick_ms * client.welcome.sample_rate_out)
                )
                arrived = client.media_now + delay_s
                self._stamps.setdefault(tick, arrived)

    async def _end(self, *tasks: asyncio.Task[None]) -> None:
        for task in tasks:
            if task.done() and (error := task.exception()) is not None:
                self.load.error = str(error)
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    def _sum_up(self, client: Client) -> None:
        """A tick's speech begins where its window ended, on the media clock."""
        load, period_s = self.load, client.welcome.tick_ms / 1000
        load.ticks = len(self._stamps)
        if self._stamps:
            load.gaps = max(self._stamps) - min(self._stamps) + 1 - len(self._stamps)
        load.latency_ms = [
            1000 * (arrived - tick * period_s) for tick, arrived in sorted(self._stamps.items())
        ]
        load.resumes = client.resumes
        load.outputs_lost += client.lost_outputs


def speech_noise(seconds: float, sample_rate: int, seed: int) -> np.ndarray:
    """int16: noise with the spectrum of speech, in syllables of a quarter second and pauses."""
    rng = np.random.default_rng(seed)
    num = round(seconds * sample_rate)
    spectrum = np.fft.rfft(rng.standard_normal(num))
    hertz = np.fft.rfftfreq(num, 1 / sample_rate)
    spectrum *= (hertz > 80) / np.maximum(1.0, hertz / 500.0)  # falls 6 dB an octave above 500 Hz
    pcm = np.fft.irfft(spectrum, num)
    t = np.arange(num) / sample_rate
    pcm *= np.clip(np.sin(2 * np.pi * 4 * t), 0, None) * (np.sin(2 * np.pi * 0.2 * t) > -0.5)
    return np.round(pcm / max(1e-9, np.abs(pcm).max()) * 10_000).astype(np.int16)


async def run_load(
    callers: list[Caller],
    *,
    seconds: float,
    sample_rate: int,
    pcm: np.ndarray | None = None,
    on_frame: Callable[[], None] = lambda: None,
) -> None:
    """Run all callers at once, started evenly over one second, so that their frames interleave."""

    async def run(caller: Caller, number: int) -> None:
        await asyncio.sleep(number / len(callers))
        sound = speech_noise(10.0, sample_rate, number) if pcm is None else pcm
        await caller.run(sound, seconds, on_frame)

    await asyncio.gather(*(run(caller, number) for number, caller in enumerate(callers)))
