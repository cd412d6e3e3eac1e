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
from ..model.replay import PastTick

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
    arrays = [x.numpy() for x in (tick.slot_S, tick.pcm_S_W, tick.missing_S)]
    rows = []
    for row, frames in enumerate(tick.frames):
        if frames is not None:
            rows.append(row)
            arrays.append(frames.cpu().numpy() if isinstance(frames, Tensor) else frames)
    text = [_ids(ids) for ids in tick.text]
    return pack({**words, "text": text, "framed": rows, "rows": len(tick.frames)}, arrays)


def unpack_tick(words: dict[str, Any], arrays: list[np.ndarray]) -> TickInput:
    slot_S, pcm_S_W, missing_S, *pictures = arrays
    frames: list[np.ndarray | None] = [None] * words["rows"]
    for row, picture in zip(words["framed"], pictures, strict=True):
        frames[row] = picture
    return TickInput(
        torch.from_numpy(slot_S),
        torch.from_numpy(pcm_S_W),
        torch.from_numpy(missing_S),
        frames=frames,
        text=words["text"],
    )


def pack_past(past: Sequence[PastTick]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Words and arrays of ticks that are to be replayed."""
    words, arrays = [], []
    for tick in past:
        framed = tick.frames is not None
        words.append({"missing": bool(tick.missing), "text": _ids(tick.text), "framed": framed})
        arrays += [tick.pcm_W, tick.token_K, tick.mel_M_B, *([tick.frames] if framed else [])]
    return words, arrays


def unpack_past(words: list[dict[str, Any]], arrays: list[np.ndarray]) -> list[PastTick]:
    given, past = iter(arrays), []
    for tick in words:
        pcm_W, token_K, mel_M_B = next(given), next(given), next(given)
        frames = next(given) if tick["framed"] else None
        past.append(PastTick(pcm_W, tick["missing"], frames, tick["text"], token_K, mel_M_B))
    return past


def _ids(ids: Sequence[int]) -> list[int]:
    """As JSON takes them."""
    return [int(token) for token in ids]
