"""Sound and pictures for episodes, made here, so that the tests need no network."""

from __future__ import annotations

import numpy as np

from tml_runtime.demo.cue.speech import Footage, Speech
from tml_runtime.demo.cue.stage import SIDE


def made_speech(seed: int = 0, seconds: float = 4.0) -> Speech:
    """A buzz that comes and goes, in noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * 16_000)) / 16_000
    buzz = sum(np.sin(2 * np.pi * 130 * n * t + n) / n for n in range(1, 12))
    pcm = 0.1 * buzz * (np.sin(2 * np.pi * 0.7 * t) > -0.5) + 0.01 * rng.standard_normal(len(t))
    return Speech({f"made-{seed}": pcm.astype(np.float32)})


def made_footage(seed: int = 0) -> Footage:
    rng = np.random.default_rng(seed)
    return Footage({f"clip-{seed}": rng.integers(0, 120, (30, SIDE, SIDE, 3), np.uint8)}, SIDE)
