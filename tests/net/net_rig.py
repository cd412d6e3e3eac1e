"""A session with nothing behind it, on a clock that the test moves, and ways to send it audio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from tml_runtime import Session, errors
from tml_runtime.net.faults import Link
from tml_runtime.net.intake import Intake

RATE, WINDOW, FRAME = 16_000, 3200, 320
MS, S = 1_000_000, 1_000_000_000
FRAME_NS = 20 * MS
LEAD = 16  # windows


class Line:
    """What a Session would hear: it refuses what a Session refuses. Samples nobody sent are NaN."""

    def __init__(self, seconds: float, *, queue: int = 10**9) -> None:
        self.now_ns = 0
        self.heard = np.full(round(seconds * RATE), np.nan, np.float32)
        self.pushes: list[tuple[int, np.ndarray]] = []
        self.frames: list[tuple[float, np.ndarray]] = []
        self.texts: list[list[int]] = []
        self.queue = queue  # texts and frames that it takes

    @property
    def media_time(self) -> float:
        return self.now_ns / S

    @property
    def open_t(self) -> float:
        return self.now_ns // (200 * MS) / 5

    def push_audio(self, pcm: np.ndarray, t: float, *, sample_rate: int | None = None) -> None:
        assert sample_rate in (None, RATE)
        start, open_sample = round(t * RATE), round(self.open_t * RATE)
        self._check(t, start >= open_sample, start + len(pcm) <= open_sample + LEAD * WINDOW)
        if len(pcm) > 0:
            self.pushes.append((start, pcm))
        self.heard[start : start + len(pcm)] = pcm

    def push_video(self, frame: np.ndarray, t: float) -> None:
        self._check(t, t >= self.open_t, len(self.frames) < self.queue)
        self.frames.append((t, frame))

    def encode_text(self, text: str) -> np.ndarray:
        return np.array(list(text.encode()), np.int32)

    def push_text(self, ids: np.ndarray) -> None:
        self._check(0.0, True, len(self.texts) < self.queue)
        self.texts.append(ids.tolist())

    def missing_windows(self) -> list[int]:
        whole = ~np.isnan(self.heard[: len(self.heard) // WINDOW * WINDOW].reshape(-1, WINDOW))
        return np.flatnonzero(~whole.all(1)).tolist()

    def _check(self, t: float, in_time: bool, room: bool) -> None:
        if not in_time:
            raise errors.LateInput("late", t=t, open_t=self.open_t)
        if not room:
            raise errors.InputBackpressure("full")


def make_intake(seconds: float, **options: Any) -> tuple[Intake, Line]:
    line = Line(seconds, **options)
    return Intake(cast(Session, line), sample_rate=RATE), line


def ramp(stamp: int, size: int = FRAME, scale: float = 1.0) -> np.ndarray:
    """Samples that tell their own count. With scale 2**-40 they are silence."""
    return (np.arange(stamp, stamp + size) * scale).astype(np.float32)


def over(link: Link, sent_ns: Sequence[int]) -> list[tuple[int, int]]:
    """(arrival, index of what was sent), in the order of arrival."""
    arrivals = [(at, i) for i, t in enumerate(sent_ns) for at in link.send(t, 2 * FRAME)]
    return sorted(arrivals)


def hear(
    intake: Intake,
    line: Line,
    arrivals: Iterable[tuple[int, int]],
    *,
    scale: float = 1.0,
    size: int = FRAME,
    stamp0: int = 0,
) -> None:
    """Piece i holds samples stamp0 + i * size and on."""
    for at, i in arrivals:
        line.now_ns = max(line.now_ns, at)
        stamp = stamp0 + i * size
        intake.audio(i, stamp, ramp(stamp % 2**20, size, scale), at)
