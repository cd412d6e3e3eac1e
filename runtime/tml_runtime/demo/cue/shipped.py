"""The checkpoint that ships, and a scene for the demo in which it has something to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...model import InteractionModel
from ...session import TextOut
from ..decode import SAMPLE_RATE, Clip
from ..source import Media
from .recordings import FRAMES_PER_S, Say, scene_media
from .score import Share
from .stage import Episode
from .tasks import make_episode
from .words import CONFIG, ID, SPOKEN, WORDS

FOLDER = Path(__file__).parent / "checkpoint"
# What the demo goes through, one after the other and again from the first; of counts only one,
# since no episode of the training had another before it.
SCENE = ("speak", "count_motion", "wait_flash", "cue", "ask", "every")
SECTION = 45  # ticks
PERIOD_S = CONFIG.layout.period_ms / 1000
_SPOKEN = {ID[word] for word in SPOKEN}


@dataclass(frozen=True)
class Scene:
    """What there is to hear, see and read, and (tick, word) of all that is to be said to it."""

    media: Media
    due: tuple[tuple[int, int], ...]

    def in_time(self, texts: Iterable[TextOut], num_ticks: int) -> Share:
        """Words due in the first ticks of a session that began with the scene; hits are those that
        it said in the very tick."""
        said = {(tick_of(out.t), word) for out in texts for word in out.ids}
        share = Share()
        for due in self.due:
            if due[0] < num_ticks:
                share.add(due in said)
        return share


def tick_of(t: float) -> int:
    """The tick that says what is due at media time `t`, in any of its output steps."""
    return math.floor(t / PERIOD_S + 1e-6) - 1


def load_shipped(device: str = "cpu") -> InteractionModel:
    """float32, whatever the device. Raises CheckpointError."""
    return InteractionModel.load(FOLDER, config=CONFIG, device=device, dtype=torch.float32)


def make_scene(seconds: float, seed: int, say: Say | None = None) -> Scene:
    """Tasks with their instructions as text, on a real conversation and a real film. Raises
    MediaError."""
    recordings = scene_media(say)
    count = max(1, math.ceil(seconds / (SECTION * PERIOD_S)))
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
    due = tuple(
        (n * SECTION + event.tick, event.word)
        for n, part in enumerate(parts)
        for event in part.events
        if event.kind in ("due", "scale") and event.word in _SPOKEN
    )
    return Scene(Media(pcm, Clip(frames, FRAMES_PER_S), tuple(_texts(parts))), due)


def _texts(parts: list[Episode]) -> Iterator[tuple[float, str]]:
    """(seconds, words) of all instructions, in the middle of their ticks; "stop" where a new part
    begins."""
    for n, part in enumerate(parts):
        for tick, ids in enumerate(part.text):
            words = ["stop"] * (n > 0 and tick == 0) + [WORDS[token] for token in ids]
            if words:
                yield (n * SECTION + tick + 0.5) * PERIOD_S, " ".join(words)
