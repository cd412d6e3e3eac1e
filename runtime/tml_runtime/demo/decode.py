"""Files to arrays: 16 kHz mono float32 speech, and small RGB frames at the live frame rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import require
from .media import MediaError

SAMPLE_RATE = 16_000
PATCH = 40  # frames are a whole number of patches in both directions
_SOUNDFILE = {".wav", ".flac", ".ogg"}


@dataclass(frozen=True)
class Clip:
    frames: np.ndarray  # uint8 [n, height, width, 3], RGB
    fps: float

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps


def load_audio(path: Path, *, seconds: float | None = None) -> np.ndarray:
    """Decode to float32 [n] at 16 kHz mono, within [-1, 1]; at most `seconds` of it.

    Channels are averaged. wav, flac and ogg are read by soundfile, the rest (mp3, a film's sound)
    by PyAV, whose resampler also serves other rates. Raises MediaError.
    """
    _check_file(path)
    try:
        if path.suffix.lower() in _SOUNDFILE:
            pcm = _read_soundfile(path, seconds)
        else:
            pcm = _read_av_audio(path, seconds)
    except MediaError:
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("soundfile", "av"):
            raise
        raise MediaError(f"cannot decode sound from {path}: {error}") from error
    if seconds is not None:
        pcm = pcm[: round(seconds * SAMPLE_RATE)]
    if pcm.size == 0:
        raise MediaError(f"{path} holds no sound")
    return np.clip(np.nan_to_num(pcm, nan=0.0), -1.0, 1.0).astype(np.float32)


def load_video(
    path: Path, *, fps: float, size: tuple[int, int], seconds: float | None = None
) -> Clip:
    """Decode to RGB frames of `size` (height, width) at `fps`; at most `seconds` of it.

    Frame k is the one on screen at k / fps. The picture is scaled to cover `size` and its centre
    is cut out, so nothing is distorted. Raises MediaError, ValueError for a size that is not a
    multiple of 40.
    """
    height, width = size
    if height <= 0 or width <= 0 or height % PATCH or width % PATCH:
        raise ValueError(f"video size {height}x{width} is not a multiple of {PATCH} in each axis")
    _check_file(path)
    av = require("av", f"decode {path.name}")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path} has no video stream")
            limit = None if seconds is None else max(1, round(seconds * fps))
            frames = _sample_frames(container, fps, (height, width), limit)
    except av.FFmpegError as error:
        raise MediaError(f"cannot decode video from {path}: {error}") from error
    if not frames:
        raise MediaError(f"{path} holds no video frames")
    return Clip(np.stack(frames), fps)


def has_audio(path: Path) -> bool:
    """Whether a film has a sound track that could stand in for --audio."""
    _check_file(path)
    av = require("av", f"read {path.name}")
    try:
        with av.open(str(path)) as container:
            return bool(container.streams.audio)
    except av.FFmpegError as error:
        raise MediaError(f"cannot read {path}: {error}") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise MediaError(f"no such file: {path}")


def _read_soundfile(path: Path, seconds: float | None) -> np.ndarray:
    soundfile = require("soundfile", f"read {path.name}")
    with soundfile.SoundFile(str(path)) as file:
        count = -1 if seconds is None else round(seconds * file.samplerate)
        pcm = file.read(count, dtype="float32", always_2d=True).mean(axis=1)
        rate = file.samplerate
    return pcm if rate == SAMPLE_RATE else _resample(pcm, rate)


def _read_av_audio(path: Path, seconds: float | None) -> np.ndarray:
    av = require("av", f"decode {path.name}")
    limit = None if seconds is None else round(seconds * SAMPLE_RATE)
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise MediaError(f"{path} has no sound track")
        resampler = _resampler(av)
        pieces = [np.zeros(0, np.float32)]
        count = 0
        for frame in container.decode(audio=0):
            pieces += [out.to_ndarray()[0] for out in resampler.resample(frame)]
            count += frame.samples * SAMPLE_RATE // frame.sample_rate
            if limit is not None and count > limit + SAMPLE_RATE:  # a second for its delay
                break
        pieces += [out.to_ndarray()[0] for out in resampler.resample(None)]
    return np.concatenate(pieces)


def _resample(pcm: np.ndarray, rate: int) -> np.ndarray:
    av = require("av", f"resample {rate} Hz to {SAMPLE_RATE} Hz")
    frame = av.AudioFrame.from_ndarray(pcm[None, :], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = _resampler(av)
    outs = resampler.resample(frame) + resampler.resample(None)
    return np.concatenate([out.to_ndarray()[0] for out in outs] or [np.zeros(0, np.float32)])


def _resampler(av: Any) -> Any:
    return av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)


def _sample_frames(
    container: Any, fps: float, size: tuple[int, int], limit: int | None
) -> list[np.ndarray]:
    frames: list[np.ndarray] = []
    start = time = 0.0
    last: np.ndarray | None = None
    for picture in container.decode(video=0):
        time = float(picture.time or 0.0)
        start = time if last is None else start
        # the picture before stays on screen until this one comes
        while last is not None and len(frames) / fps < time - start - 1e-6:
            frames.append(last)
            if limit is not None and len(frames) >= limit:
                return frames
        last = _cover(picture, size)
    if last is not None and len(frames) / fps <= time - start + 1e-6:
        frames.append(last)
    return frames


def _cover(picture: Any, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    tall, wide = round(picture.height * scale), round(picture.width * scale)
    rgb = picture.reformat(width=wide, height=tall, format="rgb24").to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(rgb[top : top + height, left : left + width])
