from __future__ import annotations

import numpy as np
import pytest

from tml_runtime.model.scale import scale_frames, scaled_size


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        ((90, 160), 1.0, (90, 160)),
        ((90, 160), 1.5, (135, 240)),
        ((3, 5), 1.5, (5, 8)),  # 4.5 and 7.5 go up
        ((1080, 1920), 4.0, (1152, 2048)),  # growth stops at the cap
        ((3000, 1000), 2.0, (3000, 1000)),  # what is over the cap stays
        ((3000, 1000), 0.5, (1500, 500)),
    ],
)
def test_size(size: tuple[int, int], factor: float, expected: tuple[int, int]) -> None:
    assert scaled_size(*size, factor) == expected


def test_filter_is_lanczos_on_each_picture_alone() -> None:
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 31, 3), np.uint8)
    out = scale_frames(frames, 2.0)
    assert out.shape == (3, 40, 62, 3)
    for frame, scaled in zip(frames, out, strict=True):
        expected = Image.fromarray(frame).resize((62, 40), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(scaled, np.asarray(expected))


def test_nothing_to_do_is_a_copy() -> None:
    frames = np.full((1, 40, 40, 3), 7, np.uint8)
    out = scale_frames(frames, 1.0)
    np.testing.assert_array_equal(out, frames)
    assert not np.shares_memory(out, frames)
    assert scale_frames(frames[:0], 2.0).shape == (0, 80, 80, 3)


@pytest.mark.parametrize(
    ("frames", "factor", "error", "words"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), 2.0, TypeError, "float32"),
        ([[0]], 2.0, TypeError, "list"),
        (np.zeros((4, 4, 3), np.uint8), 2.0, ValueError, r"\(4, 4, 3\)"),
        (np.zeros((1, 0, 4, 3), np.uint8), 2.0, ValueError, "height=0"),
        (np.zeros((1, 4, 4, 3), np.uint8), 0.0, ValueError, "factor=0.0"),
        (np.zeros((1, 4, 4, 3), np.uint8), float("nan"), ValueError, "factor=nan"),
        (np.zeros((1, 4, 4, 3), np.uint8), 0.01, ValueError, "leaves nothing"),
    ],
)
def test_bad_input(frames, factor: float, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        scale_frames(frames, factor)
