"""Whether a piece of sound is silence, next to a noise floor that follows the room."""

from __future__ import annotations

import math

import numpy as np

LOUDEST_DB = -30.0  # of full scale; louder is never silence, however steady
QUIETEST_DB = -60.0  # softer always is
ABOVE_FLOOR_DB = 6.0
FLOOR_RISES = 1.0  # dB per second


class SilenceDetector:
    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._floor_db = LOUDEST_DB

    def is_silent(self, pcm: np.ndarray) -> bool:
        """Mono float samples in the order in which they were captured; at least one."""
        power = float(np.dot(pcm, pcm)) / len(pcm)
        level_db = 10.0 * math.log10(power + 1e-10)
        risen_db = self._floor_db + FLOOR_RISES * len(pcm) / self._sample_rate
        self._floor_db = min(level_db, risen_db)
        return level_db <= min(LOUDEST_DB, max(QUIETEST_DB, self._floor_db + ABOVE_FLOOR_DB))
