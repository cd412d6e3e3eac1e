"""Frames cut into patches: which pixel goes where, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_runtime._tick import cut_patches


def expected_group(frames: np.ndarray, rows: int, columns: int, side: int) -> np.ndarray:
    """The same by padding and transposing, from [frames, H, W, 3]."""
    padded = np.zeros((len(frames), rows * side, columns * side, 3), np.uint8)
    inside = frames[:, : rows * side, : columns * side]
    padded[:, : inside.shape[1], : inside.shape[2]] = inside
    cut = padded.reshape(len(frames), rows, side, columns, side, 3).transpose(1, 3, 0, 2, 4, 5)
    return cut.reshape(rows * columns, len(frames), side, side, 3)


def expected(frames: np.ndarray, length: int, rows: int, columns: int, side: int) -> np.ndarray:
    groups = np.split(frames, len(frames) // length)
    return np.concatenate([expected_group(group, rows, columns, side) for group in groups])


@given(
    num_groups=st.integers(1, 3),
    length=st.integers(1, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    side=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_every_pixel_is_where_transposing_puts_it(
    num_groups: int, length: int, height: int, width: int, rows: int, columns: int, side: int,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (num_groups * length, height, width, 3), dtype=np.uint8)
    out = np.full((num_groups * rows * columns, length, side, side, 3), 77, np.uint8)
    cut_patches(list(frames), columns, out)
    np.testing.assert_array_equal(out, expected(frames, length, rows, columns, side))


def pixels(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("frames", "columns", "out", "words"),
    [
        ([pixels(8, 8, 3)], 2, pixels(4, 2, 4, 4, 3), "frames=1 of a group=2"),
        ([pixels(8, 8, 3)], 2, pixels(4, 0, 4, 4, 3), "of a group=0"),
        ([pixels(8, 8, 3)] * 3, 2, pixels(4, 1, 4, 4, 3), "columns=2 groups=3 patches=4"),
        ([pixels(8, 8, 3)], 3, pixels(4, 1, 4, 4, 3), "columns=3 .*patches=4"),
        ([pixels(8, 8, 3)], 0, pixels(4, 1, 4, 4, 3), "columns=0"),
        ([pixels(8, 8, 3)], 2, pixels(4, 1, 4, 5, 3), "side=4 5"),
        ([pixels(8, 8, 3)], 2, pixels(4, 1, 4, 4, 4), "channels=4"),
        ([pixels(8, 8, 3)], 2, pixels(4, 4, 4, 3), "ndim=4"),
        ([pixels(8, 8, 3)], 2, pixels(8, 1, 4, 4, 3)[::2], "out is not contiguous"),
        ([pixels(8, 8, 4)], 2, pixels(4, 1, 4, 4, 3), "frame: channels=4"),
        ([pixels(8, 16, 3)[:, ::2]], 2, pixels(4, 1, 4, 4, 3), "frame is not contiguous"),
        ([pixels(8, 8)], 2, pixels(4, 1, 4, 4, 3), "frame: expected .*ndim=2"),
        ([pixels(8, 8, 3).view(np.int8)], 2, pixels(4, 1, 4, 4, 3), "frame: expected uint8"),
    ],
)
def test_shapes_that_do_not_go_together(
    frames: list[np.ndarray], columns: int, out: np.ndarray, words: str
) -> None:
    out[...] = 7
    with pytest.raises(ValueError, match=words):
        cut_patches(frames, columns, out)
    assert (out == 7).all()


def test_what_is_read_only_is_not_written() -> None:
    out = pixels(4, 1, 4, 4, 3)
    out.flags.writeable = False
    with pytest.raises((BufferError, ValueError)):
        cut_patches([pixels(8, 8, 3)], 2, out)
