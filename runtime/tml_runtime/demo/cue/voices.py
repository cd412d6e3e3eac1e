"""Voices that nobody has: vowels and hisses in a row, of which training can have any amount.

A recording of half a minute has one or two people's vowels in it; whoever has heard only these
takes another one's for a tone.
"""

from __future__ import annotations

import numpy as np

from ..decode import SAMPLE_RATE

HIGHEST_HZ = 4000.0
FORMANTS_HZ = ((250.0, 1150.0), (700.0, 2500.0), (2200.0, 3500.0))


def made_voices(seconds: float, seed: int = 0) -> np.ndarray:
    """float32 [seconds * 16000] of syllables with pauses; every few seconds another one talks."""
    rng = np.random.default_rng(seed)
    pcm = np.zeros(round(seconds * SAMPLE_RATE))
    at = 0
    while at < len(pcm):
        pitch_hz, reach = 90 * 3.5 ** rng.random(), rng.uniform(0.85, 1.2)
        end = at + int(rng.uniform(2, 6) * SAMPLE_RATE)
        while at < min(end, len(pcm)):
            count = int(rng.uniform(0.06, 0.35) * SAMPLE_RATE)
            hisses = rng.random() < 0.2
            part = _hiss(rng, count) if hisses else _vowel(rng, count, pitch_hz, reach)
            edge_s = np.minimum(np.arange(count), np.arange(count)[::-1]) / SAMPLE_RATE
            part *= np.clip(edge_s / rng.uniform(0.005, 0.05), 0, 1) * 4 ** rng.uniform(-1, 0)
            pcm[at : at + count] += part[: len(pcm) - at]
            pause_s = rng.uniform(0.2, 0.7) if rng.random() < 0.15 else rng.uniform(0, 0.08)
            at += count + int(pause_s * SAMPLE_RATE)
    return (0.1 * pcm).astype(np.float32)


def _vowel(rng: np.random.Generator, count: int, pitch_hz: float, reach: float) -> np.ndarray:
    """Harmonics under three formants, all of which move. reach: of the formants, by which people
    differ."""
    way = np.linspace(0, 1, count)
    bend = 1 + rng.uniform(-0.2, 0.2, 3)
    hz = pitch_hz * np.interp(way, (0, 0.5, 1), bend)
    turns = np.cumsum(hz) / SAMPLE_RATE
    numbers = np.arange(1, max(2, int(HIGHEST_HZ / hz.max()) + 1))
    gain = np.full((len(numbers), count), 0.01)
    for (least, most), loud in zip(FORMANTS_HZ, (1.0, 0.6, 0.25), strict=True):
        ends = reach * rng.uniform(least, most, 2)
        centre = ends[0] + way * (ends[1] - ends[0])
        width = rng.uniform(40, 140)
        gain += loud / (1 + ((numbers[:, None] * hz - centre) / width) ** 2)
    wave = np.sin(2 * np.pi * (numbers[:, None] * turns + rng.random((len(numbers), 1))))
    wave = (gain * wave).sum(0)
    return wave / np.sqrt(np.mean(wave**2))


def _hiss(rng: np.random.Generator, count: int) -> np.ndarray:
    noise = rng.standard_normal(count + 1)
    return 0.4 * (noise[1:] - rng.uniform(0.5, 1.0) * noise[:-1])
