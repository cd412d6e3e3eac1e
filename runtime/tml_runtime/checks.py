"""What a client may hand in. Each function returns its argument in the runtime's own form or raises
an error that names the value; none has a side effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import InputTypeError, InputValueError

MAX_TEMPERATURE = 1e6  # any distribution is flat long before


@dataclass(frozen=True)
class FrameGrid:
    """How frames become tokens: two frames and one patch are one."""

    patch: int  # rows and columns of pixels
    extra_columns: int  # padded columns of patches, 0 or 1
    max_tokens: int  # per session and tick

    def tokens(self, height: int, width: int) -> int:
        """Of a pair of frames."""
        return (height // self.patch) * (width // self.patch + self.extra_columns)

    @property
    def max_bytes(self) -> int:
        """Of the largest frame; a tick's pairs together have at most twice as many."""
        return self.max_tokens * self.patch * self.patch * 3


def checked_time(t: float) -> float:
    """Media time in seconds, finite. Whether it is too early or too late is another question."""
    if isinstance(t, bool) or not isinstance(t, (int, float, np.integer, np.floating)):
        raise InputTypeError(f"t: expected seconds as a number, got {t!r}")
    try:
        seconds = float(t)
    except OverflowError:  # an int beyond all floats
        seconds = math.inf
    if not math.isfinite(seconds):
        raise InputValueError(f"t: expected a finite number of seconds, got {seconds}")
    return seconds


def whole(t: float, per_second: int) -> int:
    """A finite time in samples or ns; also one so large that the product is infinite."""
    exact = t * per_second
    return round(exact) if math.isfinite(exact) else round(t) * per_second


def checked_rate(sample_rate: int | None, expected: int) -> None:
    if sample_rate is not None and sample_rate != expected:
        raise InputValueError(
            f"sample_rate={sample_rate}, but the model hears {expected} Hz: resample before pushing"
        )


def checked_pcm(pcm: np.ndarray) -> np.ndarray:
    """Mono float32, finite; int16 is divided by 32768. Samples beyond [-1, 1] pass as they are.

    May return `pcm` itself.
    """
    if not isinstance(pcm, np.ndarray):
        raise InputTypeError(f"pcm: expected a numpy array, got {type(pcm).__name__}")
    if pcm.dtype not in (np.float32, np.int16):
        raise InputTypeError(f"pcm: expected float32 or int16 samples, got {pcm.dtype}")
    if pcm.ndim != 1:
        raise InputValueError(f"pcm: expected mono samples [n], got shape {pcm.shape}")
    if pcm.dtype == np.int16:
        return pcm.astype(np.float32) / np.float32(32768)
    finite = np.isfinite(pcm)
    if not finite.all():
        at = int(np.argmin(finite))
        raise InputValueError(f"pcm: sample {at} of {len(pcm)} is {pcm[at]}")
    return pcm


def checked_frame(frame: np.ndarray, grid: FrameGrid) -> np.ndarray:
    """A uint8 RGB frame [H, W, 3] that the grid cuts into whole patches, not too many of them."""
    if not isinstance(frame, np.ndarray):
        raise InputTypeError(f"frame: expected a numpy array, got {type(frame).__name__}")
    if frame.dtype != np.uint8:
        raise InputTypeError(f"frame: expected uint8, got {frame.dtype}")
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise InputValueError(f"frame: expected [height, width, 3], got shape {frame.shape}")
    height, width, _ = frame.shape
    if height == 0 or width == 0 or height % grid.patch or width % grid.patch:
        raise InputValueError(
            f"frame: height {height} and width {width} must be positive multiples of {grid.patch}: "
            "resize or pad it"
        )
    tokens = grid.tokens(height, width)
    if tokens > grid.max_tokens:
        raise InputValueError(
            f"frame: {height}x{width} is {tokens} tokens and a tick takes {grid.max_tokens}: "
            "resize it"
        )
    return frame


def checked_ids(ids: Sequence[int] | np.ndarray, num_valid: int) -> np.ndarray:
    """Token ids of the vocabulary, int32."""
    if isinstance(ids, (bytes, bytearray, memoryview)):
        raise InputTypeError(f"text: expected str or token ids, got {type(ids).__name__}")
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        checked, wrong = ids, ids[(ids < 0) | (ids >= num_valid)]
    else:
        try:
            checked = [_checked_id(token) for token in ids]
        except TypeError:
            raise InputTypeError(f"text: expected str or token ids, got {ids!r:.80}") from None
        wrong = [token for token in checked if not 0 <= token < num_valid]
    if len(wrong) > 0:
        raise InputValueError(f"text: id {wrong[0]} is not in 0..{num_valid - 1}")
    return np.array(checked, np.int32)


def _checked_id(token: int) -> int:
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
        raise TypeError
    return int(token)


@dataclass(frozen=True)
class Sampling:
    """How a session's tokens and speech are drawn."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            if type(getattr(self, name)) is not int:
                raise InputTypeError(f"{name}={getattr(self, name)!r}: expected an int")
        for name in ("temperature", "top_p", "min_p"):
            if type(getattr(self, name)) not in (int, float):
                raise InputTypeError(f"{name}={getattr(self, name)!r}: expected a float")
        if not 0.0 <= self.temperature <= MAX_TEMPERATURE:
            raise InputValueError(
                f"temperature={_shown(self.temperature)} is not in 0..{MAX_TEMPERATURE:g}"
            )
        if not 0 <= self.top_k < 2**31:
            raise InputValueError(f"top_k={self.top_k} is not in 0..2**31-1 (0: off)")
        if not 0.0 < self.top_p <= 1.0:
            raise InputValueError(f"top_p={self.top_p} is not in (0, 1] (1: off)")
        if not 0.0 <= self.min_p <= 1.0:
            raise InputValueError(f"min_p={self.min_p} is not in 0..1 (0: off)")
        if not -(2**63) <= self.seed < 2**63:
            raise InputValueError(f"seed={self.seed} does not fit 64 bits")


def _shown(number: float) -> str:
    """An int may have more digits than anybody wants to read, or Python to write."""
    return "(above 1e300)" if number > 1e300 else str(number)
