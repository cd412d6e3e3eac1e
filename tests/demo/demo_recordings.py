"""Makes small films for the tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_film(
    path: Path,
    *,
    seconds: float = 2.0,
    fps: int = 25,
    size: tuple[int, int] = (96, 160),
    tone_hz: float | None = None,
) -> Path:
    """An mp4 whose brightness rises from 16 to 216 over its length, left half red, right half blue.

    tone_hz adds a 44.1 kHz stereo sound track.
    """
    height, width = size
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=fps, options={"g": "1"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.bit_rate = 8_000_000
        audio = container.add_stream("aac", rate=44_100, layout="stereo") if tone_hz else None
        count = round(seconds * fps)
        for index in range(count):
            picture = np.zeros((height, width, 3), np.uint8)
            value = 16 + round(200 * index / max(1, count - 1))
            picture[:, : width // 2, 0] = picture[:, width // 2 :, 2] = value
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and tone_hz is not None:
            t = np.arange(round(seconds * 44_100)) / 44_100
            tone = np.tile(0.3 * np.sin(2 * np.pi * tone_hz * t).astype(np.float32), (2, 1))
            sound = av.AudioFrame.from_ndarray(tone, format="fltp", layout="stereo")
            sound.sample_rate, sound.pts = 44_100, 0
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
    return path
