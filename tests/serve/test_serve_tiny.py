"""The service with a real model, the smallest, in real time."""

from __future__ import annotations

import contextlib

import numpy as np

from tml_runtime import InteractionModel, ModelConfig, Runtime, TurnLayout
from tml_runtime.net.intake import Intake
from tml_runtime.random_model import vocoder_for
from tml_runtime.serve.client import connect
from tml_runtime.serve.events import Epoch, Speech, Text
from tml_runtime.serve.limits import Limits
from tml_runtime.serve.server import serving
from tml_runtime.serve.service import Service

CONFIG = ModelConfig.preset("tiny", layout=TurnLayout.preset("ms160"))


def test_a_real_model_is_talked_to(run) -> None:
    model = InteractionModel.random(CONFIG)
    runtime = Runtime(model, num_slots=1, vocoder=vocoder_for(model))

    async def talk() -> None:
        service = Service(runtime, CONFIG, make_intake=Intake, limits=Limits(close_s=0.3))
        async with serving(service) as url, connect(url, seed=1) as client:
            await client.send_text("hello")
            heard: list[Speech] = []
            said = ""
            async for event in client:
                await client.send_audio(np.full(2560, 0.1, np.float32))
                await client.send_video(np.zeros((40, 40, 3), np.uint8))
                if isinstance(event, Speech):
                    heard.append(event)
                elif isinstance(event, Text):
                    said += event.text
                elif isinstance(event, Epoch):
                    break
                if len(heard) == 8:
                    await client.interrupt()
            assert service.sessions[0].session.stats.ticks > 0
        assert len(heard) >= 8 and any(event.pcm.any() for event in heard) and said
        ends = [event.stamp + len(event.pcm) for event in heard]
        assert ends == sorted(ends)

    runtime.start()
    try:
        run(talk(), 60.0)
    finally:
        with contextlib.suppress(Exception):
            runtime.stop()
