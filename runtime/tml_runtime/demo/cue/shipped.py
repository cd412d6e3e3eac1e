"""The checkpoint that ships, and a scene for the demo in which it has something to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ...model import InteractionModel
from ..decode import SAMPLE_RATE, Clip
from ..source import Media
from .recordings import FRAMES_PER_S, Say, training_media
from .stage import Episode
from .tasks import make_episode
from .words import CONFIG, WORDS

FOLDER = Path(__file__).parent / "checkpoint"
# What the demo goes through, one after the other and again from the first; without what the weights
# that ship have not learnt, see their report.
SCENE = ("speak", "count_motion", "cue", "ask", "count_flash", "every")
SECTION = 45  # ticks
PERIOD_S = CONFIG.layout.period_ms / 1000


def load_shipped(device: str = "cpu") -> InteractionModel:
    """float32, whatever the device. Raises CheckpointError."""
    return InteractionModel.load(FOLDER, config=CONFIG, device=device, dtype=torch.float32)


def make_scene(seconds: float, seed: int, say: Say | None = None) -> Media:
    """Tasks with their instructions as text, on a real conversation and a real film. Raises
    MediaError."""
    recordings = training_media(say)
    count = max(1, round(seconds / (SECTION * PERIOD_S)))
    parts = [
        make_episode(
            SCENE[n % len(SCENE)],
            SECTION,
            np.random.SeedSequence([seed, n]),
            *recordings,
            lose=0.0,
        )
        for n in range(count)
    ]
    pcm = np.concatenate([part.pcm_T_W.reshape(-1) for part in parts])
    assert len(pcm) == count * SECTION * round(PERIOD_S * SAMPLE_RATE)
    frames = np.concatenate([part.frames_T_2_Y_Y_3.reshape(-1, *part.frames_T_2_Y_Y_3.shape[2:])
                             for part in parts])  # fmt: skip
    return Media(pcm, Clip(frames, FRAMES_PER_S), tuple(_texts(parts)))


def _texts(parts: list[Episode]) -> Iterator[tuple[float, str]]:
    """(seconds, words) of all instructions, in the middle of their ticks; "stop" where a new part
    begins."""
    for n, part in enumerate(parts):
        for tick, ids in enumerate(part.text):
            words = ["stop"] * (n > 0 and tick == 0) + [WORDS[token] for token in ids]
            if words:
                yield (n * SECTION + tick + 0.5) * PERIOD_S, " ".join(words)
