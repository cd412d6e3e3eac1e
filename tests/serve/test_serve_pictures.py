"""JPEGs of one connection: one is decoded, the newest waits, what is none is told."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Sized
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from tml_runtime.checks import FrameGrid
from tml_runtime.serve.pictures import Pictures
from tml_runtime.serve.protocol import ErrorCode, Kind, Media, ProtocolError

GRID = FrameGrid(patch=40, extra_columns=0, max_tokens=4)


def jpeg(seq: int, shade: int) -> Media:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), shade, np.uint8)).save(file, "JPEG")
    return Media(Kind.JPEG, seq, 0, memoryview(file.getvalue()), 0)


class Heard:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []  # number, shade, when it arrived
        self.refused: list[ErrorCode] = []

    def see(self, media: Media, frame: np.ndarray, arrived_ns: int) -> None:
        if media.seq == 9:
            raise ProtocolError("late", field="stamp", code=ErrorCode.REFUSED_INPUT)
        self.seen.append((media.seq, int(frame.mean()), arrived_ns))

    def refuse(self, error: ProtocolError) -> None:
        self.refused.append(error.code)


async def until(done: Sized, count: int) -> None:
    for _ in range(20_000):
        if len(done) >= count:
            return
        await asyncio.sleep(0.001)
    raise TimeoutError(f"{len(done)} of {count}")


def test_while_one_is_decoded_the_newest_waits_and_the_others_are_shed() -> None:
    async def run() -> None:
        heard, held = Heard(), threading.Event()
        with ThreadPoolExecutor(1) as decoders:
            pictures = Pictures(decoders, GRID, heard.see, heard.refuse)
            decoders.submit(held.wait)  # the thread is busy
            assert pictures.add(jpeg(1, 50), 10) == 0
            await asyncio.sleep(0)  # it has been taken, and waits for the thread
            assert [pictures.add(jpeg(n, 50 * n), 10 * n) for n in (2, 3, 4)] == [0, 1, 1]
            held.set()
            await until(heard.seen, 2)
            assert heard.seen == [(1, 50, 10), (4, 200, 40)] and not heard.refused
            assert pictures.add(jpeg(5, 100), 50) == 0  # and it goes on
            await until(heard.seen, 3)

    asyncio.run(run())


def test_what_is_no_picture_or_comes_late_is_refused_and_the_next_is_seen() -> None:
    async def run() -> None:
        heard = Heard()
        with ThreadPoolExecutor(1) as decoders:
            pictures = Pictures(decoders, GRID, heard.see, heard.refuse)
            pictures.add(Media(Kind.JPEG, 1, 0, memoryview(b"no picture"), 0), 0)
            await until(heard.refused, 1)
            pictures.add(jpeg(9, 100), 0)
            await until(heard.refused, 2)
            pictures.add(jpeg(3, 100), 0)
            await until(heard.seen, 1)
        assert heard.refused == [ErrorCode.BAD_FRAME, ErrorCode.REFUSED_INPUT]

    asyncio.run(run())


def test_once_stopped_nothing_is_seen() -> None:
    async def run() -> None:
        heard, held = Heard(), threading.Event()
        with ThreadPoolExecutor(1) as decoders:
            pictures = Pictures(decoders, GRID, heard.see, heard.refuse)
            pictures.stop()  # nothing is decoded: no error
            decoders.submit(held.wait)
            pictures.add(jpeg(1, 50), 0)
            await asyncio.sleep(0)
            pictures.stop()
            held.set()
        await asyncio.sleep(0.01)
        assert not heard.seen and not heard.refused

    asyncio.run(run())
