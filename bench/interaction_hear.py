"""When the model is heard, and when a cue begins.

The model's own speech is found by loudness: nothing else is in it, and it is no human voice. Its
syllables are sung tones, of which Silero's network, which finds the user's, hears a few.
"""

# Dimension key: N samples, F frames of 20 ms, W samples of a frame.

from __future__ import annotations

import numpy as np

from .interaction_metrics import Span, merge

FRAME_S = 0.02
THRESHOLD = 0.01  # root mean square of a frame: -40 dB of full scale
BRIDGE_S = 0.1  # pauses within speech, as Silero's min_silence_duration_ms
TONE_SHARE = 0.5  # of a tone's loudest frame: it has begun
WHITE = 200  # mean of a frame's pixels that is a flash


def segments(pcm_N: np.ndarray, sample_rate: int) -> list[Span]:
    """Stretches of loud frames in seconds; pauses up to BRIDGE_S are part of one."""
    size = round(FRAME_S * sample_rate)
    frames_F_W = pcm_N[: len(pcm_N) // size * size].reshape(-1, size).astype(np.float64)
    loud_F = np.sqrt(np.mean(frames_F_W**2, axis=1)) > THRESHOLD
    edges = np.diff(np.concatenate([[False], loud_F, [False]]).astype(int))
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    spans = zip((begins * FRAME_S).tolist(), (ends * FRAME_S).tolist(), strict=True)
    return merge(spans, BRIDGE_S)


def first_sound(pcm_N: np.ndarray, sample_rate: int, begin_s: float, end_s: float) -> float | None:
    """When the first sample above THRESHOLD between the two times is heard."""
    first = max(0, round(begin_s * sample_rate))
    loud = np.flatnonzero(np.abs(pcm_N[first : round(end_s * sample_rate)]) > THRESHOLD)
    return None if len(loud) == 0 else (first + int(loud[0])) / sample_rate


def tone_begin(pcm_N: np.ndarray, sample_rate: int, hz: float) -> float:
    """When a tone of about `hz` begins in samples that hold one, to 10 ms, whatever else is heard.

    By the share of that frequency in frames of 10 ms."""
    size = sample_rate // 100
    whole_F_W = pcm_N[: len(pcm_N) // size * size].reshape(-1, size)
    wave_W = np.exp(-2j * np.pi * hz / sample_rate * np.arange(size))
    level_F = np.abs(whole_F_W @ wave_W)
    return int(np.argmax(level_F >= TONE_SHARE * level_F.max())) * size / sample_rate


def flash_frame(frames_2_Y_Y_3: np.ndarray) -> int:
    """Which of a tick's two frames is white first; 0 if none is."""
    return int(np.argmax(frames_2_Y_Y_3.mean(axis=(1, 2, 3)) >= WHITE))
