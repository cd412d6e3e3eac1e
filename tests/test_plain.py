from __future__ import annotations

import pytest
import torch

from tml_kernels._plain import row_blocked_matmul
from tml_kernels.testing import assert_bitwise, assert_matches, randn


@pytest.mark.parametrize(
    ("width", "out_width"),
    [(75, 128), (128, 256), (512, 64), (4096, 96), (33, 2), (33, 11), (7, 1)],
)
def test_a_row_has_the_same_bits_anywhere(width: int, out_width: int) -> None:
    x, weight = randn(37, width), randn(out_width, width)
    together = row_blocked_matmul(x, weight)
    assert_matches(together, x.double() @ weight.double().T)
    alone = torch.cat([row_blocked_matmul(x[t : t + 1], weight) for t in range(37)])
    assert_bitwise(together, alone)
    order = torch.randperm(37)
    assert_bitwise(together[order], row_blocked_matmul(x[order], weight))
    assert_bitwise(together[5:29], row_blocked_matmul(x[5:29], weight))


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 16])
def test_every_row_is_written(num_rows: int) -> None:
    x, weight = randn(num_rows, 32), randn(48, 32)
    out = row_blocked_matmul(x, weight)
    assert out.shape == (num_rows, 48)
    assert out.isfinite().all()


def test_a_nan_row_stays_alone() -> None:
    x, weight = randn(10, 32), randn(48, 32)
    clean = row_blocked_matmul(x, weight)
    x[3] = float("nan")
    out = row_blocked_matmul(x, weight)
    others = [t for t in range(10) if t != 3]
    assert_bitwise(out[others], clean[others])
