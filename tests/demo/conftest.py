"""Small recordings, made here, so that the tests need no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from demo_recordings import write_film


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4")


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 s at 16 kHz: bursts of a tone in noise."""
    rng = np.random.default_rng(1)
    t = np.arange(32_000) / 16_000
    pcm = 0.2 * np.sin(2 * np.pi * 300 * t) * (np.sin(2 * np.pi * 2 * t) > 0)
    pcm += 0.01 * rng.standard_normal(len(t))
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(path, pcm, 16_000)
    return path
