"""What rank 0 tells the others before a tick: words as JSON, then arrays as they are.

>>> unpack(pack({"op": "stop"}, [np.arange(3, dtype=np.int16)]))
({'op': 'stop'}, [array([0, 1, 2], dtype=int16)])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import TickInput

ALIGNMENT = 16


def pack(words: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> np.ndarray:
    """uint8 [bytes]. Floats and integers of the words come back as they were."""
    shapes = [[array.dtype.str, list(array.shape)] for array in arrays]
    head = json.dumps([words, shapes]).encode()
    pieces = [np.array([len(head)], np.int64).tobytes(), head]
    size = 8 + len(head)
    for array in arrays:
        padding = -size % ALIGNMENT
        pieces += [bytes(padding), np.ascontiguousarray(array).tobytes()]
        size += padding + array.nbytes
    return np.frombuffer(b"".join(pieces), np.uint8)


def unpack(message: np.ndarray) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The words and arrays of `pack`, which the caller may write to."""
    end = 8 + int(message[:8].view(np.int64)[0])
    words, shapes = json.loads(message[8:end].tobytes())
    arrays = []
    for dtype, shape in shapes:
        begin = end + -end % ALIGNMENT
        end = begin + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays.append(np.frombuffer(bytearray(message[begin:end]), dtype).reshape(shape))
    return words, arrays


def pack_tick(tick: TickInput, words: dict[str, Any]) -> np.ndarray:
    """The same tick on every rank, with `words` in front of it."""
    arrays = [x.cpu().numpy() for x in (tick.slot_S, tick.pcm_S_W, tick.missing_S)]
    rows = []
    for row, frames in enumerate(tick.frames):
        if frames is not None:
            rows.append(row)
            arrays.append(frames.cpu().numpy() if isinstance(frames, Tensor) else frames)
    text = [[int(token) for token in ids] for ids in tick.text]
    return pack({**words, "text": text, "framed": rows, "rows": len(tick.frames)}, arrays)


def unpack_tick(words: dict[str, Any], arrays: list[np.ndarray], device: torch.device) -> TickInput:
    slot_S, pcm_S_W, missing_S, *pictures = arrays
    frames: list[np.ndarray | None] = [None] * words["rows"]
    for row, picture in zip(words["framed"], pictures, strict=True):
        frames[row] = picture
    return TickInput(
        torch.from_numpy(slot_S).to(device),
        torch.from_numpy(pcm_S_W).to(device),
        torch.from_numpy(missing_S).to(device),
        frames=frames,
        text=words["text"],
    )
