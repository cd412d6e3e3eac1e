"""Pictures of a client, made fit for the model. Runs in the service's few decoding threads.

A JPEG is scaled down, never up, until a tick can take it, and padded with black on the right and
below to whole patches. A raw frame is taken as it is, and so must be whole patches already.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np

from .._optional import require
from ..checks import FrameGrid
from .protocol import ErrorCode, Media, ProtocolError

MAX_PIXELS = 4_194_304  # of a JPEG: 2048 x 2048
# A picture has one scan, or about ten when it is progressive. Each is a pass over all pixels, so
# that a small file of very many would take minutes to decode.
MAX_SCANS = 32
_SCAN = b"\xff\xda"  # never inside a scan's data, where 0xFF is followed by 0


def decode_jpeg(data: bytes | memoryview, grid: FrameGrid) -> np.ndarray:
    """uint8 [H, W, 3], whole patches, no more than `grid` takes. Raises ProtocolError.

    Size and scans are looked at before anything is decoded.
    """
    image_module = require("PIL.Image", "decode JPEG frames", extra="serve")
    data = bytes(data)
    if data.count(_SCAN) > MAX_SCANS:
        raise _bad(f"more than {MAX_SCANS} scans")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            image = image_module.open(io.BytesIO(data), formats=("JPEG",))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _bad(f"{width}x{height} is more than {MAX_PIXELS} pixels")
            return _fitted(image, grid)
    except ProtocolError:
        raise
    except Exception as error:  # a decoder fed with anything may raise anything
        raise _bad(f"no JPEG that can be decoded: {error!s:.100}") from None


def raw_frame(media: Media, grid: FrameGrid) -> np.ndarray:
    """uint8 [H, W, 3], a view of the message. Raises ProtocolError."""
    if media.width % grid.patch or media.height % grid.patch:
        raise _bad(
            f"raw, {media.width}x{media.height}: width and height must be multiples of {grid.patch}"
        )
    tokens = grid.tokens(media.height, media.width)
    if tokens > grid.max_tokens:
        raise _bad(
            f"{media.width}x{media.height} is {tokens} tokens, and a tick takes {grid.max_tokens}"
        )
    return np.frombuffer(media.payload, np.uint8).reshape(media.height, media.width, 3)


def fitted_size(width: int, height: int, grid: FrameGrid) -> tuple[int, int]:
    """Width and height to scale a picture to, so that padded to whole patches a tick takes it.

    >>> fitted_size(1280, 720, FrameGrid(patch=40, extra_columns=0, max_tokens=256))
    (840, 472)
    """
    scale = 1.0
    while True:
        scaled = max(1, int(width * scale)), max(1, int(height * scale))
        tokens = grid.tokens(_padded(scaled[1], grid.patch), _padded(scaled[0], grid.patch))
        if tokens <= grid.max_tokens:
            return scaled
        scale *= min(0.99, math.sqrt(grid.max_tokens / tokens))


def _fitted(image: Any, grid: FrameGrid) -> np.ndarray:
    width, height = image.size
    width, height = fitted_size(width, height, grid)
    image.draft("RGB", (width, height))  # decodes an eighth, quarter or half if that is enough
    image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height))
    frame = np.zeros((_padded(height, grid.patch), _padded(width, grid.patch), 3), np.uint8)
    frame[:height, :width] = np.asarray(image)
    return frame


def _padded(size: int, patch: int) -> int:
    return -(-size // patch) * patch


def _bad(message: str) -> ProtocolError:
    return ProtocolError(message, field="payload", code=ErrorCode.BAD_FRAME)
