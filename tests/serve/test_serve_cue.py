"""The trained model behind the demo's page, as a user starts it."""

from __future__ import annotations

import asyncio

import aiohttp
import numpy as np
import pytest

from tml_runtime.cli import CUE_HINT
from tml_runtime.demo.cue.tasks import TASKS
from tml_runtime.demo.cue.words import ID, SCALE, WordTokenizer
from tml_runtime.serve.child import local_service
from tml_runtime.serve.client import connect
from tml_runtime.serve.events import Speech, Text
from tml_runtime.serve.protocol import SUBPROTOCOL


async def scale_said(url: str) -> tuple[str, float]:
    """What it says once it is asked to speak, four words of it, and the loudest sample."""
    said, loudest = "", 0.0
    async with connect(url) as client:
        await client.send_text("speak")
        sends = asyncio.create_task(send_silence(client))
        async for event in client:
            if isinstance(event, Text):
                said += event.text
            elif isinstance(event, Speech):
                loudest = max(loudest, float(np.abs(event.pcm).max()))
            if len(said.split()) >= 4:
                break
        sends.cancel()
    return said, loudest


async def send_silence(client) -> None:
    while True:
        await client.send_audio(np.zeros(320, np.int16))
        await asyncio.sleep(0.02)


def test_the_demo_talks_with_the_trained_model(run) -> None:
    async def talk() -> None:
        http = url.replace("ws://", "http://").partition("/v1/")[0]
        async with aiohttp.ClientSession() as browser, browser.get(http + "/") as page:
            assert page.status == 200 and "Live session" in await page.text()
        async with (
            aiohttp.ClientSession() as browser,
            browser.ws_connect(url, protocols=(SUBPROTOCOL,)) as raw,
        ):
            await raw.send_json({"type": "hello", "version": 1})
            welcome = await raw.receive_json()
        assert welcome["hint"] == CUE_HINT
        assert welcome["video"]["max_tokens"] == 1  # a picture of the size that it knows
        said, loudest = await scale_said(url)
        assert set(said.split()) <= set(SCALE) and loudest > 1000

    with local_service("--demo", "--probe-ticks", "0", "--sessions", "2") as url:
        run(talk(), 120.0)


@pytest.mark.parametrize("instruction", CUE_HINT.split(", "))
def test_the_hint_names_what_it_has_learnt(instruction: str) -> None:
    ids = WordTokenizer().encode(instruction)
    assert ID["<unknown>"] not in ids
    words = instruction.split()
    task = "_".join(word for word in words if not word.isdigit())
    assert task in TASKS or task == "stop"
