"""Speech made a little longer or shorter, without a step where it joins what was heard before."""

from __future__ import annotations

import numpy as np

MIN_PERIOD_MS, MAX_PERIOD_MS = 2.5, 15.0  # voices from 67 to 400 Hz
TEMPLATE_MS = 10.0  # compared at every period, half on each side of the joint


def resample(pcm: np.ndarray, num_samples: int) -> np.ndarray:
    """`pcm` on another number of samples; its first and last stay what they are. Linear."""
    at = np.linspace(0.0, len(pcm) - 1.0, num_samples)
    return np.interp(at, np.arange(len(pcm)), pcm).astype(np.float32)


def extra_period(
    before: np.ndarray, after: np.ndarray, max_samples: int, sample_rate: int
) -> np.ndarray:
    """At most `max_samples` that may be heard between `before` and `after`, which follows it.

    It is one more period of the voice, after WebRTC's preemptive expansion: begins as `after` does
    and ends as `before` does. Empty when there is room or sound for none. `before` has to be
    MAX_PERIOD_MS and half a template long.
    """
    least, most, half = (
        round(ms * sample_rate / 1000) for ms in (MIN_PERIOD_MS, MAX_PERIOD_MS, TEMPLATE_MS / 2)
    )
    most = min(most, max_samples, len(after))
    if most < least or len(after) < half or len(before) < most + half:
        return np.empty(0, np.float32)
    line = np.concatenate([before[-(most + half) :], after[:half]]).astype(np.float64)
    template = line[most:]  # around the joint
    earlier = line[: len(line) - least]  # the same, `most` to `least` samples before
    likeness = np.correlate(earlier, template, "valid")
    power = np.convolve(np.square(earlier), np.ones(2 * half), "valid")
    period = most - int(np.argmax(likeness / np.sqrt(power + 1e-9)))
    fade = (np.arange(period, dtype=np.float32) + 0.5) / period
    return after[:period] * (1.0 - fade) + before[-period:] * fade
