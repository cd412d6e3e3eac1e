"""What rank 0 sends arrives as it was, whatever its size."""

from __future__ import annotations

from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from crew import Crew, Raised, values
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime.model import TickInput
from tml_runtime.model.replay import PastTick
from tml_runtime.parallel.message import (
    pack,
    pack_past,
    pack_tick,
    unpack,
    unpack_past,
    unpack_tick,
)

WORDS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
DTYPES = (np.uint8, np.bool_, np.int32, np.int64, np.float32)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.text(max_size=5), WORDS, max_size=4),
    st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES, st.integers(0, 9)), max_size=4),
)
def test_words_and_arrays_come_back(words: dict, drawn: list) -> None:
    arrays = [np.random.default_rng(s).integers(0, 2, shape).astype(d) for d, shape, s in drawn]
    same_words, same_arrays = unpack(pack(words, arrays))
    assert same_words == words
    assert len(same_arrays) == len(arrays)
    for ours, theirs in zip(same_arrays, arrays, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
        ours.reshape(-1)[:1] = 1  # torch wants arrays it may write to


@pytest.mark.parametrize("slots", [[0], [2, -1, 0], [-1]])
def test_ticks_come_back(slots: list[int]) -> None:
    tick = jobs.tick_of(1, slots)
    words, arrays = unpack(pack_tick(tick, {"op": "tick"}))
    same = unpack_tick(words, arrays)
    assert words["op"] == "tick"
    for name in ("slot_S", "pcm_S_W", "missing_S"):
        assert torch.equal(getattr(same, name), getattr(tick, name))
    assert list(same.text) == list(tick.text)
    for ours, theirs in zip(same.frames, tick.frames, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)


def test_a_tick_without_pictures_or_text_comes_back() -> None:
    whole = jobs.tick_of(0, [0, 1])
    bare = TickInput(whole.slot_S, whole.pcm_S_W, whole.missing_S)
    same = unpack_tick(*unpack(pack_tick(bare, {})))
    assert (len(same.frames), len(same.text)) == (0, 0)


def test_frames_that_lie_apart_come_back_in_one_piece() -> None:
    whole, frames = jobs.tick_of(0, [0]), np.random.default_rng(0).integers(0, 9, (2, 2, 8, 16, 3))
    frames = frames.astype(np.uint8)
    apart = [[frame[:, ::-1][:, ::-1] for frame in group] for group in frames]
    tick = TickInput(whole.slot_S, whole.pcm_S_W, whole.missing_S, [apart])
    same = unpack_tick(*unpack(pack_tick(tick, {})))
    np.testing.assert_array_equal(same.frames[0], frames)
    past = PastTick(np.zeros(8, np.float32), False, apart, [], np.zeros(4), np.zeros((4, 3)))
    words, arrays = pack_past([past])
    words, arrays = unpack(pack({"past": words}, arrays))
    np.testing.assert_array_equal(unpack_past(words["past"], arrays)[0].frames, frames)


def test_past_ticks_come_back() -> None:
    dice = np.random.default_rng(0)
    past = [
        PastTick(
            dice.standard_normal(8).astype(np.float32),
            bool(n),
            dice.integers(0, 9, (1, 2, 8, 8, 3), dtype=np.uint8) if n else None,
            [n] * n,
            np.arange(4, dtype=np.int32),
            dice.standard_normal((4, 3)).astype(np.float32),
        )
        for n in range(3)
    ]
    words, arrays = pack_past(past)
    words, arrays = unpack(pack({"past": words}, arrays))
    for ours, theirs in zip(unpack_past(words["past"], arrays), past, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x, y)


def test_messages_of_every_size_arrive(crew: Crew, tmp_path: Path) -> None:
    """None at all, to the byte at the block's end, longer than it may ever grow, and short again;
    one broadcast once the block has grown."""
    (crc, sent), *others = values(crew.run(3, jobs.broadcasts, tmp_path))
    assert all(other == (crc, sent) for other in others)
    assert sent == [1, 1, 1, 2, 1, 2, 1, 2, 2, 1]


def test_a_job_that_the_ranks_do_not_divide_is_refused(crew: Crew, tmp_path: Path) -> None:
    for result in crew.run(3, jobs.two_models, tmp_path):
        assert isinstance(result, Raised) and result.kind == "InputValueError"
        assert "tensor=2 does not divide the 3 ranks" in result.message
