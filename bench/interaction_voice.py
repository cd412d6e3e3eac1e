"""Where somebody speaks in a recording, as Silero's network hears it.

The metrics ask it as the published scripts do, for the speech of a whole recording; the baseline
as a live harness does, frame by frame. Both get the same probabilities, and these are computed for
many recordings together.

The network is the one that the package itself loads, TorchScript. Its safetensors file is another
network's, whose probabilities differ by up to 0.37 on a real conversation; a script in a package
that is installed is trusted as the package's Python is.
"""

# Dimension key: B recordings, N samples, F frames of 32 ms.

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from tml_runtime._optional import require

from .interaction_metrics import Span

RATE = 16_000  # samples a second, of the network and of episodes
FRAME = 512  # samples
SPEECH_S = 0.25  # the least that is speech: min_speech_duration_ms
BATCH = 64  # recordings at a time


class Heard(NamedTuple):
    """Speech from `begin` to `end`, and when one who listens live knows of each. In seconds."""

    begin: float
    end: float
    begin_known: float
    end_known: float


def speech(recordings: Sequence[np.ndarray]) -> list[list[Span]]:
    """Of each recording, its speech by `get_speech_timestamps` as it is, in seconds.

    Raises MissingExtraError."""
    return [
        [(span["start"] / RATE, span["end"] / RATE) for span in spans]
        for spans in (
            _package().get_speech_timestamps_from_probs(
                probability_F.tolist(), audio_length_samples=len(pcm_N)
            )
            for pcm_N, probability_F in zip(recordings, probabilities(recordings), strict=True)
        )
    ]


def probabilities(recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """float32 [F] for each: that somebody speaks in a frame; the last is filled up with silence.

    Raises MissingExtraError."""
    found: list[np.ndarray] = []
    for first in range(0, len(recordings), BATCH):
        batch = recordings[first : first + BATCH]
        frames = [-(-len(pcm_N) // FRAME) for pcm_N in batch]
        pcm_B_N = np.zeros((len(batch), max(1, *frames) * FRAME), np.float32)
        for row_N, pcm_N in zip(pcm_B_N, batch, strict=True):
            row_N[: len(pcm_N)] = pcm_N
        heard_B_F = _network().audio_forward(torch.from_numpy(pcm_B_N), RATE).numpy()
        found += [row_F[:num] for row_F, num in zip(heard_B_F, frames, strict=True)]
    return found


def listen(probability_F: np.ndarray, silence_s: float) -> list[Heard]:
    """What Silero's iterator over a stream finds, of SPEECH_S at least; a pause shorter than
    `silence_s` is part of it. Speech that has not ended when the recording does is left out.

    It is known to be speech with the first frame that is not silent and ends SPEECH_S after the
    first. Raises MissingExtraError."""
    stream = _package().VADIterator(_Replay(probability_F), min_silence_duration_ms=1e3 * silence_s)
    heard: list[Heard] = []
    begin = onset = 0.0
    begin_known: float | None = None
    for number in range(len(probability_F)):
        event = stream(torch.zeros(FRAME)) or {}
        now = (number + 1) * FRAME / RATE
        if "start" in event:
            begin, onset, begin_known = event["start"] / RATE, now - FRAME / RATE, None
        if "end" in event:
            if begin_known is not None:
                heard.append(Heard(begin, event["end"] / RATE, begin_known, now))
        elif stream.triggered and not stream.temp_end and now - onset >= SPEECH_S:
            begin_known = now if begin_known is None else begin_known
    return heard


def voice_detector() -> str:
    """Name and version of what hears. Raises MissingExtraError."""
    _network()
    return f"silero-vad {version('silero-vad')}"


class _Replay:
    """Answers a stream with probabilities that are known."""

    def __init__(self, probability_F: np.ndarray) -> None:
        self._frames = iter(probability_F)

    def __call__(self, frame_N: torch.Tensor, sample_rate: int) -> np.floating:
        return next(self._frames)

    def reset_states(self) -> None:
        pass


@cache
def _package() -> ModuleType:
    num_threads = torch.get_num_threads()
    try:
        return require("silero_vad", "hear where somebody speaks", extra="bench")
    finally:
        torch.set_num_threads(num_threads)  # importing it sets one thread for all of torch


@cache
def _network() -> Any:
    with warnings.catch_warnings():
        # Of torch.jit.load, and of how the package finds its file.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _package().load_silero_vad()
