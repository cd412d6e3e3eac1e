"""What rank 0 tells the others before a tick: words as JSON, then arrays as they are.

>>> unpack(pack({"op": "stop"}, [np.arange(3, dtype=np.int16)]))
({'op': 'stop'}, [array([0, 1, 2], dtype=int16)])
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import TickInput
from ..model.replay import PastTick
from ..model.tick_input import Frames, Groups

ALIGNMENT = 16


def pack(words: dict[str, Any], arrays: Sequence[np.ndarray | Groups] = ()) -> np.ndarray:
    """uint8 [bytes]. Floats and integers of the words come back as they were, groups of frames as
    one array."""
    shapes = [_dtype_and_shape(array) for array in arrays]
    head = json.dumps([words, shapes]).encode()
    places, size = _places(shapes, 8 + len(head))
    message = np.zeros(size, np.uint8)
    message[:8] = np.array([len(head)], np.int64).view(np.uint8)
    message[8 : 8 + len(head)] = np.frombuffer(head, np.uint8)
    for array, place, (dtype, shape) in zip(arrays, places, shapes, strict=True):
        _fill(message[place].view(dtype).reshape(shape), array)
    return message


def unpack(message: np.ndarray) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The words and arrays of `pack`; these are views of the message."""
    end = 8 + int(message[:8].view(np.int64)[0])
    words, shapes = json.loads(message[8:end].tobytes())
    places, _ = _places(shapes, end)
    arrays = [
        message[place].view(dtype).reshape(shape)
        for place, (dtype, shape) in zip(places, shapes, strict=True)
    ]
    return words, arrays


def pack_tick(tick: TickInput, words: dict[str, Any]) -> np.ndarray:
    """The same tick on every rank, with `words` in front of it."""
    arrays: list[np.ndarray | Groups] = [
        x.numpy() for x in (tick.slot_S, tick.pcm_S_W, tick.missing_S)
    ]
    rows = []
    for row, frames in enumerate(tick.frames):
        if frames is not None:
            rows.append(row)
            arrays.append(_on_host(frames))
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


def pack_past(
    past: Sequence[PastTick],
) -> tuple[list[dict[str, Any]], list[np.ndarray | Groups]]:
    """Words and arrays of ticks that are to be replayed."""
    words: list[dict[str, Any]] = []
    arrays: list[np.ndarray | Groups] = []
    for tick in past:
        frames = [] if tick.frames is None else [_on_host(tick.frames)]
        missing, framed = bool(tick.missing), len(frames) > 0
        words.append({"missing": missing, "text": _ids(tick.text), "framed": framed})
        arrays += [tick.pcm_W, tick.token_K, tick.mel_M_B, *frames]
    return words, arrays


def unpack_past(words: list[dict[str, Any]], arrays: list[np.ndarray]) -> list[PastTick]:
    given, past = iter(arrays), []
    for tick in words:
        pcm_W, token_K, mel_M_B = next(given), next(given), next(given)
        frames = next(given) if tick["framed"] else None
        past.append(PastTick(pcm_W, tick["missing"], frames, tick["text"], token_K, mel_M_B))
    return past


def _on_host(frames: Frames) -> np.ndarray | Groups:
    return frames.cpu().numpy() if isinstance(frames, Tensor) else frames


def _dtype_and_shape(array: np.ndarray | Groups) -> tuple[str, list[int]]:
    if isinstance(array, np.ndarray):
        return array.dtype.str, list(array.shape)
    first = array[0][0]
    return first.dtype.str, [len(array), len(array[0]), *first.shape]


def _places(shapes: Sequence[tuple[str, list[int]]], begin: int) -> tuple[list[slice], int]:
    """Where arrays lie behind byte `begin`, and where the last one ends."""
    places = []
    for dtype, shape in shapes:
        begin += -begin % ALIGNMENT
        places.append(slice(begin, begin + np.dtype(dtype).itemsize * math.prod(shape)))
        begin = places[-1].stop
    return places, begin


def _fill(to: np.ndarray, source: np.ndarray | Groups) -> None:
    if isinstance(source, np.ndarray):
        to[...] = source
        return
    for group, frames in zip(to, source, strict=True):
        for place, frame_H_W_3 in zip(group, frames, strict=True):
            place[...] = frame_H_W_3


def _ids(ids: Sequence[int]) -> list[int]:
    """As JSON takes them."""
    return [int(token) for token in ids]
