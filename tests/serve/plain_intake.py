"""The thinnest intake: media go straight to their place on the media clock."""

from __future__ import annotations

import numpy as np

from tml_runtime import Session
from tml_runtime.errors import LateInput

MARGIN_S = 0.1  # how far ahead of the oldest open window the first sample is put


class PlainIntake:
    def __init__(self, session: Session, sample_rate: int = 16_000) -> None:
        self._session = session
        self._rate = sample_rate
        self._offset_s: float | None = None
        self.counts = {"audio": 0, "video": 0, "text": 0, "late": 0}

    def audio(self, seq: int, stamp: int, pcm: np.ndarray, arrived_ns: int) -> None:
        self.counts["audio"] += 1
        try:
            self._session.push_audio(pcm, self._place(stamp))
        except LateInput:
            self.counts["late"] += 1
            self._offset_s = None

    def video(self, seq: int, stamp: int, frame: np.ndarray, arrived_ns: int) -> None:
        self.counts["video"] += 1
        try:
            self._session.push_video(frame, self._place(stamp))
        except LateInput:
            self.counts["late"] += 1

    def text(self, text: str) -> None:
        self.counts["text"] += 1
        self._session.push_text(text)

    def poll(self) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return dict(self.counts)

    def _place(self, stamp: int) -> float:
        if self._offset_s is None:
            self._offset_s = self._session.open_t + MARGIN_S - stamp / self._rate
        return self._offset_s + stamp / self._rate
