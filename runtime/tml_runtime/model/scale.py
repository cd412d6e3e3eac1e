"""Scaling still pictures before they are cut in patches, as the public image processor can.

An option for pictures shown once; live video is taken at the size it comes in.
"""

# Dimension key: N pictures, Y and X height and width.

from __future__ import annotations

import math

import numpy as np


def scaled_size(
    height: int, width: int, factor: float, *, max_long_edge: int = 2048
) -> tuple[int, int]:
    """(height, width) after scaling by `factor`, rounded half up.

    The longer edge grows to `max_long_edge` at most; one that is longer already is not shrunk.

    >>> scaled_size(90, 160, 1.5), scaled_size(1080, 1920, 4.0)
    ((135, 240), (1152, 2048))
    """
    if height < 1 or width < 1:
        raise ValueError(f"height={height}, width={width}: a picture has at least one pixel")
    if not 0.0 < factor < math.inf:
        raise ValueError(f"factor={factor} is not a finite number > 0")
    if max_long_edge < 1:
        raise ValueError(f"max_long_edge={max_long_edge} is not positive")
    long_edge = max(height, width)
    ratio = min(long_edge * factor, max(max_long_edge, long_edge)) / long_edge
    scaled = (math.floor(height * ratio + 0.5), math.floor(width * ratio + 0.5))
    if min(scaled) < 1:
        raise ValueError(f"factor={factor} leaves nothing of {height}x{width} pixels")
    return scaled


def scale_frames(
    frames_N_Y_X_3: np.ndarray, factor: float, *, max_long_edge: int = 2048
) -> np.ndarray:
    """uint8 RGB pictures [N, Y, X, 3] scaled to `scaled_size` with a Lanczos filter; new memory.

    Deterministic. Needs Pillow (ImportError says how to get it). Raises TypeError or ValueError
    naming the argument.

    Source: `InklingImageProcessor` of transformers 5.17 (`rescale_image_frac`,
    `rescale_image_max_upscaled_long_edge`), whose filter is Lanczos.
    """
    frames = frames_N_Y_X_3
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        kind = getattr(frames, "dtype", type(frames).__name__)
        raise TypeError(f"frames_N_Y_X_3: expected a uint8 array, got {kind}")
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames_N_Y_X_3: expected [N, height, width, 3], got {frames.shape}")
    given = frames.shape[1], frames.shape[2]
    height, width = scaled_size(*given, factor, max_long_edge=max_long_edge)
    if (height, width) == given:
        return frames.copy()
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("scaling pictures needs Pillow: pip install pillow") from error
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        picture = Image.fromarray(np.ascontiguousarray(frame))
        out[index] = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    return out
